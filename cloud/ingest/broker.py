"""The cloud's connection to the MQTT broker: paho-mqtt 2, MQTT 5, TLS 1.3, one certificate named `cloud`.

A message is acknowledged to the broker by hand, once Redis has it: a Redis that is full or away makes the
broker hold back, and a killed door loses nothing that the broker still holds.
"""

from __future__ import annotations

import queue
import random
import ssl
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from shared.errors import LinkError
from shared.log import get_logger

CLIENT_ID = "cloud"
SESSION_S = 24 * 3600
KEEPALIVE_S = 30
INFLIGHT = 20
BACKOFF_S = (0.2, 30.0)  # first and longest wait before connecting again; full jitter


@dataclass(frozen=True, slots=True)
class Incoming:
    """A message from a node; `acknowledge` lets the broker forget it."""

    topic: str
    payload: bytes
    acknowledge: Callable[[], None]


class Broker:
    """Keeps one connection and makes a new one whenever it breaks; each starts with nothing in flight."""

    def __init__(
        self, host: str, port: int, *, ca: Path, certificate: Path, key: Path, subscribe: Sequence[str]
    ) -> None:
        self._address = (host, port)
        self._context = ssl.create_default_context(cafile=str(ca))
        self._context.minimum_version = ssl.TLSVersion.TLSv1_3
        self._context.load_cert_chain(certificate, key)
        self._filters = list(subscribe)
        self._incoming: queue.SimpleQueue[Incoming] = queue.SimpleQueue()  # at most INFLIGHT unacknowledged
        self._stop = threading.Event()
        self._ready = threading.Event()
        self._client: mqtt.Client | None = None
        self._log = get_logger()
        self.connections = 0  # how often a connection was made: a change means retained state may be gone
        self._thread = threading.Thread(target=self._keep_connected, name="broker", daemon=True)
        self._thread.start()

    def take(self, seconds: float) -> Incoming | None:
        """Returns the next message, or None after `seconds`."""
        try:
            return self._incoming.get(timeout=seconds)
        except queue.Empty:
            return None

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> mqtt.MQTTMessageInfo:
        """Hands a QoS 1 message to the connection; `confirm` waits for the broker's word.

        Raises:
            LinkError: there is no connection.
        """
        client = self._client
        if client is None or not self._ready.is_set():
            raise LinkError("No connection to the broker.", cure="Start the broker or check its address.")
        return client.publish(topic, payload, qos=1, retain=retain)

    def confirm(self, sent: mqtt.MQTTMessageInfo, seconds: float = 10.0) -> None:
        """Waits until the broker has acknowledged a publish; LinkError when it does not."""
        try:
            sent.wait_for_publish(seconds)
        except (RuntimeError, ValueError) as exc:
            raise LinkError(f"The broker did not take a message: {exc}.") from exc
        if not sent.is_published():
            raise LinkError("The broker did not acknowledge a message in time.")

    def wait_connected(self, seconds: float) -> bool:
        """Tells whether there is a connection within `seconds`."""
        return self._ready.wait(seconds)

    def close(self) -> None:
        """Disconnects and ends the thread; the broker keeps the session."""
        self._stop.set()
        if self._client is not None:
            self._client.disconnect()
        self._thread.join(10.0)

    def _keep_connected(self) -> None:
        failures = 0
        while not self._stop.is_set():
            gone = threading.Event()
            client = self._new_client(gone)
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.SessionExpiryInterval = SESSION_S
            properties.ReceiveMaximum = INFLIGHT
            try:
                client.connect(*self._address, keepalive=KEEPALIVE_S, clean_start=False, properties=properties)
                self._client = client
                # paho's own thread, not loop_forever in ours: without it paho lets publish() write to the TLS
                # socket from the caller's thread while this one reads, and the broker sees "bad record mac".
                client.loop_start()
                gone.wait()
                client.loop_stop()
            except OSError as exc:
                self._log.warning("broker.unreachable", reason=str(exc))
            failures = 0 if self._ready.is_set() else failures + 1
            self._ready.clear()
            self._client = None
            ceiling = min(BACKOFF_S[1], BACKOFF_S[0] * 2 ** min(failures, 10))
            self._stop.wait(random.uniform(0, ceiling))  # noqa: S311  # jitter, not a secret

    def _new_client(self, gone: threading.Event) -> mqtt.Client:
        client = mqtt.Client(
            CallbackAPIVersion.VERSION2,
            client_id=CLIENT_ID,
            protocol=mqtt.MQTTv5,
            reconnect_on_failure=False,
            manual_ack=True,
        )
        client.tls_set_context(self._context)
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_message = self._on_message
        client.on_disconnect = lambda *_: gone.set()
        return client

    def _on_connect(
        self, client: mqtt.Client, _data: object, _flags: object, code: ReasonCode, _properties: object
    ) -> None:
        if code.is_failure:
            self._log.error("broker.refused", reason=str(code))
            client.disconnect()
            return
        client.subscribe([(name, SubscribeOptions(qos=1)) for name in self._filters])

    def _on_subscribe(
        self, client: mqtt.Client, _data: object, _mid: int, codes: list[ReasonCode], _properties: object
    ) -> None:
        if any(code.is_failure for code in codes):
            self._log.error("broker.subscription_refused", reasons=[str(code) for code in codes])
            client.disconnect()
            return
        self.connections += 1
        self._ready.set()

    def _on_message(self, client: mqtt.Client, _data: object, message: mqtt.MQTTMessage) -> None:
        if message.qos == 0:  # unacknowledged, so without back-pressure: no node of ours sends it
            self._log.warning("broker.unacknowledged_refused", topic=message.topic)
            return

        def acknowledge(mid: int = message.mid, qos: int = message.qos) -> None:
            client.ack(mid, qos)

        self._incoming.put(Incoming(message.topic, bytes(message.payload), acknowledge))
