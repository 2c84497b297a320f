"""The spool's promise: what it said it stored is on the disk, whole, once; what it refused left nothing."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import sqlite3
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.dataset import FileDataset

from edge.intake import spool as spool_module
from edge.intake.head import read_head, valid_uid
from edge.intake.index import Index
from edge.intake.part import Arriving, Part, RefusedError
from edge.intake.spool import Spool
from edge.intake.status import KEPT, STATUS, Outcome
from edge.intake.walk import CutError
from edge.results.store import Store
from scripts.lab.child import wait_until
from shared.errors import RadfleetError, RoomError, StateError
from tests.simulators.modality import EXPLICIT, encoded, phantom_study
from tests.simulators.node import make_spool

ITEM = phantom_study("chest-xray", 0, seed=1)[0]
DATA = encoded(ITEM)


def arriving(instance: str = str(ITEM.SOPInstanceUID), **changes: str) -> Arriving:
    return Arriving(
        **{"sop_class": str(ITEM.SOPClassUID), "sop_instance": instance, "transfer_syntax": EXPLICIT, **changes}
    )


def files(spool: Spool) -> list[str]:
    return sorted(path.name for path in spool.folder.iterdir())


def rows(tmp_path: Path) -> list[sqlite3.Row]:
    database = sqlite3.connect(tmp_path / "intake.sqlite")
    database.row_factory = sqlite3.Row
    found = database.execute("SELECT * FROM objects ORDER BY id").fetchall()
    database.close()
    return found


def test_a_stored_object_is_a_dicom_file_with_the_bytes_received(tmp_path: Path) -> None:
    spool = make_spool(tmp_path)
    assert spool.store(arriving(calling_ae="CT1"), [DATA[:1000], DATA[1000:]]) is Outcome.STORED
    (row,) = rows(tmp_path)
    stored = (spool.folder / row["file"]).read_bytes()
    assert stored[row["offset"] :] == DATA
    assert row["length"] == len(DATA)
    assert (row["study"], row["series"], row["modality"]) == (ITEM.StudyInstanceUID, ITEM.SeriesInstanceUID, "DX")
    read = pydicom.dcmread(spool.folder / row["file"])
    assert read.file_meta.SourceApplicationEntityTitle == "CT1"
    assert read.SOPInstanceUID == ITEM.SOPInstanceUID


def test_the_same_bytes_again_are_one_object(tmp_path: Path) -> None:
    spool = make_spool(tmp_path)
    spool.store(arriving(), [DATA])
    assert spool.store(arriving(), [DATA]) is Outcome.DUPLICATE
    assert len(files(spool)) == len(rows(tmp_path)) == 1
    assert spool.counts() == {"duplicate": 1, "stored": 1, "in_conflict": 0, "identity_conflicts": 0}


def test_other_bytes_under_the_same_uid_are_kept_beside_and_both_are_flagged(tmp_path: Path) -> None:
    spool = make_spool(tmp_path)
    spool.store(arriving(), [DATA])
    other = phantom_study("chest-xray", 0, seed=1)[0]
    other.PatientComments = "other bytes"
    assert spool.store(arriving(), [encoded(other)]) is Outcome.CONFLICT
    assert len(files(spool)) == 2
    assert [row["conflict"] for row in rows(tmp_path)] == [1, 1]


@pytest.mark.parametrize("kept", [1, 7, 100, 5000, len(DATA) // 2, len(DATA) - 2, len(DATA) - 1])
def test_attack_a_cut_data_set_is_refused_and_leaves_nothing(tmp_path: Path, kept: int) -> None:
    spool = make_spool(tmp_path)
    with pytest.raises(RefusedError) as refused:
        spool.store(arriving(), [DATA[:kept]])
    assert refused.value.outcome is Outcome.CUT
    assert files(spool) == []
    assert rows(tmp_path) == []


def test_an_empty_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="empty"):
        make_spool(tmp_path).store(arriving(), [])


@pytest.mark.parametrize("change", [{"sop_instance": "1.2.3.4"}, {"sop_class": "1.2.840.10008.5.1.4.1.1.2"}])
def test_attack_a_command_that_contradicts_its_data_set_is_refused(tmp_path: Path, change: dict[str, str]) -> None:
    spool = make_spool(tmp_path)
    values = {"sop_class": str(ITEM.SOPClassUID), "sop_instance": str(ITEM.SOPInstanceUID), **change}
    with pytest.raises(RefusedError) as refused:
        spool.store(Arriving(**values, transfer_syntax=EXPLICIT), [DATA])
    assert refused.value.outcome is Outcome.MISMATCH
    assert files(spool) == []


@pytest.mark.parametrize("uid", [b"1.2.3\0.4", b"/tmp/x", b"1." + b"2" * 70, b"Doe^Jane"])
def test_attack_a_data_set_whose_own_uid_is_none_is_refused_and_the_reason_does_not_repeat_it(
    tmp_path: Path, uid: bytes
) -> None:
    spool = make_spool(tmp_path)
    own = ITEM.SOPInstanceUID.encode()
    at = DATA.index(own)
    data = DATA[: at - 2] + len(uid + b"\0").to_bytes(2, "little") + uid + b"\0" + DATA[at + len(own) + len(own) % 2 :]
    with pytest.raises(RefusedError) as refused:
        spool.store(arriving(), [data])
    assert refused.value.outcome is Outcome.MISMATCH
    assert uid.decode() not in refused.value.message


def test_a_study_uid_that_is_too_long_is_not_cut_to_another(tmp_path: Path) -> None:
    own = ITEM.StudyInstanceUID.encode()
    at = DATA.index(own)
    uid = b"1." + b"2" * 70
    data = DATA[: at - 2] + len(uid).to_bytes(2, "little") + uid + DATA[at + len(own) + len(own) % 2 :]
    make_spool(tmp_path).store(arriving(), [data])
    (row,) = rows(tmp_path)
    assert row["study"] == ""


@pytest.mark.parametrize("uid", ["", "1", "../../etc/passwd", "1.2.3/4", "1." + "2" * 64, "1.2\x00.3", "1..2"])
def test_attack_a_path_for_a_uid_is_refused(tmp_path: Path, uid: str) -> None:
    spool = make_spool(tmp_path)
    with pytest.raises(RefusedError) as refused:
        spool.store(arriving(uid), [DATA])
    assert refused.value.outcome is Outcome.BAD_UID
    assert files(spool) == []
    assert not valid_uid(uid)


def test_the_quota_refuses_before_anything_is_left_half(tmp_path: Path) -> None:
    spool = make_spool(tmp_path, limit_bytes=len(DATA) + 5000)
    spool.store(arriving(), [DATA])
    other = phantom_study("chest-xray", 0, seed=2)[0]
    with pytest.raises(RoomError):
        spool.store(arriving(str(other.SOPInstanceUID)), [encoded(other)])
    assert len(files(spool)) == 1
    make_spool(tmp_path)  # and the index agrees


def test_a_disk_that_fills_while_the_object_arrives_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = make_spool(tmp_path)

    def full(_file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(spool_module.os, "fsync", full)
    with pytest.raises(RoomError):
        spool.store(arriving(), [DATA])
    assert files(spool) == []


def test_an_index_that_fails_is_no_success(tmp_path: Path) -> None:
    spool = make_spool(tmp_path)
    with spool.index.durable() as database:
        database.execute("DROP TABLE objects")
    with pytest.raises((StateError, sqlite3.Error)):
        spool.store(arriving(), [DATA])


@pytest.mark.parametrize("committed", [False, True])
def test_what_was_answered_with_a_failure_is_not_there_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, committed: bool
) -> None:
    """Unless the index has it all the same: a row without its file would be a loss."""
    spool = make_spool(tmp_path)
    real = spool.index.add

    def failing(objects: Sequence[Mapping[str, Any]], **more: Any) -> None:
        if committed:
            real(objects, **more)
        raise RoomError("No room left for the database.")

    monkeypatch.setattr(spool.index, "add", failing)
    with pytest.raises(RoomError):
        spool.store(arriving(), [DATA])
    assert (len(files(spool)), spool._used_bytes > 0) == (int(committed), committed)
    spool.close()
    again = make_spool(tmp_path)
    assert len(rows(tmp_path)) == int(committed)
    assert again.store(arriving(), [DATA]) is (Outcome.DUPLICATE if committed else Outcome.STORED)
    assert len(files(again)) == len(rows(tmp_path)) == 1


def test_pixels_are_compared_before_anybody_has_to_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = make_spool(tmp_path)
    compared, real = [], spool_module.same_pixels

    def watched(one: Path, one_offset: int, two: Path, two_offset: int, syntax: str) -> bool:
        compared.append(spool._commit_lock.locked())
        return real(one, one_offset, two, two_offset, syntax)

    monkeypatch.setattr(spool_module, "same_pixels", watched)
    for number in range(3):
        other = phantom_study("chest-xray", 0, seed=1)[0]
        other.PatientComments = f"other bytes {number}"
        spool.store(arriving(), [encoded(other)])
    assert compared == [False] * 3  # the second with the first, the third with both
    other = phantom_study("chest-xray", 0, seed=1)[0]
    other.PixelData = bytes(len(other.PixelData))
    assert spool.store(arriving(), [encoded(other)]) is Outcome.IDENTITY_CONFLICT
    assert compared == [False] * 4


def test_a_power_cut_between_rename_and_index_is_healed_at_the_start(tmp_path: Path) -> None:
    spool = make_spool(tmp_path)
    spool.store(arriving(calling_ae="CT1"), [DATA])
    spool.close()
    before = dict(rows(tmp_path)[0])
    with sqlite3.connect(tmp_path / "intake.sqlite") as database:
        database.execute("DELETE FROM objects")
    (tmp_path / "spool" / ".0123.part").write_bytes(b"half")
    again = make_spool(tmp_path)
    after = dict(rows(tmp_path)[0])
    for name in ("id", "received_at", "stored_at"):
        before.pop(name), after.pop(name)
    assert after == before
    assert files(again) == [before["file"]]
    assert again.store(arriving(), [DATA]) is Outcome.DUPLICATE


def test_a_lost_index_is_rebuilt_from_the_folder(tmp_path: Path) -> None:
    spool = make_spool(tmp_path)
    for seed in range(3):
        item = phantom_study("chest-xray", 0, seed=seed)[0]
        spool.store(arriving(str(item.SOPInstanceUID)), [encoded(item)])
    spool.close()
    for path in tmp_path.glob("intake.sqlite*"):
        path.unlink()
    (tmp_path / "spool" / "stranger.dcm").write_bytes(b"not ours")
    make_spool(tmp_path)
    assert len(rows(tmp_path)) == 3


def test_a_newer_schema_is_not_touched(tmp_path: Path) -> None:
    make_spool(tmp_path).close()
    with sqlite3.connect(tmp_path / "intake.sqlite") as database:
        database.execute("PRAGMA user_version=99")
    with pytest.raises(StateError, match="schema 99"):
        make_spool(tmp_path)


def test_every_outcome_has_one_status_and_only_what_is_kept_is_a_success() -> None:
    assert set(STATUS) == set(Outcome)
    assert {outcome for outcome, status in STATUS.items() if status == 0x0000} == KEPT
    assert STATUS[Outcome.NO_ROOM] == 0xA700


def test_attack_a_deflate_bomb_is_kept_as_bytes_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zlib

    monkeypatch.setattr("edge.intake.head.INFLATED_LIMIT_BYTES", 1_000_000)
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = deflater.compress(DATA[:1000] + b"\0" * 5_000_000) + deflater.flush()
    path = tmp_path / "bomb"
    path.write_bytes(bomb)
    assert "inflates to more" in read_head(path, 0, "1.2.840.10008.1.2.1.99").fault
    path.write_bytes(bomb[:-20])
    monkeypatch.setattr("edge.intake.head.INFLATED_LIMIT_BYTES", 100_000_000)
    with pytest.raises(CutError):
        read_head(path, 0, "1.2.840.10008.1.2.1.99")


def finish_at_once(spool: Spool, parts: list[Part]) -> list[Outcome | BaseException]:
    """Finishes parts by a thread each, all of them in one commit."""
    found: dict[int, Outcome | BaseException] = {}

    def finish(number: int) -> None:
        try:
            found[number] = spool.finish(parts[number])
        except RadfleetError as exc:
            found[number] = exc

    threads = [threading.Thread(target=finish, args=(number,)) for number in range(len(parts))]
    with spool._commit_lock:
        for thread in threads:
            thread.start()
        wait_until("everybody to wait for the commit", lambda: len(spool._queue) == len(parts))
    for thread in threads:
        thread.join()
    return [found[number] for number in range(len(parts))]


def written(spool: Spool, data: bytes) -> Part:
    part = spool.begin(arriving())
    part.write(data)
    return part


def test_the_same_bytes_at_once_are_one_object(tmp_path: Path) -> None:
    spool = make_spool(tmp_path)
    outcomes = finish_at_once(spool, [written(spool, DATA) for _ in range(3)])
    assert sorted(outcomes) == [Outcome.DUPLICATE, Outcome.DUPLICATE, Outcome.STORED]
    assert len(files(spool)) == len(rows(tmp_path)) == 1


def test_the_same_bytes_at_once_are_no_success_when_the_disk_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = make_spool(tmp_path)
    real = os.fsync

    def broken(file: int) -> None:
        if file == spool._folder_fd:
            raise OSError(errno.EIO, "Input/output error")
        real(file)

    monkeypatch.setattr(spool_module.os, "fsync", broken)
    outcomes = finish_at_once(spool, [written(spool, DATA) for _ in range(3)])
    assert all(isinstance(one, StateError) for one in outcomes), outcomes
    monkeypatch.undo()
    assert (files(spool), spool._used_bytes) == ([], 0)
    assert spool.store(arriving(), [DATA]) is Outcome.STORED


def test_other_bytes_under_the_same_uid_at_once_are_flagged(tmp_path: Path) -> None:
    spool = make_spool(tmp_path)
    other = phantom_study("chest-xray", 0, seed=1)[0]
    other.PatientComments = "other bytes"
    stranger = phantom_study("chest-xray", 0, seed=1)[0]
    stranger.PatientID = "P2"
    parts = [written(spool, data) for data in (DATA, encoded(other), encoded(stranger))]
    outcomes = finish_at_once(spool, parts)
    assert outcomes.count(Outcome.STORED) == 1
    assert Outcome.IDENTITY_CONFLICT in outcomes
    assert len(files(spool)) == 3
    assert [row["conflict"] for row in rows(tmp_path)] == [1, 1, 1]


def test_attack_the_same_bytes_under_another_name_are_no_duplicate(tmp_path: Path) -> None:
    spool = make_spool(tmp_path)
    spool.store(arriving(), [DATA])
    for change in ({"sop_instance": "1.2.3.4"}, {"sop_class": "1.2.840.10008.5.1.4.1.1.2"}):
        values = {"sop_class": str(ITEM.SOPClassUID), "sop_instance": str(ITEM.SOPInstanceUID), **change}
        with pytest.raises(RefusedError) as refused:
            spool.store(Arriving(**values, transfer_syntax=EXPLICIT), [DATA])
        assert refused.value.outcome is Outcome.MISMATCH
    nameless = phantom_study("chest-xray", 0, seed=1)[0]
    del nameless.SOPInstanceUID
    assert spool.store(arriving("1.2.3.5"), [encoded(nameless)]) is Outcome.STORED
    assert spool.store(arriving("1.2.3.5"), [encoded(nameless)]) is Outcome.DUPLICATE
    with pytest.raises(RefusedError, match="under others"):
        spool.store(arriving("1.2.3.6"), [encoded(nameless)])
    assert len(files(spool)) == 2


def test_attack_a_data_set_of_endless_elements_is_kept_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.intake.walk.ELEMENTS_LIMIT", 2000)
    spool = make_spool(tmp_path)
    endless = b"".join(struct.pack("<HH2sH", 0x7001, 0x1000 + n, b"UN", 0) + bytes(4) for n in range(3000))
    items = struct.pack("<HHI", 0xFFFE, 0xE000, 0) * 3000
    sequence = struct.pack("<HH2sHI", 0x7001, 0x1000, b"SQ", 0, 0xFFFFFFFF) + items
    for number, tail in enumerate((endless, sequence)):
        item = phantom_study("chest-xray", 0, seed=1)[0]
        item.SOPInstanceUID = f"1.2.3.{number}"
        data = encoded(item)
        data = data[: data.index(struct.pack("<HH", 0x7FE0, 0x0010))] + tail
        assert spool.store(arriving(f"1.2.3.{number}"), [data]) is Outcome.STORED
    assert [row["fault"] for row in rows(tmp_path)] == ["the data set has too many elements"] * 2
    assert {row["study"] for row in rows(tmp_path)} == {ITEM.StudyInstanceUID}


def worked_off(follower: Store) -> list[str]:
    """Claims and finishes whatever there is."""
    seen = []
    while claimed := follower.claim(0.0):
        seen.append(claimed.digest)
        with follower.writing():
            follower.finish(claimed, "skipped")
    return seen


def test_a_commit_that_fails_leaves_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for somebody else's commit gets its error, and the next commit has a leader."""
    spool = make_spool(tmp_path)
    items = phantom_study("chest-ct", 0, seed=8, slices=32)
    calls = itertools.count()

    def by_turns(name: str) -> Callable[..., Any]:
        real = getattr(spool.index, name)

        def work(*values: Any, **more: Any) -> Any:
            if next(calls) % 5 == 4:
                raise StateError("The index says no.")
            return real(*values, **more)

        return work

    for name in ("beside", "add"):
        monkeypatch.setattr(spool.index, name, by_turns(name))
    kept: list[str] = []

    def send(mine: Sequence[FileDataset]) -> None:
        for item in mine:
            uid = str(item.SOPInstanceUID)
            with contextlib.suppress(StateError):
                spool.store(arriving(uid, sop_class=str(item.SOPClassUID)), [encoded(item)])
                kept.append(uid)

    threads = [threading.Thread(target=send, args=(items[n::8],), daemon=True) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    monkeypatch.undo()
    assert 0 < len(kept) < len(items)
    assert {row["sop_instance"] for row in rows(tmp_path)} >= set(kept)
    # A file may stay whose sender was told of a failure: taking it back needs the index too.
    assert {row["file"] for row in rows(tmp_path)} <= set(files(spool))
    assert spool.store(arriving(), [DATA]) is Outcome.STORED


@pytest.mark.parametrize("taken_in", [1, 2, 3])
def test_a_second_crash_inside_the_healing_hides_nothing_from_followers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken_in: int
) -> None:
    """The index lost rows that a follower has seen; what gets their numbers now must be seen too."""
    spool, other = make_spool(tmp_path / "one"), make_spool(tmp_path / "two")
    for seed in range(4):
        item = phantom_study("chest-xray", 0, seed=seed)[0]
        (other if seed == 3 else spool).store(arriving(str(item.SOPInstanceUID)), [encoded(item)])
    follower = Store(tmp_path / "results.sqlite", tmp_path / "one" / "intake.sqlite")
    assert len(worked_off(follower)) == 3
    (late,) = files(other)
    spool.close()
    with sqlite3.connect(tmp_path / "one" / "intake.sqlite") as database:
        database.execute("DELETE FROM objects WHERE id > 1")
        database.execute("UPDATE sqlite_sequence SET seq = 1 WHERE name = 'objects'")
    shutil.copy(other.folder / late, spool.folder)
    os.utime(spool.folder / late, (0, 0))  # the oldest: it is taken in first
    real, calls = Index.add, []

    def dying(self: Index, objects: Sequence[Mapping[str, Any]], **more: Any) -> None:
        real(self, objects, **more)
        calls.append(objects)
        if len(calls) == taken_in:  # 3 are all
            raise KeyboardInterrupt

    monkeypatch.setattr(Index, "add", dying)
    with pytest.raises(KeyboardInterrupt):
        make_spool(tmp_path / "one")
    monkeypatch.undo()
    make_spool(tmp_path / "one").close()
    assert worked_off(follower) == [late.removesuffix(".dcm")]
    follower.close()


def test_a_file_of_somebody_else_makes_no_follower_start_over(tmp_path: Path) -> None:
    spool = make_spool(tmp_path)
    (spool.folder / "stranger.dcm").write_bytes(b"not ours")
    (before,) = spool.index.rows("SELECT id FROM generation")
    spool.close()
    (after,) = make_spool(tmp_path).index.rows("SELECT id FROM generation")
    assert after["id"] == before["id"]
