"""Routing when the disk or the object does not play along, when the index is named anew, and what is forgotten."""

from __future__ import annotations

import sqlite3
import struct
from pathlib import Path

import pytest
from pydicom.dataset import FileDataset

from edge.forward import reading
from edge.forward.facts import HEAD_LIMIT_BYTES, read_facts_head
from edge.forward.follow import FetchRule
from edge.forward.peer import Peer
from edge.forward.queue import PRIOR_S, Received, want
from edge.forward.rules import Facts, Rule, possible
from edge.intake.index import Index
from edge.intake.part import Arriving
from tests.simulators.forwarding import KEEP_S, OURS, ForwardingNode, radiographs, receive
from tests.simulators.modality import EXPLICIT, encoded
from tests.simulators.node import make_pipeline, make_spool, run_until_idle

PEERS = [Peer("one", "ONE", "127.0.0.1", 1), Peer("two", "TWO", "127.0.0.1", 1)]
BY_MODALITY = Rule(name="dx", action="forward", destinations=("one",), modality=("DX",))
BY_PART = Rule(name="chest", action="forward", destinations=("two",), body_part=("CHEST",))
# group 0009 sorts before the body part and after modality and descriptions; the character set of its item is a number
_NUMBER = struct.pack("<HH2sHH", 0x0008, 0x0005, b"US", 2, 7)
_ITEM = struct.pack("<HHI", 0xFFFE, 0xE000, len(_NUMBER)) + _NUMBER + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
BROKEN = struct.pack("<HH2sHI", 0x0009, 0x1001, b"SQ", 0, 0xFFFFFFFF) + _ITEM
LONG = struct.pack("<HH2sHI", 0x0009, 0x1001, b"OB", 0, HEAD_LIMIT_BYTES + 2) + bytes(HEAD_LIMIT_BYTES + 2)


def states(node: ForwardingNode) -> list[tuple[str, str]]:
    db = sqlite3.connect(node.state / "forward.sqlite")
    found = db.execute("SELECT destination, state FROM queue ORDER BY id").fetchall()
    db.close()
    return found


def rows(node: ForwardingNode, table: str) -> int:
    db = sqlite3.connect(node.state / "forward.sqlite")
    found = int(db.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0])  # noqa: S608 words of this file
    db.close()
    return found


def with_bytes(item: FileDataset, inserted: bytes) -> bytes:
    """The data set with bytes before its group 0010."""
    data = encoded(item)
    at = data.index(b"\x10\x00\x10\x00PN")
    return data[:at] + inserted + data[at:]


def put(state: Path, item: FileDataset, data: bytes) -> None:
    spool = make_spool(state)
    arriving = Arriving(str(item.SOPClassUID), str(item.SOPInstanceUID), EXPLICIT, "MODALITY", OURS)
    spool.store(arriving, [data])
    spool.close()


def test_what_the_disk_does_not_give_is_routed_later_and_holds_up_nobody(tmp_path: Path) -> None:
    node = ForwardingNode(tmp_path, [BY_MODALITY], PEERS)
    receive(tmp_path, radiographs(3))
    (first, *_) = sorted((tmp_path / "spool").glob("*.dcm"))
    first.rename(tmp_path / "away")
    node.follow()
    assert states(node) == [("one", "waiting")] * 2
    (tmp_path / "away").rename(first)
    node.follow()
    node.clock.advance(3)
    node.follow()
    assert states(node) == [("one", "waiting")] * 3
    assert (rows(node, "routed"), rows(node, "unrouted")) == (3, 0)


def test_what_the_disk_never_gives_is_shown_to_a_person(tmp_path: Path) -> None:
    node = ForwardingNode(tmp_path, [BY_PART], PEERS)
    receive(tmp_path, radiographs(1))
    (first,) = (tmp_path / "spool").glob("*.dcm")
    first.rename(tmp_path / "away")
    for _ in range(12):
        node.follow()
        node.clock.advance(600)
    (letter,) = reading.dead_letters(tmp_path / "forward.sqlite")
    assert (letter.destination, letter.why) == ("two", "chest")
    assert "Cannot read" in letter.error
    assert letter.cure
    assert rows(node, "unrouted") == 0


def test_what_left_the_spool_before_it_could_be_read_is_let_go(tmp_path: Path) -> None:
    node = ForwardingNode(tmp_path, [BY_PART], PEERS)
    receive(tmp_path, radiographs(1))
    (first,) = (tmp_path / "spool").glob("*.dcm")
    first.unlink()
    node.follow()
    db = sqlite3.connect(tmp_path / "intake.sqlite")
    with db:
        db.execute("UPDATE objects SET state = 'evicted'")
    db.close()
    node.clock.advance(600)
    node.follow()
    assert states(node) == []
    assert rows(node, "unrouted") == 0


def test_an_object_that_is_odd_after_its_modality_goes_by_its_modality(tmp_path: Path) -> None:
    node = ForwardingNode(tmp_path, [BY_MODALITY], PEERS)
    (item,) = radiographs(1)
    put(tmp_path, item, with_bytes(item, BROKEN))
    node.follow()
    assert states(node) == [("one", "waiting")]


def test_where_what_a_rule_needs_cannot_be_read_a_person_decides(tmp_path: Path) -> None:
    node = ForwardingNode(tmp_path, [BY_PART, BY_MODALITY], PEERS)
    (item,) = radiographs(1)
    put(tmp_path, item, with_bytes(item, BROKEN))
    node.follow()
    assert states(node) == [("two", "dead"), ("one", "dead")]  # the second is what decides if the first does not
    assert all("cannot be read" in one.error for one in reading.dead_letters(tmp_path / "forward.sqlite"))


def test_a_long_value_is_passed_over_and_many_bytes_end_the_reading(tmp_path: Path) -> None:
    (item,) = radiographs(1)
    path = tmp_path / "x"
    path.write_bytes(with_bytes(item, LONG))
    found = read_facts_head(path, 0, EXPLICIT)
    assert (found.fault, found.dataset.BodyPartExamined) == ("", "CHEST")
    assert 0x00091001 not in found.dataset
    many = b"".join(struct.pack("<HH2sHI", 9, n, b"OB", 0, 60_000) + bytes(60_000) for n in range(0x1001, 0x1060))
    path.write_bytes(with_bytes(item, many))
    found = read_facts_head(path, 0, EXPLICIT)
    assert str(HEAD_LIMIT_BYTES) in found.fault
    assert found.dataset.Modality == item.Modality
    assert "BodyPartExamined" not in found.dataset


@pytest.mark.parametrize("inserted", [b"", BROKEN, LONG])
def test_pipeline_and_forward_decide_alike(tmp_path: Path, inserted: bytes) -> None:
    node = ForwardingNode(tmp_path, [BY_PART], PEERS)
    (item,) = radiographs(1)
    put(tmp_path, item, with_bytes(item, inserted))
    node.follow()
    run_until_idle(make_pipeline(tmp_path, routes=node.routes))
    db = sqlite3.connect(tmp_path / "results.sqlite")
    ((outcome,),) = db.execute("SELECT outcome FROM work").fetchall()
    db.close()
    assert (outcome == "rule:forward") == (states(node) == [("two", "waiting")])


def test_rules_that_may_decide() -> None:
    facts = Facts(modality="DX", calling_ae="CT1")
    late = Rule(name="late", action="keep")
    never = Rule(name="never", action="forward", modality=("CT",), body_part=("CHEST",))
    assert possible([never, BY_PART, BY_MODALITY, late], facts) == (BY_PART, BY_MODALITY)
    assert possible([BY_PART], facts) == (BY_PART,)
    assert possible([never], facts) == ()


def test_an_index_that_is_named_anew_is_not_routed_by_the_rules_of_today(tmp_path: Path) -> None:
    priors = FetchRule("one", "priors", modality=("DX",))
    node = ForwardingNode(tmp_path, [BY_MODALITY], PEERS, fetches=[priors])
    (old, new) = radiographs(2)
    node.queue.note_priors([str(old.StudyInstanceUID)], "1.2.3", node.now())
    receive(tmp_path, [old])
    node.follow()
    assert states(node) == []
    node.clock.advance(PRIOR_S + 10)
    index = Index(tmp_path / "intake.sqlite")
    index.rename()
    index.close()
    receive(tmp_path, [new])
    assert node.follow() == 2
    assert len(states(node)) == 1
    assert rows(node, "routed") == 2
    assert rows(node, "fetches") == 0


def test_what_an_older_version_routed_is_known(tmp_path: Path) -> None:
    node = ForwardingNode(tmp_path, [BY_MODALITY], PEERS)
    receive(tmp_path, radiographs(2))
    node.follow()
    with node.queue.writing() as db:
        for table in ("routed", "queue"):
            db.execute(f"DELETE FROM {table}")  # noqa: S608
    again = ForwardingNode(tmp_path, [BY_MODALITY], PEERS)
    assert again.follow() == 0
    index = Index(tmp_path / "intake.sqlite")
    index.rename()
    index.close()
    assert again.follow() == 2
    assert states(again) == []


def test_what_is_over_is_forgotten_and_nothing_else(tmp_path: Path) -> None:
    node = ForwardingNode(tmp_path, [BY_MODALITY], PEERS)
    receive(tmp_path, radiographs(3))
    node.follow()
    sent, gone, waits = node.queue.due("one", node.now(), 10)
    received = Received("d", "f", 0, 1, "1", "1", EXPLICIT, "1.2", "1.2.3", "DX", "A", "B", 0.0, False)
    with node.queue.writing() as db:
        db.execute("UPDATE queue SET state = 'sent', ended_at = ? WHERE id IN (?, ?)", (node.now(), sent.id, gone.id))
        want(db, "series", "one", 0, received, node.now())
        want(db, "priors", "one", 0, received, node.now())
    ended = node.queue.next_fetch("one", node.now())
    assert ended is not None
    node.queue.end_fetch(ended, "done", next_at=node.now())
    node.queue.note_priors(["9.9"], "1.2.3", node.now())
    db_ = sqlite3.connect(tmp_path / "intake.sqlite")
    with db_:
        db_.execute("UPDATE objects SET state = 'evicted' WHERE file IN (?, ?)", (gone.file, waits.file))
    db_.close()
    node.clock.advance(KEEP_S - 10)
    node.follow()
    assert (rows(node, "queue"), rows(node, "routed"), rows(node, "fetches"), rows(node, "priors")) == (3, 1, 2, 0)
    node.clock.advance(4000)
    node.follow()
    left = {(row.file) for row in node.queue.due("one", node.now(), 10)}
    assert left == {waits.file}  # it waits, though its file is gone: a person will hear of it
    assert (rows(node, "queue"), rows(node, "routed"), rows(node, "fetches")) == (2, 1, 1)
