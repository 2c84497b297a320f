"""What a node says of itself, kept beside its name in the inventory."""

from __future__ import annotations

import msgspec
from sqlalchemy import Connection, and_, select, update

from cloud.access.tables import nodes
from shared.clock import Clock
from shared.errors import TrustError
from shared.wire.envelope import Header
from shared.wire.records import NodeReport


def take_report(conn: Connection, sender: Header, report: NodeReport, clock: Clock) -> None:
    """Keeps a node's newest report; an older one that was resent only shows that the node lives.

    Raises:
        TrustError: the node is not in the inventory.
    """
    here = and_(nodes.c.site == sender.site, nodes.c.node == sender.node)
    row = conn.execute(select(nodes).where(here)).first()
    if row is None:
        raise TrustError(f"{sender.site}/{sender.node} is not in the inventory.")
    values: dict[str, object] = {"last_seen": clock.now()}
    if row.incarnation != sender.incarnation or sender.sequence > (row.sequence or 0):
        body = msgspec.structs.asdict(report)
        body["slots"] = [msgspec.structs.asdict(slot) for slot in report.slots]
        values |= {"incarnation": sender.incarnation, "sequence": sender.sequence, "report": body}
    conn.execute(update(nodes).where(here).values(values))
