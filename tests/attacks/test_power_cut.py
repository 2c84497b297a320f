"""The power is cut after every single system call of a real door; what was answered with Success is there.

How: `tests/simulators/power_cut.py`. The same replay, with a disk that ignores one kind of fsync, must lose objects:
otherwise it would prove nothing.
"""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydicom.dataset import Dataset, FileDataset
from pynetdicom.sop_class import StorageCommitmentPushModel

from edge.intake.commitment import WELL_KNOWN_INSTANCE
from edge.intake.part import Arriving
from edge.intake.status import Outcome
from edge.results.store import Store
from edge.sqlite import reading
from scripts.lab.child import wait_until
from scripts.lab.door import door_process
from tests.simulators.modality import EXPLICIT, associate, encoded, phantom_study, storescu, write_files
from tests.simulators.node import make_spool
from tests.simulators.power_cut import Call, Disk, cuts, lay_out, read_trace, traced

SEEDS = 30


def small(item: FileDataset, side: int) -> FileDataset:
    """The object with fewer pixels: a trace holds every byte four times."""
    item.Rows = item.Columns = side
    item.PixelData = random.Random(str(item.SOPInstanceUID)).randbytes(side * side * 2)
    return item


ITEMS = [small(item, 32 + 24 * n) for n, item in enumerate(phantom_study("chest-ct", 0, seed=3, slices=8))]
SENT = {str(item.SOPInstanceUID): encoded(item) for item in ITEMS}
LATER = small(phantom_study("chest-ct", 0, seed=4, slices=1)[0], 16)


@dataclass(frozen=True)
class Recorded:
    state: Path  # where the door worked
    calls: Sequence[Call]


def record(folder: Path, items: Sequence[FileDataset], senders: int = 1) -> Recorded:
    """Sends objects with `storescu` to a door on `folder`/state and returns its system calls."""
    trace, state = folder / "trace", folder / "state"
    state.mkdir(exist_ok=True)
    files = write_files(folder / "send", items)
    with door_process(state, before=traced(trace)) as door, ThreadPoolExecutor(senders) as pool:
        for sent in pool.map(lambda part: storescu(door.port, part), [files[n::senders] for n in range(senders)]):
            assert sent.returncode == 0, sent.stderr
        # A door killed inside its last write leaves bytes that no trace tells of.
        wait_until("the last write", lambda: ended(state / "intake.sqlite") == senders)
    shutil.rmtree(folder / "send")
    return Recorded(state, read_trace(trace))


def ended(index: Path) -> int:
    """How many associations the index of a spool knows to be over."""
    with reading(index) as database:
        assert database is not None
        return int(database.execute("SELECT COUNT(*) FROM associations").fetchone()[0])


@pytest.fixture(scope="module", params=[1, 4], ids=["one sender", "four senders"])
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Four senders share commits; their calls overlap in the trace."""
    return record(tmp_path_factory.mktemp("traced"), ITEMS, request.param)


@pytest.fixture
def rooms(tmp_path: Path) -> Iterator[Path]:
    """Folder after folder for what a cut left; none is kept."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def lost(left: Path, acknowledged: Sequence[str]) -> list[str]:
    """Starts the real spool on what a cut left and returns the acknowledged objects that it has not, whole.

    Whatever was lost: the spool starts, shows nothing half, takes a new object, and the pipeline's store sees every
    object once.
    """
    spool = make_spool(left)
    try:
        rows = spool.index.rows("SELECT * FROM objects")
        kept = {}
        for row in rows:
            data = (spool.folder / row["file"]).read_bytes()[row["offset"] :]
            assert data == SENT[row["sop_instance"]], "a half object is visible"
            kept[row["sop_instance"]] = row["digest"]
        assert not list(spool.folder.glob(".*"))
        later = str(LATER.SOPInstanceUID)
        arriving = Arriving(str(LATER.SOPClassUID), later, EXPLICIT)
        assert spool.store(arriving, [encoded(LATER)]) is Outcome.STORED
        digests = [row["digest"] for row in spool.index.rows("SELECT digest FROM objects")]
        assert sorted(work_off(left)) == sorted(set(digests) - done(left))
        return [uid for uid in acknowledged if uid not in kept]
    finally:
        spool.close()


def work_off(state: Path) -> list[str]:
    """Returns the digests that a pipeline gets from its store, in order."""
    store = Store(state / "results.sqlite", state / "intake.sqlite")
    seen, idle = [], 0
    while idle < 5:  # a look at a batch of objects that are done already finds nothing
        claimed = store.claim(0.0)
        idle = 0 if claimed else idle + 1
        if claimed:
            seen.append(claimed.digest)
            with store.writing():
                store.finish(claimed, "skipped")
    store.close()
    return seen


def done(state: Path) -> set[str]:
    """What the pipeline had worked off before the cut."""
    before = state / "before"
    if not before.exists():
        return set()
    return set(before.read_text().split())


def test_a_cut_after_any_system_call_loses_nothing_acknowledged(recorded: Recorded, rooms: Path) -> None:
    disk, checked = Disk(recorded.state), 0
    for number in cuts(disk, recorded.calls):
        lay_out(disk.survivors(), left := rooms / str(number))
        assert lost(left, disk.acknowledged) == [], number
        checked += 1
    assert sorted(disk.acknowledged) == sorted(SENT)
    assert checked > 2 * len(SENT)  # file and answer of each at the least


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_cut_that_keeps_a_part_of_what_was_not_synced(recorded: Recorded, rooms: Path, seed: int) -> None:
    luck = random.Random(seed)
    disk = Disk(recorded.state)
    for call in recorded.calls[: luck.randrange(len(recorded.calls))]:
        disk.apply(call)
    left = rooms / "left"
    lay_out(disk.survivors(luck), left)
    assert lost(left, disk.acknowledged) == []


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_disk_that_ignores_one_kind_of_fsync_loses_objects(recorded: Recorded, rooms: Path, kind: str) -> None:
    disk, missing = Disk(recorded.state, ignoring=[kind]), set()
    for number in cuts(disk, recorded.calls):
        lay_out(disk.survivors(), left := rooms / str(number))
        missing |= set(lost(left, disk.acknowledged))
    assert missing == set(SENT)


def test_the_pipeline_sees_no_object_twice_when_the_index_lost_its_newest_rows(recorded: Recorded, rooms: Path) -> None:
    disk, older = Disk(recorded.state), 0
    for number in cuts(disk, recorded.calls):
        lay_out(disk.visible(), seen := rooms / f"{number}-seen")
        if not (seen / "spool").exists() or number % 3:
            continue
        make_spool(seen).close()
        before = work_off(seen)
        lay_out(disk.survivors(), left := rooms / f"{number}-left")
        shutil.copy(seen / "results.sqlite", left)
        (left / "before").write_text(" ".join(before))
        assert lost(left, disk.acknowledged) == []
        older += bool(before)
    assert older > 3


def test_an_object_that_a_killed_door_had_only_renamed_is_synced_before_it_is_acknowledged(tmp_path: Path) -> None:
    """SIGKILL between rename and fsync of the folder, a restart, the same object again, and then the power goes."""
    first = record(tmp_path, ITEMS[:1])
    disk = Disk(first.state)
    for call in first.calls:
        disk.apply(call)
        if call.name == "rename" and call.ended:
            break
    disk.restart()
    shutil.rmtree(first.state)
    lay_out(disk.visible(), first.state)
    assert len(list((first.state / "spool").glob("*.dcm"))) == 1
    second = record(tmp_path, ITEMS[:1])
    for number in cuts(disk, second.calls):
        lay_out(disk.survivors(), left := tmp_path / f"left{number}")
        assert lost(left, disk.acknowledged) == []
    assert disk.acknowledged == [str(ITEMS[0].SOPInstanceUID)]


def test_a_request_for_commitment_that_was_taken_is_known_after_a_cut(tmp_path: Path) -> None:
    trace, state = tmp_path / "trace", tmp_path / "state"
    state.mkdir()
    with door_process(state, before=traced(trace)) as door:
        assert storescu(door.port, write_files(tmp_path / "send", ITEMS[:2])).returncode == 0
        association = associate(door.port, [(str(StorageCommitmentPushModel), EXPLICIT)])
        for number in range(3):
            asked = Dataset()
            asked.TransactionUID = f"1.2.3.{number + 1}"
            one = Dataset()
            one.ReferencedSOPClassUID, one.ReferencedSOPInstanceUID = ITEMS[0].SOPClassUID, ITEMS[0].SOPInstanceUID
            asked.ReferencedSOPSequence = [one]
            status, _ = association.send_n_action(asked, 1, StorageCommitmentPushModel, WELL_KNOWN_INSTANCE)
            assert status.Status == 0
        association.release()
    disk = Disk(state)
    for number in cuts(disk, read_trace(trace)):
        lay_out(disk.survivors(), left := tmp_path / str(number))
        spool = make_spool(left)
        rows = spool.index.rows("SELECT transaction_uid FROM commitments")
        promised = spool.index.rows("SELECT 1 FROM objects WHERE committed_at IS NOT NULL")
        spool.close()
        assert len(rows) >= disk.committed
        assert len(promised) >= bool(disk.committed)
    assert disk.committed == 3


def test_the_replay_ends_where_the_real_folder_is(recorded: Recorded) -> None:
    """The model follows the trace: what it holds to be visible is what is there."""
    disk = Disk(recorded.state)
    for call in recorded.calls:
        disk.apply(call)
    tree = disk.visible()
    spool = tree["spool"]
    assert isinstance(spool, dict)
    assert spool == {path.name: path.read_bytes() for path in (recorded.state / "spool").iterdir()}
    index = tree["intake.sqlite-wal"]
    assert index == (recorded.state / "intake.sqlite-wal").read_bytes()
    database = sqlite3.connect(recorded.state / "intake.sqlite")
    assert database.execute("SELECT COUNT(*) FROM objects").fetchone() == (len(ITEMS),)
    database.close()
