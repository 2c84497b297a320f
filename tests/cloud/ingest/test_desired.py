"""Desired states: one serial a change, signed, and published by the door over the real broker."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Engine, select

from cloud.ingest.desired import DesiredStates
from cloud.ingest.tables import desired
from cloud.store import METADATA, open_engine
from scripts.lab.child import wait_until
from shared.clock import SystemClock
from shared.errors import TrustError
from shared.wire.records import Desired, ReleaseOrder
from shared.wire.signed import verify_record
from tests.simulators.wire import WireLab

ORDER = ReleaseOrder(3, "ab" * 32)


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    engine = open_engine(f"sqlite:///{tmp_path / 'cloud.sqlite'}")
    METADATA.create_all(engine, tables=[desired])
    return engine


def test_a_change_raises_the_serial_and_nothing_else_does(engine: Engine) -> None:
    sign = Ed25519PrivateKey.generate()
    states = DesiredStates(sign, SystemClock())
    with engine.begin() as conn:
        assert states.read(conn, "a", "n1").serial == 0
        states.set_order(conn, "a", "n1", ORDER)
        states.set_order(conn, "a", "n1", ORDER)
        assert states.read(conn, "a", "n1").serial == 1
        states.set_task(conn, "a", "n1", None)
        assert states.read(conn, "a", "n1").serial == 1
        states.set_order(conn, "a", "n1", None)
        states.set_order(conn, "a", "n2", ORDER)
    with engine.connect() as conn:
        document = conn.execute(select(desired.c.document).where(desired.c.node == "n1")).scalar_one()
        wanted = verify_record(document, sign.public_key(), "desired", Desired)
        assert (wanted.site, wanted.node, wanted.serial, wanted.order) == ("a", "n1", 2, None)
        assert states.read(conn, "a", "n2").order == ORDER


def test_attack_a_document_changed_in_the_database(engine: Engine) -> None:
    states = DesiredStates(Ed25519PrivateKey.generate(), SystemClock())
    with engine.begin() as conn:
        states.set_order(conn, "a", "n1", ORDER)
        conn.execute(desired.update().values(document=b"\x00" * 100))
        with pytest.raises(TrustError):
            states.read(conn, "a", "n1")


@pytest.mark.e2e
def test_it_reaches_the_node_and_outlives_the_broker(tmp_path: Path) -> None:
    lab = WireLab(tmp_path)
    try:
        states = DesiredStates(lab.sign, SystemClock())
        kit = lab.node("a")
        lab.start_door()
        lab.start_uplink(kit)
        kept = kit.state / "desired-i1.signed"

        def serial() -> int:
            if not kept.exists():
                return 0
            return verify_record(kept.read_bytes(), lab.sign.public_key(), "desired", Desired).serial

        with lab.engine.begin() as conn:
            states.set_order(conn, "a", "n1", ORDER)
        wait_until("the order", lambda: serial() == 1)
        lab.broker.kill()  # and with it every retained message
        with lab.engine.begin() as conn:
            states.set_order(conn, "a", "n1", None)
        lab.broker.restart()
        wait_until("the withdrawal", lambda: serial() == 2)
    finally:
        lab.close()
