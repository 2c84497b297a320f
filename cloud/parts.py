"""The parts of one cloud, each made when a process first needs it, and how a cloud is founded."""

from __future__ import annotations

import importlib.resources
from functools import cached_property
from pathlib import Path

from sqlalchemy import Connection, Engine

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
from cloud.rollout.shell import Rollouts
from cloud.store import open_engine, upgrade
from shared.clock import Clock, SystemClock
from shared.errors import ConfigError
from shared.files import sha256_file
from shared.package.manifest import MANIFEST_NAME
from shared.supervise import fix_ports
from shared.wire.enrolment import Welcome

FIRST_ADMINISTRATOR = "administrator"


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
