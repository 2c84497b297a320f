"""A part of the two corpora by three senders that share no code with us, fetched back by a fourth: identical, or
refused with the expected reason and the same bytes in the quarantine. All of it: `scripts/bench corpora`,
docs/corpora.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pydicom
import pytest

from edge.imaging.read import describe
from scripts.lab import corpora
from scripts.lab.corpora import FETCHED, KEPT, Fate, Item
from scripts.lab.expected import REFUSED, allowed, became, departure
from scripts.lab.senders import FELL, NO_CONTEXT, NOT_SENT, OrthancSender, Sender, Web, by_dicom, storescu
from scripts.lab.tap import Tap
from shared.errors import PeerError
from tests.simulators.dicomweb import DicomWebNode
from tests.simulators.node import make_door
from tests.simulators.real_data import DATA, needs_data

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom warns of what it puts right
_UNSENT = {NOT_SENT, FELL, NO_CONTEXT}


@dataclass
class Room:
    """A node's two doors over one spool; no pipeline."""

    tap: Tap
    state: Path
    web: Web

    def send(self, items: list[Item], sender: Sender) -> list[Fate]:
        return corpora.send_all(items, sender, self.state, self.web)


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Room]:
    node = DicomWebNode(tmp_path).start()
    door = make_door(node.spool)
    tap = Tap(door.port)
    yield Room(tap, tmp_path, Web(node.url, node.token("ada", "administrator"), tmp_path))
    tap.close()
    door.stop()
    node.stop()


def sample(each: int) -> list[Item]:
    """Some files of every category, spread over it; six times as many of the large ones."""
    by_category: dict[str, list[Item]] = {}
    for item in corpora.corpus(DATA):
        by_category.setdefault(item.category, []).append(item)
    found = []
    for items in by_category.values():
        count = min(len(items), 6 * each if len(items) > 60 else each)
        found += [items[number * len(items) // count] for number in range(count)]
    return found


def quarantined(state: Path, fate: Fate) -> bool:
    """Tells whether the pipeline, which does not run here, would quarantine an object for its header."""
    file = state / "spool" / f"{fate.digest}.dcm"
    if not file.exists():
        return False
    try:
        describe(pydicom.dcmread(file, stop_before_pixels=True, force=True))
    except PeerError:
        return True
    return False


def judged(room: Room, fates: list[Fate]) -> Counter[str]:
    """Counts outcomes, all of them expected."""
    bad = {}
    work = {fate.digest: "quarantined" for fate in fates if quarantined(room.state, fate)}
    for fate in fates:
        outcome = became(fate, work)
        if outcome not in allowed(fate.item) | _UNSENT and departure(fate.item, outcome) is None:
            bad[fate.item.path.name] = (outcome, fate.item.expected, fate.reason)
    assert bad == {}
    assert max(fate.answer_s for fate in fates) < corpora.BOUND_S
    return Counter(fate.outcome for fate in fates)


@needs_data
def test_storescu_sends_some_of_every_category(room: Room) -> None:
    items = sample(each=2)
    found = judged(room, room.send(items, by_dicom(room.tap, storescu)))
    assert found[FETCHED] > len(items) * 0.5


@needs_data
def test_orthanc_sends_some_of_every_category(room: Room) -> None:
    items = sample(each=1)
    sender = OrthancSender(room.state / "orthanc", room.tap.port)
    try:
        found = judged(room, room.send(items, by_dicom(room.tap, sender.send)))
    finally:
        sender.close()
    assert found[FETCHED] > len(items) * 0.4


@needs_data
def test_curl_sends_any_bytes(room: Room) -> None:
    items = sample(each=1) + [item for item in corpora.corpus(DATA) if "named_dcm" in item.path.name]
    found = judged(room, room.send(items, room.web.curl))
    assert found[FETCHED] > len(items) * 0.4
    assert found["not_dicom"] >= 4
    assert sum(found[one] for one in (*KEPT, *REFUSED)) == len(items)  # nothing was kept back


@needs_data
def test_wget_sends_what_no_dicom_sender_takes(room: Room) -> None:
    items = [item for item in corpora.corpus(DATA) if "named_dcm" in item.path.name or "dev_trunc" in item.path.name]
    assert set(judged(room, room.send(items, room.web.wget))) == {"not_dicom", "cut"}


@needs_data
def test_bytes_that_change_behind_the_nodes_back_are_seen(room: Room) -> None:
    """The comparison itself: one byte of a file in the spool, then one in the quarantine."""
    real = next(item for item in corpora.corpus(DATA) if item.category == "dicom: series")
    text = next(item for item in corpora.corpus(DATA) if item.path.name == "dev_text_named_dcm.dcm")
    for item, folder, before in ((real, "spool", FETCHED), (text, "quarantine", "not_dicom")):
        sent = room.web.curl(item.path)
        (file,) = (room.state / folder).glob("*.dcm")
        assert corpora.look(item, sent, room.state, room.web).outcome == before
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        assert corpora.look(item, sent, room.state, room.web).outcome == corpora.LOST


@needs_data
def test_every_note_of_the_manifest_has_a_meaning() -> None:
    assert all(allowed(item) for item in corpora.corpus(DATA))
