"""The cloud's composition root: configuration to concrete parts, one function a process, and the supervisor."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError
from starlette.types import ASGIApp

from cloud.access import audit
from cloud.config import PROCESSES
from cloud.parts import Cloud, refresh_certificates
from cloud.rollout.plan import Policy
from cloud.rounds.shell import start_campaign
from cloud.store import upgrade
from cloud.training.gate import Verdict
from cloud.web.fleet import Deeds, NodeName, champion_of, read_plan
from shared.errors import RadfleetError
from shared.log import get_logger
from shared.supervise import Job, Supervisor, announce, python_module

ROUNDS_LOOK_S = 0.5
TRAINER_LOOK_S = 0.5


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
