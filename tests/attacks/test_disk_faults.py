"""The disk fills in the middle of an object, fails, or may only be read; the index is locked; the clock jumps.

Each gets the right status, is over when the cause is over, without a restart, and concerns nobody else. The system
calls of a real door fail by strace's fault injection; what only a file system can do is done on a small one of our own.
"""

from __future__ import annotations

import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from edge.intake import spool as spool_module
from edge.intake.part import Arriving
from edge.intake.status import Outcome
from edge.results.store import Store
from scripts.lab.child import wait_until
from scripts.lab.door import DoorProcess, door_process
from scripts.lab.kill import attach
from shared.clock import SystemClock
from shared.errors import RoomError
from tests.simulators import caller
from tests.simulators.caller import CT, DATA, Bystander, Caller
from tests.simulators.modality import EXPLICIT, associate, encoded, phantom_study, send_raw
from tests.simulators.node import make_door, make_spool

ITEMS = phantom_study("chest-xray", 0, seed=1) + phantom_study("chest-xray", 0, seed=2)
NO_ROOM, FAULT = 0xA700, 0x0110


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DoorProcess]:
    with door_process(tmp_path_factory.mktemp("faults") / "state", "--allow", "MODALITY", "--allow", "OTHER") as one:
        yield one


@contextmanager
def failing(door: DoorProcess, call: str, error: str, when: str, *, thread: int = 0) -> Iterator[None]:
    """Lets system calls of the door fail while the block runs; the count starts anew in every thread."""
    fault = f"inject={call}:error={error}:when={when}"
    tracer = attach(door, "-o", "/dev/null", "-e", f"trace={call}", "-e", fault, thread=thread)
    try:
        yield
    finally:
        tracer.terminate()
        tracer.wait(10)


def echoes(one: Caller) -> bool:
    one.say(caller.pdu(DATA, caller.value(3, 3, caller.echo())))
    return one.status() == 0


FAULTS = [
    ("write", "ENOSPC", "1+", NO_ROOM),  # at once, and the log's disk too
    ("write", "ENOSPC", "2+", NO_ROOM),  # in mid-object
    ("write", "EDQUOT", "3", NO_ROOM),
    ("write", "EIO", "2", FAULT),
    ("openat", "EROFS", "1+", FAULT),
    ("openat", "EMFILE", "1", FAULT),
    ("pread64,mmap", "EIO", "1+", FAULT),  # reading the head
    ("fsync", "EIO", "1", FAULT),  # of the file
    ("fsync", "ENOSPC", "1", NO_ROOM),
    ("fsync", "EIO", "2", FAULT),  # of the folder
    ("rename", "EROFS", "1", FAULT),
    ("pwrite64", "EIO", "1+", FAULT),  # the index
    ("pwrite64", "ENOSPC", "1+", NO_ROOM),
    ("unlink", "EROFS", "1+", 0),
    ("openat,write,rename,unlink,pwrite64", "EROFS", "1+", FAULT),  # the whole disk, read-only
    ("write,rename,unlink,pwrite64", "EROFS", "2+", FAULT),  # the same in mid-object
]


@pytest.mark.parametrize(("call", "error", "when", "status"), FAULTS)
def test_a_system_call_that_fails_is_answered_and_over_when_it_works_again(
    door: DoorProcess, call: str, error: str, when: str, status: int
) -> None:
    number = FAULTS.index((call, error, when, status))
    item = phantom_study("chest-xray", 0, seed=100 + number)[0]
    item.SOPInstanceUID = instance = f"1.2.840.99.{number}"
    item.SOPClassUID = CT
    data = encoded(item)
    assert len(data) > 200_000
    spool = door.state / "spool"
    before = len(list(spool.glob("*.dcm")))
    with Caller(door.port) as one:
        one.associate()
        with failing(door, call, error, when):
            answered = caller.send(one, instance, data)
            assert answered == status
            assert echoes(one)
        assert caller.send(one, instance, data) == 0
        assert echoes(one)
    assert len(list(spool.glob("*.dcm"))) == before + 1
    database = sqlite3.connect(door.state / "intake.sqlite")
    rows = database.execute("SELECT file, offset FROM objects WHERE sop_instance = ?", (instance,)).fetchall()
    database.close()
    assert [(spool / file).read_bytes()[offset:] for file, offset in rows] == [data]
    assert not list(spool.glob(".*")) or "unlink" in call


def test_somebody_else_is_not_concerned(door: DoorProcess) -> None:
    other = Bystander(door.port)
    try:
        other.more()
        threads = door.threads()
        with Caller(door.port) as one:
            one.associate()
            (mine,) = door.threads() - threads
            item = phantom_study("chest-xray", 0, seed=1)[0]
            item.SOPClassUID, item.SOPInstanceUID = CT, "1.2.840.98"
            with failing(door, "write,rename,openat", "EROFS", "1+", thread=mine):
                for _ in range(3):
                    assert caller.send(one, "1.2.840.98", encoded(item)) == FAULT
                    other.more(1)
            assert caller.send(one, "1.2.840.98", encoded(item)) == 0
    finally:
        other.stop()


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own, so small that it can be filled."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"mounting is not allowed: {done.stderr.strip()[:60]}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_is_answered_before_it_is_full_and_served_again_when_there_is_room(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "80m") as disk:
        spool = make_spool(disk)
        door = make_door(spool)
        try:
            sop_class = str(phantom_study("chest-xray", 0, seed=1)[0].SOPClassUID)
            association = associate(door.port, [(sop_class, EXPLICIT)])

            def send(seed: int) -> int:
                item = phantom_study("chest-xray", 0, seed=seed)[0]
                return send_raw(association, sop_class, str(item.SOPInstanceUID), EXPLICIT, encoded(item))

            assert send(1) == 0
            (disk / "filler").write_bytes(bytes(14_000_000))
            assert send(2) == NO_ROOM
            assert send(1) == NO_ROOM  # even what is there already: nothing is promised while there is no room
            (disk / "filler").unlink()
            assert send(2) == 0
            association.release()
        finally:
            door.stop()
            spool.close()


def test_a_disk_without_reserve_that_fills_in_mid_object_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "_FREE_RESERVE_BYTES", -(1 << 40))
    item = ITEMS[1]
    arriving = Arriving(str(item.SOPClassUID), str(item.SOPInstanceUID), EXPLICIT)
    with small_disk(tmp_path / "disk", "2m") as disk:
        spool = make_spool(disk)
        (disk / "filler").write_bytes(bytes(1_600_000))
        with pytest.raises(RoomError):
            spool.store(arriving, [encoded(item)[:64_000], encoded(item)])
        assert not list(spool.folder.iterdir())
        (disk / "filler").unlink()
        assert spool.store(arriving, [encoded(item)]) is Outcome.STORED
        spool.close()


def test_an_index_that_somebody_else_locks_is_answered_and_served_again(tmp_path: Path) -> None:
    spool = make_spool(tmp_path)
    spool.index._db.execute("PRAGMA busy_timeout = 300")  # of 30 s
    door = make_door(spool)
    locker = sqlite3.connect(tmp_path / "intake.sqlite", isolation_level=None)
    try:
        item = ITEMS[1]
        sop_class, instance = str(item.SOPClassUID), str(item.SOPInstanceUID)
        association = associate(door.port, [(sop_class, EXPLICIT), (caller.VERIFICATION, EXPLICIT)])
        locker.execute("BEGIN IMMEDIATE")
        assert send_raw(association, sop_class, instance, EXPLICIT, encoded(item)) == FAULT
        assert association.send_c_echo().Status == 0
        locker.execute("ROLLBACK")
        assert send_raw(association, sop_class, instance, EXPLICIT, encoded(item)) == 0
        association.release()
        assert spool.counts()["stored"] == 1
        assert spool._used_bytes == sum(path.stat().st_size for path in spool.folder.iterdir())
    finally:
        locker.close()
        door.stop()
        spool.close()


def test_an_index_that_is_locked_for_a_moment_is_waited_for(tmp_path: Path) -> None:
    spool = make_spool(tmp_path)
    locker = sqlite3.connect(tmp_path / "intake.sqlite", isolation_level=None, check_same_thread=False)
    locker.execute("BEGIN IMMEDIATE")
    item = ITEMS[1]
    outcomes: list[Outcome] = []
    arriving = Arriving(str(item.SOPClassUID), str(item.SOPInstanceUID), EXPLICIT)
    thread = threading.Thread(target=lambda: outcomes.append(spool.store(arriving, [encoded(item)])))
    thread.start()
    wait_until("the file to have its name", lambda: bool(list(spool.folder.glob("*.dcm"))))
    assert outcomes == []
    locker.execute("ROLLBACK")
    thread.join(20)
    assert outcomes == [Outcome.STORED]
    locker.close()
    spool.close()


class Jumping:
    """A wall clock that is set by hand; the monotonic one goes on."""

    def __init__(self) -> None:
        self.at = datetime(2026, 1, 2, tzinfo=UTC)

    def now(self) -> datetime:
        return self.at

    def monotonic(self) -> float:
        return SystemClock().monotonic()


def test_a_clock_that_jumps_backwards_and_to_1970_changes_no_answer(tmp_path: Path) -> None:
    clock = Jumping()
    spool = make_spool(tmp_path, clock, quarantine_limit_bytes=1_000_000)
    door = make_door(spool, clock=clock)
    sop_class = str(ITEMS[1].SOPClassUID)
    sent = []
    try:
        for year in (2026, 2025, 1970, 2100, 1970):
            clock.at = datetime(year, 1, 1, tzinfo=UTC)
            association = associate(door.port, [(sop_class, EXPLICIT)])
            item = phantom_study("chest-xray", 0, seed=len(sent))[0]
            sent.append(str(item.SOPInstanceUID))
            assert send_raw(association, sop_class, sent[-1], EXPLICIT, encoded(item)) == 0
            assert send_raw(association, sop_class, f"1.2.3.{year}", EXPLICIT, encoded(item)[:-5]) == 0xC000
            association.release()
            newest = spool.index.rows("SELECT file FROM quarantine WHERE sop_instance = ?", f"1.2.3.{year}")
            assert newest, "the newest left the quarantine first"
            assert (spool.quarantine_folder / newest[-1]["file"]).exists()
    finally:
        door.stop()
    rows = spool.index.rows("SELECT sop_instance FROM objects ORDER BY id")
    assert [row["sop_instance"] for row in rows] == sent
    spool.close()
    again = make_spool(tmp_path, clock)
    follower = Store(tmp_path / "results.sqlite", tmp_path / "intake.sqlite")
    claimed = [follower.claim(0.0) for _ in sent]
    assert [one.sop_instance for one in claimed if one] == sent
    follower.close()
    again.close()
