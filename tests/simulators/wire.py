"""Broker, Redis, SQL database and any number of nodes: the wire with its real parts, in one folder.

Door, worker and uplinks are child processes (tests/simulators/wire_process.py): a test can kill them.
"""

from __future__ import annotations

import json
import sqlite3
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from string import Template

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from sqlalchemy import Engine, insert, text, update

from cloud.access.tables import audit, devices
from cloud.ingest.tables import chunks, desired, messages, refusals, transfers, windows
from cloud.store import METADATA, open_engine
from edge.uplink.outbox import drop
from scripts.lab.child import Child, free_port, listens
from scripts.lab.parts import Redis, start_mosquitto, start_redis
from shared.clock import SystemClock
from shared.wire.envelope import SealPrivate
from shared.wire.identity import Identity
from shared.wire.records import FeatureBatch, FeatureRow, ModelUpdate, UpStage
from tests.simulators.pki import Leaf, TestAuthority

ROOT = Path(__file__).resolve().parents[2]
TABLES = [messages, windows, refusals, transfers, chunks, desired, devices, audit]
PACKAGE = "ab" * 32


def features(number: int, site: str = "a") -> FeatureBatch:
    """Returns a batch of one embedding that `number` tells from all others."""
    case = f"{number:031x}{'abcdef'.index(site) + 10:x}"
    return FeatureBatch(PACKAGE, "cpu-u8s8", [FeatureRow(case, "chest", number % 2, False, b"\x00\x3c" * 64)])


def update_of(blob: bytes, round_id: str = "r1") -> ModelUpdate:
    """Returns an update that carries `blob`."""
    return ModelUpdate(round_id, PACKAGE, 10, 1.0, 0.7, 0.6, blob)


@dataclass
class NodeKit:
    """One node's state folder and certificate."""

    identity: Identity
    state: Path
    leaf: Leaf

    @property
    def drops(self) -> Path:
        return self.state / "outbox" / "drop"

    def drop(self, stage: UpStage, record: FeatureBatch | ModelUpdate, name: str) -> None:
        drop(self.drops, stage, record, name=name)

    def outbox(self, query: str) -> list[tuple[object, ...]]:
        """Reads the node's outbox as another process would; empty while it does not exist."""
        path = self.state / "outbox.sqlite"
        if not path.exists():
            return []
        db = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)
        try:
            return db.execute(query).fetchall()
        except sqlite3.OperationalError:  # its owner is still creating it
            return []
        finally:
            db.close()

    def states(self) -> dict[str, int]:
        """Returns how many messages are in each state."""
        return {
            str(row[0]): int(str(row[1])) for row in self.outbox("SELECT state, count(*) FROM messages GROUP BY state")
        }


class WireLab:
    """`start_*` begin child processes; `close` ends every one of them by its own handle."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = TestAuthority(folder / "pki")
        self.authority.issue("broker")
        self.cloud_leaf = self.authority.issue("cloud")
        self.sign = Ed25519PrivateKey.generate()
        self.seal = SealPrivate.generate()
        self.port = free_port()
        template = Template((ROOT / "deploy/mosquitto/mosquitto.conf.template").read_text())
        config = folder / "mosquitto.conf"
        config.write_text(
            template.substitute(
                port=self.port,
                address="127.0.0.1",
                pki=self.authority.ca.parent,
                acl=ROOT / "deploy/mosquitto/acl",
            )
            + "user root\n"  # started by root it would become a user who may not read this folder
        )
        self.children: list[Child] = []
        self.broker = start_mosquitto(config)
        self.children.append(self.broker)
        self.broker.wait_ready("the broker", lambda: listens(self.port))
        self.redis: Redis = start_redis(folder / "redis")
        self.children.append(self.redis.child)
        self.url = f"sqlite:///{folder / 'cloud.sqlite'}"
        self.engine: Engine = open_engine(self.url)
        METADATA.create_all(self.engine, tables=TABLES)
        with self.engine.begin() as conn:
            conn.execute(text("CREATE TABLE effects (id TEXT, stage TEXT, mark TEXT)"))

    # -- nodes

    def node(self, site: str, node: str = "n1", *, enrolled: bool = True, revoked: bool = False) -> NodeKit:
        """Makes a node with a certificate of this fleet's authority."""
        leaf = self.authority.node(site, node)
        kit = NodeKit(Identity(site, node), self.folder / f"{site}-{node}", leaf)
        kit.drops.mkdir(parents=True)
        if enrolled:
            self.enrol(kit, revoked=revoked)
        return kit

    def enrol(self, kit: NodeKit, *, revoked: bool = False) -> None:
        now = datetime.now(UTC)
        with self.engine.begin() as conn:
            conn.execute(
                insert(devices).values(
                    serial=f"{kit.leaf.x509.serial_number:x}",
                    site=kit.identity.site,
                    node=kit.identity.node,
                    key=kit.leaf.key.public_key().public_bytes_raw(),
                    certificate=kit.leaf.x509.public_bytes(Encoding.DER),
                    issued_at=now,
                    expires_at=now + timedelta(days=30),
                    revoked=revoked,
                )
            )

    def revoke(self, kit: NodeKit) -> None:
        with self.engine.begin() as conn:
            conn.execute(update(devices).where(devices.c.site == kit.identity.site).values(revoked=True))

    # -- processes

    def start_door(self) -> Child:
        return self._start("door", {})

    def start_worker(self, name: str = "w1") -> Child:
        return self._start("worker", {"consumer": name}, label=name)

    def start_uplink(self, kit: NodeKit, **more: object) -> Child:
        values = {
            "site": kit.identity.site,
            "node": kit.identity.node,
            "state": str(kit.state),
            "certificate": str(kit.leaf.certificate),
            "key": str(kit.leaf.key_file),
            **more,
        }
        return self._start("uplink", values, label=f"uplink-{kit.identity.site}-{kit.identity.node}")

    def _start(self, process: str, values: dict[str, object], label: str | None = None) -> Child:
        config = {
            "process": process,
            "ca": str(self.authority.ca),
            "cloud_certificate": str(self.cloud_leaf.certificate),
            "cloud_key": str(self.cloud_leaf.key_file),
            "port": self.port,
            "redis": self.redis.url,
            "sql": self.url,
            "objects": str(self.folder / "objects"),
            "sign": self.sign.private_bytes_raw().hex(),
            "seal": self.seal.raw.hex(),
            **values,
        }
        path = self.folder / f"{label or process}.json"
        path.write_text(json.dumps(config))
        command = [sys.executable, "-m", "tests.simulators.wire_process", path]
        child = Child(label or process, command, log=path.with_suffix(".log"), env={"PYTHONPATH": str(ROOT)})
        self.children.append(child)
        return child

    # -- what is true on disk

    def rows(self, query: str) -> list[tuple[object, ...]]:
        with self.engine.connect().execution_options(read_only=True) as conn:
            return [tuple(row) for row in conn.execute(text(query))]

    def count(self, table: str) -> int:
        return int(str(self.rows(f"SELECT count(*) FROM {table}")[0][0]))  # noqa: S608

    def close(self) -> None:
        self.engine.dispose()
        for child in reversed(self.children):
            child.stop(seconds=5)


def effect(clock: SystemClock | None = None) -> Callable[..., None]:
    """Returns a handler that leaves a mark for each message: two marks are a message with two effects."""

    def handle(conn: object, header: object, record: object) -> None:
        mark = record.rows[0].case if isinstance(record, FeatureBatch) else ""
        conn.execute(  # type: ignore[attr-defined]
            text("INSERT INTO effects VALUES (:id, :stage, :mark)"),
            {"id": header.id, "stage": header.stage, "mark": mark},  # type: ignore[attr-defined]
        )

    return handle
