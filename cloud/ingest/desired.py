"""What each node should be doing: one signed document a node, its serial raised by every change."""

from __future__ import annotations

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Connection, delete, insert, select

from cloud.ingest.tables import desired
from shared.clock import Clock
from shared.wire.records import Desired, JudgeTask, ReleaseOrder, TrainTask
from shared.wire.signed import sign_record, verify_record


class DesiredStates:
    """Reads and writes desired states inside the caller's transaction; `sign` is the cloud's document key."""

    def __init__(self, sign: Ed25519PrivateKey, clock: Clock) -> None:
        self._sign = sign
        self._clock = clock

    def read(self, conn: Connection, site: str, node: str) -> Desired:
        """Returns what the node is asked to be; serial 0 when it was never asked anything."""
        document = conn.execute(
            select(desired.c.document).where(desired.c.site == site, desired.c.node == node).with_for_update()
        ).scalar_one_or_none()
        if document is None:
            return Desired(node=node, site=site, serial=0, issued="", task=None, order=None)
        return verify_record(document, self._sign.public_key(), "desired", Desired)

    def set_task(self, conn: Connection, site: str, node: str, task: TrainTask | JudgeTask | None) -> None:
        """Asks the node to train or to judge, or to stop doing so."""
        self._write(conn, msgspec.structs.replace(self.read(conn, site, node), task=task))

    def set_order(self, conn: Connection, site: str, node: str, order: ReleaseOrder | None) -> None:
        """Orders a release on the node; None leaves it with what it has."""
        self._write(conn, msgspec.structs.replace(self.read(conn, site, node), order=order))

    def forget(self, conn: Connection, site: str, node: str) -> None:
        """Removes a node that is no longer of the fleet; its retained document is withdrawn by the door."""
        conn.execute(delete(desired).where(desired.c.site == site, desired.c.node == node))

    def _write(self, conn: Connection, wanted: Desired) -> None:
        before = self.read(conn, wanted.site, wanted.node)
        if before.serial and (before.task, before.order) == (wanted.task, wanted.order):
            return
        wanted = msgspec.structs.replace(
            wanted, serial=before.serial + 1, issued=self._clock.now().isoformat(timespec="seconds")
        )
        self.forget(conn, wanted.site, wanted.node)
        conn.execute(
            insert(desired).values(
                site=wanted.site,
                node=wanted.node,
                serial=wanted.serial,
                document=sign_record(wanted, self._sign, "desired"),
            )
        )
