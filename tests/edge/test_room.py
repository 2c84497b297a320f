"""Room: nothing that is owed ever leaves, what leaves makes room, and the door serves again without a restart."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.intake import debts
from edge.intake.debts import Books, Open, Worked
from edge.intake.index import EVICTED
from edge.intake.part import Arriving
from edge.intake.release import ask, stuck
from edge.intake.room import HIGH, IDENTITY, LOW, Candidate, Keeper, Limits, Retention, level, plan
from edge.intake.spool import Spool
from edge.intake.status import Outcome
from edge.pipeline import Pipeline
from edge.report import room_state
from scripts.lab.child import wait_until
from shared.errors import PeerError
from tests.edge.test_intake_commitment import Hears, request
from tests.simulators.modality import EXPLICIT, encoded, phantom_study, storescu, write_files
from tests.simulators.node import make_door, make_pipeline, make_spool, run_until_idle
from tests.simulators.reading import ReadingNode

DAY, HOUR = 86400.0, 3600.0
RETENTION = Retention(full_s=14 * DAY, short_s=24 * HOUR)


class Clock:
    """Time by hand."""

    def __init__(self) -> None:
        self.seconds = 1_800_000_000.0

    def now(self) -> datetime:
        return datetime.fromtimestamp(self.seconds, UTC)

    def monotonic(self) -> float:
        return self.seconds


# -- the pure core --------------------------------------------------------------------------------------------------

candidates = st.builds(
    Candidate,
    digest=st.uuids().map(str),
    length=st.integers(1, 50),
    stored_at=st.floats(0, 30 * DAY),
    promised_at=st.just(0.0) | st.floats(0, 30 * DAY),
    conflict=st.booleans(),
    owed=st.sampled_from(["", "", debts.UNDELIVERED, debts.UNANSWERED, debts.QUARANTINED, debts.UNSENT]),
)


@settings(max_examples=500)
@given(st.lists(candidates, max_size=40), st.floats(0, 60 * DAY), st.integers(0, 100), st.integers(0, 100))
def test_the_plan_keeps_what_is_owed_promised_or_young(
    objects: list[Candidate], now: float, low: int, more: int
) -> None:
    objects.sort(key=lambda one: one.stored_at)
    limits, used = Limits(high=low + more, low=low), sum(one.length for one in objects)
    gone = list(plan(objects, now=now, used=used, limits=limits, retention=RETENTION))
    for one in gone:
        assert not one.owed
        age = now - max(one.stored_at, one.promised_at)
        assert age >= RETENTION.short_s
        if age < RETENTION.full_s:
            assert used >= limits.high
            assert not one.promised_at
            assert not one.conflict
    over = [one for one in objects if not one.owed and now - max(one.stored_at, one.promised_at) >= RETENTION.full_s]
    assert set(over) <= set(gone)
    kept = used - sum(one.length for one in gone)
    early = [one for one in gone if one not in over]
    if early:  # not one more than it took to get down to the low mark
        assert kept + max(one.length for one in gone) > limits.low
        still = [one for one in objects if one not in gone and not (one.owed or one.promised_at or one.conflict)]
        assert all(one.stored_at >= early[-1].stored_at for one in still)  # the oldest went first


@pytest.mark.parametrize(("used", "says"), [(0, ""), (79, ""), (80, "warning"), (96, "warning"), (97, "full")])
def test_the_marks(used: int, says: str) -> None:
    assert level(used, 100) == says
    assert LOW < HIGH


series_names = st.sampled_from(["s1", "s2", "s3"])
outcomes = st.sampled_from(["", "gone", "answered", "slice", "unassessed", "ignored", "quarantined", "rule:forward"])
answer_rows = st.tuples(st.sampled_from(["a1", "a2", "a3"]), st.integers(1, 3), st.booleans())
books = st.builds(
    Open,
    reading=st.frozensets(series_names),
    pending=st.frozensets(series_names),
    undelivered=st.frozensets(st.tuples(st.sampled_from(["a1", "a2", "a3"]), st.integers(1, 3))),
    labelled=st.frozensets(st.sampled_from(["a1", "a2", "a3"])),
)


@settings(max_examples=500)
@given(outcomes, series_names, st.dictionaries(series_names, st.lists(answer_rows, max_size=3)), books)
def test_nothing_is_owed_only_when_all_is_done(
    outcome: str, series: str, answers: dict[str, list[tuple[str, int, bool]]], unfinished: Open
) -> None:
    reason = debts.judge("d", series, Worked({"d": outcome} if outcome else {}, answers), unfinished)
    mine = answers.get(series, [])
    done = (
        outcome not in ("", "gone", "quarantined")
        and series not in unfinished.reading | unfinished.pending
        and (bool(mine) or outcome in ("ignored", "rule:forward"))
        and all(built for _, _, built in mine)
        and not {(answer, version) for answer, version, _ in mine} & unfinished.undelivered
        and not {answer for answer, _, _ in mine} & unfinished.labelled
    )
    assert (reason == "") == done


# -- with a real spool and a real pipeline --------------------------------------------------------------------------


class Node:
    """A spool, a pipeline and a keeper on one state folder and one clock."""

    def __init__(self, state: Path, *, pacs: bool = False, forwarding: bool = False, **limits: int) -> None:
        self.state = state
        self.clock = Clock()
        self.spool: Spool = make_spool(state, self.clock, **limits)
        self.pipeline: Pipeline = make_pipeline(state, clock=self.clock)
        self.keeper = Keeper(self.spool, Books(state, pacs=pacs, forwarding=forwarding), RETENTION, self.clock)

    def put(self, *items: pydicom.Dataset) -> list[Outcome]:
        found = []
        for item in items:
            self.clock.seconds += 0.01
            arriving = Arriving(
                str(item.SOPClassUID), str(item.SOPInstanceUID), str(item.file_meta.TransferSyntaxUID), "MODALITY"
            )
            found.append(self.spool.store(arriving, [encoded(item)]))
        return found

    def answer(self) -> None:
        self.clock.seconds += 1
        run_until_idle(self.pipeline)

    def later(self, seconds: float) -> int:
        self.clock.seconds += seconds
        return self.keeper.step()

    def files(self) -> int:
        return len(list((self.state / "spool").glob("*.dcm")))

    def held(self) -> dict[str, int]:
        return dict(json.loads(self.spool.index.rows("SELECT held FROM room")[0]["held"]))

    def write(self, file: str, statement: str) -> None:
        database = sqlite3.connect(self.state / file)
        with database:
            database.execute(statement)
        database.close()


def xray(seed: int = 11) -> pydicom.Dataset:
    return phantom_study("chest-xray", 1, seed=seed, patient=f"P{seed}")[0]


def test_an_answered_object_leaves_after_its_retention_and_not_before(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.put(xray())
    assert node.later(20 * DAY) == 0
    assert node.held() == {debts.UNREAD: 1}
    node.answer()
    assert node.later(0) == 1
    assert node.files() == 0
    node.put(xray(12))
    node.answer()
    assert node.later(13.9 * DAY) == 0
    assert node.later(0.2 * DAY) == 1


def test_an_evicted_object_that_comes_again_is_stored_again_and_answered_once(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.put(xray())
    node.answer()
    documents = sqlite3.connect(tmp_path / "results.sqlite").execute("SELECT sop_instance FROM deliveries").fetchall()
    assert node.later(15 * DAY) == 1
    assert node.put(xray()) == [Outcome.STORED]
    node.answer()
    database = sqlite3.connect(tmp_path / "results.sqlite")
    assert database.execute("SELECT version FROM answers").fetchall() == [(1,)]
    assert database.execute("SELECT sop_instance FROM deliveries").fetchall() == documents
    assert node.files() == 1
    assert node.later(13 * DAY) == 0  # its time begins anew
    assert node.later(2 * DAY) == 1


def test_what_waits_for_the_pacs_stays_where_there_is_one(tmp_path: Path) -> None:
    node = Node(tmp_path, pacs=True)
    node.put(xray())
    node.answer()
    assert node.later(15 * DAY) == 0
    assert node.held() == {debts.UNDELIVERED: 1}
    node.write("results.sqlite", "UPDATE deliveries SET state = 'sent'")
    assert node.later(0) == 1


def test_what_cannot_be_read_and_what_is_in_identity_conflict_stay_for_ever(tmp_path: Path) -> None:
    node = Node(tmp_path)
    broken, one, other = xray(1), xray(2), xray(2)
    broken.PixelData = broken.PixelData[:1000]
    other.PatientID = "SOMEBODY ELSE"
    assert node.put(broken, one, other)[2] is Outcome.IDENTITY_CONFLICT
    node.answer()
    assert node.later(1000 * DAY) == 1
    assert node.files() == 2
    assert node.held() == {debts.QUARANTINED: 1, IDENTITY: 1}


def test_a_series_stays_whole_while_one_of_its_images_is_open(tmp_path: Path) -> None:
    node = Node(tmp_path)
    study = phantom_study("chest-ct", 2, seed=5, slices=4)
    node.put(*study[:3])
    node.answer()
    node.clock.seconds += 15 * DAY
    node.put(study[3])
    assert node.later(0) == 0
    assert node.held() == {debts.UNREAD: 3}
    node.pipeline.step()
    assert node.later(0) == 0
    assert node.held() == {debts.UNANSWERED: 3}
    node.answer()
    assert node.later(0) == 3


def test_what_rules_send_on_stays_until_it_was_routed_and_taken(tmp_path: Path) -> None:
    from edge.forward.queue import Queue

    node = Node(tmp_path, forwarding=True)
    node.put(xray())
    node.answer()
    assert node.later(15 * DAY) == 0
    assert node.held() == {debts.UNSENT: 1}  # there is no forward.sqlite yet
    queue = Queue(tmp_path / "forward.sqlite")
    assert node.later(0) == 0  # it was not routed yet
    (row,) = node.spool.index.rows("SELECT id, digest FROM objects")
    (generation,) = node.spool.index.rows("SELECT id FROM generation")
    with queue.writing() as db:
        db.execute("INSERT INTO cursors VALUES (?, ?)", (f"intake {generation['id']}", row["id"]))
        values = "'archive', ?, '', 0, 0, '', '', '', '', '', '', 1, 'waiting', 0, 0, '', '', 0, 0"
        db.execute(f"INSERT INTO queue VALUES (1, {values})", (row["digest"],))  # noqa: S608
    for state in ("waiting", "dead"):
        node.write("forward.sqlite", f"UPDATE queue SET state = '{state}'")  # noqa: S608
        assert node.later(0) == 0
    node.write("forward.sqlite", "UPDATE queue SET state = 'sent'")
    node.write("forward.sqlite", f"INSERT INTO unrouted VALUES ('{row['digest']}', 1, 0)")  # noqa: S608
    assert node.later(0) == 0  # the disk did not give it: it is routed later
    node.write("forward.sqlite", "DELETE FROM unrouted")
    assert node.later(0) == 1


def test_what_was_committed_stays_its_retention_however_full_the_spool_is(tmp_path: Path) -> None:
    size = len(encoded(xray(0)))
    node = Node(tmp_path, limit_bytes=10 * size)
    items = [xray(seed) for seed in range(9)]
    node.put(*items)
    node.answer()
    node.spool.index.promise([str(item.SOPInstanceUID) for item in items], node.clock.seconds)
    assert node.later(10 * DAY) == 0
    assert node.later(5 * DAY) == 9


def test_short_of_room_the_oldest_leave_early_down_to_the_low_mark(tmp_path: Path) -> None:
    size = len(encoded(xray(0))) + 1000
    node = Node(tmp_path, limit_bytes=10 * size)
    for seed in range(9):
        node.put(xray(seed))
    node.answer()
    assert node.later(23 * HOUR) == 0
    assert node.spool.index.rows("SELECT level FROM room")[0]["level"] == "warning"
    assert node.later(2 * HOUR) in (2, 3)
    assert node.spool.fullness() <= LOW
    assert node.spool.index.rows("SELECT level FROM room")[0]["level"] == ""
    left = [row["sop_instance"] for row in node.spool.index.rows("SELECT sop_instance FROM objects WHERE state='kept'")]
    assert str(xray(8).SOPInstanceUID) in left
    assert str(xray(0).SOPInstanceUID) not in left
    assert node.later(12 * DAY) == 0


def test_no_books_no_eviction(tmp_path: Path) -> None:
    spool = make_spool(tmp_path, Clock())
    keeper = Keeper(spool, Books(tmp_path, pacs=False, forwarding=False), Retention(0, 0), Clock())
    item = xray()
    spool.store(Arriving(str(item.SOPClassUID), str(item.SOPInstanceUID), "1.2.840.10008.1.2.1"), [encoded(item)])
    assert keeper.step() == 0


def test_a_person_lets_go_of_what_nothing_else_does(tmp_path: Path) -> None:
    node = Node(tmp_path / "state")
    (tmp_path / "edge.toml").write_text("")
    broken, one, other = xray(1), xray(2), xray(2)
    broken.PixelData = broken.PixelData[:1000]
    other.PatientID = "SOMEBODY ELSE"
    node.put(broken, one, other)
    node.answer()

    listed = stuck(node.state)
    assert [one.why.partition(":")[0] for one in listed] == ["cannot be read", "identity conflict"]
    question = "SELECT digest FROM objects WHERE sop_instance = ? AND state = 'kept'"
    (kept,) = node.spool.index.rows(question, str(one.SOPInstanceUID))
    for name in ("", "ab", "0" * 64, kept["digest"], "../../labels.sqlite"):
        with pytest.raises(PeerError):
            ask(node.state, [listed[0].digest, name])
    assert node.later(0) == 0
    node.spool.index.promise([str(other.SOPInstanceUID)], node.clock.seconds)
    command = [sys.executable, "-m", "edge", "release", *(one.digest[:12] for one in listed)]
    told = subprocess.run(
        [*command, "--config", str(tmp_path / "edge.toml")], capture_output=True, text=True, check=True
    )
    assert "identity conflict" in told.stdout
    assert node.later(0) == 1
    assert node.files() == 2  # the other one was committed
    assert node.later(13 * DAY) == 0
    assert node.later(2 * DAY) == 2  # and the one that was answered
    assert stuck(node.state) == []
    assert list((node.state / "release").iterdir()) == []


# -- death, and the door --------------------------------------------------------------------------------------------

_DIES = """
import os, pathlib, signal, sys
from tests.simulators.node import make_spool
spool = make_spool(pathlib.Path(sys.argv[1]))
pathlib.Path.unlink = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
spool.evict([sys.argv[2]], promised_before=float("inf"))
"""


def test_sigkill_between_the_mark_and_the_removal_leaves_the_object_kept_and_its_answer_alone(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.put(xray())
    node.answer()
    (digest,) = (row["digest"] for row in node.spool.index.rows("SELECT digest FROM objects"))
    node.spool.close()
    dead = subprocess.run([sys.executable, "-c", _DIES, str(tmp_path), digest], check=False)
    assert dead.returncode == -signal.SIGKILL
    database = sqlite3.connect(tmp_path / "intake.sqlite")
    assert database.execute("SELECT state FROM objects").fetchall() == [(EVICTED,)]
    database.close()
    again = Node(tmp_path)
    assert [row["state"] for row in again.spool.index.rows("SELECT state FROM objects")] == ["kept"]
    assert again.spool.room()[0] == (tmp_path / "spool" / f"{digest}.dcm").stat().st_size
    again.answer()
    assert sqlite3.connect(tmp_path / "results.sqlite").execute("SELECT version FROM answers").fetchall() == [(1,)]
    assert again.put(xray()) == [Outcome.DUPLICATE]
    assert again.later(15 * DAY) == 1
    assert again.files() == 0


_EVICTS = """
import pathlib, sys
from tests.simulators.node import make_spool
make_spool(pathlib.Path(sys.argv[1])).evict([sys.argv[2]], promised_before=float("inf"))
"""


def test_the_mark_is_on_the_disk_before_the_file_goes(tmp_path: Path) -> None:
    """Else a power cut could leave a row that says kept and no file."""
    node = Node(tmp_path / "state")
    node.put(xray())
    (digest,) = (row["digest"] for row in node.spool.index.rows("SELECT digest FROM objects"))
    node.spool.close()
    calls = tmp_path / "calls"
    trace = ["strace", "-f", "-y", "-o", str(calls), "-e", "trace=fsync,fdatasync,unlink,unlinkat"]
    subprocess.run([*trace, sys.executable, "-c", _EVICTS, str(node.state), digest], check=True)
    lines = calls.read_text().splitlines()
    (removed,) = (number for number, line in enumerate(lines) if f"{digest}.dcm" in line and "unlink" in line)
    synced = max(number for number, line in enumerate(lines[:removed]) if "sync(" in line)
    assert "intake.sqlite-wal" in lines[synced]


def test_the_same_bytes_that_come_while_their_object_leaves_are_not_lost(tmp_path: Path) -> None:
    """Eviction holds the lock under which an arriving object is renamed and indexed."""
    node = Node(tmp_path)
    node.put(xray())
    (digest,) = (row["digest"] for row in node.spool.index.rows("SELECT digest FROM objects"))
    real, outcomes = node.spool.index.evict, list[Outcome]()
    sender = threading.Thread(target=lambda: outcomes.extend(node.put(xray())))

    def evict(digests: list[str], promised_before: float) -> list[str]:
        marked = real(digests, promised_before)
        sender.start()
        sender.join(0.5)  # it may come as far as it gets: the file is still there, its row says evicted
        return marked

    node.spool.index.evict = evict  # type: ignore[method-assign,assignment]
    assert node.spool.evict([digest], promised_before=float("inf")) == 1
    sender.join()
    assert outcomes == [Outcome.STORED]
    assert node.files() == 1
    assert node.spool.index.rows("SELECT state FROM objects")[0]["state"] == "kept"


def test_what_is_promised_while_it_is_chosen_stays(tmp_path: Path) -> None:
    node = Node(tmp_path)
    item = xray()
    node.put(item)
    (digest,) = (row["digest"] for row in node.spool.index.rows("SELECT digest FROM objects"))
    node.spool.index.promise([str(item.SOPInstanceUID)], node.clock.seconds)
    assert node.spool.evict([digest], promised_before=node.clock.seconds) == 0
    assert node.files() == 1


def test_the_page_and_status_say_how_full_the_spool_is_and_what_waits(tmp_path: Path) -> None:
    node = ReadingNode(tmp_path / "state").start()
    watcher = node.client(node.person("Ada", "administrator"))
    try:
        assert watcher.get("/api/status").json()["room"] is None
        spool = make_spool(tmp_path / "state", limit_bytes=1_700_000)
        clock = Clock()
        clock.seconds += 100 * DAY
        Keeper(spool, Books(tmp_path / "state", pacs=True, forwarding=False), RETENTION, clock).step()
        room = watcher.get("/api/status").json()["room"]
        assert (room["level"], room["held"]) == ("warning", {debts.UNDELIVERED: 3, debts.QUARANTINED: 1})
        page = watcher.get("/status").text
        assert "objects leave early; kept on: 1 in quarantine: cannot be read, 3 waiting for the PACS" in page
    finally:
        watcher.close()
        node.stop()
    config = tmp_path / "edge.toml"
    config.write_text('[node]\nstate = "state"\n')
    command = [sys.executable, "-m", "edge", "status", "--json", "--config", str(config)]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(said.stdout)["room"]["level"] == "warning"


def test_what_the_index_remembers_of_the_past_is_bounded(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.put(xray())
    node.answer()
    node.spool.association_ended("old")
    assert node.later(15 * DAY) == 1
    assert node.spool.index.rows("SELECT id FROM associations") == []
    assert len(node.spool.index.rows("SELECT id FROM objects")) == 1  # a year of what left, to know it again
    node.later(360 * DAY)
    assert node.spool.index.rows("SELECT id FROM objects") == []
    assert node.put(xray()) == [Outcome.STORED]
    node.answer()
    assert sqlite3.connect(tmp_path / "results.sqlite").execute("SELECT version FROM answers").fetchall() == [(1,)]


@pytest.mark.e2e
def test_full_then_evicted_then_served_again_without_a_restart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = len(encoded(xray(0))) + 1000
    node = Node(tmp_path / "state", limit_bytes=int(10.2 * size))
    door = make_door(node.spool)
    try:
        files = write_files(
            tmp_path / "send", [phantom_study("chest-xray", 1, seed=s, patient=f"P{s}")[0] for s in range(12)]
        )
        assert storescu(door.port, files[:8]).returncode == 0
        assert node.later(0) == 0
        assert node.spool.index.rows("SELECT level FROM room")[0]["level"] == ""
        sent = storescu(door.port, files[8:9])
        assert sent.returncode == 0, sent.stderr
        assert node.later(0) == node.later(1) == 0
        assert node.spool.index.rows("SELECT level FROM room")[0]["level"] == "warning"
        assert capsys.readouterr().out.count("intake.room_short") == 1
        over = storescu(door.port, files[9:])  # one association: it may finish, but the tenth is the last that fits
        assert "Refused: OutOfResources" in over.stdout + over.stderr
        assert node.files() == 10
        rejected = storescu(door.port, files[10:])
        assert "Rejected Transient" in rejected.stderr
        assert "Temporary Congestion" in rejected.stderr
        assert node.later(30 * HOUR) == 0
        row = node.spool.index.rows("SELECT level, held FROM room")[0]
        assert (row["level"], json.loads(row["held"])) == ("full", {debts.UNREAD: 10})
        node.answer()
        assert node.later(0) == 3
        assert node.spool.index.rows("SELECT level FROM room")[0]["level"] == ""
        assert storescu(door.port, files[10:]).returncode == 0
        assert storescu(door.port, files[:1]).returncode == 0  # one that has left comes again
        node.answer()
        answers = sqlite3.connect(node.state / "results.sqlite").execute("SELECT answer, version FROM answers")
        assert sorted(version for _, version in answers) == [1] * 12
    finally:
        door.stop()


@pytest.mark.e2e
def test_a_storage_commitment_holds_from_its_report_and_is_refused_once_the_object_has_left(tmp_path: Path) -> None:
    node = Node(tmp_path)
    item = xray()
    pair = (str(item.SOPClassUID), str(item.SOPInstanceUID))
    door = make_door(node.spool, clock=node.clock)
    try:
        early = Hears(answer=0x0110)  # it asks before the object has come, and does not take the report
        early.ask(door.port, request(pair, transaction="2.25.1"))
        node.put(item)
        node.answer()
        node.clock.seconds += 10 * DAY
        (due,) = door.commitments.due(node.clock.seconds)  # judged anew for an association of our own
        assert due.report.safe == (pair,)
        assert node.later(13.9 * DAY) == 0  # ten days older than the retention, and promised by that report
        asks = Hears()
        asks.ask(door.port, request(pair, transaction="2.25.2"))
        assert [event for event, _ in asks.reports] == [1]
        assert node.later(13.9 * DAY) == 0
        assert node.later(0.2 * DAY) == 1
        late = Hears()
        late.ask(door.port, request(pair, transaction="2.25.3"))
        ((event, report),) = late.reports
        assert (event, report.FailedSOPSequence[0].FailureReason) == (2, 0x0112)
    finally:
        door.stop()


@pytest.mark.e2e
def test_the_intake_process_keeps_room_as_its_configuration_says(tmp_path: Path) -> None:
    state = tmp_path / "state"
    spool = make_spool(state)
    for seed, item in enumerate((xray(1), xray(2))):
        if seed:
            item.PixelData = item.PixelData[:1000]
        arriving = Arriving(str(item.SOPClassUID), str(item.SOPInstanceUID), EXPLICIT, "MODALITY")
        spool.store(arriving, [encoded(item)])
    spool.close()
    run_until_idle(make_pipeline(state))
    config = tmp_path / "edge.toml"
    config.write_text('[dicom]\nhost = "127.0.0.1"\nport = 0\n[room]\nretention_days = 0.00001\n')
    command = [sys.executable, "-m", "edge", "run", "--only", "intake", "--config", str(config)]
    intake = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until("the answered object has left", lambda: len(list((state / "spool").glob("*.dcm"))) == 1, seconds=60)
        wait_until("it says what stays", lambda: _held(state) == {debts.QUARANTINED: 1}, seconds=30)
        intake.terminate()
        assert intake.wait(30) == 0
    finally:
        intake.kill()
        intake.wait()


def _held(state: Path) -> object:
    room = room_state(state)
    return room.held if room else None


_DOOR = """
import pathlib, sys, time
from edge.intake import room
from edge.intake.debts import Books
from shared.clock import SystemClock
from tests.simulators.node import make_door, make_spool
room.EVERY_S, room._REST = 0.02, 0.0
state = pathlib.Path(sys.argv[1])
spool = make_spool(state, limit_bytes=int(sys.argv[2]))
room.Keeper(spool, Books(state, pacs=False, forwarding=False), room.Retention(0.0, 0.0), SystemClock()).start()
print(make_door(spool).port, file=sys.stderr, flush=True)  # the log goes to stdout
time.sleep(600)
"""


@pytest.mark.e2e
def test_sigkill_while_objects_come_and_go_loses_nothing_that_was_answered_for(tmp_path: Path) -> None:
    """The spool holds six objects, sixty come, everything that is done leaves at once, and the door dies five times."""
    items = [phantom_study("chest-xray", 1, seed=seed % 6, patient=f"P{seed}")[0] for seed in range(60)]
    files = write_files(tmp_path / "send", items)
    command = [sys.executable, "-c", _DOOR, str(tmp_path), str(int(6.5 * files[0].stat().st_size))]
    make_spool(tmp_path).close()
    pipeline = make_pipeline(tmp_path)
    waiting, deaths = files, 0
    ends = time.monotonic() + 200
    while waiting:
        door = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            assert door.stderr is not None
            port = int(door.stderr.readline())
            while waiting and door.poll() is None:
                assert time.monotonic() < ends
                sending = threading.Thread(target=storescu, args=(port, waiting[:6]))
                sending.start()
                while sending.is_alive():
                    pipeline.step()
                    if deaths < 5 and _stored(tmp_path) >= 10 * (deaths + 1):
                        deaths += 1
                        door.kill()
                        door.wait()
                sending.join()
                known = _known(tmp_path)
                waiting = [
                    path for path, item in zip(files, items, strict=True) if str(item.SOPInstanceUID) not in known
                ]
        finally:
            door.kill()
            door.wait()
            if door.stderr is not None:
                door.stderr.close()
    spool = make_spool(tmp_path)
    run_until_idle(pipeline)
    assert deaths == 5
    rows = spool.index.rows("SELECT * FROM objects")
    assert {row["sop_instance"] for row in rows} == {str(item.SOPInstanceUID) for item in items}
    kept = {row["file"] for row in rows if row["state"] == "kept"}
    assert kept == {path.name for path in spool.folder.glob("*.dcm")}
    answers = sqlite3.connect(tmp_path / "results.sqlite").execute("SELECT version FROM answers").fetchall()
    assert answers == [(1,)] * 60
    assert sqlite3.connect(tmp_path / "results.sqlite").execute("SELECT COUNT(*) FROM quarantine").fetchone() == (0,)


def _known(state: Path) -> set[str]:
    database = sqlite3.connect(state / "intake.sqlite")
    found = {row[0] for row in database.execute("SELECT sop_instance FROM objects")}
    database.close()
    return found


def _stored(state: Path) -> int:
    return len(_known(state))
