"""The edge's composition root: configuration to concrete parts, one function a process, and the supervisor.

`run_learning` alone imports torch (through `models`), in a process of its own; `run_pipeline` alone imports the
inference runtime.
"""

from __future__ import annotations

import importlib.resources
import json
import random
import secrets
import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from edge.config import EdgeConfig
from edge.enrolment import NodeIdentity, read_identity, renew_if_due
from edge.nudge import Ear, nudge
from edge.report import node_report
from edge.slots.journal import Journal
from edge.slots.swap import install_baseline
from edge.web.labels import FIRST_ADMINISTRATOR, Labels
from shared.clock import SystemClock
from shared.errors import ConfigError, LinkError, StateError, TrustError
from shared.files import atomic_write, read_limited
from shared.log import get_logger
from shared.supervise import Job, Supervisor, announce, fix_ports, python_module
from shared.wire.identity import Identity

if TYPE_CHECKING:
    from edge.uplink.desired import DesiredKeeper
    from edge.uplink.download import NodePort

STEADY = ("intake", "pipeline", "uplink", "web")
PROCESSES = (*STEADY, "learning")
NICE_LEARNING = 15
LEARNING_LINGER_S = 60.0
RENEWAL_LOOK_S = 3600.0
POLL_S = 1.0
PKI_LIMIT_BYTES = 1_000_000


def found(config: EdgeConfig) -> str | None:
    """Makes the state folder with its key, the shipped model and the first administrator; safe to repeat.

    Returns:
        The token of the first administrator's one-time link; None when there are people already.
    """
    state = config.state
    for folder in (state, config.run_folder, state / "models"):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not (state / "site.key").exists():
        atomic_write(state / "site.key", secrets.token_bytes(32), mode=0o600)
    journal = Journal(state / "slots.sqlite", SystemClock())
    install_baseline(state / "models", journal, shipped_package())
    journal.close()
    labels = Labels(state / "labels.sqlite", SystemClock())
    try:
        if labels.has_people():
            return None
        return labels.invite(FIRST_ADMINISTRATOR, "administrator", actor="system")
    finally:
        labels.close()


def shipped_package() -> Path:
    """Returns the folder of the model package that ships with the software."""
    return Path(str(importlib.resources.files("models"))) / "baseline"


def ports(config: EdgeConfig) -> dict[str, int]:
    """Returns the ports of the door and the page, chosen once where the configuration says 0."""
    wanted = {"dicom": (config.dicom.host, config.dicom.port), "web": (config.web.host, config.web.port)}
    return fix_ports(config.run_folder / "ports.json", wanted)


def web_url(config: EdgeConfig) -> str:
    """Returns the address of the reading page."""
    scheme = "https" if config.web.certificate else "http"
    return f"{scheme}://{config.web.host}:{ports(config)['web']}"


def run_intake(config: EdgeConfig, stop: threading.Event) -> None:
    """Runs the DICOM door until `stop`."""
    from edge.intake.door import Door, Peer
    from edge.intake.spool import Spool

    clock, state = SystemClock(), config.state
    spool = Spool(state / "spool", state / "intake.sqlite", limit_bytes=config.room.spool_limit_bytes, clock=clock)
    door = Door(
        spool,
        ae_title=config.dicom.ae_title,
        host=config.dicom.host,
        port=ports(config)["dicom"],
        allow=[Peer(peer.ae_title, peer.address) for peer in config.dicom.allow],
        nudge=lambda: nudge(config.run_folder / "pipeline.sock"),
        clock=clock,
    )
    door.start()
    announce(config.run_folder, "intake", ae_title=config.dicom.ae_title, port=door.port)
    stop.wait()
    door.stop()
    spool.close()


def run_uplink(config: EdgeConfig, stop: threading.Event) -> None:
    """Runs the outbox, the link and the downloader until `stop`, or until the node's identity changed."""
    ear = Ear(config.run_folder / "uplink.sock")
    node = read_identity(config.state)
    announce(config.run_folder, "uplink", node=f"{node.site}/{node.node}" if node else "not enrolled")
    while node is None:
        if stop.is_set():
            return
        ear.wait(POLL_S)
        node = read_identity(config.state)
    _Uplink(config, node, ear).run(stop)


class _Uplink:
    """The uplink process of an enrolled node: three threads and what they share."""

    def __init__(self, config: EdgeConfig, node: NodeIdentity, ear: Ear) -> None:
        from edge.uplink.desired import DesiredKeeper, Obeyer
        from edge.uplink.download import NodePort
        from edge.uplink.link import Event, MqttLink, Transport
        from edge.uplink.outbox import Outbox
        from edge.uplink.uplink import Sealer, Uplink
        from shared.wire.envelope import SealPublic

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
        from edge.uplink.link import Woken

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
    import onnxruntime

    from edge.slots.fetch import Fetcher

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
        nudge=lambda: nudge(config.run_folder / "pipeline.sock"),
    ).step


def run_learning(config: EdgeConfig, stop: threading.Event) -> None:
    """Does the tasks that the uplink leaves, lingers for the next, and ends."""
    from edge.learning.worker import linger

    announce(config.run_folder, "learning")
    linger(config.state, seconds=LEARNING_LINGER_S, poll=POLL_S, stop=stop)


def learning_wanted(state: Path) -> bool:
    """Tells whether there is a task that was not done; without importing torch to find out."""
    try:
        task = json.loads((state / "learning" / "task.json").read_bytes())
        return not (state / "learning" / "done" / f"{task['round']}-{task['type']}").exists()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def run_process(name: str, config: EdgeConfig, stop: threading.Event) -> None:
    """Runs one of PROCESSES until `stop`."""
    {"intake": run_intake, "uplink": run_uplink, "learning": run_learning}[name](config, stop)


def supervise(config_path: Path, config: EdgeConfig, stop: threading.Event, told: Callable[[str], None]) -> None:
    """Keeps all processes alive until `stop`; `told` gets the READY lines."""
    if not (config.state / "site.key").exists():
        raise ConfigError(f"There is no node in {config.state}.", cure="Run `radfleet-edge init FOLDER`.")
    ports(config)

    def command(name: str) -> list[str]:
        return python_module("edge", "run", "--only", name, "--config", str(config_path))

    jobs = [Job(name, command(name)) for name in STEADY]
    jobs.append(Job("learning", command("learning"), NICE_LEARNING, lambda: learning_wanted(config.state)))
    Supervisor(jobs, config.run_folder, announced=told).run(stop)
