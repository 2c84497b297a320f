"""The queue between the state machine and the trainer: asked once by key, claimed by lease, ended once."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, insert, or_, select, update

from cloud.training.tables import jobs

MAX_ATTEMPTS = 3  # a job that killed its trainer three times will kill the fourth
LEASE_S = 15.0


@dataclass(frozen=True)
class Job:
    """One claimed job; `input` is what its kind documents in `cloud.training.trainer`."""

    id: int
    key: str
    kind: str
    input: dict[str, Any]
    holder: str


def ask(conn: Connection, key: str, kind: str, given: dict[str, Any]) -> None:
    """Queues a job once; asking again with the same key changes nothing."""
    if conn.execute(select(jobs.c.id).where(jobs.c.key == key)).first() is None:
        row = {
            "key": key,
            "kind": kind,
            "input": given,
            "state": "queued",
            "reason": "",
            "holder": "",
            "attempts": 0,
        }
        conn.execute(insert(jobs).values(row))


def claim(conn: Connection, holder: str, now: datetime) -> Job | None:
    """Returns the oldest job that nobody works on, now leased to `holder`, or None.

    A job whose lease lapsed (its trainer died) is taken again; after MAX_ATTEMPTS it fails instead.
    """
    free = or_(jobs.c.state == "queued", (jobs.c.state == "running") & (jobs.c.lease_until < now))
    for row in conn.execute(select(jobs).where(free).order_by(jobs.c.id).with_for_update()).all():
        mine = update(jobs).where(jobs.c.id == row.id, free)
        if row.attempts >= MAX_ATTEMPTS:
            conn.execute(mine.values(state="failed", reason=f"the trainer died {row.attempts} times at this job"))
            continue
        lease = {"state": "running", "holder": holder, "lease_until": now + timedelta(seconds=LEASE_S)}
        if conn.execute(mine.values(attempts=row.attempts + 1, **lease)).rowcount:
            return Job(row.id, row.key, row.kind, row.input, holder)
    return None


def extend(conn: Connection, job: Job, now: datetime) -> bool:
    """Returns True when the job is still this holder's, its lease now longer."""
    lease = update(jobs).where(jobs.c.id == job.id, jobs.c.holder == job.holder, jobs.c.state == "running")
    return conn.execute(lease.values(lease_until=now + timedelta(seconds=LEASE_S))).rowcount == 1


def finish(conn: Connection, job: Job, output: dict[str, Any]) -> bool:
    """Returns True when the output was recorded; False when another holder has taken the job over."""
    return _end(conn, job, {"state": "done", "output": output})


def fail(conn: Connection, job: Job, reason: str) -> bool:
    """Returns True when the failure was recorded; False when another holder has taken the job over."""
    return _end(conn, job, {"state": "failed", "reason": reason})


def _end(conn: Connection, job: Job, values: dict[str, Any]) -> bool:
    mine = update(jobs).where(jobs.c.id == job.id, jobs.c.holder == job.holder, jobs.c.state == "running")
    return conn.execute(mine.values(lease_until=None, **values)).rowcount == 1
