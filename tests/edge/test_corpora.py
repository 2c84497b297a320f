"""A part of the two corpora, by two senders that share no code with us: identical in the spool, or refused with a
reason. All of it: `scripts/bench corpora`, docs/corpora.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge.intake.status import KEPT, Outcome
from scripts.lab import corpora
from scripts.lab.corpora import FELL, NO_CONTEXT, NOT_SENT, STORED, Fate, Item
from scripts.lab.tap import Tap
from tests.simulators.node import make_door, make_spool
from tests.simulators.real_data import DATA, needs_data

REFUSALS = {outcome.value for outcome in Outcome} - {outcome.value for outcome in KEPT}


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


@pytest.fixture
def room(tmp_path: Path) -> Iterator[tuple[Tap, Path]]:
    spool = make_spool(tmp_path)
    door = make_door(spool)
    tap = Tap(door.port)
    yield tap, tmp_path
    tap.close()
    door.stop()
    spool.close()


def judged(fates: list[Fate]) -> Counter[str]:
    found = Counter(fate.outcome for fate in fates)
    bad = {fate.item.path.name: fate.outcome for fate in fates if fate.outcome not in _GOOD}
    assert bad == {}
    return found


_GOOD = {STORED, NOT_SENT, FELL, NO_CONTEXT} | REFUSALS


@needs_data
@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom warns of what it puts right
def test_storescu_sends_some_of_every_category(room: tuple[Tap, Path]) -> None:
    tap, state = room
    items = sample(each=2)
    found = judged(corpora.send_all(items, tap, corpora.storescu, state))
    assert found[STORED] > len(items) * 0.5


@needs_data
@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom warns of what it puts right
def test_orthanc_sends_some_of_every_category(room: tuple[Tap, Path]) -> None:
    tap, state = room
    items = sample(each=1)
    sender = corpora.OrthancSender(state / "orthanc", tap.port)
    try:
        found = judged(corpora.send_all(items, tap, sender.send, state))
    finally:
        sender.close()
    assert found[STORED] > len(items) * 0.4
