"""What only a person lets go: objects that cannot be read, and identity conflicts. They are asked for by name.

A request is an empty file named by the object's digest, in a folder that the intake process looks at: durable, and
taken once.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from msgspec import Struct

from edge.sqlite import open_foreign
from shared.errors import PeerError
from shared.files import atomic_write

FOLDER = "release"
SHORTEST = 6  # characters of a digest that name an object
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Stuck(Struct, frozen=True):
    """One object that stays until a person lets it go."""

    digest: str
    why: str
    modality: str
    calling_ae: str
    length: int  # bytes
    stored_at: float  # seconds since 1970


def stuck(state: Path) -> list[Stuck]:
    """Returns what only a person lets go, the oldest first."""
    with ExitStack() as stack:
        intake, results = (open_foreign(state / name) for name in ("intake.sqlite", "results.sqlite"))
        for one in (intake, results):
            if one is not None:
                stack.enter_context(closing(one))
        if intake is None:
            return []
        unread = results.execute("SELECT digest, reason FROM quarantine").fetchall() if results else []
        reasons = {row["digest"]: f"cannot be read: {row['reason']}" for row in unread}
        found: list[sqlite3.Row] = []
        columns = "digest, modality, calling_ae, length, stored_at, state"
        for digest in reasons:
            found += intake.execute(f"SELECT {columns} FROM objects WHERE digest = ? AND state = 'kept'", (digest,))  # noqa: S608
        found += intake.execute(f"SELECT {columns} FROM objects WHERE state = 'identity_conflict'")  # noqa: S608
    objects = [
        Stuck(
            row["digest"],
            reasons.get(row["digest"], "") if row["state"] == "kept" else "identity conflict",
            row["modality"],
            row["calling_ae"],
            row["length"],
            row["stored_at"],
        )
        for row in found
    ]
    return sorted(objects, key=lambda one: one.stored_at)


def ask(state: Path, names: Sequence[str]) -> list[Stuck]:
    """Asks the intake process to let objects go, by the beginning of their digests, and returns them.

    Raises:
        PeerError: a name is too short, or is not that of exactly one object that waits for a person; nothing was asked.
    """
    waiting, found = stuck(state), []
    for name in names:
        hits = [one for one in waiting if len(name) >= SHORTEST and one.digest.startswith(name.lower())]
        if len(hits) != 1:
            raise PeerError(
                f"{name[:64]!r} names {len(hits)} objects that wait for a person.",
                cure=f"Give {SHORTEST} characters or more of a digest that `radfleet-edge release` lists.",
            )
        found += hits
    for one in found:
        (state / FOLDER).mkdir(mode=0o700, exist_ok=True)
        atomic_write(state / FOLDER / one.digest, b"", mode=0o600)
    return found


def asked(state: Path) -> list[Path]:
    """Returns the requests that wait; each is named by a digest."""
    return sorted(path for path in (state / FOLDER).glob("*") if _DIGEST.fullmatch(path.name))
