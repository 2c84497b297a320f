"""The durable spool: an object is on disk, fsynced and indexed before anybody answers for it.

    spool/<sha256 of transfer syntax and data set>.dcm   Part 10, the data set byte for byte as received
    spool/.<random>.part                                 arriving; removed at the next start
    intake.sqlite                                        the index; rebuildable from the folder

File names come from digests, never from the wire. Nothing is ever overwritten: the same bytes again are one
object, other bytes under the same SOP Instance UID stand beside and both rows are flagged.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import sqlite3
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from msgspec import Struct
from pydicom.dataset import FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_file_meta_info
from pydicom.filewriter import write_file_meta_info
from pydicom.uid import UID

from edge.intake.head import CutError, DatasetHead, read_head, valid_uid
from edge.intake.status import Outcome
from edge.sqlite import insert, open_owned, transaction
from shared.clock import Clock
from shared.errors import RadfleetError, RoomError, StateError
from shared.files import fsync_folder, translate_os_error
from shared.log import get_logger

IMPLEMENTATION_UID = "2.25.326184215467394874613452637815163912417"
IMPLEMENTATION_NAME = "RADFLEET_01"
OBJECT_LIMIT_BYTES = 4 * 1024 * 1024 * 1024
_FREE_RESERVE_BYTES = 64 * 1024 * 1024  # left on the disk for the databases
_CHECK_EVERY_BYTES = 4 * 1024 * 1024  # the disk is asked for room once in so many bytes

_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS objects (
    id INTEGER PRIMARY KEY AUTOINCREMENT,   -- order of storing; other processes follow it as a cursor
    digest TEXT NOT NULL UNIQUE,
    file TEXT NOT NULL,                     -- name inside the spool folder
    offset INTEGER NOT NULL,                -- where the data set starts, bytes
    length INTEGER NOT NULL,                -- of the data set, bytes
    sop_instance TEXT NOT NULL,
    sop_class TEXT NOT NULL,
    study TEXT NOT NULL,
    series TEXT NOT NULL,
    modality TEXT NOT NULL,
    transfer_syntax TEXT NOT NULL,
    calling_ae TEXT NOT NULL,
    address TEXT NOT NULL,
    association TEXT NOT NULL,
    received_at REAL NOT NULL,              -- first byte, seconds since 1970
    stored_at REAL NOT NULL,                -- durable, seconds since 1970
    conflict INTEGER NOT NULL,              -- 1: other bytes were stored under the same SOP Instance UID
    fault TEXT NOT NULL                     -- why the data set could not be walked; empty when it could
);
CREATE INDEX IF NOT EXISTS objects_instance ON objects (sop_instance);
CREATE INDEX IF NOT EXISTS objects_series ON objects (series);
CREATE TABLE IF NOT EXISTS associations (id TEXT PRIMARY KEY, ended_at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS counts (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
-- One row: names this index. A rebuilt index gives other ids to the same objects, so whoever follows ids starts again.
CREATE TABLE IF NOT EXISTS generation (one INTEGER PRIMARY KEY CHECK (one = 1), id TEXT NOT NULL);
"""


class Arriving(Struct, frozen=True):
    """What is known of an object before its data set: the C-STORE command and the association."""

    sop_class: str
    sop_instance: str
    transfer_syntax: str
    calling_ae: str = ""
    address: str = ""
    association: str = ""


class RefusedError(RadfleetError):
    """The object was not kept; `outcome` says why. Nothing of it is left on the disk."""

    exit_code = 65

    def __init__(self, outcome: Outcome, message: str) -> None:
        super().__init__(message)
        self.outcome = outcome


class Part:
    """An object while it arrives: a temporary file in the spool. `Spool.finish` or `discard` ends it."""

    def __init__(self, spool: Spool, arriving: Arriving, received_at: float) -> None:
        self.arriving = arriving
        self.received_at = received_at
        self.path = spool.folder / f".{secrets.token_hex(8)}.part"
        self.length = 0
        self.file: BinaryIO | None = None
        self._spool = spool
        self._digest = hashlib.sha256(arriving.transfer_syntax.encode() + b"\0")
        self._asked = 0
        spool.ask_quota(0)
        try:
            self.file = self.path.open("xb", buffering=1024 * 1024)
            _write_preamble(self.file, arriving)
            self.offset = self.file.tell()
        except OSError as exc:
            self.discard()
            raise translate_os_error(exc, "the spool") from exc

    def write(self, data: bytes) -> None:
        """Appends bytes of the data set as received.

        Raises:
            RoomError: quota, disk or object limit; the temporary file is gone.
        """
        if self.file is None:
            raise StateError("The arriving object was given up.")
        self.length += len(data)
        self._digest.update(data)
        try:
            self._spool.ask_quota(self.length)
            if self.length >= self._asked:
                self._asked = self.length + _CHECK_EVERY_BYTES
                self._spool.ask_disk(_CHECK_EVERY_BYTES + len(data))
            self.file.write(data)
        except OSError as exc:
            self.discard()
            raise translate_os_error(exc, "the spool") from exc
        except RoomError:
            self.discard()
            raise

    @property
    def digest(self) -> str:
        """SHA-256 over transfer syntax and data set: the object's name."""
        return self._digest.hexdigest()

    def discard(self) -> None:
        """Removes the temporary file; safe to call again."""
        file, self.file = self.file, None
        if file is not None:
            try:
                file.close()
            except OSError:  # the buffered rest found no room: nobody wants it any more
                get_logger().debug("intake.close_failed")
        self.path.unlink(missing_ok=True)


class Spool:
    """See the module's docstring. One process owns folder and index; threads may call the methods."""

    def __init__(
        self,
        folder: Path,
        index: Path,
        *,
        limit_bytes: int,
        clock: Clock,
        object_limit_bytes: int = OBJECT_LIMIT_BYTES,
    ) -> None:
        self.folder = folder
        self._limit_bytes = limit_bytes
        self._object_limit_bytes = object_limit_bytes
        self._clock = clock
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        self._index = open_owned(index, _SCHEMA, _SCHEMA_VERSION)
        insert(self._index, "generation", {"one": 1, "id": secrets.token_hex(8)}, on_conflict="OR IGNORE")
        for part in folder.glob(".*.part"):
            part.unlink()
        self._used_bytes = 0
        self.rebuild()

    def begin(self, arriving: Arriving) -> Part:
        """Returns a Part to write the data set into.

        Raises:
            RoomError: the quota is used up or the disk is full.
            RefusedError: the SOP Instance UID is not a UID.
        """
        if not valid_uid(arriving.sop_instance):
            raise RefusedError(Outcome.BAD_UID, "The command's SOP Instance UID is not a UID.")
        return Part(self, arriving, self._clock.now().timestamp())

    def finish(self, part: Part) -> Outcome:
        """Makes the object durable and returns STORED, DUPLICATE or CONFLICT: success may be answered now.

        Raises:
            RefusedError: the data set is cut or contradicts the command.
            RoomError: no room; StateError: the disk or the index failed. In all cases nothing is left
            behind.
        """
        try:
            return self._finish(part)
        except OSError as exc:
            raise translate_os_error(exc, "the spool") from exc
        finally:
            part.discard()

    def store(self, arriving: Arriving, chunks: Iterable[bytes]) -> Outcome:
        """Stores a whole object (`begin`, `write`, `finish`); raises what they raise."""
        part = self.begin(arriving)
        try:
            for chunk in chunks:
                part.write(chunk)
            return self.finish(part)
        except BaseException:
            part.discard()
            raise

    def association_ended(self, association: str) -> None:
        """Records that no more objects will come by this association: a hint that a series is complete."""
        with self._lock, transaction(self._index) as index:
            index.execute(
                "INSERT OR IGNORE INTO associations VALUES (?, ?)",
                (association, self._clock.now().timestamp()),
            )

    def count(self, outcome: Outcome) -> None:
        """Counts an outcome that left no row (a refusal or a duplicate); never raises."""
        try:
            with self._lock, transaction(self._index) as index:
                index.execute(
                    "INSERT INTO counts VALUES (?, 1) ON CONFLICT (name) DO UPDATE SET value = value + 1",
                    (outcome.value,),
                )
        except StateError:
            get_logger().warning("intake.count_failed", outcome=outcome.value)

    def counts(self) -> dict[str, int]:
        """Returns how often each outcome occurred since the node was set up, by its name."""
        with self._lock:
            counts = {row["name"]: int(row["value"]) for row in self._index.execute("SELECT * FROM counts")}
            stored = self._index.execute("SELECT COUNT(*), COALESCE(SUM(conflict), 0) FROM objects").fetchone()
        return counts | {"stored": int(stored[0]), "in_conflict": int(stored[1])}

    def ask_quota(self, length: int) -> None:
        """Returns when an object may have `length` bytes so far; RoomError otherwise."""
        if length > self._object_limit_bytes:
            raise RoomError(f"An object may have {self._object_limit_bytes} bytes.")
        if self._used_bytes + length > self._limit_bytes:
            raise RoomError(
                f"The spool holds {self._used_bytes} bytes of {self._limit_bytes}.",
                cure="Raise room.spool_limit_bytes or free the spool.",
            )

    def ask_disk(self, length: int) -> None:
        """Returns when the disk has room for `length` more bytes; RoomError otherwise."""
        if shutil.disk_usage(self.folder).free < length + _FREE_RESERVE_BYTES:
            raise RoomError("The spool's disk is full.", cure="Free disk space.")

    def rebuild(self) -> int:
        """Brings index and folder together and returns how many orphans were indexed.

        A file without a row was renamed but not indexed when the power went: it gets its row back. A row
        without a file can only come from somebody deleting files: it stays and imaging reports it.
        """
        indexed = {row["file"] for row in self._index.execute("SELECT file FROM objects")}
        found = 0
        self._used_bytes = 0
        for path in sorted(self.folder.glob("*.dcm"), key=lambda p: p.stat().st_mtime):
            self._used_bytes += path.stat().st_size
            if path.name not in indexed:
                found += self._adopt(path)
        if found:
            get_logger().warning("intake.rebuilt", objects=found)
        return found

    def close(self) -> None:
        """Closes the index; the spool is not used afterwards."""
        with self._lock:
            self._index.close()

    def _finish(self, part: Part) -> Outcome:
        if part.file is None:
            raise StateError("The arriving object was given up.")
        if self._known(part.digest):
            self.count(Outcome.DUPLICATE)
            return Outcome.DUPLICATE
        part.file.flush()
        try:
            head = read_head(part.path, part.offset, part.arriving.transfer_syntax)
        except CutError as exc:
            raise RefusedError(Outcome.CUT, exc.message) from exc
        for said, has in (
            (part.arriving.sop_class, head.sop_class),
            (part.arriving.sop_instance, head.sop_instance),
        ):
            if has and has != said:
                raise RefusedError(Outcome.MISMATCH, f"The command says {said}, the data set {has}.")
        self.ask_quota(part.length)  # again: others may have filled the quota while this one arrived
        os.fsync(part.file.fileno())
        name = f"{part.digest}.dcm"
        part.path.rename(self.folder / name)
        fsync_folder(self.folder)
        return self._insert(name, part.offset, part.length, part.arriving, head, part.received_at)

    def _known(self, digest: str) -> bool:
        with self._lock:
            row = self._index.execute("SELECT file FROM objects WHERE digest = ?", (digest,)).fetchone()
        return row is not None and (self.folder / row["file"]).exists()

    def _insert(
        self, name: str, offset: int, length: int, arriving: Arriving, head: DatasetHead, received_at: float
    ) -> Outcome:
        with self._lock, transaction(self._index) as index:
            conflict = _flag_conflicts(index, arriving.sop_instance, name)
            row = {
                "digest": name.removesuffix(".dcm"),
                "file": name,
                "offset": offset,
                "length": length,
                "sop_instance": arriving.sop_instance,
                "sop_class": arriving.sop_class,
                "study": head.study,
                "series": head.series,
                "modality": head.modality,
                "transfer_syntax": arriving.transfer_syntax,
                "calling_ae": arriving.calling_ae,
                "address": arriving.address,
                "association": arriving.association,
                "received_at": received_at,
                "stored_at": self._clock.now().timestamp(),
                "conflict": conflict,
                "fault": head.fault,
            }
            # Two associations may bring the same bytes at once: the second row is no second object.
            new = insert(index, "objects", row, on_conflict="OR IGNORE")
            if new:
                self._used_bytes += offset + length
        if not new:
            self.count(Outcome.DUPLICATE)
            return Outcome.DUPLICATE
        return Outcome.CONFLICT if conflict else Outcome.STORED

    def _adopt(self, path: Path) -> bool:
        try:
            meta = read_file_meta_info(path)
            # preamble, "DICM" and the group length's own element stand before what it counts
            offset = 128 + 4 + 12 + int(meta.FileMetaInformationGroupLength)
            arriving = Arriving(
                str(meta.MediaStorageSOPClassUID),
                str(meta.MediaStorageSOPInstanceUID),
                str(meta.TransferSyntaxUID),
                str(meta.get("SourceApplicationEntityTitle", "")),
            )
            head = read_head(path, offset, arriving.transfer_syntax)
        except Exception as exc:  # noqa: BLE001 a file that is not ours stays where it is and is named in the log
            get_logger().error("intake.orphan_unreadable", file=path.name, error=str(exc)[:200])
            return False
        stat = path.stat()
        self._insert(path.name, offset, stat.st_size - offset, arriving, head, stat.st_mtime)
        return True


def _flag_conflicts(index: sqlite3.Connection, sop_instance: str, name: str) -> bool:
    return (
        index.execute(
            "UPDATE objects SET conflict = 1 WHERE sop_instance = ? AND file <> ?", (sop_instance, name)
        ).rowcount
        > 0
    )


def _write_preamble(file: BinaryIO, arriving: Arriving) -> None:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UID(arriving.sop_class)
    meta.MediaStorageSOPInstanceUID = UID(arriving.sop_instance)
    meta.TransferSyntaxUID = UID(arriving.transfer_syntax)
    meta.ImplementationClassUID = UID(IMPLEMENTATION_UID)
    meta.ImplementationVersionName = IMPLEMENTATION_NAME
    if arriving.calling_ae:
        meta.SourceApplicationEntityTitle = arriving.calling_ae
    file.write(b"\0" * 128 + b"DICM")
    encoded = DicomBytesIO()
    write_file_meta_info(encoded, meta)
    file.write(encoded.getvalue())
