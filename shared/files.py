"""Durable files: what is named is whole, and what is whole survives a power cut."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from shared.errors import PeerError, RoomError, StateError

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def translate_os_error(exc: OSError, what: str) -> StateError:
    """Returns the StateError (RoomError for a full disk or quota) that stands for `exc`."""
    if exc.errno in _NO_ROOM:
        return RoomError(f"No room left for {what}: {exc}.", cure="Free disk space or raise the quota.")
    return StateError(f"Cannot write {what}: {exc}.", cure="Check the disk and the folder's permissions.")


def fsync_folder(folder: Path) -> None:
    """Makes renames and unlinks inside `folder` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def atomic_write(path: Path, data: bytes | Iterable[bytes], *, mode: int = 0o600) -> None:
    """Writes `data` to `path` so that a reader, or a machine after a power cut, sees all of it or none.

    Temporary name in the same folder, fsync, rename, fsync of the folder. The temporary file is removed on failure.

    Raises:
        RoomError: the disk or quota is full.
        StateError: any other failure of the file system.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(fd, "wb") as file:
            for piece in (data,) if isinstance(data, bytes) else data:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_folder(path.parent)
    except OSError as exc:
        temporary.unlink(missing_ok=True)
        raise translate_os_error(exc, str(path)) from exc
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_limited(path: Path, limit_bytes: int) -> bytes:
    """Returns the file's bytes, refusing before allocation when it is longer than `limit_bytes`.

    Raises:
        PeerError: the file is longer than the limit.
        StateError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            length = os.fstat(file.fileno()).st_size
            if length > limit_bytes:
                raise PeerError(f"{path.name} has {length} bytes, the limit is {limit_bytes}.")
            return file.read(length)  # not the limit: a buffer of that size would be allocated
    except OSError as exc:
        raise StateError(f"Cannot read {path}: {exc}.") from exc


def sha256_hex(data: bytes) -> str:
    """Returns the lower-case hexadecimal SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Returns the lower-case hexadecimal SHA-256 of a file, read in constant memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
