"""A worker in this process, over a real Redis and a real database, and a node that seals for it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from sqlalchemy import Connection, Engine, insert, text

from cloud.access.audit import record as audit_record
from cloud.access.tables import devices
from cloud.ingest.devices import enrolled_devices
from cloud.ingest.streams import Stream
from cloud.ingest.worker import Handler, Opener, Worker
from cloud.objects import Objects
from cloud.store import METADATA, open_engine
from scripts.lab.parts import Redis, start_redis
from shared.clock import SystemClock
from shared.wire import topics
from shared.wire.chunks import DATA_BYTES, pack, whole_of
from shared.wire.envelope import Header, SealPrivate, SealPublic, seal
from shared.wire.identity import Identity
from shared.wire.records import Receipt, UpStage
from shared.wire.signed import verify_record
from shared.wire.stages import STAGES, encode
from tests.simulators.pki import Leaf, TestAuthority
from tests.simulators.wire import TABLES, effect, features


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    server = start_redis(tmp_path_factory.mktemp("redis"))
    yield server
    server.child.stop()


@dataclass
class Node:
    """Seals messages; each attack changes one thing."""

    leaf: Leaf
    identity: Identity
    recipient: SealPublic
    ids: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def message(
        self,
        record: object,
        stage: UpStage = "features",
        *,
        device: Ed25519PrivateKey | None = None,
        recipient: SealPublic | None = None,
        **changes: Any,
    ) -> tuple[str, bytes]:
        """Returns id and bytes of a sealed message; `changes` are other header fields than the honest ones."""
        number = next(self.ids)
        values = {
            "version": 1,
            "site": self.identity.site,
            "node": self.identity.node,
            "incarnation": "i1",
            "stage": stage,
            "id": f"{number:032x}",
            "sequence": number,
            "round": "",
            "key_id": (recipient or self.recipient).key_id,
            "created": 0,
            **changes,
        }
        head = Header(**values)
        data = record if isinstance(record, bytes) else encode(record)  # type: ignore[arg-type]
        return head.id, seal(head, data, recipient or self.recipient, device or self.leaf.key)


class Bench:
    """What the tests of the worker need at hand."""

    def __init__(self, folder: Path, redis: Redis) -> None:
        self.clock = SystemClock()
        self.folder = folder
        self.engine: Engine = open_engine(f"sqlite:///{folder / 'cloud.sqlite'}")
        METADATA.create_all(self.engine, tables=TABLES)
        with self.engine.begin() as conn:
            conn.execute(text("CREATE TABLE effects (id TEXT, stage TEXT, mark TEXT)"))
        self.authority = TestAuthority(folder / "pki")
        self.sign = Ed25519PrivateKey.generate()
        self.seal = SealPrivate.generate()
        self.objects = Objects(str(folder / "objects"))
        name = folder.name
        self.up = Stream(redis.url, f"up:{name}", "w", claim_after_ms=100)
        self.down = Stream(redis.url, f"down:{name}", "d", claim_after_ms=100)
        self.handlers: dict[str, Handler] = {stage: effect() for stage in STAGES}
        self.opened: list[tuple[Header, bytes]] = []
        self.worker = self.new_worker()

    def new_worker(self) -> Worker:
        return Worker(
            self.engine,
            self.up,
            self.down,
            opener=Opener([self.seal], enrolled_devices, lambda head, data: self.opened.append((head, data))),
            objects=self.objects,
            handlers=self.handlers,
            sign=self.sign,
            clock=self.clock,
            audit=lambda conn, **line: audit_record(conn, self.clock, **line),
        )

    def node(self, site: str = "hosp-a", *, enrolled: bool = True, revoked: bool = False) -> Node:
        leaf = self.authority.node(site, "n1")
        if enrolled:
            now = datetime.now(UTC)
            with self.engine.begin() as conn:
                conn.execute(
                    insert(devices).values(
                        serial=f"{leaf.x509.serial_number:x}",
                        site=site,
                        node="n1",
                        key=leaf.key.public_key().public_bytes_raw(),
                        certificate=leaf.x509.public_bytes(Encoding.DER),
                        issued_at=now,
                        expires_at=now + timedelta(days=1),
                        revoked=revoked,
                    )
                )
        return Node(leaf, Identity(site, "n1"), self.seal.public)

    def send(
        self,
        identity: Identity,
        message: tuple[str, bytes],
        stage: UpStage = "features",
        only: list[int] | None = None,
    ) -> None:
        """Puts a message's chunks where the door would."""
        message_id, sealed = message
        whole = whole_of(message_id, sealed)
        for index in range(whole.count) if only is None else only:
            start = index * DATA_BYTES
            data = sealed[start : start + whole.length(index)]
            assert self.up.push(topics.up(identity, stage), pack(whole, index, data))

    def receipts(self) -> list[Receipt]:
        """Lets the worker work and returns what it then sends, in order."""
        while self.worker.step():
            pass
        entries = self.down.take(1000, 1)
        self.down.finish([entry.id for entry in entries])
        public = self.sign.public_key()
        return [verify_record(entry.payload, public, "receipt", Receipt) for entry in entries]

    def verdict(self, node: Node, message: tuple[str, bytes], stage: UpStage = "features") -> Receipt:
        self.send(node.identity, message, stage)
        (receipt,) = self.receipts()
        return receipt

    def one(self, query: str) -> Any:
        with self.engine.connect().execution_options(read_only=True) as conn:
            return conn.execute(text(query)).scalar_one_or_none()

    def true_on_disk(self) -> dict[str, int]:
        """Returns how much of everything there is."""
        tables = ("messages", "effects", "refusals", "transfers", "chunks", "audit")
        counts = {table: int(self.one(f"SELECT count(*) FROM {table}")) for table in tables}  # noqa: S608
        return counts | {"objects": len(list(self.folder.glob("objects/*/*")))}


@pytest.fixture
def bench(tmp_path: Path, redis_server: Redis) -> Iterator[Bench]:
    made = Bench(tmp_path, redis_server)
    yield made
    made.up.close()
    made.down.close()
    made.engine.dispose()


@pytest.fixture
def node(bench: Bench) -> Node:
    return bench.node()


def failing(_conn: Connection, _head: Header, _record: object) -> None:
    raise ValueError("a defect of a handler")


__all__ = ["Bench", "Node", "failing", "features"]
