"""The uplink's main path, event by event, over a transport that only writes down what it is given."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge.uplink import uplink as uplink_module
from edge.uplink.desired import DesiredKeeper
from edge.uplink.link import Connected, Denied, Event, Heard, Lost, Taken, Transport
from edge.uplink.outbox import Outbox, drop
from edge.uplink.uplink import FLYING_LIMIT, Sealer, Uplink
from shared.errors import LinkError
from shared.wire.chunks import Chunk, bitmap, unpack
from shared.wire.envelope import SealPrivate, open_sealed
from shared.wire.identity import Identity
from shared.wire.records import Desired, NodeReport, Receipt
from shared.wire.signed import sign_record
from shared.wire.stages import STAGES, encode
from tests.simulators.wire import features, update_of

A = Identity("hosp-a", "n1")
CLOUD, DEVICE, SEAL = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate(), SealPrivate.generate()
REPORT = NodeReport("0.1.0", "", 0, "", "", "", 1, "CPU", [], 0, 0, 0, 0, 0, True)


class HandClock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def now(self) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=self.seconds)

    def monotonic(self) -> float:
        return self.seconds


class Paper:
    """A Transport on paper: `sent` is everything published, tokens count from 1."""

    def __init__(self, deliver: Callable[[Event], None]) -> None:
        self.deliver = deliver
        self.sent: list[tuple[str, Chunk]] = []
        self.filters: list[str] = []
        self.up = True

    def publish(self, topic: str, payload: bytes) -> int:
        if not self.up:
            raise LinkError("no connection")
        self.sent.append((topic, unpack(payload, STAGES[topic.rpartition("/")[2]].sealed_limit)))
        return len(self.sent)

    def subscribe(self, topic: str) -> None:
        self.filters.append(topic)

    def close(self) -> None:
        self.up = False


class Desk:
    """An uplink and all that it talks to."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.clock = folder, HandClock()
        self.papers: list[Paper] = []
        self.news = 0
        self.report: NodeReport | None = None
        ids = itertools.count(1)
        self._new_id = lambda: f"{next(ids):032x}"
        self.start()

    def start(self) -> None:
        """(Re)starts the process: only what is on disk is left."""
        self.outbox = Outbox(self.folder / "outbox.sqlite", self.clock)
        self.keeper = DesiredKeeper(
            self.folder, identity=A, incarnation="i1", cloud=CLOUD.public_key(), clock=self.clock
        )
        self.uplink = Uplink(
            sealer=Sealer(A, "i1", DEVICE, SEAL.public, self._new_id, self.clock),
            outbox=self.outbox,
            drops=self.folder / "drop",
            cloud=CLOUD.public_key(),
            connect=self._connect,
            keeper=self.keeper,
            on_news=self._on_news,
            report=None if self.report is None else lambda: self.report or REPORT,
            features_allowed=True,
            clock=self.clock,
            heartbeat_s=30.0,
        )

    def _connect(self, deliver: Callable[[Event], None]) -> Transport:
        self.papers.append(Paper(deliver))
        return self.papers[-1]

    def _on_news(self) -> None:
        self.news += 1

    @property
    def paper(self) -> Paper:
        return self.papers[-1]

    def turn(self, *events: Event) -> None:
        for event in events:
            self.uplink.deliver(event)
        self.uplink.step(0.0)
        self.uplink.step(0.0)

    def take_all(self) -> None:
        """Lets the broker take whatever is published until nothing more comes."""
        taken = 0
        while taken < len(self.paper.sent):
            taken += 1
            self.turn(Taken(taken))

    def hear(self, receipt: Receipt, key: Ed25519PrivateKey = CLOUD) -> None:
        self.turn(Heard("radfleet/1/hosp-a/n1/down/receipt", sign_record(receipt, key, "receipt")))

    def drop(self, number: int = 1) -> None:
        drop(self.folder / "drop", "features", features(number), name=f"f{number}")

    def state(self) -> list[tuple[str, str]]:
        return [tuple(row) for row in self.outbox._db.execute("SELECT state, reason FROM messages")]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_sealed_before_it_is_sent_and_the_file_is_gone(desk: Desk) -> None:
    desk.drop()
    desk.turn()
    assert desk.state() == [("waiting", "")]
    assert list((desk.folder / "drop").glob("*.msg")) == []
    assert desk.paper.sent == []  # not connected
    desk.turn(Connected())
    ((topic, chunk),) = desk.paper.sent
    assert topic == "radfleet/1/hosp-a/n1/up/features"
    header, record = open_sealed(chunk.data, [SEAL], [DEVICE.public_key()])
    assert (header.identity, header.id, header.sequence) == (A, chunk.whole.id, 1)
    assert record == encode(features(1))


def test_killed_between_the_row_and_the_unlink(desk: Desk) -> None:
    desk.drop()
    file = next((desk.folder / "drop").glob("*.msg"))
    data = file.read_bytes()
    desk.turn()
    file.write_bytes(data)  # as if the unlink had never happened
    desk.start()
    desk.turn()
    assert desk.outbox.depth() == 1
    assert not file.exists()


def test_a_puback_ends_nothing_a_verdict_does(desk: Desk) -> None:
    desk.drop()
    desk.turn(Connected())
    desk.take_all()
    assert desk.state() == [("waiting", "")]
    desk.hear(Receipt(desk.paper.sent[0][1].whole.id, "accepted", "", b""))
    assert desk.state() == [("accepted", "")]


def test_a_refusal_shows_its_reason(desk: Desk) -> None:
    desk.drop()
    desk.turn(Connected())
    desk.hear(Receipt(desk.paper.sent[0][1].whole.id, "refused", "There is no round.", b""))
    assert desk.state() == [("refused", "There is no round.")]
    assert desk.outbox.counts()["features", "refused"] == 1


def test_attack_forged_receipt(desk: Desk) -> None:
    desk.drop()
    desk.turn(Connected())
    receipt = Receipt(desk.paper.sent[0][1].whole.id, "accepted", "", b"")
    desk.hear(receipt, Ed25519PrivateKey.generate())
    desk.turn(Heard("radfleet/1/hosp-b/n1/down/receipt", sign_record(receipt, CLOUD, "receipt")))
    desk.turn(Heard("radfleet/1/hosp-a/n1/down/receipt", b"\x00" * 1000))
    desk.turn(Heard("not a topic", sign_record(receipt, CLOUD, "receipt")))
    assert desk.state() == [("waiting", "")]
    assert desk.uplink.counts["refused_from_cloud"] == 4


def test_silence_is_answered_by_sending_again_later_and_later(desk: Desk) -> None:
    desk.drop()
    desk.turn(Connected())
    times = [desk.clock.seconds]
    while len(times) < 5:
        desk.take_all()
        desk.clock.seconds += 1
        desk.turn()
        if len(desk.paper.sent) > len(times):
            times.append(desk.clock.seconds)
    gaps = [late - early for early, late in itertools.pairwise(times)]
    assert 15 <= gaps[0] <= 26
    assert gaps == sorted(gaps)
    assert 120 <= gaps[3] <= 201


def test_only_missing_chunks_are_sent_again(desk: Desk) -> None:
    drop(desk.folder / "drop", "update", update_of(os.urandom(1_200_000)), name="u")
    desk.turn(Connected())
    desk.take_all()
    chunks = [chunk.index for _, chunk in desk.paper.sent]
    assert chunks == [0, 1, 2, 3, 4]
    whole = desk.paper.sent[0][1].whole
    desk.hear(Receipt(whole.id, "partial", "", bitmap({0, 2, 4}, 5)))
    assert [chunk.index for _, chunk in desk.paper.sent[5:]] == [1, 3]
    assert desk.state() == [("waiting", "")]  # `partial` ends nothing


def test_after_a_restart_the_last_chunk_asks_what_is_held(desk: Desk) -> None:
    drop(desk.folder / "drop", "update", update_of(os.urandom(1_200_000)), name="u")
    desk.turn(Connected())
    desk.start()
    desk.turn(Connected())
    assert [chunk.index for _, chunk in desk.paper.sent] == [4]
    assert desk.papers[0].sent[0][1].whole == desk.paper.sent[0][1].whole  # sealed once, sent twice


def test_few_are_in_flight_and_the_urgent_overtakes(desk: Desk) -> None:
    drop(desk.folder / "drop", "update", update_of(os.urandom(6_000_000)), name="u")
    desk.turn(Connected())
    assert len(desk.paper.sent) == FLYING_LIMIT
    drop(desk.folder / "drop", "judgement", _judgement(), name="j")
    desk.turn(Taken(1))
    desk.turn(Taken(2))
    assert "radfleet/1/hosp-a/n1/up/judgement" in [topic for topic, _ in desk.paper.sent[: FLYING_LIMIT + 2]]


def _judgement() -> msgspec.Struct:
    from shared.wire.records import Judgement

    return Judgement("r1", "ab" * 32, "cd" * 32, [])


def test_a_lost_connection_forgets_what_was_in_flight(desk: Desk) -> None:
    for number in range(3):
        desk.drop(number)
    desk.turn(Connected())
    assert len(desk.paper.sent) == 3
    desk.turn(Lost("cable"))
    desk.turn(Taken(1))  # too late to mean anything
    desk.turn(Connected())
    assert len(desk.paper.sent) == 6
    assert desk.outbox.depth() == 3


def test_a_denied_publish_shows_and_waits(desk: Desk) -> None:
    desk.drop()
    desk.turn(Connected())
    desk.turn(Denied(1, "Not authorized"))
    assert desk.state() == [("waiting", "the broker refuses it: Not authorized")]
    for _ in range(50):
        desk.clock.seconds += 1
        desk.turn()
    assert len(desk.paper.sent) == 1
    desk.clock.seconds += 20
    desk.turn()
    assert len(desk.paper.sent) == 2


def test_bad_drops_are_set_aside_and_counted(desk: Desk) -> None:
    folder = desk.folder / "drop"
    (folder / "x.features.msg").write_bytes(b"\xff\xff")
    (folder / "x.nostage.msg").write_bytes(b"x")
    (folder / "nothing.msg").write_bytes(b"x")
    (folder / ".half.features.msg.part").write_bytes(b"x")
    desk.drop()
    desk.turn()
    assert desk.outbox.depth() == 1
    bad = sorted(file.name for file in (folder / "bad").iterdir())
    assert bad == ["nothing.msg", "x.features.msg", "x.nostage.msg"]
    assert desk.outbox.counts()["features", "malformed"] == 1


def desired(serial: int, **changes: object) -> Desired:
    made = Desired(node="n1", site="hosp-a", serial=serial, issued="2026-01-01T00:00:00+00:00", task=None, order=None)
    return msgspec.structs.replace(made, **changes)


def send_desired(desk: Desk, wanted: Desired, key: Ed25519PrivateKey = CLOUD) -> None:
    desk.turn(Heard("radfleet/1/hosp-a/n1/down/desired", sign_record(wanted, key, "desired")))


def test_features_stay_at_home_when_either_side_says_so(desk: Desk) -> None:
    send_desired(desk, desired(1, feature_policy="off"))
    desk.drop()
    drop(desk.folder / "drop", "update", update_of(b"x"), name="u")
    desk.turn()
    assert [w.stage for w in desk.outbox.waiting()] == ["update"]
    assert desk.outbox.counts()["features", "withheld"] == 1
    send_desired(desk, desired(2))
    desk.uplink._features_allowed = False
    desk.drop(2)
    desk.turn()
    assert desk.outbox.counts()["features", "withheld"] == 2


def test_desired_state_is_news_once_and_survives_a_restart(desk: Desk) -> None:
    send_desired(desk, desired(3))
    send_desired(desk, desired(3))
    assert desk.news == 1
    desk.start()
    assert desk.keeper.current == desired(3)


def test_attack_desired_states(desk: Desk) -> None:
    send_desired(desk, desired(3))
    send_desired(desk, desired(2))  # replayed
    send_desired(desk, desired(9, node="n2"))  # meant for another node
    send_desired(desk, desired(9), Ed25519PrivateKey.generate())  # signed by somebody else
    assert desk.keeper.current == desired(3)
    assert desk.news == 1
    assert desk.uplink.counts["refused_from_cloud"] == 3
    desk.start()
    assert desk.keeper.current == desired(3)


class TestHeartbeat:
    @pytest.fixture
    def desk(self, tmp_path: Path) -> Desk:
        desk = Desk(tmp_path)
        desk.report = REPORT
        desk.start()
        return desk

    def sent(self, desk: Desk) -> list[Chunk]:
        return [chunk for topic, chunk in desk.paper.sent if topic.endswith("/report")]

    def accept(self, desk: Desk) -> None:
        desk.hear(Receipt(self.sent(desk)[-1].whole.id, "accepted", "", b""))

    def test_one_at_a_time_and_none_while_away(self, desk: Desk) -> None:
        desk.clock.seconds += 100
        desk.turn()
        assert desk.outbox.depth() == 0
        desk.turn(Connected())
        assert len(self.sent(desk)) == 1
        desk.clock.seconds += 15
        desk.report = msgspec.structs.replace(REPORT, package="ab" * 32)
        desk.turn()
        assert desk.outbox.depth("report") == 1  # the first has no verdict yet

    def test_a_change_is_told_at_once_and_counters_with_the_beat(self, desk: Desk) -> None:
        desk.turn(Connected())
        self.accept(desk)
        desk.report = msgspec.structs.replace(REPORT, studies=7)
        desk.clock.seconds += 5
        desk.turn()
        assert len(self.sent(desk)) == 1
        desk.report = msgspec.structs.replace(REPORT, package="ab" * 32)
        desk.clock.seconds += 5
        desk.turn()
        assert len(self.sent(desk)) == 2
        self.accept(desk)
        desk.clock.seconds += 29
        desk.turn()
        assert len(self.sent(desk)) == 2
        desk.clock.seconds += 2
        desk.turn()
        assert len(self.sent(desk)) == 3


def test_the_observer_sees_every_record_before_it_is_sealed(desk: Desk) -> None:
    seen: list[bytes] = []
    desk.uplink._sealer = replace(desk.uplink._sealer, observe=lambda _header, record: seen.append(record))
    desk.drop()
    desk.turn()
    assert seen == [encode(features(1))]


def test_a_full_disk_keeps_the_drop(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object) -> bool:
        raise uplink_module.RoomError("no room")

    desk.drop()
    with monkeypatch.context() as patch:
        patch.setattr(desk.outbox, "put", full)
        desk.turn()
    assert len(list((desk.folder / "drop").glob("*.msg"))) == 1
    desk.turn()
    assert desk.outbox.depth() == 1
