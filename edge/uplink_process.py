"""The uplink of an enrolled node, put together: outbox, link, downloader, desired state, renewal."""

from __future__ import annotations

import random
import secrets
import threading
from collections.abc import Callable
from datetime import datetime

import onnxruntime
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from edge.config import EdgeConfig
from edge.enrolment import renew_if_due
from edge.identity import NodeIdentity, read_identity
from edge.nudge import Ear, Nudge
from edge.report import node_report
from edge.slots.fetch import Fetcher
from edge.slots.journal import Journal
from edge.uplink.desired import DesiredKeeper, Obeyer
from edge.uplink.download import NodePort
from edge.uplink.link import Event, MqttLink, Transport, Woken
from edge.uplink.outbox import Outbox
from edge.uplink.uplink import Sealer, Uplink
from shared.clock import SystemClock
from shared.errors import LinkError, StateError, TrustError
from shared.files import read_limited
from shared.log import get_logger
from shared.wire.envelope import SealPublic
from shared.wire.identity import Identity

POLL_S = 1.0
RENEWAL_LOOK_S = 3600.0
PKI_LIMIT_BYTES = 1_000_000


class EnrolledUplink:
    """The uplink process of an enrolled node: three threads and what they share."""

    def __init__(self, config: EdgeConfig, node: NodeIdentity, ear: Ear) -> None:
        self._config, self._node, self._ear, self._clock = config, node, ear, SystemClock()
        state, pki = config.state, config.state / "pki"
        identity = Identity(node.site, node.node)
        ca, certificate, key = pki / "ca.pem", pki / "device.pem", pki / "device.key"
        device = load_pem_private_key(read_limited(key, PKI_LIMIT_BYTES), None)
        if not isinstance(device, Ed25519PrivateKey):
            raise StateError("pki/device.key is not an Ed25519 key.", cure="Enrol the node again.")
        cloud = Ed25519PublicKey.from_public_bytes(
            bytes.fromhex(read_limited(pki / "cloud-sign.pub", PKI_LIMIT_BYTES).decode())
        )
        self._keeper = DesiredKeeper(
            state, identity=identity, incarnation=node.incarnation, cloud=cloud, clock=self._clock
        )
        self._port = NodePort(node.nodes_url, ca=ca, certificate=certificate, key=key)
        self._journal = Journal(state / "slots.sqlite", self._clock)
        fetcher = _fetcher(config, node, self._port, self._journal, self._keeper)
        self._obeyer = Obeyer(
            state / "learning",
            self._port,
            fetcher,
            wait=lambda ceiling: random.uniform(0, ceiling),  # noqa: S311  jitter
        )

        def connect(deliver: Callable[[Event], None]) -> Transport:
            return MqttLink(
                node.broker_host,
                node.broker_port,
                identity=identity.common_name,
                ca=ca,
                certificate=certificate,
                key=key,
                deliver=deliver,
            )

        self._uplink = Uplink(
            sealer=Sealer(
                identity=identity,
                incarnation=node.incarnation,
                device=device,
                recipient=SealPublic(read_limited(pki / "cloud-seal.pub", PKI_LIMIT_BYTES)),
                new_id=lambda: secrets.token_hex(16),
                clock=self._clock,
            ),
            outbox=Outbox(state / "outbox.sqlite", self._clock),
            drops=state / "outbox" / "drop",
            cloud=cloud,
            connect=connect,
            keeper=self._keeper,
            on_news=self._obeyer.wake,
            report=lambda: node_report(state, self._journal.reports(), clock_trusted=self._keeper.clock_trusted()),
            features_allowed=config.learning.features == "features",
            clock=self._clock,
        )

    def run(self, stop: threading.Event) -> None:
        """Blocks until `stop`, or until a new certificate or enrolment asks for a fresh start."""
        ended = threading.Event()
        helpers = [
            threading.Thread(target=self._obeyer.run, args=(self._keeper, ended), daemon=True),
            threading.Thread(target=self._listen, args=(ended,), daemon=True),
            threading.Thread(target=self._watch, args=(stop, ended), daemon=True),
        ]
        for helper in helpers:
            helper.start()
        try:
            self._uplink.run(ended)
        finally:
            ended.set()
            self._obeyer.wake()
            self._uplink.close()

    def _listen(self, ended: threading.Event) -> None:
        while not ended.is_set():
            if self._ear.wait(POLL_S):
                self._uplink.deliver(Woken())

    def _watch(self, stop: threading.Event, ended: threading.Event) -> None:
        looked = -RENEWAL_LOOK_S
        while not ended.is_set():
            if stop.wait(POLL_S) or read_identity(self._config.state) != self._node:
                ended.set()
            elif self._clock.monotonic() - looked > RENEWAL_LOOK_S:
                looked = self._clock.monotonic()
                try:
                    if renew_if_due(self._config.state, self._clock.now()):
                        ended.set()
                except (LinkError, TrustError) as exc:
                    get_logger().warning("uplink.renewal_failed", reason=exc.message)


def _fetcher(
    config: EdgeConfig, node: NodeIdentity, port: NodePort, journal: Journal, keeper: DesiredKeeper
) -> Callable[..., bool]:
    """Returns the step that brings the node nearer to the release it is ordered to have."""
    clock = SystemClock()

    def now() -> datetime:  # a clock set back to 1970 must not make old metadata fresh
        floor = [datetime.fromisoformat(keeper.current.issued)] if keeper.current else []
        return max([clock.now(), *floor])

    pki = config.state / "pki"
    return Fetcher(
        config.state / "models",
        journal,
        site=node.site,
        node=node.node,
        release_root=read_limited(pki / "tuf-root.json", PKI_LIMIT_BYTES),
        director_root=read_limited(pki / "director-root.json", PKI_LIMIT_BYTES),
        get=port.get,
        download=port.download,
        providers=onnxruntime.get_available_providers(),
        now=now,
        nudge=Nudge(config.run_folder / "pipeline.sock"),
    ).step
