"""From stream to verdict: once, durably, and told only afterwards."""

from __future__ import annotations

import os
from typing import Any

import pytest
from sqlalchemy import Connection, text

from cloud.ingest import assembly
from cloud.ingest.replay import WINDOW
from shared.errors import LinkError, PeerError
from shared.wire.chunks import missing, whole_of
from shared.wire.envelope import Header
from shared.wire.records import NodeReport
from shared.wire.stages import encode
from tests.cloud.ingest.conftest import Bench, Node, failing
from tests.simulators.wire import features, update_of

NOTHING = {"messages": 0, "effects": 0, "refusals": 0, "transfers": 0, "chunks": 0, "audit": 0, "objects": 0}
ONE = NOTHING | {"messages": 1, "effects": 1, "objects": 1}


def report(number: int) -> NodeReport:
    return NodeReport("0.1.0", "", 0, "", "", "", number, "CPU", [], number, 0, 0, 0, 0, True)


def test_accepted_once_then_duplicate(bench: Bench, node: Node) -> None:
    message = node.message(features(1))
    receipt = bench.verdict(node, message)
    assert (receipt.id, receipt.verdict) == (message[0], "accepted")
    assert bench.true_on_disk() == ONE
    assert bench.objects.read(bench.one("SELECT record FROM messages")) == encode(features(1))
    assert bench.opened[0][1] == encode(features(1))
    assert bench.verdict(node, message).verdict == "duplicate"
    assert bench.true_on_disk() == ONE


def test_several_chunks_in_any_order(bench: Bench, node: Node) -> None:
    message = node.message(update_of(os.urandom(900_000)), "update")
    whole = whole_of(*message)
    assert whole.count == 4
    bench.send(node.identity, message, "update", [2, 3, 0])
    (partial,) = bench.receipts()
    assert (partial.verdict, missing(partial.held, 4)) == ("partial", [0, 1])  # told when the last one came
    assert bench.true_on_disk() == NOTHING | {"transfers": 1, "chunks": 3}
    bench.worker = bench.new_worker()  # another process: what it needs is in SQL
    bench.send(node.identity, message, "update", [1])
    assert [r.verdict for r in bench.receipts()] == ["accepted"]
    assert bench.true_on_disk() == ONE
    bench.send(node.identity, message, "update")
    assert [r.verdict for r in bench.receipts()] == ["duplicate"]  # once, for the last chunk
    assert bench.true_on_disk() == ONE


def test_unfinished_transfers_are_bounded(bench: Bench, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "OPEN_LIMIT_BYTES", 1_000_000)
    old, new = (node.message(update_of(os.urandom(600_000)), "update") for _ in range(2))
    bench.send(node.identity, old, "update", [0])
    bench.send(node.identity, new, "update", [0])
    bench.receipts()
    assert bench.true_on_disk() == NOTHING | {"transfers": 1, "chunks": 1}
    assert bench.one("SELECT digest FROM transfers") == whole_of(*new).digest.hex()
    bench.send(node.identity, old, "update", [2])
    (told,) = bench.receipts()
    assert missing(told.held, 3) == [0, 1]  # the sender learns it and sends again
    bench.send(node.identity, old, "update", [0, 1])
    assert [r.verdict for r in bench.receipts()] == ["accepted"]


def test_a_handler_refuses_and_nothing_of_it_stays(bench: Bench, node: Node) -> None:
    def refuse(conn: Connection, _head: Header, _record: Any) -> None:
        conn.execute(text("INSERT INTO effects VALUES ('x', 'x', 'x')"))
        raise PeerError("There is no round 'r9'.")

    bench.handlers["features"] = refuse
    bench.worker = bench.new_worker()
    message = node.message(features(1))
    receipt = bench.verdict(node, message)
    assert (receipt.verdict, receipt.reason) == ("refused", "There is no round 'r9'.")
    assert bench.true_on_disk() == NOTHING | {"refusals": 1, "audit": 1, "objects": 1}
    assert bench.verdict(node, message).verdict == "refused"
    assert bench.one("SELECT times FROM refusals") == 2
    assert bench.one("SELECT count(*) FROM audit") == 1


def test_a_defect_of_a_handler_stops_nothing_and_ends_nothing(bench: Bench, node: Node) -> None:
    good, bench.handlers["features"] = bench.handlers["features"], failing
    bench.worker = bench.new_worker()
    message = node.message(features(1))
    bench.send(node.identity, message)
    bench.send(node.identity, node.message(report(1), "report"), "report")
    assert [r.verdict for r in bench.receipts()] == ["accepted"]  # the report behind it
    assert bench.one("SELECT count(*) FROM messages WHERE stage = 'features'") == 0
    bench.handlers["features"] = good
    bench.worker = bench.new_worker()
    assert bench.verdict(node, message).verdict == "accepted"  # the node sent it again


def test_killed_between_commit_and_receipt(bench: Bench, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """The receipt never left; the entry is claimed by the next worker, which knows the bytes."""

    def dead(_topic: str, _payload: bytes) -> bool:
        raise LinkError("the process is gone")

    message = node.message(features(1))
    bench.send(node.identity, message)
    with monkeypatch.context() as patch:
        patch.setattr(bench.down, "push", dead)
        with pytest.raises(LinkError):
            bench.worker.step()
    assert bench.true_on_disk() == ONE
    bench.worker = bench.new_worker()
    receipts = []
    while not receipts:  # until the dead worker's claim has lapsed
        receipts = bench.receipts()
    assert [r.verdict for r in receipts] == ["duplicate"]
    assert bench.true_on_disk() == ONE


def test_no_receipt_before_the_commit(bench: Bench, node: Node) -> None:
    """While the handler runs nothing is told; a commit that fails tells nothing either."""
    told: list[int] = []

    def look(_conn: Connection, _head: Header, _record: Any) -> None:
        told.append(len(bench.down.take(10, 1)))
        raise LinkError("the database is away")

    bench.handlers["features"] = look
    bench.worker = bench.new_worker()
    bench.send(node.identity, node.message(features(1)))
    bench.worker.step()
    assert told == [0]
    assert bench.down.take(10, 1) == []
    assert bench.true_on_disk()["messages"] == 0


def test_reports_do_not_pile_up(bench: Bench, node: Node) -> None:
    last = ("", b"")
    for number in range(130):
        last = node.message(report(number), "report")
        bench.send(node.identity, last, "report")
    assert {r.verdict for r in bench.receipts()} == {"accepted"}
    assert bench.one("SELECT count(*) FROM messages") == 100
    assert bench.true_on_disk()["objects"] == 0
    assert bench.verdict(node, last, "report").verdict == "duplicate"


def test_sequences_may_come_in_any_order(bench: Bench, node: Node) -> None:
    for sequence in (5, 3, WINDOW, 4, WINDOW + 10, 11):
        receipt = bench.verdict(node, node.message(features(sequence), sequence=sequence))
        assert receipt.verdict == "accepted", sequence
