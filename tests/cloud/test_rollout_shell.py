"""Rollouts with real registry, director, SQL and nodes; reports and orders are function calls, not messages."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Connection, Engine, insert, select

from cloud.access.reports import take_report
from cloud.access.tables import nodes as inventory
from cloud.ingest.desired import DesiredStates
from cloud.rollout.plan import Halt, Hold, Policy, Recall
from cloud.rollout.shell import Rollouts
from cloud.rollout.tables import rollouts
from cloud.store import open_engine, upgrade
from shared.errors import PeerError
from shared.files import sha256_hex
from shared.wire.envelope import Header
from shared.wire.records import NodeReport
from tests.simulators.package import MODEL
from tests.simulators.release import CloudSide, HandClock, NodeSide

NAMES = [("a", "n1"), ("b", "n1"), ("c", "n1")]
POLICY = Policy(waves=(1, 2), deadline_s=300, soak_s=60)


class Fleet:
    """Three hospitals and the cloud's rollout room."""

    def __init__(self, folder: Path) -> None:
        self.clock = HandClock()
        self.cloud = CloudSide(folder, self.clock)
        url = f"sqlite:///{folder}/cloud.sqlite"
        upgrade(url)
        self.engine: Engine = open_engine(url)
        self.desired = DesiredStates(Ed25519PrivateKey.generate(), self.clock)
        self.rollouts = Rollouts(
            self.cloud.repository, self.cloud.director, set_order=self.desired.set_order, clock=self.clock
        )
        self.nodes = {name: NodeSide(folder / name[0], self.cloud, self.clock, name) for name in NAMES}
        self.sequence = 0
        self.silent: set[tuple[str, str]] = set()
        self.lying: set[tuple[str, str]] = set()
        self.broken: set[str] = set()  # packages whose outputs are bad on local studies
        with self.engine.begin() as conn:
            for site, node in NAMES:
                conn.execute(insert(inventory).values(site=site, node=node, invited_at=self.clock.now()))

    def tick(self, seconds: float = 20) -> object:
        """Every node does what it is told, studies arrive, reports go up, and the rollout takes a step."""
        self.clock.advance(seconds)
        for name, node in self.nodes.items():
            if name in self.silent:
                continue
            with self.engine.begin() as conn:
                order = self.desired.read(conn, *name).order
            node.fetch(order)
            for _ in range(8):
                node.swapper.step()
                if node.serving in self.broken:
                    node.swapper.failed("its outputs are not finite")
                node.read_study()
            with self.engine.begin() as conn:
                self.report(conn, name, node)
        with self.engine.begin() as conn:
            return self.rollouts.step(conn)

    def run(self, ticks: int = 20) -> list[object]:
        return [self.tick() for _ in range(ticks)]

    def report(self, conn: Connection, name: tuple[str, str], node: NodeSide) -> None:
        self.sequence += 1
        record = node.records[-1]
        weights = "f" * 64 if name in self.lying and record.release > 1 else record.weights_loaded
        report = NodeReport(
            version="0",
            package=record.package,
            release=record.release,
            variant=record.variant,
            weights_loaded=weights,
            golden=record.golden,
            serving_pid=record.pid,
            provider=record.provider,
            slots=node.journal.reports(),
            studies=0,
            quarantined=0,
            labelled=0,
            outbox_waiting=0,
            outbox_expired=0,
            clock_trusted=True,
        )
        take_report(conn, header(name, self.sequence), report, self.clock)

    def start(self, release: int, names: list[tuple[str, str]] | None = None) -> None:
        with self.engine.begin() as conn:
            self.rollouts.start(conn, release, names, "test", POLICY)

    def serving(self) -> list[int]:
        return [node.records[-1].release for node in self.nodes.values()]

    def state(self) -> tuple[str, str]:
        with self.engine.begin() as conn:
            row = conn.execute(select(rollouts).order_by(rollouts.c.id.desc())).first()
            assert row is not None
            return row.state, row.reason


def header(name: tuple[str, str], sequence: int) -> Header:
    site, node = name
    return Header(1, site, node, "1", "report", "0" * 32, sequence, "", "0" * 16, 0)


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


def test_a_good_release_reaches_all_in_waves(fleet: Fleet) -> None:
    fleet.cloud.release(2)
    fleet.start(2)
    seen = []
    for _ in range(20):
        fleet.tick()
        seen.append(fleet.serving())
    assert seen[-1] == [2, 2, 2]
    assert [2, 1, 1] in seen  # the first wave soaked alone
    assert fleet.state()[0] == "done"


def test_named_nodes_only(fleet: Fleet) -> None:
    fleet.cloud.release(2)
    fleet.start(2, [("b", "n1")])
    fleet.run(8)
    assert fleet.serving() == [1, 2, 1]
    assert fleet.state()[0] == "done"


def test_a_release_that_fails_at_a_hospital_is_recalled_after_one_wave(fleet: Fleet) -> None:
    order = fleet.cloud.release(2)
    fleet.broken.add(order.package)
    fleet.start(2)
    steps = fleet.run(8)
    assert any(isinstance(s, Recall) for s in steps)
    assert fleet.serving() == [1, 1, 1]
    assert fleet.state() == ("recalled", "a/n1: ROLLED_BACK")
    assert fleet.nodes["b", "n1"].journal.get(order.package) is None
    assert fleet.nodes["c", "n1"].journal.get(order.package) is None


def test_a_silent_node_halts_the_rollout(fleet: Fleet) -> None:
    fleet.cloud.release(2)
    fleet.silent.add(("a", "n1"))
    fleet.start(2)
    steps = fleet.run(20)
    assert any(isinstance(s, Halt) for s in steps)
    assert fleet.state()[0] == "halted"
    assert fleet.serving() == [1, 1, 1]
    fleet.silent.clear()
    fleet.run(4)
    assert fleet.serving() == [1, 1, 1]  # the order was taken back


def test_an_old_refusal_does_not_halt_a_second_try(fleet: Fleet) -> None:
    """A blob is damaged in the store; it is repaired and the release goes out again under the same number."""
    fleet.cloud.release(2)
    blob = fleet.cloud.blobs.folder / sha256_hex((fleet.cloud.packages / "2" / MODEL).read_bytes())
    blob.write_bytes(b"damaged")
    fleet.start(2)
    fleet.run(4)
    assert fleet.state() == ("halted", "a/n1: REFUSED")
    fleet.run(1)  # the node hears that the order was taken back
    blob.write_bytes((fleet.cloud.packages / "2" / MODEL).read_bytes())
    fleet.start(2)
    with fleet.engine.begin() as conn:
        fleet.rollouts.step(conn)
        assert isinstance(fleet.rollouts.step(conn), Hold)  # its last report is still about the first try
    fleet.run(20)
    assert fleet.serving() == [2, 2, 2]


def test_a_node_that_lies_about_its_weights_is_caught(fleet: Fleet) -> None:
    fleet.cloud.release(2)
    fleet.lying.add(("a", "n1"))
    fleet.start(2)
    fleet.run(8)
    state, reason = fleet.state()
    assert state == "recalled"
    assert "other weights" in reason


def test_a_person_rolls_back(fleet: Fleet) -> None:
    fleet.cloud.release(2)
    fleet.start(2)
    fleet.run(20)
    assert fleet.serving() == [2, 2, 2]
    with fleet.engine.begin() as conn:
        fleet.rollouts.roll_back(conn, None, "test")
    fleet.run(3)
    assert fleet.serving() == [1, 1, 1]
    assert fleet.state() == ("recalled", "by test")
    assert fleet.cloud.director.assignments()["a", "n1"].allow_downgrade_to == 1


def test_one_node_is_rolled_back_alone(fleet: Fleet) -> None:
    fleet.cloud.release(2)
    fleet.start(2)
    fleet.run(20)
    with fleet.engine.begin() as conn:
        fleet.rollouts.roll_back(conn, [("c", "n1")], "test")
    fleet.run(3)
    assert fleet.serving() == [2, 2, 1]


def test_forward_again_after_a_recall(fleet: Fleet) -> None:
    fleet.cloud.release(2)
    fleet.start(2)
    fleet.run(20)
    with fleet.engine.begin() as conn:
        fleet.rollouts.roll_back(conn, None, "test")
    fleet.run(3)
    fleet.cloud.release(3)
    fleet.start(3)
    fleet.run(20)
    assert fleet.serving() == [3, 3, 3]


def test_a_second_rollout_supersedes_the_first(fleet: Fleet) -> None:
    fleet.cloud.release(2)
    fleet.cloud.release(3)
    fleet.start(2)
    fleet.tick()
    fleet.start(3)
    fleet.run(20)
    assert fleet.serving() == [3, 3, 3]


def test_what_cannot_be_rolled_out(fleet: Fleet) -> None:
    fleet.cloud.propose(2)
    with pytest.raises(PeerError, match="not published"):
        fleet.start(2)
    with pytest.raises(PeerError, match="inventory: x/n1"):
        fleet.start(1, [("x", "n1")])


def test_a_crash_between_the_director_and_the_commit_heals(fleet: Fleet) -> None:
    fleet.cloud.release(2)
    fleet.start(2)

    def crash() -> None:
        with fleet.engine.begin() as conn:
            fleet.rollouts.step(conn)
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        crash()
    fleet.clock.advance(timedelta(minutes=1).total_seconds())
    fleet.run(20)
    assert fleet.serving() == [2, 2, 2]
