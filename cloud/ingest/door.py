"""Between MQTT and Redis: messages up into the stream, receipts and desired states down to the nodes.

The door opens nothing. That a topic's site and node are the sender's is the broker's proof
(deploy/mosquitto/acl).
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from sqlalchemy import Engine, select
from sqlalchemy.exc import SQLAlchemyError

from cloud.ingest.broker import Broker
from cloud.ingest.streams import Stream
from cloud.ingest.tables import desired
from shared.clock import Clock
from shared.errors import LinkError, RadfleetError
from shared.log import get_logger
from shared.wire import topics
from shared.wire.identity import Identity

REPEAT_S = 30.0  # every retained document is published again this often
LOOK_S = 0.25  # how often the table of desired states is looked at


class Door:
    """`run` moves both ways in threads of its own until `stop`."""

    def __init__(self, broker: Broker, up: Stream, down: Stream, engine: Engine, clock: Clock) -> None:
        self._broker = broker
        self._up = up
        self._down = down
        self._engine = engine
        self._clock = clock
        self._log = get_logger()
        self._published: dict[Identity, int] = {}
        self._connection = 0
        self._repeat_at = 0.0
        self.counts = {"up": 0, "receipt": 0, "desired": 0}

    def run(self, stop: threading.Event) -> None:
        """Serves until `stop`; what is away is waited for."""
        loops = (self.step_up, self.step_receipts, self.step_desired)
        threads = [threading.Thread(target=self._loop, args=(loop, stop)) for loop in loops]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._broker.close()

    def _loop(self, step: Callable[[threading.Event], None], stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                step(stop)
            except (RadfleetError, SQLAlchemyError) as exc:
                self._log.warning("door.waiting", step=step.__name__, reason=str(exc))
                stop.wait(0.5)

    def step_up(self, stop: threading.Event) -> None:
        """Moves one message from the broker to the stream; only then may the broker forget it."""
        incoming = self._broker.take(0.5)
        if incoming is None:
            return
        waiting = False
        while not stop.is_set():
            try:
                if self._up.push(incoming.topic, incoming.payload):
                    incoming.acknowledge()
                    self.counts["up"] += 1
                    return
                reason = "the stream is full"
            except LinkError as exc:
                reason = str(exc)
            if not waiting:
                self._log.warning("door.holding_back", reason=reason)
                waiting = True
            stop.wait(0.1)

    def step_receipts(self, _stop: threading.Event) -> None:
        """Publishes the receipts of one batch; each is finished when the broker has acknowledged it."""
        if not self._broker.wait_connected(0.5):
            return
        entries = self._down.take(64, block_ms=500)
        sent = [(entry.id, self._broker.publish(entry.topic, entry.payload)) for entry in entries]
        for _, info in sent:
            self._broker.confirm(info)
        self._down.finish([entry_id for entry_id, _ in sent])
        self.counts["receipt"] += len(sent)

    def step_desired(self, stop: threading.Event) -> None:
        """Publishes what changed; everything on a new connection and every REPEAT_S: brokers forget."""
        if not self._broker.wait_connected(0.5):
            return
        now = self._clock.monotonic()
        if self._broker.connections != self._connection or now >= self._repeat_at:
            self._connection = self._broker.connections
            self._published, forgotten = {}, set()
            self._repeat_at = now + REPEAT_S
        else:
            forgotten = set(self._published)
        with self._engine.connect().execution_options(read_only=True) as conn:
            rows = conn.execute(select(desired.c.site, desired.c.node, desired.c.serial)).all()
            for row in rows:
                identity = Identity(row.site, row.node)
                forgotten.discard(identity)
                if self._published.get(identity) == row.serial:
                    continue
                document, serial = conn.execute(
                    select(desired.c.document, desired.c.serial).where(
                        desired.c.site == row.site, desired.c.node == row.node
                    )
                ).one()
                self._publish(identity, document)
                self._published[identity] = serial
        for identity in forgotten:
            self._publish(identity, b"")  # an empty retained message withdraws the document
            del self._published[identity]
        stop.wait(LOOK_S)

    def _publish(self, identity: Identity, document: bytes) -> None:
        sent = self._broker.publish(topics.down(identity, "desired"), document, retain=True)
        self._broker.confirm(sent)
        self.counts["desired"] += 1
