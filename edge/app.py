"""The edge's composition root: configuration to concrete parts, one function a process, and the supervisor.

Each function imports what its process needs, and no other process carries it: `run_learning` alone imports torch,
`run_pipeline` alone the inference runtime, and the door stays small.
"""

from __future__ import annotations

import importlib.resources
import json
import os
import random
import secrets
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from edge.config import EdgeConfig
from edge.identity import read_identity
from edge.nudge import Ear, Nudge
from shared.clock import SystemClock
from shared.errors import ConfigError, StateError
from shared.files import atomic_write, read_limited
from shared.supervise import Job, Supervisor, announce, fix_ports, python_module

if TYPE_CHECKING:
    from edge.forward.reading import Requests
    from edge.forward.routes import Routes
    from edge.intake.peers import AllowList
    from edge.web.dicomweb.retention import Retention
    from edge.web.door import Destination
    from edge.web.door import Door as DoorView

STEADY = ("intake", "pipeline", "uplink", "web")
PROCESSES = (*STEADY, "forward", "learning")
NICE_LEARNING = 15
LEARNING_LINGER_S = 60.0
POLL_S = 1.0
PIPELINE_LOOK_S = 0.1  # the fallback when a nudge was lost
SITE_KEY_BYTES = 32
READERS = 4  # processes that decode, at most: the line before the models is eight objects long


def found(config: EdgeConfig) -> str | None:
    """Makes the state folder with its key, the shipped model and the first administrator; safe to repeat.

    Returns:
        The token of the first administrator's one-time link; None when there are people already.
    """
    from edge.slots.journal import Journal
    from edge.slots.swap import install_baseline
    from edge.web.labels import FIRST_ADMINISTRATOR, Labels

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
    if config.dicom.tls:
        wanted["dicom_tls"] = (config.dicom.host, config.dicom.tls.port)
    return fix_ports(config.run_folder / "ports.json", wanted)


def web_url(config: EdgeConfig) -> str:
    """Returns the address of the reading page."""
    scheme = "https" if config.web.certificate else "http"
    return f"{scheme}://{config.web.host}:{ports(config)['web']}"


def node_name(state: Path) -> str:
    """Returns `<site>/<node>`; empty before the node was enrolled."""
    node = read_identity(state)
    return f"{node.site}/{node.node}" if node else ""


def run_intake(config: EdgeConfig, stop: threading.Event) -> None:
    """Runs the DICOM door until `stop`."""
    from edge.intake.debts import Books
    from edge.intake.door import Door
    from edge.intake.handover import Handover
    from edge.intake.reports import Reports, sender
    from edge.intake.room import Keeper, Retention
    from edge.intake.spool import Spool
    from edge.intake.syntaxes import storage_classes, transfer_syntaxes
    from edge.intake.tls import Tls

    clock, state, dicom = SystemClock(), config.state, config.dicom
    spool = Spool(
        state / "spool",
        state / "intake.sqlite",
        limit_bytes=config.room.spool_limit_bytes,
        quarantine_limit_bytes=config.room.quarantine_limit_bytes,
        clock=clock,
    )
    allow = allow_list(config)
    chosen = ports(config)
    nudge = Nudge(config.run_folder / "pipeline.sock")
    tls = Tls(dicom.tls.certificate, dicom.tls.key, dicom.tls.ca, dicom.tls.profile) if dicom.tls else None
    door = Door(
        spool,
        ae_title=dicom.ae_title,
        host=dicom.host,
        port=None if dicom.tls and dicom.tls.only else chosen["dicom"],
        allow=allow,
        nudge=nudge,
        clock=clock,
        tls=tls,
        tls_port=chosen.get("dicom_tls", 0),
        private_classes=dicom.private_classes,
    )
    handover = Handover(
        config.run_folder / "intake.sock",
        spool,
        storage=storage_classes(dicom.private_classes),
        syntaxes=transfer_syntaxes(),
        nudge=nudge,
    )
    reports = Reports(
        door.commitments, allow, send=sender(dicom.ae_title, tls if dicom.tls and dicom.tls.only else None), clock=clock
    )
    keeper = Keeper(
        spool,
        Books(state, pacs=config.pacs is not None, forwarding=bool(config.destination)),
        Retention(config.room.retention_days * 86400, config.room.keep_hours * 3600),
        clock,
    )
    door.start()
    handover.start()
    reports.start()
    keeper.start()
    announce(config.run_folder, "intake", ae_title=config.dicom.ae_title, port=door.port)
    while door.alive() and not stop.wait(POLL_S):
        pass
    ended = not stop.is_set()
    handover.stop()
    door.stop()
    reports.stop()
    keeper.stop()
    spool.close()
    if ended:
        raise StateError("The DICOM door ended by itself.", cure="Its log says why; the supervisor starts it again.")


def allow_list(config: EdgeConfig) -> AllowList:
    """Returns who may call the door: the configured peers, and callers that were admitted on the page."""
    from edge.intake.peers import AllowList, Peer, admitted_callers

    peers = [Peer(**peer.model_dump()) for peer in config.dicom.allow]
    return AllowList(peers, admitted_callers(config.state / "labels.sqlite"))


def run_uplink(config: EdgeConfig, stop: threading.Event) -> None:
    """Runs the outbox, the link and the downloader until `stop`, or until the node's identity changed."""
    from edge.uplink_process import EnrolledUplink

    ear = Ear(config.run_folder / "uplink.sock")
    node = read_identity(config.state)
    announce(config.run_folder, "uplink", node=node_name(config.state) or "not enrolled")
    while node is None:
        if stop.is_set():
            return
        ear.wait(POLL_S)
        node = read_identity(config.state)
    EnrolledUplink(config, node, ear).run(stop)


def run_pipeline(config: EdgeConfig, stop: threading.Event) -> None:
    """Answers studies until `stop`: the main path, the model swap between studies, and delivery to the PACS."""
    from edge.imaging.reading import Reader
    from edge.inference.engine import Accelerator, Engine, OnnxEngine, load_engine
    from edge.inference.golden import golden_proof
    from edge.inference.providers import find_gpu
    from edge.inference.tensorrt import Engines
    from edge.pipeline import Models, Pipeline
    from edge.results.cases import CaseStore
    from edge.results.documents import Builder
    from edge.results.sender import Pacs, Sender
    from edge.results.series import Rules
    from edge.results.store import Store
    from edge.slots.journal import Journal
    from edge.slots.swap import Swapper
    from edge.uplink.outbox import drop
    from shared.package.manifest import Manifest

    clock, state = SystemClock(), config.state
    ear, nudge = Ear(config.run_folder / "pipeline.sock"), Nudge(config.run_folder / "pipeline.sock")
    store = Store(state / "results.sqlite", state / "intake.sqlite")
    cores = len(os.sched_getaffinity(0))
    gpu, engines = find_gpu(), Engines(state / "engines", clock)

    def load(folder: Path, manifest: Manifest) -> OnnxEngine:
        return load_engine(
            folder,
            manifest,
            threads=cores,
            accelerator=Accelerator(gpu, engines) if gpu else None,
            accept=lambda engine: golden_proof(engine, folder, manifest),
        )

    swapper = Swapper(
        state / "models",
        Journal(state / "slots.sqlite", clock),
        load=load,
        prove=lambda engine, folder, manifest: golden_proof(cast(Engine, engine), folder, manifest),
        record=lambda served: store.record_serving(served, clock.now().timestamp()),
        clock=clock,
        better=lambda folder, manifest: load(folder, manifest) if engines.step() else None,
    )
    sender = None
    if config.pacs:
        sender = Sender(
            state / "results.sqlite",
            Pacs(config.pacs.ae_title, config.pacs.host, config.pacs.port),
            ae_title=config.dicom.ae_title,
            clock=clock,
            random_unit=random.random,
        )
        sender.start()
    drops = state / "outbox" / "drop"
    drops.mkdir(parents=True, exist_ok=True)
    readers, builder = [Reader() for _ in range(min(cores, READERS))], Builder(nudge)
    pipeline = Pipeline(
        store,
        state / "spool",
        cast(Models, swapper),  # it serves what `load` made, though its own protocol asks less of an engine
        cases=CaseStore(state / "cases" / "cases.sqlite"),
        labels=state / "labels.sqlite",
        site_key=read_limited(state / "site.key", SITE_KEY_BYTES),
        rules=Rules(config.series.quiet_s, config.series.hard_limit_s),
        keep_s=config.room.retention_days * 86400,
        pacs=config.pacs is not None,
        enqueue=partial(drop, drops) if config.learning.features == "features" else None,
        delivered=sender.wake if sender else lambda: None,
        clock=clock,
        readers=[reader.read for reader in readers],
        builder=builder,
        routes=routes(config) if config.rules or config.fetch else None,
    )
    engine, manifest, package = swapper.serving()
    announce(config.run_folder, "pipeline", package=package, release=manifest.release, variant=engine.variant)
    while not stop.is_set():
        if not pipeline.step():
            ear.wait(PIPELINE_LOOK_S)
    engines.close()
    pipeline.close()
    for reader in readers:
        reader.close()
    builder.close()
    if sender:
        sender.stop()
    store.close()


def run_forward(config: EdgeConfig, stop: threading.Event) -> None:
    """Routes, sends on and fetches until `stop`."""
    from edge.forward.fetch import Fetcher
    from edge.forward.follow import FetchRule, Follower
    from edge.forward.peer import Peer, Tls
    from edge.forward.process import Forward
    from edge.forward.queue import Queue
    from edge.forward.sender import Sender

    clock, state, ours = SystemClock(), config.state, config.dicom.ae_title
    scratch, intake, spool = state / "forward" / "scratch", state / "intake.sqlite", state / "spool"
    shutil.rmtree(scratch, ignore_errors=True)  # copies that a killed process was sending
    scratch.mkdir(mode=0o700, parents=True)
    queue = Queue(state / "forward.sqlite")
    peers = {
        one.name: Peer(
            one.name, one.ae_title, one.host, one.port, Tls(one.ca, one.certificate, one.key) if one.ca else None
        )
        for one in config.destination
    }
    fetches = [FetchRule(**one.model_dump()) for one in config.fetch]
    make_sender = partial(
        Sender, queue, spool=spool, scratch=scratch, ours=ours, clock=clock, random_unit=random.random
    )
    make_fetcher = partial(
        Fetcher, queue, rules=fetches, intake=intake, spool=spool, ours=ours, clock=clock, random_unit=random.random
    )
    forward = Forward(
        queue,
        Follower(
            intake,
            spool,
            queue,
            routes(config),
            fetches,
            quiet_s=config.series.quiet_s,
            keep_s=config.room.retention_days * 86400,
            clock=clock,
        ),
        {name: make_sender(peer) for name, peer in peers.items()},
        [make_fetcher(peers[name]) for name in dict.fromkeys(one.source for one in config.fetch)],
        forward_requests(config),
    )
    ear = Ear(config.run_folder / "forward.sock")
    announce(config.run_folder, "forward", destinations=len(peers), fetches=len(fetches))
    forward.run(ear, stop)


def routes(config: EdgeConfig) -> Routes:
    """Returns the configured rules, ready to be asked."""
    from edge.forward.routes import Priors, Routes

    titles = {one.name: one.ae_title for one in config.destination}
    return Routes(
        config.rules, titles, Priors(config.state / "forward.sqlite") if config.fetch else lambda _study: False
    )


def destinations(config: EdgeConfig) -> dict[str, str]:
    """Returns where the configured destinations are, by name, for people."""
    return {one.name: f"{one.ae_title} at {one.host}:{one.port}" for one in config.destination}


def forward_requests(config: EdgeConfig) -> Requests:
    """Returns where dead letters are asked to be tried again."""
    from edge.forward.reading import Requests

    return Requests(config.state / "forward" / "requests", config.run_folder / "forward.sock")


def run_web(config: EdgeConfig, stop: threading.Event) -> None:
    """Serves the reading page until `stop`."""
    from edge.report import degraded_reason, link_state, node_report
    from edge.slots.journal import Journal
    from edge.web.dicomweb.retention import Retention
    from edge.web.dicomweb.routes import DicomWeb
    from edge.web.forwarding import Forwarding
    from edge.web.labels import Labels
    from edge.web.site import web_app
    from edge.web.studies import Studies
    from shared.serve import Listener, serve

    clock, state, web = SystemClock(), config.state, config.web
    labels = Labels(state / "labels.sqlite", clock)
    journal = Journal(state / "slots.sqlite", clock)
    studies = Studies(
        state / "results.sqlite",
        labels,
        labelled=Nudge(config.run_folder / "pipeline.sock"),
        report=lambda: node_report(state, journal.reports(), clock_trusted=True),
        link=lambda: link_state(state),
        degraded=lambda: degraded_reason(state),
        site=lambda: node_name(state),
        pacs=f"{config.pacs.ae_title} at {config.pacs.host}:{config.pacs.port}" if config.pacs else "",
    )
    retention = Retention(state / "intake.sqlite", state / "spool")
    dicomweb = DicomWeb(retention, config.run_folder / "intake.sock", web.viewer_origins)
    forwarding = Forwarding(
        state / "forward.sqlite", state / "results.sqlite", destinations(config), forward_requests(config), labels
    )
    app = web_app(studies, labels, clock, dicomweb=dicomweb, forwarding=forwarding, door=door_view(config, retention))
    listener = Listener(app, web.host, ports(config)["web"], web.certificate, web.key)
    serve([listener], stop, lambda: announce(config.run_folder, "web", url=web_url(config)))
    labels.close()


def door_view(config: EdgeConfig, retention: Retention) -> DoorView:
    """Returns what the Door page shows and asks."""
    from edge.web.dicomweb.search import Headers
    from edge.web.door import Destination, Door

    def ask(asked: Destination) -> None:
        from edge.forward.peer import Peer, Tls  # pynetdicom: only when somebody asks
        from edge.web.echo import ask

        given = next((one for one in config.destination if one.name == asked.name), None)
        tls = Tls(given.ca, given.certificate, given.key) if given and given.ca else None
        ask(Peer(asked.name, asked.ae_title, asked.host, asked.port, tls), config.dicom.ae_title)

    chosen, dicom = ports(config), config.dicom
    known = [Destination(one.name, one.ae_title, one.host, one.port, bool(one.ca)) for one in config.destination]
    if config.pacs:
        known.insert(0, Destination("pacs", config.pacs.ae_title, config.pacs.host, config.pacs.port, tls=False))
    return Door(
        config.state / "intake.sqlite",
        Headers(retention),
        ae_title=dicom.ae_title,
        host=dicom.host,
        port=chosen["dicom"],
        tls_port=chosen.get("dicom_tls", 0),
        allowed=[(one.ae_title, one.address) for one in dicom.allow],
        destinations=known,
        echo=ask,
    )


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


_RUN: dict[str, Callable[[EdgeConfig, threading.Event], None]] = {
    "intake": run_intake,
    "pipeline": run_pipeline,
    "uplink": run_uplink,
    "forward": run_forward,
    "web": run_web,
    "learning": run_learning,
}


def run_process(name: str, config: EdgeConfig, stop: threading.Event) -> None:
    """Runs one of PROCESSES until `stop`."""
    _RUN[name](config, stop)


def process_command(name: str, config_path: Path) -> list[str]:
    """Returns the command that runs one of PROCESSES (edge/process.py)."""
    return python_module("edge.process", name, str(config_path))


def supervise(config_path: Path, config: EdgeConfig, stop: threading.Event, told: Callable[[str], None]) -> None:
    """Keeps all processes alive until `stop`; `told` gets the READY lines."""
    if not (config.state / "site.key").exists():
        raise ConfigError(f"There is no node in {config.state}.", cure="Run `radfleet-edge init FOLDER`.")
    ports(config)

    forward = ("forward",) if config.destination else ()  # rules to forward and to fetch name destinations
    jobs = [Job(name, process_command(name, config_path)) for name in (*STEADY, *forward)]
    jobs.append(
        Job("learning", process_command("learning", config_path), NICE_LEARNING, lambda: learning_wanted(config.state))
    )
    Supervisor(jobs, config.run_folder, announced=told).run(stop)
