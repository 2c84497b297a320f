"""What a node may do at the broker, tried at the real one with the configuration that is deployed."""

from __future__ import annotations

import queue
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from shared.wire.chunks import CHUNK_BYTES
from tests.simulators.pki import Leaf
from tests.simulators.wire import WireLab

pytestmark = pytest.mark.e2e


class Client:
    """A client that hides nothing of what the broker says."""

    def __init__(
        self,
        lab: WireLab,
        leaf: Leaf | None,
        client_id: str = "anything",
        tls: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
    ) -> None:
        self.events: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._client = mqtt.Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            protocol=mqtt.MQTTv5,
            reconnect_on_failure=False,
        )
        context = ssl.create_default_context(cafile=str(lab.authority.ca))
        context.minimum_version = context.maximum_version = tls
        if leaf is not None:
            context.load_cert_chain(leaf.certificate, leaf.key_file)
        self._client.tls_set_context(context)
        put = self.events.put
        self._client.on_connect = lambda *a: put(("connect", str(a[3])))
        self._client.on_disconnect = lambda *a: put(("disconnect", str(a[3])))
        self._client.on_publish = lambda *a: put(("publish", str(a[3])))
        self._client.on_subscribe = lambda *a: put(("subscribe", str(a[3])))
        self._client.on_message = lambda *a: put(("message", (a[2].topic, bytes(a[2].payload))))
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = 60
        self._client.connect("127.0.0.1", lab.port, properties=properties, clean_start=True)
        self._client.loop_start()

    def next(self, seconds: float = 10.0) -> tuple[str, Any]:
        return self.events.get(timeout=seconds)

    def publish(self, topic: str, payload: bytes = b"x") -> tuple[str, Any]:
        self._client.publish(topic, payload, qos=1)
        return self.next()

    def subscribe(self, topic: str) -> None:
        self._client.subscribe(topic, qos=1)
        assert self.next()[0] == "subscribe"

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WireLab]:
    made = WireLab(tmp_path_factory.mktemp("acl"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def leaves(lab: WireLab) -> dict[str, Leaf]:
    return {site: lab.authority.node(site, "n1") for site in ("a", "b")}


@pytest.fixture
def a(lab: WireLab, leaves: dict[str, Leaf]) -> Iterator[Client]:
    client = Client(lab, leaves["a"])
    assert client.next() == ("connect", "Success")
    yield client
    client.close()


@pytest.fixture
def cloud(lab: WireLab) -> Iterator[Client]:
    client = Client(lab, lab.cloud_leaf)
    assert client.next() == ("connect", "Success")
    client.subscribe("radfleet/1/+/+/up/+")
    yield client
    client.close()


def test_a_node_speaks_under_its_own_name(a: Client, cloud: Client) -> None:
    assert a.publish("radfleet/1/a/n1/up/report", b"hello") == ("publish", "Success")
    assert cloud.next() == ("message", ("radfleet/1/a/n1/up/report", b"hello"))
    largest = bytes(CHUNK_BYTES)
    assert a.publish("radfleet/1/a/n1/up/update", largest) == ("publish", "Success")
    assert cloud.next() == ("message", ("radfleet/1/a/n1/up/update", largest))


@pytest.mark.parametrize(
    "topic",
    [
        "radfleet/1/b/n1/up/report",
        "radfleet/1/a/n2/up/report",
        "radfleet/1/a/n1/down/receipt",
        "radfleet/1/b/n1/down/desired",
        "radfleet/1/a/n1/up/update/more",
        "radfleet/1/a/n1/up",
        "anything",
    ],
)
def test_attack_a_node_speaks_elsewhere(a: Client, cloud: Client, topic: str) -> None:
    assert a.publish(topic) == ("publish", "Not authorized")
    assert a.publish("radfleet/1/a/n1/up/report", b"after") == ("publish", "Success")
    assert cloud.next() == ("message", ("radfleet/1/a/n1/up/report", b"after"))  # and nothing before it


def test_attack_a_node_listens_elsewhere(a: Client, cloud: Client) -> None:
    for topic in ("#", "radfleet/1/+/+/down/+", "radfleet/1/b/n1/down/receipt", "radfleet/1/+/+/up/+"):
        a.subscribe(topic)  # Mosquitto grants it, and delivers nothing of it
    assert cloud.publish("radfleet/1/b/n1/down/receipt", b"for b") == ("publish", "Success")
    assert cloud.publish("radfleet/1/a/n1/down/receipt", b"for a") == ("publish", "Success")
    assert a.next() == ("message", ("radfleet/1/a/n1/down/receipt", b"for a"))


def test_attack_taking_over_another_nodes_session(lab: WireLab, a: Client, leaves: dict[str, Leaf]) -> None:
    """The client id is the certificate's name whatever a client says: b with a's id is still b."""
    b = Client(lab, leaves["b"], client_id="a/n1")
    assert b.next() == ("connect", "Success")
    assert b.publish("radfleet/1/a/n1/up/report") == ("publish", "Not authorized")
    assert a.publish("radfleet/1/a/n1/up/report") == ("publish", "Success")  # a was not thrown out
    b.close()


def test_attack_a_packet_over_the_limit(a: Client, cloud: Client) -> None:
    assert a.publish("radfleet/1/a/n1/up/update", bytes(CHUNK_BYTES + 16_384))[0] == "disconnect"


def test_attack_no_certificate(lab: WireLab) -> None:
    client = Client(lab, None)
    assert client.next()[0] == "disconnect"
    client.close()


def test_attack_a_certificate_of_another_authority(lab: WireLab, tmp_path: Path) -> None:
    from tests.simulators.pki import TestAuthority

    client = Client(lab, TestAuthority(tmp_path).node("a", "n1"))
    assert client.next()[0] == "disconnect"
    client.close()


def test_attack_old_tls(lab: WireLab, leaves: dict[str, Leaf]) -> None:
    with pytest.raises(ssl.SSLError):
        Client(lab, leaves["a"], tls=ssl.TLSVersion.TLSv1_2)
