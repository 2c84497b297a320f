"""The audit log: append-only, each row's digest covers the row and the digest before it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from sqlalchemy import Connection, Row, insert, select, text

from cloud.access.tables import audit
from shared.clock import Clock
from shared.errors import TrustError

GENESIS = "0" * 64


def record(conn: Connection, clock: Clock, *, actor: str, action: str, subject: str, **detail: Any) -> None:
    """Appends one decision within the caller's transaction.

    Args:
        actor: a person's name, `node:<site>/<node>`, or `system`.
        action: `<room>.<what>`, for example `enrolment.refused`.
        subject: what it was done to.
        detail: JSON values; never anything of a patient.
    """
    if conn.dialect.name == "postgresql":  # SQLite transactions are already one at a time
        conn.execute(text("LOCK TABLE audit IN EXCLUSIVE MODE"))
    last = conn.execute(select(audit).order_by(audit.c.serial.desc()).limit(1)).first()
    serial = last.serial + 1 if last else 1
    values = {
        "serial": serial,
        "at": clock.now().isoformat(),
        "actor": actor[:80],
        "action": action[:64],
        "subject": subject[:200],
        "detail": json.dumps(detail, sort_keys=True),
    }
    conn.execute(insert(audit).values(**values, digest=_digest(last.digest if last else GENESIS, values)))


def verify(conn: Connection) -> tuple[int, str]:
    """Returns how many rows the log has and its newest digest, after recomputing every one of them.

    Raises:
        TrustError: a row was changed, removed from the middle, added or moved; names the first wrong one. Rows cut
            off at the end are seen only against a digest kept elsewhere: write the returned one down.
    """
    previous, expected = GENESIS, 1
    for row in conn.execute(select(audit).order_by(audit.c.serial)).yield_per(500):
        values = {name: getattr(row, name) for name in ("serial", "at", "actor", "action", "subject", "detail")}
        if row.serial != expected or row.digest != _digest(previous, values):
            raise TrustError(
                f"The audit log is not what was written: entry {expected} is wrong.",
                cure="Compare with a backup; somebody changed the database by hand.",
            )
        previous, expected = row.digest, expected + 1
    return expected - 1, previous


def newest(conn: Connection, limit: int) -> Iterator[Row[Any]]:
    """Yields the newest `limit` entries, newest first."""
    yield from conn.execute(select(audit).order_by(audit.c.serial.desc()).limit(limit))


def _digest(previous: str, values: dict[str, Any]) -> str:
    return hashlib.sha256((previous + json.dumps(values, sort_keys=True)).encode()).hexdigest()
