"""The durable spool: an object is on disk, fsynced and indexed before anybody answers for it.

    spool/<sha256 of transfer syntax and data set>.dcm   Part 10, the data set byte for byte as received
    spool/.<random>.part                                 arriving; removed at the next start
    quarantine/<sha256>.dcm                              what the door refused, under a quota
    intake.sqlite                                        the index; rebuildable from the spool

File names come from digests, never from the wire. Nothing is ever overwritten: the same bytes again are one object,
other bytes under the same SOP Instance UID stand beside. Objects that finish at the same time share one fsync of the
folder and one transaction (group commit): whoever comes first commits for all that wait.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct, structs
from pydicom.filereader import read_file_meta_info

from edge.intake import index as states
from edge.intake.head import DatasetHead, read_head, read_head_of, same_pixels, valid_uid
from edge.intake.index import Index, Visit
from edge.intake.part import OBJECT_LIMIT_BYTES, Arriving, Part, RefusedError
from edge.intake.status import Outcome
from edge.intake.walk import CutError
from shared.clock import Clock
from shared.errors import RadfleetError, RoomError, StateError
from shared.files import fsync_folder, translate_os_error
from shared.log import get_logger

QUARANTINE_LIMIT_BYTES = 5_000_000_000
_FREE_RESERVE_BYTES = 64 * 1024 * 1024  # left on the disk for the databases


Rows = Sequence[Mapping[str, Any] | sqlite3.Row]


class _Object(Struct):
    """An object that is about to get its row."""

    name: str  # in the spool's folder, once it is there
    path: Path  # where it lies now
    offset: int
    length: int
    arriving: Arriving
    head: DatasetHead
    received_at: float
    same: dict[str, bool] = {}  # whether it has the pixels of the objects with these digests, as far as compared


class _Ticket:
    """One object that waits for a commit, and what became of it."""

    def __init__(self, part: Part, one: _Object) -> None:
        self.part = part
        self.object = one
        self.outcome: Outcome | None = None
        self.error: BaseException | None = None
        self.turn = threading.Lock()  # released when the ticket is done, or when its thread is to commit next
        self.turn.acquire()

    @property
    def done(self) -> bool:
        return self.outcome is not None or self.error is not None


class Spool:
    """See the module's docstring. One process owns folder and index; threads may call the methods."""

    def __init__(
        self,
        folder: Path,
        index: Path,
        *,
        limit_bytes: int,
        clock: Clock,
        quarantine_limit_bytes: int = QUARANTINE_LIMIT_BYTES,
    ) -> None:
        self.folder = folder
        self.quarantine_folder = folder.with_name("quarantine")
        self._limit_bytes = limit_bytes
        self._quarantine_limit_bytes = quarantine_limit_bytes
        self._clock = clock
        self._queue: list[_Ticket] = []
        self._led = False  # whether some thread commits, or is called to
        self._queue_lock = threading.Lock()  # guards both
        self._commit_lock = threading.Lock()
        self._used_bytes = 0  # guarded by the commit lock
        for one in (folder, self.quarantine_folder):
            one.mkdir(mode=0o700, parents=True, exist_ok=True)
            for part in one.glob(".*.part"):
                part.unlink()
        fsync_folder(folder.parent)
        self._folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(self._folder_fd)  # a killed process may have renamed and not synced: no row, no answer before that
        self.index = Index(index)
        self.rebuild()

    def begin(self, arriving: Arriving) -> Part:
        """Returns a Part to write the data set into.

        Raises:
            RoomError: the quota is used up or the disk is full.
        """
        return Part(self.folder, self, arriving, self._clock.now().timestamp())

    def finish(self, part: Part) -> Outcome:
        """Makes the object durable and returns an outcome of KEPT: success may be answered now.

        Raises:
            RefusedError: the data set is cut, contradicts the command, or its identifier is no UID; the bytes are in
            the quarantine.
            RoomError: no room; StateError: the disk or the index failed. Nothing half is ever visible.
        """
        try:
            return self._finish(part)
        except RefusedError as exc:
            self.refuse(part, exc)
            raise
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

    def association_ended(self, association: str, visit: Visit | None = None) -> None:
        """Records that no more objects will come by this association: a hint that a series is complete."""
        self.index.association_ended(association, self._clock.now().timestamp(), visit)

    def count(self, outcome: Outcome) -> None:
        """Counts an outcome that left no row (a refusal or a duplicate); never raises."""
        try:
            self.index.count(outcome.value)
        except StateError:
            get_logger().warning("intake.count_failed", outcome=outcome.value)

    def counts(self) -> dict[str, int]:
        """Returns how often each outcome occurred since the node was set up, by its name."""
        return self.index.counts()

    def ask_quota(self, length: int, object_limit_bytes: int = OBJECT_LIMIT_BYTES) -> None:
        """Returns when an object may have `length` bytes so far; RoomError otherwise."""
        if length > object_limit_bytes:
            raise RoomError(f"An object may have {object_limit_bytes} bytes.")
        if self._used_bytes + length > self._limit_bytes:
            raise RoomError(
                f"The spool holds {self._used_bytes} bytes of {self._limit_bytes}.",
                cure="Raise room.spool_limit_bytes or free the spool.",
            )

    def ask_disk(self, length: int) -> None:
        """Returns when the disk has room for `length` more bytes; RoomError otherwise."""
        if shutil.disk_usage(self.folder).free < length + _FREE_RESERVE_BYTES:
            raise RoomError("The spool's disk is full.", cure="Free disk space.")

    def room(self) -> tuple[int, int]:
        """Returns how many bytes the spool holds, and how many it could: its quota, or what the disk has for it."""
        free = max(0, shutil.disk_usage(self.folder).free - _FREE_RESERVE_BYTES)
        return self._used_bytes, min(self._limit_bytes, self._used_bytes + free)

    def fullness(self) -> float:
        """Returns how full the spool is, 0 to 1; one system call, so that every association may ask."""
        used, capacity = self.room()
        return used / capacity if capacity else 1.0

    def evict(self, digests: Sequence[str], *, promised_before: float) -> int:
        """Lets objects go and returns how many went: the rows say so first, durable, then the files are removed.

        What was promised to its sender (Storage Commitment) at or after `promised_before` stays. Nothing that
        arrives meanwhile can be lost: the same bytes wait for the commit lock. A crash between row and file leaves a
        file whose row says evicted. The next start takes it in again (`rebuild`): it may be an object that came again
        after it had left.
        """
        with self._commit_lock:
            files = self.index.evict(digests, promised_before)
            for file in files:
                path = self.folder / file
                try:
                    length = path.stat().st_size
                    path.unlink()
                except FileNotFoundError:
                    continue  # somebody deleted it
                except OSError as exc:
                    raise translate_os_error(exc, "the spool") from exc
                self._used_bytes = max(0, self._used_bytes - length)
        return len(files)

    def rebuild(self) -> int:
        """Brings index and folder together and returns how many orphans were indexed.

        A file without a row was renamed but not indexed when the power went: it gets its row back, and the index a
        new name. A row without a file can only come from somebody deleting files: it stays and imaging reports it.
        """
        indexed = {row["file"] for row in self.index.rows("SELECT file FROM objects WHERE state <> ?", states.EVICTED)}
        found = 0
        self._used_bytes = 0
        for path in sorted(self.folder.glob("*.dcm"), key=lambda p: p.stat().st_mtime):
            self._used_bytes += path.stat().st_size
            orphan = None if path.name in indexed else self._orphan(path)
            if orphan is None:
                continue
            if not found:
                self.index.rename()  # first: a crash in the middle must not leave old numbers with new objects
            digest = path.stem
            beside = self.index.beside([(digest, orphan.arriving.sop_instance)])
            self.index.add([self._row(orphan, beside)], again=[digest])
            found += 1
        if found:
            get_logger().warning("intake.rebuilt", objects=found)
        return found

    def close(self) -> None:
        """Closes the index; the spool is not used afterwards."""
        self.index.close()
        os.close(self._folder_fd)

    def _finish(self, part: Part) -> Outcome:
        if part.file is None:
            raise StateError("The arriving object was given up.")
        if not valid_uid(part.arriving.sop_instance):
            raise RefusedError(Outcome.BAD_UID, "The command's SOP Instance UID is not a UID.")
        negotiated = part.arriving.negotiated
        if negotiated and negotiated != part.arriving.sop_class:
            raise RefusedError(Outcome.MISMATCH, f"The context says {negotiated}, the command another class.")
        beside = self.index.beside([(part.digest, part.arriving.sop_instance)])
        held = self._held(part.digest, beside)
        if held is not None and _same_object(held, part.arriving):
            self.count(Outcome.DUPLICATE)
            return Outcome.DUPLICATE
        part.file.flush()
        try:
            head = read_head_of(part.file.fileno(), part.offset, part.arriving.transfer_syntax)
        except CutError as exc:
            raise RefusedError(Outcome.CUT, exc.message) from exc
        for said, has in (
            (part.arriving.sop_class, head.sop_class),
            (part.arriving.sop_instance, head.sop_instance),
        ):
            if has and has != said:
                raise RefusedError(Outcome.MISMATCH, f"The command says {said}, the data set {has}.")
        name = f"{part.digest}.dcm"
        one = _Object(name, part.path, part.offset, part.length, part.arriving, head, part.received_at)
        self._conflict(one, beside)  # compares pixels here, so that others need not wait for it behind the commit lock
        os.fsync(part.file.fileno())
        ticket = _Ticket(part, one)
        self._queue_up(ticket)
        if ticket.error is not None:
            raise ticket.error
        return ticket.outcome or Outcome.FAULT

    def _queue_up(self, ticket: _Ticket) -> None:
        """Returns when the ticket is done. Whoever finds nobody committing commits for all that wait, then calls the
        first of those who came meanwhile to do the same; the others are woken with their answers, not one by one
        through a lock that the next commit holds."""
        with self._queue_lock:
            self._queue.append(ticket)
            leads, self._led = not self._led, True
        if not leads:
            ticket.turn.acquire()
        if ticket.done:
            return
        with self._commit_lock:
            with self._queue_lock:
                batch, self._queue = self._queue, []
            try:
                self._commit(batch)
            except BaseException as exc:  # noqa: BLE001 the others who wait must not wait for ever
                for one in batch:
                    one.error = exc if not one.done else one.error
        with self._queue_lock:
            following = self._queue[0] if self._queue else None
            self._led = following is not None
        for one in ([following] if following else []) + [one for one in batch if one is not ticket]:
            one.turn.release()

    def _commit(self, batch: Sequence[_Ticket]) -> None:
        """Renames, makes the folder durable, and indexes; every ticket is done afterwards."""
        beside = self.index.beside([(one.part.digest, one.object.arriving.sop_instance) for one in batch])
        renamed: dict[str, _Ticket] = {}
        twins: list[tuple[_Ticket, _Ticket]] = []  # two associations brought the same bytes at once: one object
        for ticket in batch:
            first = renamed.get(ticket.part.digest)
            if first is not None:
                twins.append((ticket, first))
            elif self._place(ticket, beside):
                renamed[ticket.part.digest] = ticket
        try:
            if renamed:
                os.fsync(self._folder_fd)
                rows: list[dict[str, Any]] = []
                for ticket in renamed.values():
                    rows.append(self._row(ticket.object, [*beside, *rows]))
                self.index.add(rows, again=[row["digest"] for row in beside if row["state"] == states.EVICTED])
                for ticket, row in zip(renamed.values(), rows, strict=True):
                    ticket.outcome = _outcome(row)
        except BaseException as exc:  # noqa: BLE001 the others who wait must not wait for ever
            for ticket in renamed.values():
                ticket.error = exc
                self._take_back(ticket.object)
        for ticket, first in twins:
            _share(first, ticket)

    def _place(self, ticket: _Ticket, beside: Rows) -> bool:
        """Gives the object its name in the folder; False when the ticket is done instead."""
        part = ticket.part
        target = self.folder / ticket.object.name
        try:
            self.ask_quota(part.length)  # again: others may have filled the quota while this one arrived
            held = self._held(part.digest, beside)
            if held is not None:
                ticket.outcome = _twin(held, part.arriving)
                return False
            if not target.exists():  # it does where the index failed the last time
                self._used_bytes += part.offset + part.length
            part.move(target)
            ticket.object.path = target
        except (OSError, RadfleetError) as exc:
            ticket.error = exc
            return False
        return True

    def _take_back(self, one: _Object) -> None:
        """Removes what was renamed and then not indexed: its sender is told so, and the next start must not show it.

        Best effort, and nothing that the index has or may have: an object too many is sent again and is the same one,
        a row without its file is a loss.
        """
        try:
            digest = one.name.removesuffix(".dcm")
            if self._held(digest, self.index.beside([(digest, one.arriving.sop_instance)])) is None:
                length = one.path.stat().st_size
                one.path.unlink()
                self._used_bytes = max(0, self._used_bytes - length)
        except (OSError, RadfleetError) as exc:
            get_logger().error("intake.orphan_stays", error=type(exc).__name__)

    def _row(self, one: _Object, beside: Rows) -> dict[str, Any]:
        conflict, state = self._conflict(one, beside)
        arriving, head = one.arriving, one.head
        return {
            "digest": one.name.removesuffix(".dcm"),
            "file": one.name,
            "offset": one.offset,
            "length": one.length,
            "sop_instance": arriving.sop_instance,
            "sop_class": arriving.sop_class,
            "study": head.study,
            "series": head.series,
            "modality": head.modality,
            "transfer_syntax": arriving.transfer_syntax,
            "calling_ae": arriving.calling_ae,
            "called_ae": arriving.called_ae,
            "address": arriving.address,
            "association": arriving.association,
            "received_at": one.received_at,
            "stored_at": self._clock.now().timestamp(),
            "conflict": int(conflict),
            "fault": head.fault,
            "patient": head.patient,
            "state": state,
        }

    def _conflict(self, one: _Object, beside: Rows) -> tuple[bool, str]:
        """Whether other bytes stand under the same UID, and the state that follows: an object of another patient or
        with other pixels is another object, whatever its UID says. `beside` are rows of the index and rows about to
        be added. Pixels are compared once; `one` remembers with which."""
        arriving, head = one.arriving, one.head
        others = [row for row in beside if row["sop_instance"] == arriving.sop_instance and row["file"] != one.name]
        for row in others:
            if row["state"] == states.IDENTITY_CONFLICT:
                continue
            if row["patient"] and head.patient and row["patient"] != head.patient:
                return True, states.IDENTITY_CONFLICT
            if row["transfer_syntax"] != arriving.transfer_syntax or row["state"] == states.EVICTED:
                continue
            if row["digest"] not in one.same:
                there = self.folder / row["file"]
                one.same[row["digest"]] = same_pixels(
                    there, row["offset"], one.path, one.offset, arriving.transfer_syntax
                )
            if not one.same[row["digest"]]:
                return True, states.IDENTITY_CONFLICT
        return bool(others), states.KEPT

    def refuse(self, part: Part, refused: RefusedError) -> None:
        """Moves the bytes to the quarantine; what fails here changes nothing in the answer."""
        name = f"{part.digest}.dcm"
        arriving = part.arriving
        try:
            part.close()
            part.move(self.quarantine_folder / name)
            row = {
                "digest": part.digest,
                "file": name,
                "outcome": refused.outcome.value,
                "reason": refused.message,
                "calling_ae": arriving.calling_ae,
                "address": arriving.address,
                "sop_class": arriving.sop_class[:64],
                "sop_instance": arriving.sop_instance[:64],
                "transfer_syntax": arriving.transfer_syntax,
                "length": part.length,
                "at": self._clock.now().timestamp(),
            }
            for file in self.index.quarantine(row, self._quarantine_limit_bytes):
                (self.quarantine_folder / file).unlink(missing_ok=True)
        except (OSError, StateError) as exc:
            get_logger().error("intake.quarantine_failed", error=type(exc).__name__)

    def _held(self, digest: str, beside: Rows) -> Mapping[str, Any] | sqlite3.Row | None:
        """Returns the row of an object that is there."""
        for row in beside:
            if row["digest"] == digest and row["state"] != states.EVICTED and (self.folder / row["file"]).exists():
                return row
        return None

    def _orphan(self, path: Path) -> _Object | None:
        """Reads a file that has no row; None, with a line in the log, where it is none of ours."""
        try:
            meta = read_file_meta_info(path)
            # preamble, "DICM" and the group length's own element stand before what it counts
            offset = 128 + 4 + 12 + int(meta.FileMetaInformationGroupLength)
            arriving = Arriving(
                str(meta.MediaStorageSOPClassUID),
                str(meta.MediaStorageSOPInstanceUID),
                str(meta.TransferSyntaxUID),
                str(meta.get("SourceApplicationEntityTitle", "")),
                called_ae=str(meta.get("ReceivingApplicationEntityTitle", "")),
            )
            head = read_head(path, offset, arriving.transfer_syntax)
        except Exception as exc:  # noqa: BLE001 a file that is not ours stays where it is and is named in the log
            get_logger().error("intake.orphan_unreadable", file=path.name, error=str(exc)[:200])
            return None
        stat = path.stat()
        return _Object(path.name, path, offset, stat.st_size - offset, arriving, head, stat.st_mtime)


def _same_object(held: Mapping[str, Any] | sqlite3.Row, arriving: Arriving) -> bool:
    return (held["sop_class"], held["sop_instance"]) == (arriving.sop_class, arriving.sop_instance)


def _twin(held: Mapping[str, Any] | sqlite3.Row, arriving: Arriving) -> Outcome:
    """The same bytes under one name are one object; under another name (the data set has none) a contradiction."""
    if not _same_object(held, arriving):
        raise RefusedError(Outcome.MISMATCH, "The same data set, without identifiers, is held under others.")
    return Outcome.DUPLICATE


def _share(first: _Ticket, ticket: _Ticket) -> None:
    """Gives a ticket with the same bytes as the first one the first one's fate."""
    ticket.error = first.error
    if first.outcome is not None:
        try:
            ticket.outcome = _twin(structs.asdict(first.part.arriving), ticket.part.arriving)
        except RefusedError as exc:
            ticket.error = exc


def _outcome(row: dict[str, Any]) -> Outcome:
    if row["state"] == states.IDENTITY_CONFLICT:
        return Outcome.IDENTITY_CONFLICT
    return Outcome.CONFLICT if row["conflict"] else Outcome.STORED
