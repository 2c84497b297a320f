"""Outbox to verdict over the real broker and Redis, with every part killed while messages are under way."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scripts.lab.child import Child, wait_until
from tests.simulators.wire import NodeKit, WireLab, features, update_of

pytestmark = pytest.mark.e2e


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[WireLab]:
    made = WireLab(tmp_path)
    yield made
    made.close()


def all_ended(kits: list[NodeKit], each: int) -> bool:
    """True when every message of every node has an ending verdict and the drop folder is empty."""
    for kit in kits:
        states = kit.states()
        if states.get("accepted", 0) + states.get("duplicate", 0) != each or any(kit.drops.glob("*.msg")):
            return False
    return True


def assert_once(lab: WireLab, messages: int) -> None:
    """Every message is in the cloud's truth, had its effect exactly once, and nothing is left over."""
    assert lab.count("messages") == messages
    assert lab.count("effects") == messages
    assert lab.rows("SELECT count(DISTINCT id) FROM effects") == [(messages,)]
    assert lab.rows("SELECT count(*) FROM transfers") == [(0,)]
    assert lab.count("refusals") == 0


def test_outbox_to_verdict(lab: WireLab) -> None:
    kit = lab.node("a")
    for process in (lab.start_door, lab.start_worker):
        process()
    lab.start_uplink(kit)
    for number in range(40):
        kit.drop("features", features(number), f"f{number}")
    kit.drop("update", update_of(os.urandom(1_500_000)), "u1")
    wait_until("verdicts", lambda: all_ended([kit], 41), seconds=60)
    assert_once(lab, 41)
    assert kit.outbox("SELECT count(*) FROM bodies") == [(0,)]  # what has ended takes no room
    kit.drop("features", features(1), "f1")  # the same again is no new message
    kit.drop("features", features(999), "f1")  # a corrected one is
    wait_until("the correction", lambda: all_ended([kit], 42), seconds=30)
    assert_once(lab, 42)


def test_a_large_update_does_not_block_what_is_urgent(lab: WireLab) -> None:
    kit = lab.node("a")
    kit.drop("update", update_of(os.urandom(12_000_000)), "big")
    lab.start_uplink(kit)
    wait_until("the update is sealed", lambda: kit.states().get("waiting") == 1)
    lab.start_door()
    lab.start_worker()
    wait_until("it is under way", lambda: lab.count("chunks") > 0)
    kit.drop("judgement", judgement(), "j1")  # type: ignore[arg-type]
    wait_until("both", lambda: all_ended([kit], 2), seconds=60)
    stages = [row[0] for row in lab.rows("SELECT stage FROM effects ORDER BY rowid")]
    assert stages == ["judgement", "update"]


def judgement() -> object:
    from shared.wire.records import Judgement

    return Judgement("r1", "ab" * 32, "cd" * 32, [])


def _kill_and_restart(child: Child) -> None:
    child.kill()
    child.restart()


@pytest.mark.parametrize("victim", ["broker", "redis", "door", "worker", "uplink", "all"])
def test_chaos_sigkill_loses_nothing_and_doubles_nothing(lab: WireLab, victim: str) -> None:
    kits = [lab.node("a"), lab.node("b")]
    children = {
        "broker": [lab.broker],
        "redis": [lab.redis.child],
        "door": [lab.start_door()],
        "worker": [lab.start_worker("w1"), lab.start_worker("w2")],
        "uplink": [lab.start_uplink(kit, retry_s=1.0) for kit in kits],
    }
    targets = [child for name, some in children.items() if victim in (name, "all") for child in some]
    chance = random.Random(7)
    each = 0
    for wave in range(3):
        for kit in kits:
            for number in range(30):
                site = kit.identity.site
                kit.drop("features", features(100 * wave + number, site), f"f{wave}-{number}")
            kit.drop("update", update_of(os.urandom(700_000), f"r{wave}"), f"u{wave}")
        each += 31
        before = lab.count("messages")
        wait_until("some of the wave", _more_than(lab, before + chance.randrange(1, 40)), seconds=60)
        for child in targets if victim != "all" else chance.sample(targets, 3):
            _kill_and_restart(child)
    wait_until("every verdict", lambda: all_ended(kits, each), seconds=120)
    assert_once(lab, 2 * each)


def _more_than(lab: WireLab, rows: int) -> Callable[[], bool]:
    return lambda: lab.count("messages") >= rows


def test_cloud_away_for_a_while(lab: WireLab) -> None:
    """Without door and worker the broker acknowledges everything; the outbox ends nothing on its word."""
    kit = lab.node("a")
    lab.start_uplink(kit, retry_s=1.0)
    for number in range(20):
        kit.drop("features", features(number), f"f{number}")
    sent = "SELECT count(*) FROM messages WHERE attempts > 0"
    wait_until("all are published", lambda: kit.outbox(sent) == [(20,)], seconds=30)
    assert kit.states() == {"waiting": 20}
    _kill_and_restart(lab.broker)  # and everything it acknowledged is gone
    lab.start_door()
    lab.start_worker()
    wait_until("every verdict", lambda: all_ended([kit], 20), seconds=60)
    assert_once(lab, 20)


def test_attack_node_under_another_nodes_name(lab: WireLab) -> None:
    """Node b's software claims to be node a, with b's certificate: the broker refuses, and it shows."""
    a, b = lab.node("a"), lab.node("b")
    lab.start_door()
    lab.start_worker()
    liar = NodeKit(a.identity, b.state, b.leaf)
    liar.drop("features", features(1), "f1")
    denied = "SELECT count(*) FROM messages WHERE reason LIKE '%Not authorized%'"
    lab.start_uplink(liar, client_id="b/n1")
    wait_until("the refusal shows", lambda: liar.outbox(denied) == [(1,)], seconds=30)
    assert liar.states() == {"waiting": 1}
    assert lab.count("messages") == lab.count("refusals") == 0


def test_attack_stranger_without_a_certificate_of_the_fleet(lab: WireLab, tmp_path: Path) -> None:
    from tests.simulators.pki import TestAuthority

    kit = lab.node("a")
    foreign = TestAuthority(tmp_path / "foreign").node("a", "n1")
    kit.drop("features", features(1), "f1")
    lab.start_uplink(NodeKit(kit.identity, kit.state, foreign))
    wait_until("it does not get in", lambda: kit.outbox("SELECT * FROM facts") != [], seconds=30)
    assert kit.states() == {"waiting": 1}
