"""What this node has been offered, what became of it, and which model it may serve.

    OFFERED > VERIFIED > DOWNLOADED > STAGED > SHADOW > READY > PROVISIONAL > COMMITTED
        any of them before PROVISIONAL > REFUSED(reason);  PROVISIONAL > ROLLED_BACK(reason)
        after a crash of the pipeline: STAGED .. PROVISIONAL > DOWNLOADED, at most ATTEMPTS times

`uplink` writes the states up to DOWNLOADED, `pipeline` those from STAGED, each step one durable transaction; a step
that is not legal from where the slot stands is refused, so two processes cannot cross each other. `current` and
`previous` are rows that change only in the transaction that commits, abandons or installs: whatever is cut off in
between leaves the model that served before.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, cast

from edge.sqlite import open_owned, transaction
from shared.clock import Clock
from shared.errors import StateError
from shared.wire.records import SlotReport

State = Literal[
    "OFFERED", "VERIFIED", "DOWNLOADED", "STAGED", "SHADOW", "READY", "PROVISIONAL", "COMMITTED",
    "ROLLED_BACK", "REFUSED",
]  # fmt: skip

ATTEMPTS = 3  # per package; then it is refused until an administrator withdraws the order and gives it again
REPORTED = 8  # slots in a report, newest first
HISTORY = 1_000  # steps kept

_NEXT: dict[State, State] = {
    "OFFERED": "VERIFIED",
    "VERIFIED": "DOWNLOADED",
    "DOWNLOADED": "STAGED",
    "STAGED": "SHADOW",
    "SHADOW": "READY",
    "READY": "PROVISIONAL",
}
IN_FLIGHT = tuple(_NEXT)  # may still be refused or superseded; PROVISIONAL ends by itself
_IN_MEMORY = ("STAGED", "SHADOW", "READY", "PROVISIONAL")  # gone with the pipeline's process
_ENDED = ("ROLLED_BACK", "REFUSED")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS slots (
    package TEXT PRIMARY KEY, release INTEGER NOT NULL, state TEXT NOT NULL, reason TEXT NOT NULL,
    attempts INTEGER NOT NULL, final INTEGER NOT NULL, length INTEGER NOT NULL, at TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS roles (
    role TEXT PRIMARY KEY CHECK (role IN ('current', 'previous')), package TEXT NOT NULL REFERENCES slots (package)
);
CREATE TABLE IF NOT EXISTS history (
    id INTEGER PRIMARY KEY, package TEXT NOT NULL, state TEXT NOT NULL, reason TEXT NOT NULL, at TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS trusted (
    repository TEXT NOT NULL, name TEXT NOT NULL, data BLOB NOT NULL, PRIMARY KEY (repository, name)
);
"""


@dataclass(frozen=True)
class Slot:
    """One package in the journal. `length` is that of its manifest in bytes, known from VERIFIED on."""

    package: str
    release: int
    state: State
    reason: str
    attempts: int
    final: bool
    length: int
    at: datetime


class Journal:
    """The file `slots.sqlite`; threads may share one instance, processes open one each."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self._connection = open_owned(path, _SCHEMA, 1)
        self._clock = clock
        self._lock = threading.Lock()

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()

    def install(self, package: str, release: int) -> None:
        """Makes `package` the committed model of a node that has none; nothing happens when it has one."""
        with self._step() as db:
            if _role(db, "current") is None:
                self._put(db, package, release, "COMMITTED", "shipped with the software")
                db.execute("INSERT INTO roles VALUES ('current', ?)", (package,))

    def offer(self, package: str, release: int) -> bool:
        """Returns True when `package` is now OFFERED, superseding whatever else was in flight.

        False when it is in flight or serves already, when it was tried ATTEMPTS times or failed for good, or while
        another package is PROVISIONAL.
        """
        with self._step() as db:
            slot = _slot(db, package)
            if _role(db, "current") == package or self._waiting(db, "PROVISIONAL") is not None:
                return False
            if slot is not None and slot.state in IN_FLIGHT:
                return False
            ended = slot is not None and slot.state in _ENDED
            if slot is not None and ended and (slot.final or slot.attempts >= ATTEMPTS):
                return False
            self._refuse_in_flight(db, f"superseded by release {release}")
            self._put(db, package, release, "OFFERED", "", attempts=slot.attempts + 1 if slot and ended else 1)
            return True

    def withdraw(self) -> bool:
        """Ends whatever is in flight, and lets what failed for passing reasons be ordered anew.

        True when something was in flight.
        """
        with self._step() as db:
            db.execute("UPDATE slots SET attempts = 0 WHERE state IN ('REFUSED', 'ROLLED_BACK') AND final = 0")
            return self._refuse_in_flight(db, "withdrawn by the cloud")

    def verified(self, package: str, length: int) -> None:
        """OFFERED > VERIFIED; `length` is the manifest's in bytes."""
        with self._step() as db:
            self._move(db, package, "VERIFIED")
            db.execute("UPDATE slots SET length = ? WHERE package = ?", (length, package))

    def advance(self, package: str, state: State, reason: str = "") -> None:
        """One step along the line, up to PROVISIONAL.

        Raises:
            StateError: the slot does not stand right before `state` (any more): drop what was prepared for it.
        """
        with self._step() as db:
            self._move(db, package, state, reason)

    def refuse(self, package: str, reason: str, *, final: bool) -> None:
        """Ends a slot before it served. `final`: the package itself is at fault and is never tried again."""
        with self._step() as db:
            slot = _slot(db, package)
            if slot is not None and slot.state in IN_FLIGHT:
                self._end(db, package, "REFUSED", reason, final=final)

    def commit(self, package: str, reason: str = "") -> None:
        """PROVISIONAL > COMMITTED: it becomes `current`, and what was current becomes `previous`."""
        with self._step() as db:
            slot = _slot(db, package)
            if slot is None or slot.state != "PROVISIONAL":
                raise StateError(f"{package[:12]} is not PROVISIONAL and cannot be committed.")
            self._put(db, package, slot.release, "COMMITTED", reason, length=slot.length)
            db.execute("INSERT OR REPLACE INTO roles SELECT 'previous', package FROM roles WHERE role = 'current'")
            db.execute("INSERT OR REPLACE INTO roles VALUES ('current', ?)", (package,))

    def roll_back(self, package: str, reason: str, *, final: bool) -> None:
        """PROVISIONAL > ROLLED_BACK; `current` never changed."""
        with self._step() as db:
            slot = _slot(db, package)
            if slot is not None and slot.state == "PROVISIONAL":
                self._end(db, package, "ROLLED_BACK", reason, final=final)

    def abandon(self, package: str, reason: str) -> None:
        """The committed model cannot be loaded any more: `previous` becomes `current`. It may be offered again."""
        with self._step() as db:
            self._end(db, package, "ROLLED_BACK", reason, final=False)
            db.execute("DELETE FROM roles WHERE role = 'current' AND package = ?", (package,))
            if _role(db, "current") is None:
                db.execute("UPDATE roles SET role = 'current' WHERE role = 'previous'")

    def recover(self) -> None:
        """What the pipeline calls first: `current` serves, and what the ended process had in memory is staged again.

        A package that took the process down ATTEMPTS times, staged or serving, is given up.
        """
        with self._step() as db:
            for slot in map(_read, db.execute("SELECT * FROM slots").fetchall()):
                if slot.state not in _IN_MEMORY:
                    continue
                reason = f"the process ended while it was {slot.state}"
                if slot.attempts < ATTEMPTS:
                    again = slot.attempts + 1
                    self._put(db, slot.package, slot.release, "DOWNLOADED", reason, attempts=again, length=slot.length)
                else:
                    state: State = "ROLLED_BACK" if slot.state == "PROVISIONAL" else "REFUSED"
                    self._end(db, slot.package, state, f"{reason}, {ATTEMPTS} times", final=True)

    def committed(self) -> tuple[str, int] | None:
        """Returns (package, release) of the model that shall serve, or None before `install`."""
        with self._lock:
            package = _role(self._connection, "current")
            slot = _slot(self._connection, package) if package else None
            return (slot.package, slot.release) if slot else None

    def previous(self) -> str | None:
        """Returns the package that was committed before the current one."""
        with self._lock:
            return _role(self._connection, "previous")

    def get(self, package: str) -> Slot | None:
        """Returns the slot of `package`."""
        with self._lock:
            return _slot(self._connection, package)

    def waiting(self, state: State) -> Slot | None:
        """Returns the newest slot in `state`."""
        with self._lock:
            return self._waiting(self._connection, state)

    def reports(self) -> list[SlotReport]:
        """Returns the newest REPORTED slots as the cloud hears of them, newest first."""
        with self._lock:
            rows = self._connection.execute(
                "SELECT * FROM slots ORDER BY at DESC, release DESC LIMIT ?", (REPORTED,)
            ).fetchall()
        return [SlotReport(s.package, s.release, s.state, s.reason) for s in map(_read, rows)]

    def history(self, package: str) -> list[tuple[str, str]]:
        """Returns every (state, reason) that `package` went through, oldest first."""
        with self._lock:
            rows = self._connection.execute(
                "SELECT state, reason FROM history WHERE package = ? ORDER BY id", (package,)
            ).fetchall()
        return [(str(row["state"]), str(row["reason"])) for row in rows]

    def trusted(self, repository: str) -> dict[str, bytes]:
        """Returns the metadata of `repository` that this node has verified and trusts, by file name."""
        with self._lock:
            rows = self._connection.execute(
                "SELECT name, data FROM trusted WHERE repository = ?", (repository,)
            ).fetchall()
        return {str(row["name"]): bytes(row["data"]) for row in rows}

    def keep_trusted(self, repository: str, files: Mapping[str, bytes]) -> None:
        """Remembers verified metadata, all of it in one transaction: older versions are refused from now on."""
        with self._step() as db:
            db.execute("DELETE FROM trusted WHERE repository = ?", (repository,))
            db.executemany(
                "INSERT INTO trusted VALUES (?, ?, ?)",
                [(repository, name, data) for name, data in files.items()],
            )

    @contextmanager
    def _step(self) -> Iterator[sqlite3.Connection]:
        with self._lock, transaction(self._connection) as db:
            yield db

    def _put(
        self, db: sqlite3.Connection, package: str, release: int, state: State, reason: str,
        *, attempts: int = 0, final: bool = False, length: int = 0,
    ) -> None:  # fmt: skip
        at = self._clock.now().isoformat()
        db.execute(
            "INSERT OR REPLACE INTO slots VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (package, release, state, reason, attempts, final, length, at),
        )
        db.execute(
            "INSERT INTO history (package, state, reason, at) VALUES (?, ?, ?, ?)",
            (package, state, reason, at),
        )
        db.execute("DELETE FROM history WHERE id <= (SELECT max(id) FROM history) - ?", (HISTORY,))

    def _move(self, db: sqlite3.Connection, package: str, state: State, reason: str = "") -> None:
        slot = _slot(db, package)
        if slot is None or _NEXT.get(slot.state) != state:
            raise StateError(f"{package[:12]} is {slot.state if slot else 'unknown'} and cannot become {state}.")
        self._put(db, package, slot.release, state, reason, attempts=slot.attempts, length=slot.length)

    def _end(self, db: sqlite3.Connection, package: str, state: State, reason: str, *, final: bool) -> None:
        slot = _slot(db, package)
        if slot is not None:
            self._put(
                db,
                package,
                slot.release,
                state,
                reason,
                attempts=slot.attempts,
                final=final,
                length=slot.length,
            )

    def _refuse_in_flight(self, db: sqlite3.Connection, reason: str) -> bool:
        flying = [s for s in map(_read, db.execute("SELECT * FROM slots").fetchall()) if s.state in IN_FLIGHT]
        for slot in flying:
            self._put(db, slot.package, slot.release, "REFUSED", reason)
        return bool(flying)

    def _waiting(self, db: sqlite3.Connection, state: State) -> Slot | None:
        row = db.execute("SELECT * FROM slots WHERE state = ? ORDER BY release DESC LIMIT 1", (state,)).fetchone()
        return _read(row) if row else None


def _role(db: sqlite3.Connection, role: str) -> str | None:
    row = db.execute("SELECT package FROM roles WHERE role = ?", (role,)).fetchone()
    return str(row["package"]) if row else None


def _slot(db: sqlite3.Connection, package: str) -> Slot | None:
    row = db.execute("SELECT * FROM slots WHERE package = ?", (package,)).fetchone()
    return _read(row) if row else None


def _read(row: sqlite3.Row) -> Slot:
    return Slot(
        package=row["package"],
        release=row["release"],
        state=cast(State, row["state"]),
        reason=row["reason"],
        attempts=row["attempts"],
        final=bool(row["final"]),
        length=row["length"],
        at=datetime.fromisoformat(row["at"]),
    )
