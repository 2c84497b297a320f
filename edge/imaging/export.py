"""A study out of the spool as de-identified files; nothing that stands in the folder is overwritten."""

from __future__ import annotations

from pathlib import Path

from msgspec import Struct

from edge.imaging.burned_in import Blacked
from edge.imaging.deidentify import deidentify, encode
from edge.imaging.read import OBJECT_LIMIT_BYTES, open_object
from edge.sqlite import open_foreign
from shared.errors import PeerError, StateError
from shared.files import atomic_write, read_limited

_KEPT = "kept"  # the other states of intake's index are reasons not to export


class Kept(Struct, frozen=True):
    """One object of intake's index; `file` is its name in the spool folder."""

    digest: str
    file: str
    state: str


class Exported(Struct, frozen=True):
    """What became of one object: a file's name, or why there is none."""

    digest: str
    name: str
    blacked: tuple[Blacked, ...]
    reason: str


def objects_of(index: Path, study: str) -> list[Kept]:
    """Returns the objects of a study in the order of their arrival.

    Raises:
        PeerError: intake knows none.
        StateError: the index cannot be read.
    """
    database = open_foreign(index)
    rows = []
    if database is not None:
        rows = database.execute(
            "SELECT digest, file, state FROM objects WHERE study = ? ORDER BY id", (study,)
        ).fetchall()
        database.close()
    if not rows:
        raise PeerError("This node holds no object of that study.", cure="Check the Study Instance UID.")
    return [Kept(row["digest"], row["file"], row["state"]) for row in rows]


def export_object(kept: Kept, spool: Path, to: Path, site_key: bytes) -> Exported:
    """Writes one object into the folder `to`, or says why not; a file that stands there already is left as it is.

    Raises:
        StateError: the folder cannot be written.
    """
    try:
        if kept.state != _KEPT:
            raise PeerError(f"Its state is {kept.state.replace('_', ' ')}.")
        try:
            dataset = open_object(spool / kept.file)
        except StateError as exc:
            raise PeerError("It cannot be read from the spool.") from exc
        result = deidentify(dataset, site_key)
        data = encode(result.dataset)
        path = to / f"{result.dataset.SOPInstanceUID}.dcm"
        if not path.exists():
            atomic_write(path, data, mode=0o644)
        elif read_limited(path, OBJECT_LIMIT_BYTES) != data:
            raise PeerError("A file of its name stands in the folder with other bytes.")
    except PeerError as exc:
        return Exported(kept.digest, "", (), exc.message)
    return Exported(kept.digest, path.name, result.blacked, "")
