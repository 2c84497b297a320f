"""One mover of campaigns at a time: a lease with a fencing token, in the database whose rows it guards."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from sqlalchemy import Connection, insert, select, update

from cloud.rounds.tables import leases

LEASE_S = 10.0


def hold(conn: Connection, name: str, holder: str, now: datetime) -> int | None:
    """Returns the fencing token when `holder` has the lease after this call, None while another has it.

    Call it in the transaction that writes what the lease guards: the lease's row is written first, so the
    database itself makes a holder that slept past its lease wait, and then see that it lost.
    """
    row = conn.execute(select(leases).where(leases.c.name == name).with_for_update()).first()
    until = now + timedelta(seconds=LEASE_S)
    if row is None:
        conn.execute(insert(leases).values(name=name, holder=holder, fence=1, until=until))
        return 1
    if row.holder != holder and now < _aware(row.until):
        return None
    fence: int = row.fence if row.holder == holder else row.fence + 1
    taken = update(leases).where(leases.c.name == name, leases.c.fence == row.fence, leases.c.holder == row.holder)
    if conn.execute(taken.values(holder=holder, fence=fence, until=until)).rowcount != 1:
        return None
    return fence


def _aware(moment: datetime) -> datetime:
    """SQLite gives times back without their zone; everything we store is UTC."""
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
