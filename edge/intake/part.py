"""An object while it arrives: a temporary file in the spool that only a commit makes visible."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path
from typing import BinaryIO, Protocol

from msgspec import Struct

from edge.intake.meta import file_meta
from edge.intake.status import Outcome
from shared.errors import RadfleetError, RoomError, StateError
from shared.files import translate_os_error
from shared.log import get_logger

OBJECT_LIMIT_BYTES = 4 * 1024 * 1024 * 1024
_CHECK_EVERY_BYTES = 4 * 1024 * 1024  # the disk is asked for room once in so many bytes
_WRITE_BUFFER_BYTES = 64 * 1024
_NUMBERS = itertools.count()  # every start begins with a spool without parts


class Arriving(Struct, frozen=True):
    """What is known of an object before its data set: the C-STORE command and the association."""

    sop_class: str
    sop_instance: str
    transfer_syntax: str
    calling_ae: str = ""
    address: str = ""
    association: str = ""
    called_ae: str = ""
    limit_bytes: int = OBJECT_LIMIT_BYTES  # of this object, by its sender
    negotiated: str = ""  # the abstract syntax of the presentation context; empty where there was none


class RefusedError(RadfleetError):
    """The object was not kept; `outcome` says why. Its bytes lie in the quarantine."""

    exit_code = 65

    def __init__(self, outcome: Outcome, message: str) -> None:
        super().__init__(message)
        self.outcome = outcome


class Room(Protocol):
    """Who knows whether there is room (edge.intake.spool.Spool); both raise RoomError when there is none."""

    def ask_quota(self, length: int, object_limit_bytes: int) -> None:
        """Returns when an object may have `length` bytes so far."""

    def ask_disk(self, length: int) -> None:
        """Returns when the disk has room for `length` more bytes."""


class Part:
    """An object while it arrives: a temporary file in the spool. `Spool.finish` or `discard` ends it."""

    def __init__(self, folder: Path, room: Room, arriving: Arriving, received_at: float) -> None:
        self.arriving = arriving
        self.received_at = received_at
        self.path = folder / f".{next(_NUMBERS)}.part"
        self.length = 0
        self.file: BinaryIO | None = None
        self._moved = False
        self._room = room
        self._digest = hashlib.sha256(arriving.transfer_syntax.encode() + b"\0")
        self._asked = 0
        room.ask_quota(0, arriving.limit_bytes)
        try:
            self.file = self.path.open("x+b", buffering=_WRITE_BUFFER_BYTES)
            preamble = file_meta(
                arriving.sop_class,
                arriving.sop_instance,
                arriving.transfer_syntax,
                arriving.calling_ae,
                arriving.called_ae,
            )
            self.offset = self.file.write(preamble)
        except OSError as exc:
            self.discard()
            raise translate_os_error(exc, "the spool") from exc

    def write(self, data: bytes | memoryview) -> None:
        """Appends bytes of the data set as received.

        Raises:
            RoomError: quota, disk or object limit; the temporary file is gone.
        """
        if self.file is None:
            raise StateError("The arriving object was given up.")
        self.length += len(data)
        self._digest.update(data)
        try:
            self._room.ask_quota(self.length, self.arriving.limit_bytes)
            if self.length >= self._asked:
                self._asked = self.length + _CHECK_EVERY_BYTES
                self._room.ask_disk(_CHECK_EVERY_BYTES + len(data))
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

    def move(self, target: Path) -> None:
        """Gives the file another name, under which it stays; OSError when that fails."""
        self.path.rename(target)
        self._moved = True

    def discard(self) -> None:
        """Removes the temporary file; never raises, safe to call again. What stays goes at the next start."""
        self.close()
        if self._moved:
            return
        try:
            self.path.unlink(missing_ok=True)
        except OSError as exc:  # a disk that turned read-only: the answer must go out all the same
            get_logger().error("intake.part_stays", error=type(exc).__name__)

    def close(self) -> None:
        """Closes the file, whatever its buffer still holds."""
        file, self.file = self.file, None
        if file is not None:
            try:
                file.close()
            except OSError:  # the buffered rest found no room: nobody wants it any more
                get_logger().debug("intake.close_failed")
