"""The pipeline honours the rules: what they keep from the models is recorded, counted, and answered by nobody."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from edge.forward import reading
from edge.forward.peer import Peer
from edge.forward.rules import Rule
from edge.imaging.read import MANUFACTURER
from tests.simulators.forwarding import ForwardingNode, radiographs, receive
from tests.simulators.node import make_pipeline, run_until_idle

RULES = [
    Rule(name="a", action="forward", destinations=("one",), calling_ae=("FORWARD",)),
    Rule(name="b", action="both", destinations=("one",), calling_ae=("BOTH",)),
    Rule(name="c", action="keep", calling_ae=("KEEP",)),
    Rule(name="d", action="ignore", calling_ae=("IGNORE",)),
]


def test_each_action_does_what_its_name_says(tmp_path: Path) -> None:
    node = ForwardingNode(tmp_path, RULES, [Peer("one", "ONE", "127.0.0.1", 1)])
    callers = ("FORWARD", "BOTH", "KEEP", "IGNORE", "OTHER")
    for number, calling in enumerate(callers):
        receive(tmp_path, radiographs(1, first=number), calling=calling)
    node.follow()
    run_until_idle(make_pipeline(tmp_path, routes=node.routes))
    results = sqlite3.connect(tmp_path / "results.sqlite")
    intake = sqlite3.connect(tmp_path / "intake.sqlite")
    by_digest = dict(intake.execute("SELECT digest, calling_ae FROM objects"))
    outcomes = {by_digest[digest]: outcome for digest, outcome in results.execute("SELECT digest, outcome FROM work")}
    assert outcomes == {
        "FORWARD": "rule:forward",
        "BOTH": "answered",
        "KEEP": "rule:keep",
        "IGNORE": "rule:ignore",
        "OTHER": "answered",
    }
    assert results.execute("SELECT COUNT(*) FROM answers").fetchone()[0] == 2
    assert reading.not_read(tmp_path / "results.sqlite") == {"forward": 1, "keep": 1, "ignore": 1}
    forward = sqlite3.connect(tmp_path / "forward.sqlite")
    queued = {by_digest[digest] for (digest,) in forward.execute("SELECT digest FROM queue")}
    assert queued == {"FORWARD", "BOTH"}


def test_a_result_of_ours_that_comes_back_goes_nowhere(tmp_path: Path) -> None:
    rule = Rule(name="all", action="both", destinations=("one",))
    node = ForwardingNode(tmp_path, [rule], [Peer("one", "ONE", "127.0.0.1", 1)])
    (item,) = radiographs(1)
    item.Manufacturer = MANUFACTURER
    receive(tmp_path, [item], calling="PACS")
    assert node.follow() == 1
    assert node.queue.due("one", node.now(), 10) == []


def test_an_identity_conflict_is_not_sent_on(tmp_path: Path) -> None:
    rule = Rule(name="all", action="both", destinations=("one",))
    node = ForwardingNode(tmp_path, [rule], [Peer("one", "ONE", "127.0.0.1", 1)])
    first, other = radiographs(2)
    receive(tmp_path, [first])
    other.SOPInstanceUID = other.file_meta.MediaStorageSOPInstanceUID = first.SOPInstanceUID
    receive(tmp_path, [other])
    assert node.follow() == 2
    (one,) = reading.destinations(tmp_path / "forward.sqlite", {"one": ""})
    assert (one.waiting, one.dead) == (1, 0)
