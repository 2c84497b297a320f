"""The cloud's composition root: configuration to concrete parts, one function a process, and the supervisor."""

from __future__ import annotations

import importlib.resources
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError
from starlette.types import ASGIApp

from cloud.access import audit, people
from cloud.access.authority import Authority, create_authority, ensure_service, load_authority
from cloud.access.keys import CloudKeys, ensure_keys, load_keys
from cloud.config import CloudConfig
from cloud.ingest.desired import DesiredStates
from cloud.objects import Objects
from cloud.registry.director import Director
from cloud.registry.keys import create_online_keys
from cloud.registry.proposal import Proposal, read_proposal
from cloud.registry.repository import ReleaseRepository
from cloud.registry.tables import sync
from cloud.rollout.plan import Policy
from cloud.rollout.shell import Rollouts
from cloud.rounds.shell import start_campaign
from cloud.store import open_engine, upgrade
from cloud.training.gate import Verdict
from cloud.web.fleet import Deeds, NodeName, champion_of, read_plan
from shared.clock import Clock, SystemClock
from shared.errors import ConfigError, RadfleetError
from shared.files import sha256_file
from shared.log import get_logger
from shared.package.manifest import MANIFEST_NAME
from shared.supervise import Job, Supervisor, announce, fix_ports, python_module
from shared.wire.enrolment import Welcome

FIRST_ADMINISTRATOR = "administrator"
ROUNDS_LOOK_S = 0.5
TRAINER_LOOK_S = 0.5


class Cloud:
    """The parts of one cloud, each made when a process first needs it."""

    def __init__(self, config: CloudConfig, clock: Clock | None = None) -> None:
        self.config = config
        self.clock = clock or SystemClock()

    @cached_property
    def engine(self) -> Engine:
        if not (self.config.pki / "ca.pem").exists():
            raise ConfigError(f"There is no cloud in {self.config.state}.", cure="Run `radfleet-cloud init FOLDER`.")
        return open_engine(self.config.database.url)

    @cached_property
    def authority(self) -> Authority:
        return load_authority(self.config.pki)

    @cached_property
    def keys(self) -> CloudKeys:
        return load_keys(self.config.keys)

    @cached_property
    def objects(self) -> Objects:
        return Objects(self.config.objects.url)

    @cached_property
    def repository(self) -> ReleaseRepository:
        return ReleaseRepository(self.config.state / "registry", self.config.keys, blobs=self.objects, clock=self.clock)

    @cached_property
    def director(self) -> Director:
        return Director(self.config.state / "director", self.config.keys, clock=self.clock)

    @cached_property
    def desired(self) -> DesiredStates:
        return DesiredStates(self.keys.sign, self.clock)

    @cached_property
    def rollouts(self) -> Rollouts:
        return Rollouts(self.repository, self.director, set_order=self.desired.set_order, clock=self.clock)

    @cached_property
    def work(self) -> Path:
        """A folder of copies that may be lost."""
        folder = self.config.state / "work"
        folder.mkdir(exist_ok=True)
        return folder

    @cached_property
    def ports(self) -> dict[str, int]:
        people, nodes = self.config.people, self.config.nodes
        wanted = {"people": (people.host, people.port), "nodes": (nodes.host, nodes.port)}
        return fix_ports(self.config.run_folder / "ports.json", wanted)

    @property
    def people_url(self) -> str:
        return f"https://{self.config.people.name}:{self.ports['people']}"

    @property
    def nodes_url(self) -> str:
        return f"https://{self.config.nodes.name}:{self.ports['nodes']}"

    def baseline(self) -> tuple[Path, str]:
        """Returns folder and manifest digest of the package that ships with the software."""
        folder = Path(str(importlib.resources.files("models"))) / "baseline"
        return folder, sha256_file(folder / MANIFEST_NAME)

    def sync_releases(self, conn: Connection) -> None:
        """Brings the table of releases to what proposals and publications say."""
        sync(conn, self.repository, self.clock.now())

    def proposal_of(self, release: int) -> Path | None:
        """Returns the folder that the officers sign for a release; None when there is none."""
        for folder in sorted(self.repository.proposals.glob("[!.]*/")):
            if read_proposal(folder).release == release:
                return folder
        return None

    def publish(self, folder: Path, actor: str) -> Proposal:
        """Publishes a signed proposal and says so in the table of releases and in the audit log."""
        proposal = self.repository.publish(folder)
        with self.engine.begin() as conn:
            self.sync_releases(conn)
            audit.record(
                conn,
                self.clock,
                actor=actor,
                action="release.published",
                subject=f"{proposal.kind} {proposal.release}",
                package=proposal.package,
            )
        return proposal

    def welcome(self) -> Welcome:
        """Returns what a new node keeps of this cloud; StateError before the officers' root is published."""
        return Welcome(
            sign_key=self.keys.sign.public_key().public_bytes_raw().hex(),
            seal_key=self.keys.seal.public.raw,
            tuf_root=self.repository.root(),
            director_root=self.director.create(),
            broker_host=self.config.broker.host,
            broker_port=self.config.broker.port,
            nodes_url=self.nodes_url,
        )


def found(config: CloudConfig, clock: Clock) -> str | None:
    """Makes the state folder, CA, keys, database and director; safe to repeat, replaces nothing.

    Returns:
        The token of the first administrator's one-time link; None when there are people already.
    """
    config.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    config.run_folder.mkdir(exist_ok=True)
    if not (config.pki / "ca.pem").exists():
        create_authority(config.pki, clock.now())
    ensure_keys(config.keys)
    create_online_keys(config.keys)
    if "://" not in config.objects.url:
        Path(config.objects.url).mkdir(parents=True, exist_ok=True)
    upgrade(config.database.url)
    cloud = Cloud(config, clock)
    refresh_certificates(cloud)
    cloud.director.create()
    with cloud.engine.begin() as conn:
        if people.has_people(conn):
            return None
        return people.invite_person(conn, clock, FIRST_ADMINISTRATOR, "administrator", actor="system")


def refresh_certificates(cloud: Cloud) -> None:
    """Renews the cloud's own certificates in time and when a host name in the configuration changed."""
    config, now, pki = cloud.config, cloud.clock.now(), cloud.config.pki
    loopback = ["localhost", "127.0.0.1"]
    servers = {
        "server": {config.people.name, config.nodes.name, *loopback},
        "broker": {config.broker.host, *loopback},
    }
    for file, hosts in servers.items():
        ensure_service(cloud.authority, pki, file, f"radfleet {file}", sorted(hosts), now)
    ensure_service(cloud.authority, pki, "cloud", "cloud", [], now)


def run_api(cloud: Cloud, stop: threading.Event) -> None:
    """Serves the pages and enrolment (people port) and the downloads (node port, mutual TLS)."""
    from shared.serve import Listener, serve

    config, pki = cloud.config, cloud.config.pki
    upgrade(config.database.url)
    refresh_certificates(cloud)
    certificate, key = pki / "server.pem", pki / "server.key"

    def listener(app: ASGIApp, host: str, port: int, client_ca: Path | None = None) -> Listener:
        return Listener(app, host, port, certificate, key, client_ca)

    serve(
        [
            listener(_people(cloud), config.people.host, cloud.ports["people"]),
            listener(_nodes(cloud), config.nodes.host, cloud.ports["nodes"], pki / "ca.pem"),
        ],
        stop,
        lambda: announce(config.run_folder, "api", people=cloud.people_url, nodes=cloud.nodes_url),
    )


def run_ingest(cloud: Cloud, stop: threading.Event) -> None:
    """Moves messages from the broker to Redis, and receipts and desired states back."""
    from cloud.ingest.broker import Broker
    from cloud.ingest.door import Door
    from cloud.ingest.streams import DOWN, UP, Stream
    from shared.wire.topics import ALL_UP

    config, pki = cloud.config, cloud.config.pki
    broker = Broker(
        config.broker.host,
        config.broker.port,
        ca=pki / "ca.pem",
        certificate=pki / "cloud.pem",
        key=pki / "cloud.key",
        subscribe=[ALL_UP],
    )
    up, down = (Stream(config.redis.url, name, "ingest") for name in (UP, DOWN))
    announce(config.run_folder, "ingest", broker=f"{config.broker.host}:{config.broker.port}")
    Door(broker, up, down, cloud.engine, cloud.clock).run(stop)


def run_worker(cloud: Cloud, stop: threading.Event) -> None:
    """Opens messages, checks and stores them, and signs the verdicts."""
    from cloud.access.reports import take_report
    from cloud.ingest.devices import enrolled_devices
    from cloud.ingest.streams import DOWN, UP, Stream
    from cloud.ingest.worker import Opener, Worker
    from cloud.rounds.handlers import handlers

    consumer = f"worker-{secrets.token_hex(4)}"
    clock, url = cloud.clock, cloud.config.redis.url
    worker = Worker(
        cloud.engine,
        Stream(url, UP, consumer),
        Stream(url, DOWN, consumer),
        opener=Opener([cloud.keys.seal], enrolled_devices),
        objects=cloud.objects,
        handlers={
            **handlers(cloud.objects, clock),
            "report": lambda conn, header, report: take_report(conn, header, report, clock),
        },
        sign=cloud.keys.sign,
        clock=clock,
        audit=lambda conn, **line: audit.record(conn, clock, **line),
    )
    announce(cloud.config.run_folder, "worker", consumer=consumer)
    worker.run(stop)


def run_rounds(cloud: Cloud, stop: threading.Event) -> None:
    """Moves campaigns and rollouts on and keeps the signed metadata fresh; one process at a time, by a lease."""
    from cloud.rounds.lease import hold
    from cloud.rounds.propose import propose
    from cloud.rounds.shell import Rounds

    holder = f"rounds-{secrets.token_hex(8)}"

    def register(verdict: Verdict) -> None:
        propose(cloud.repository, cloud.objects, cloud.work, verdict)

    rounds = Rounds(cloud.engine, assign=cloud.desired.set_task, register=register, clock=cloud.clock, holder=holder)
    announce(cloud.config.run_folder, "rounds", holder=holder)
    while not stop.is_set():
        try:
            moved = rounds.step()
            with cloud.engine.begin() as conn:
                if hold(conn, "rollouts", holder, cloud.clock.now()) is not None:
                    cloud.sync_releases(conn)
                    cloud.rollouts.step(conn)
                    cloud.repository.refresh()
                    cloud.director.refresh()
        except (RadfleetError, SQLAlchemyError) as exc:
            get_logger().warning("rounds.waiting", reason=str(exc))
            moved = False
        if not moved:
            stop.wait(ROUNDS_LOOK_S)


def run_trainer(cloud: Cloud, stop: threading.Event) -> None:
    """Does the jobs that rounds ask for."""
    from cloud.training.trainer import Trainer
    from cloud.training.work import Workshop

    workshop = Workshop(
        cloud.engine, cloud.objects, cloud.work, cloud.clock, next_release=cloud.repository.next_release
    )
    holder = f"trainer-{secrets.token_hex(8)}"
    trainer = Trainer(cloud.engine, workshop.do, cloud.clock, holder)
    announce(cloud.config.run_folder, "trainer", holder=holder)
    while not stop.is_set():
        try:
            busy = trainer.step()
        except (RadfleetError, SQLAlchemyError) as exc:
            get_logger().warning("training.waiting", reason=str(exc))
            busy = False
        if not busy:
            stop.wait(TRAINER_LOOK_S)


_RUN: dict[str, Callable[[Cloud, threading.Event], None]] = {
    "api": run_api,
    "ingest": run_ingest,
    "worker": run_worker,
    "rounds": run_rounds,
    "trainer": run_trainer,
}
PROCESSES = tuple(_RUN)


def run_process(name: str, cloud: Cloud, stop: threading.Event) -> None:
    """Runs one of PROCESSES until `stop`."""
    _RUN[name](cloud, stop)


def supervise(config_path: Path, cloud: Cloud, stop: threading.Event, told: Callable[[str], None]) -> None:
    """Keeps all processes alive until `stop`; `told` gets the READY lines."""
    _ = cloud.engine, cloud.ports  # a missing cloud is said once, here
    jobs = [
        Job(name, python_module("cloud", "run", "--only", name, "--config", str(config_path))) for name in PROCESSES
    ]
    Supervisor(jobs, cloud.config.run_folder, announced=told).run(stop)


def deeds(cloud: Cloud) -> Deeds:
    """Returns what people may set in motion, bound to this cloud's parts."""

    def note(conn: Connection, actor: str, action: str, subject: str, **detail: Any) -> None:
        audit.record(conn, cloud.clock, actor=actor, action=action, subject=subject, **detail)

    def roll_out(conn: Connection, release: int, nodes: Sequence[NodeName] | None, actor: str) -> None:
        policy = Policy(soak_s=cloud.config.rollout.soak_s, deadline_s=cloud.config.rollout.deadline_s)
        cloud.rollouts.start(conn, release, nodes, actor, policy)
        note(conn, actor, "rollout.started", f"release {release}", nodes=nodes and list(nodes))

    def roll_back(conn: Connection, nodes: Sequence[NodeName] | None, actor: str) -> None:
        cloud.rollouts.roll_back(conn, nodes, actor)
        note(conn, actor, "rollout.rolled_back", "all" if nodes is None else "nodes", nodes=nodes and list(nodes))

    def start(conn: Connection, plan: Mapping[str, Any], actor: str) -> str:
        champion, members = champion_of(conn)
        identifier = secrets.token_hex(4)
        start_campaign(
            conn,
            id=identifier,
            champion=champion,
            nodes=members,
            plan=read_plan(plan),
            now=cloud.clock.now(),
        )
        note(conn, actor, "campaign.started", identifier, champion=champion)
        return identifier

    return Deeds(roll_out, roll_back, start)


def _people(cloud: Cloud) -> ASGIApp:
    from cloud.web.people import people_app

    return people_app(cloud.engine, cloud.clock, cloud.authority, cloud.welcome, deeds(cloud))


def _nodes(cloud: Cloud) -> ASGIApp:
    from cloud.web.nodes import node_app

    state = cloud.config.state
    return node_app(
        cloud.engine,
        cloud.clock,
        cloud.authority,
        cloud.objects,
        release=state / "registry" / "metadata",
        director=state / "director" / "metadata",
    )
