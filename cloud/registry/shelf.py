"""A folder of signed TUF metadata, written so that a client sees the old state or the new one and never a mixture.

Files have their version in the name and are written in the order root, targets, snapshot; `timestamp.json` is written
last and is the only file that is ever replaced. A crash before it leaves files that nothing names; the next write uses
the same version numbers again.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TypeVar

from securesystemslib.signer import Signer
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, Targets, Timestamp
from tuf.api.serialization import DeserializationError
from tuf.api.serialization.json import JSONSerializer

from shared.errors import StateError
from shared.files import atomic_write, read_limited

FILE_LIMIT_BYTES = 5_000_000
T = TypeVar("T", Root, Timestamp, Snapshot, Targets)
TIMESTAMP_LIFE = timedelta(days=1)
SNAPSHOT_LIFE = timedelta(days=7)


@dataclass(frozen=True)
class Current:
    """What `timestamp.json` names at this moment."""

    timestamp: Metadata[Timestamp]
    snapshot: Metadata[Snapshot]
    targets: Metadata[Targets]


class Shelf:
    """Reads and writes one repository's metadata; the signers of snapshot and timestamp are online keys."""

    def __init__(self, folder: Path, *, snapshot: Signer, timestamp: Signer) -> None:
        self.folder = folder
        self._snapshot = snapshot
        self._timestamp = timestamp

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other processes of the cloud from writing this repository."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def has_root(self) -> bool:
        """Returns True once a root was published."""
        return (self.folder / "1.root.json").exists()

    def root_bytes(self) -> bytes:
        """Returns root version 1, which nodes pin at enrolment.

        Raises:
            StateError: no root was published yet.
        """
        if not self.has_root():
            raise StateError(
                "The release repository has no root yet.",
                cure="Let two officers sign the root proposal, then publish it.",
            )
        return read_limited(self.folder / "1.root.json", FILE_LIMIT_BYTES)

    def root(self) -> Metadata[Root]:
        """Returns root version 1."""
        return parse(self.root_bytes(), Root)

    def current(self) -> Current | None:
        """Returns what clients see now, or None before anything was published."""
        if not (self.folder / "timestamp.json").exists():
            return None
        timestamp = self._read("timestamp.json", Timestamp)
        snapshot = self._read(f"{timestamp.signed.snapshot_meta.version}.snapshot.json", Snapshot)
        version = snapshot.signed.meta["targets.json"].version
        return Current(timestamp, snapshot, self._read(f"{version}.targets.json", Targets))

    def write_root(self, root: Metadata[Root]) -> None:
        """Writes the first root; clients that pinned it start from here."""
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write(self.folder / "1.root.json", to_bytes(root), mode=0o644)

    def write_targets(self, targets: Metadata[Targets], now: datetime) -> None:
        """Publishes signed `targets`: targets, snapshot, timestamp, in this order."""
        data = to_bytes(targets)
        version = targets.signed.version
        atomic_write(self.folder / f"{version}.targets.json", data, mode=0o644)
        meta = {"targets.json": MetaFile.from_data(version, data, ["sha256"])}
        self._write_snapshot(meta, now, self.current())

    def refresh(self, now: datetime) -> bool:
        """Signs snapshot and timestamp anew once half of their life is over; True when something was written."""
        current = self.current()
        if current is None:
            return False
        if current.snapshot.signed.expires - now < SNAPSHOT_LIFE / 2:
            self._write_snapshot(current.snapshot.signed.meta, now, current)
            return True
        if current.timestamp.signed.expires - now < TIMESTAMP_LIFE / 2:
            self._write_timestamp(current.timestamp.signed.snapshot_meta, now, current)
            return True
        return False

    def _write_snapshot(self, meta: dict[str, MetaFile], now: datetime, before: Current | None) -> None:
        version = before.snapshot.signed.version + 1 if before else 1
        snapshot = Metadata(Snapshot(version=version, expires=whole(now + SNAPSHOT_LIFE), meta=meta))
        snapshot.sign(self._snapshot)
        data = to_bytes(snapshot)
        atomic_write(self.folder / f"{version}.snapshot.json", data, mode=0o644)
        self._write_timestamp(MetaFile.from_data(version, data, ["sha256"]), now, before)

    def _write_timestamp(self, snapshot: MetaFile, now: datetime, before: Current | None) -> None:
        version = before.timestamp.signed.version + 1 if before else 1
        timestamp = Metadata(Timestamp(version=version, expires=whole(now + TIMESTAMP_LIFE), snapshot_meta=snapshot))
        timestamp.sign(self._timestamp)
        atomic_write(self.folder / "timestamp.json", to_bytes(timestamp), mode=0o644)

    def _read(self, name: str, kind: type[T]) -> Metadata[T]:
        return parse(read_limited(self.folder / name, FILE_LIMIT_BYTES), kind)


def parse(data: bytes, kind: type[T]) -> Metadata[T]:
    """Returns the metadata in `data`. Checks no signature.

    Raises:
        StateError: `data` is not metadata of `kind`.
    """
    try:
        metadata = Metadata[T].from_bytes(data)
    except DeserializationError as exc:
        raise StateError(f"Not TUF metadata: {exc}.") from exc
    if not isinstance(metadata.signed, kind):
        raise StateError(f"TUF metadata of type {metadata.signed.type} where {kind.type} should be.")
    return metadata


def to_bytes(metadata: Metadata[T]) -> bytes:
    """Returns the bytes that are published: indented JSON, keys sorted."""
    return metadata.to_bytes(JSONSerializer())


def whole(moment: datetime) -> datetime:
    """Returns `moment` without fractions of a second, which TUF's date format cannot hold."""
    return moment.replace(microsecond=0)
