"""One process of the wire: `python -m tests.simulators.wire_process CONFIG`."""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from shared.clock import SystemClock
from shared.log import configure
from shared.wire.envelope import SealPrivate
from shared.wire.identity import Identity
from shared.wire.stages import STAGES


def run_door(config: dict[str, Any], stop: threading.Event) -> None:
    from cloud.ingest.broker import Broker
    from cloud.ingest.door import Door
    from cloud.ingest.streams import DOWN, UP, Stream
    from cloud.store import open_engine
    from shared.wire.topics import ALL_UP

    broker = Broker(
        "127.0.0.1",
        config["port"],
        ca=Path(config["ca"]),
        certificate=Path(config["cloud_certificate"]),
        key=Path(config["cloud_key"]),
        subscribe=[ALL_UP],
    )
    up = Stream(config["redis"], UP, "door")
    down = Stream(config["redis"], DOWN, "door", claim_after_ms=1000)
    Door(broker, up, down, open_engine(config["sql"]), SystemClock()).run(stop)


def run_worker(config: dict[str, Any], stop: threading.Event) -> None:
    from cloud.access.audit import record
    from cloud.ingest.devices import enrolled_devices
    from cloud.ingest.streams import DOWN, UP, Stream
    from cloud.ingest.worker import Opener, Worker
    from cloud.objects import Objects
    from cloud.store import open_engine
    from tests.simulators.wire import effect

    clock = SystemClock()
    worker = Worker(
        open_engine(config["sql"]),
        Stream(config["redis"], UP, config["consumer"], claim_after_ms=1000),
        Stream(config["redis"], DOWN, config["consumer"]),
        opener=Opener([SealPrivate(bytes.fromhex(config["seal"]))], enrolled_devices),
        objects=Objects(config["objects"]),
        handlers={stage: effect() for stage in STAGES},
        sign=Ed25519PrivateKey.from_private_bytes(bytes.fromhex(config["sign"])),
        clock=clock,
        audit=lambda conn, **line: record(conn, clock, **line),
    )
    worker.run(stop)


def run_uplink(config: dict[str, Any], stop: threading.Event) -> None:
    from edge.uplink.desired import DesiredKeeper
    from edge.uplink.link import MqttLink
    from edge.uplink.outbox import Outbox
    from edge.uplink.uplink import Sealer, Uplink

    clock, state = SystemClock(), Path(config["state"])
    identity = Identity(config["site"], config["node"])
    device = load_pem_private_key(Path(config["key"]).read_bytes(), None)
    assert isinstance(device, Ed25519PrivateKey)
    cloud = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(config["sign"])).public_key()
    recipient = SealPrivate(bytes.fromhex(config["seal"])).public
    keeper = DesiredKeeper(state, identity=identity, incarnation="i1", cloud=cloud, clock=clock)
    link = partial(
        MqttLink,
        "127.0.0.1",
        config["port"],
        identity=config.get("client_id", identity.common_name),
        ca=Path(config["ca"]),
        certificate=Path(config["certificate"]),
        key=Path(config["key"]),
    )
    sealer = Sealer(identity, "i1", device, recipient, lambda: secrets.token_hex(16), clock)
    Uplink(
        sealer=sealer,
        outbox=Outbox(state / "outbox.sqlite", clock),
        drops=state / "outbox" / "drop",
        cloud=cloud,
        connect=lambda deliver: link(deliver=deliver),
        keeper=keeper,
        on_news=lambda: None,
        report=None,
        features_allowed=True,
        clock=clock,
        retry_s=(config.get("retry_s", 2.0), 5.0),
    ).run(stop)


def main() -> None:
    config = json.loads(Path(sys.argv[1]).read_text())
    configure(f"{config['process']}-{os.getpid()}")
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    random.seed()
    {"door": run_door, "worker": run_worker, "uplink": run_uplink}[config["process"]](config, stop)


if __name__ == "__main__":
    main()
