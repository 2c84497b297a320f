"""Each (node, incarnation, sequence) once, within a window."""

from __future__ import annotations

from sqlalchemy import Connection, insert, select, update

from cloud.ingest.tables import windows
from shared.errors import TrustError
from shared.wire.envelope import Header

WINDOW = 65_536  # sequences; 8 KiB a node


def use_once(conn: Connection, header: Header) -> None:
    """Marks the header's sequence as used, in the caller's transaction.

    Raises:
        TrustError: it was used before, or is older than the window, where that can no longer be told.
    """
    where = (
        (windows.c.site == header.site)
        & (windows.c.node == header.node)
        & (windows.c.incarnation == header.incarnation)
    )
    row = conn.execute(select(windows.c.highest, windows.c.seen).where(where).with_for_update()).first()
    highest, seen = (row.highest, bytearray(row.seen)) if row else (0, bytearray(WINDOW // 8))
    sequence = header.sequence
    if sequence <= highest - WINDOW:
        raise TrustError(f"Sequence {sequence} is older than the replay window below {highest}.")
    if sequence <= highest and _bit(seen, sequence):
        raise TrustError(f"Sequence {sequence} was used before.")
    if sequence - highest >= WINDOW:
        seen = bytearray(WINDOW // 8)
    else:
        for passed in range(highest + 1, sequence):
            _set(seen, passed, False)
    _set(seen, sequence, True)
    values = {"highest": max(highest, sequence), "seen": bytes(seen)}
    if row:
        conn.execute(update(windows).where(where).values(**values))
    else:
        names = {"site": header.site, "node": header.node, "incarnation": header.incarnation}
        conn.execute(insert(windows).values(**names, **values))


def _bit(seen: bytearray, sequence: int) -> bool:
    at = sequence % WINDOW
    return bool(seen[at // 8] >> (at % 8) & 1)


def _set(seen: bytearray, sequence: int, used: bool) -> None:
    at = sequence % WINDOW
    if used:
        seen[at // 8] |= 1 << (at % 8)
    else:
        seen[at // 8] &= ~(1 << (at % 8)) & 0xFF
