"""The outbox: a row ends by a verdict or a visible expiry, and by nothing else."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from edge.uplink import outbox as outbox_module
from edge.uplink.outbox import CLASSES, Class, Outbox, drop
from shared.errors import PeerError
from shared.wire.records import UpStage
from shared.wire.stages import encode
from tests.simulators.wire import features


class HandClock:
    def __init__(self) -> None:
        self.time = datetime(2026, 1, 1, tzinfo=UTC)

    def now(self) -> datetime:
        return self.time

    def monotonic(self) -> float:
        return self.time.timestamp()


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def box(tmp_path: Path, clock: HandClock) -> Outbox:
    return Outbox(tmp_path / "outbox.sqlite", clock)


_COUNTER = itertools.count(1)


def put(box: Outbox, stage: UpStage, name: str, record: bytes = b"r", sealed: bytes = b"s" * 100) -> str:
    message_id = f"{next(_COUNTER):032x}"
    assert box.put(stage, name, record, lambda _sequence: (message_id, sealed))
    return message_id


def test_urgent_first_then_oldest(box: Outbox) -> None:
    for number, stage in enumerate(("features", "update", "report", "judgement", "update")):
        put(box, stage, f"m{number}")
    assert [w.stage for w in box.waiting()] == ["report", "judgement", "update", "update", "features"]
    assert [w.sequence for w in box.waiting() if w.stage == "update"] == [2, 5]


def test_sequence_is_never_given_twice(tmp_path: Path, clock: HandClock) -> None:
    seen: list[int] = []

    def seal(sequence: int) -> tuple[str, bytes]:
        seen.append(sequence)
        return f"{len(seen):032x}", b"s"

    path = tmp_path / "outbox.sqlite"
    for number in range(3):
        box = Outbox(path, clock)  # a restart each time
        box.put("features", f"m{number}", b"r", seal)
        box.end(f"{len(seen):032x}", "accepted")
        box._db.execute("DELETE FROM messages")
        box.close()
    assert seen == [1, 2, 3]


def test_a_failed_seal_keeps_nothing_and_costs_no_number(box: Outbox) -> None:
    def broken(_sequence: int) -> tuple[str, bytes]:
        raise PeerError("too long")

    with pytest.raises(PeerError):
        box.put("features", "m", b"r", broken)
    assert box.waiting() == []
    put(box, "features", "m")
    assert box.waiting()[0].sequence == 1


def test_same_name_and_content_is_one_message(box: Outbox) -> None:
    put(box, "features", "case-1", b"first")
    assert not box.put("features", "case-1", b"first", lambda s: ("ff" * 16, b""))
    put(box, "features", "case-1", b"corrected")
    put(box, "features", "case-1", b"first")  # corrected back: news again
    put(box, "update", "case-1", b"first")
    assert box.depth() == 4


@pytest.mark.parametrize("state", ["accepted", "duplicate", "refused", "expired"])
def test_it_ends_once(box: Outbox, state: str) -> None:
    message_id = put(box, "update", "u")
    assert box.end(message_id, state, "why")  # type: ignore[arg-type]
    assert not box.end(message_id, "accepted")
    assert not box.end("00" * 16, "accepted")
    assert box.counts() == {("update", "sealed"): 1, ("update", state): 1}
    row = box._db.execute("SELECT state, reason FROM messages").fetchone()
    assert tuple(row) == (state, "why")
    assert box._db.execute("SELECT count(*) FROM bodies").fetchone()[0] == 0


def test_only_features_expire_and_it_is_counted(box: Outbox, clock: HandClock) -> None:
    stages: tuple[UpStage, ...] = ("features", "update", "judgement", "report")
    for stage in stages:
        put(box, stage, "m")
    assert box.expire() == 0
    clock.time += timedelta(days=10_000)
    assert box.expire() == 1
    assert {w.stage for w in box.waiting()} == {"update", "judgement", "report"}
    assert box.counts()["features", "expired"] == 1


def test_quota_drops_the_oldest_features_visibly(box: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CLASSES, "features", Class(3, timedelta(days=30), quota_bytes=250))
    first, second = put(box, "features", "m1"), put(box, "features", "m2")
    put(box, "update", "u", sealed=b"s" * 1000)
    third = put(box, "features", "m3")
    assert [w.whole.id for w in box.waiting() if w.stage == "features"] == [second, third]
    row = box._db.execute("SELECT state, reason FROM messages WHERE id = ?", (first,)).fetchone()
    assert tuple(row) == ("expired", "the quota of features is full")
    assert box.counts()["features", "expired"] == 1


def test_body_is_read_in_parts(box: Outbox) -> None:
    put(box, "update", "u", sealed=bytes(range(256)) * 10)
    assert box.body(1, 250, 12) == (bytes(range(256)) * 10)[250:262]


def test_ended_rows_do_not_pile_up_but_refusals_stay(box: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "_ENDED_KEPT", 5)
    box.end(put(box, "features", "refused"), "refused", "why")
    for number in range(20):
        box.end(put(box, "features", f"m{number}"), "accepted")
    assert box._db.execute("SELECT count(*) FROM messages").fetchone()[0] == 6
    assert box.counts()["features", "accepted"] == 20


def test_drop_is_whole_or_absent(tmp_path: Path) -> None:
    folder = tmp_path / "outbox" / "drop"
    drop(folder, "features", features(1), name="features-00ff-ab.12")
    (file,) = folder.iterdir()
    assert file.name == "features-00ff-ab.12.features.msg"
    assert file.read_bytes() == encode(features(1))


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "../x", "a" * 152, "ä", "a b"])
def test_attack_drop_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(PeerError):
        drop(tmp_path, "features", features(1), name=name)
    assert list(tmp_path.iterdir()) == []
