"""The node's connection to the broker: paho-mqtt 2, MQTT 5, TLS 1.3, named by its certificate.

Only the outbox is trusted to remember: every connection starts with a new client and nothing in flight, and
the broker's word about a publish ends nothing. Callbacks do no work, they hand events over: paho calls them
under its own locks (holding one of ours there has hung before).
"""

from __future__ import annotations

import random
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from shared.errors import LinkError

SESSION_S = 3600  # the broker keeps receipts for a node that is away for a short while
KEEPALIVE_S = 30
RECEIVE_MAXIMUM = 16
BACKOFF_S = (0.5, 60.0)  # first and longest wait before connecting again; full jitter


@dataclass(frozen=True, slots=True)
class Connected:
    """There is a connection, and its subscriptions were granted."""


@dataclass(frozen=True, slots=True)
class Lost:
    """There is none (any more); whatever was in flight is unknown."""

    reason: str


@dataclass(frozen=True, slots=True)
class Taken:
    """The broker took a publish. That is no receipt."""

    token: int


@dataclass(frozen=True, slots=True)
class Denied:
    """The broker refuses a publish for good, for example by its access list."""

    token: int
    reason: str


@dataclass(frozen=True, slots=True)
class Heard:
    """A message to this node."""

    topic: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Woken:
    """Somebody left something in the drop folder."""


Event: TypeAlias = Connected | Lost | Taken | Denied | Heard | Woken
Deliver: TypeAlias = Callable[[Event], None]


class Transport(Protocol):
    """A message bus that connects by itself; what happens comes as events, from any thread."""

    def publish(self, topic: str, payload: bytes) -> int:
        """Hands over one message; returns the token of its Taken or Denied. LinkError: not connected."""

    def subscribe(self, topic: str) -> None:
        """Asks for a topic on this and on every later connection."""

    def close(self) -> None:
        """Ends the connection; no event comes after."""


class MqttLink:
    """Transport over MQTT 5. `identity` is the certificate's common name, and so the client id."""

    def __init__(
        self, host: str, port: int, *, identity: str, ca: Path, certificate: Path, key: Path, deliver: Deliver
    ) -> None:
        self._address = (host, port)
        self._identity = identity
        self._context = ssl.create_default_context(cafile=str(ca))
        self._context.minimum_version = ssl.TLSVersion.TLSv1_3
        self._context.load_cert_chain(certificate, key)
        self._deliver = deliver
        self._filters: list[str] = []
        self._client: mqtt.Client | None = None
        self._up = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_connected, name="link", daemon=True)
        self._begun = False

    def publish(self, topic: str, payload: bytes) -> int:
        client = self._client
        if client is None or not self._up:
            raise LinkError("No connection to the broker.")
        sent = client.publish(topic, payload, qos=1)
        if sent.rc != mqtt.MQTT_ERR_SUCCESS:
            raise LinkError(f"The broker's connection is gone: {mqtt.error_string(sent.rc)}.")
        return sent.mid

    def subscribe(self, topic: str) -> None:
        self._filters.append(topic)
        if not self._begun:
            self._begun = True
            self._thread.start()
        elif self._client is not None and self._up:
            self._client.subscribe(topic, options=SubscribeOptions(qos=1))

    def close(self) -> None:
        self._stop.set()
        if self._client is not None:
            self._client.disconnect()
        if self._begun:
            self._thread.join(10.0)

    def _keep_connected(self) -> None:
        failures = 0
        while not self._stop.is_set():
            reason = self._connect_once()
            failures = 0 if self._up else failures + 1
            self._up, self._client = False, None
            if self._stop.is_set():
                return
            self._deliver(Lost(reason))
            ceiling = min(BACKOFF_S[1], BACKOFF_S[0] * 2 ** min(failures, 10))
            self._stop.wait(random.uniform(0, ceiling))  # noqa: S311  # jitter, not a secret

    def _connect_once(self) -> str:
        """Connects and stays until the connection ends; returns why it did."""
        client = mqtt.Client(
            CallbackAPIVersion.VERSION2,
            client_id=self._identity,
            protocol=mqtt.MQTTv5,
            reconnect_on_failure=False,
        )
        client.tls_set_context(self._context)
        client.max_inflight_messages_set(RECEIVE_MAXIMUM)
        why, gone = ["the connection ended"], threading.Event()
        self._listen(client, why, gone)
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = SESSION_S
        properties.ReceiveMaximum = RECEIVE_MAXIMUM
        try:
            client.connect(*self._address, keepalive=KEEPALIVE_S, clean_start=False, properties=properties)
        except OSError as exc:
            return str(exc)
        self._client = client
        # paho's own thread, not loop_forever in ours: without it paho lets publish() write to the TLS socket
        # from the caller's thread while this one reads, and the broker sees "bad record mac".
        client.loop_start()
        gone.wait()
        client.loop_stop()
        return why[0]

    def _listen(self, client: mqtt.Client, why: list[str], gone: threading.Event) -> None:
        def on_connect(_client: mqtt.Client, _data: object, _flags: object, code: ReasonCode, _more: object) -> None:
            if code.is_failure:
                why[0] = f"the broker refuses the connection: {code}"
                client.disconnect()
            else:
                client.subscribe([(name, SubscribeOptions(qos=1)) for name in self._filters])

        def on_subscribe(
            _client: mqtt.Client, _data: object, _mid: int, codes: list[ReasonCode], _more: object
        ) -> None:
            refused = [str(code) for code in codes if code.is_failure]
            if refused:
                why[0] = f"the broker refuses a subscription: {', '.join(refused)}"
                client.disconnect()
            elif not self._up:
                self._up = True
                self._deliver(Connected())

        def on_disconnect(_client: mqtt.Client, _data: object, _flags: object, code: ReasonCode, _more: object) -> None:
            if code.is_failure:
                why[0] = f"the broker closed the connection: {code}"
            gone.set()

        def on_publish(_client: mqtt.Client, _data: object, mid: int, code: ReasonCode, _more: object) -> None:
            self._deliver(Denied(mid, str(code)) if code.is_failure else Taken(mid))

        def on_message(_client: mqtt.Client, _data: object, message: mqtt.MQTTMessage) -> None:
            self._deliver(Heard(message.topic, bytes(message.payload)))

        client.on_connect = on_connect
        client.on_subscribe = on_subscribe
        client.on_disconnect = on_disconnect
        client.on_publish = on_publish
        client.on_message = on_message
