"""Blobs named by their SHA-256: a folder by default, anything fsspec knows by URL."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from shared.errors import StateError, TrustError
from shared.files import atomic_write, fsync_folder, sha256_hex, translate_os_error


class Objects:
    """A content-addressed store at `url` (a path, `file://`, `s3://` ...). The same bytes are stored once.

    On a local folder a written object is fsynced and whole under its name, or absent.
    """

    def __init__(self, url: str) -> None:
        filesystem, root = fsspec.core.url_to_fs(url)
        self._fs: Any = filesystem
        self._root = str(root).rstrip("/")
        self._local = isinstance(filesystem, LocalFileSystem)

    def put(self, data: bytes) -> str:
        """Stores `data` and returns its lower-case hexadecimal SHA-256.

        Raises:
            RoomError: the store is full.
            StateError: it cannot be written.
        """
        digest = sha256_hex(data)
        if self.has(digest):
            return digest
        name = self._name(digest)
        try:
            self._fs.makedirs(name.rpartition("/")[0], exist_ok=True)
            if self._local:
                fsync_folder(Path(self._root))  # the shard's own name
                atomic_write(Path(name), data)
            else:
                self._fs.pipe_file(name, data)
        except OSError as exc:
            raise translate_os_error(exc, f"object {digest}") from exc
        return digest

    def has(self, digest: str) -> bool:
        """Tells whether the object is stored."""
        return bool(self._fs.exists(self._name(digest)))

    def length(self, digest: str) -> int:
        """Returns the object's length in bytes; raises StateError when it is absent."""
        try:
            return int(self._fs.size(self._name(digest)))
        except OSError as exc:
            raise StateError(f"Object {digest} is not in the store.") from exc

    def open(self, digest: str) -> BinaryIO:
        """Returns a seekable reader of the object; raises StateError when it is absent."""
        try:
            return cast(BinaryIO, self._fs.open(self._name(digest), "rb"))
        except OSError as exc:
            raise StateError(f"Object {digest} is not in the store.") from exc

    def read(self, digest: str) -> bytes:
        """Returns the object's bytes, verified.

        Raises:
            StateError: it is absent.
            TrustError: what is stored under this name is something else.
        """
        with self.open(digest) as file:
            data = file.read()
        if hashlib.sha256(data).hexdigest() != digest:
            raise TrustError(f"Object {digest} was changed in the store.", cure="Restore it from a backup.")
        return data

    def path(self, digest: str) -> Path | None:
        """Returns the object's path on this machine's disk, or None where the store is elsewhere."""
        return Path(self._name(digest)) if self._local else None

    def _name(self, digest: str) -> str:
        if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
            raise StateError(f"{digest[:80]!r} is not the name of an object.")
        return f"{self._root}/{digest[:2]}/{digest}"
