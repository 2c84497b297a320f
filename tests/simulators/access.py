"""A cloud's two ports over real TLS in this process: database, CA, people and enrolment are the real ones."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import Connection

from cloud.access import enrolment, people
from cloud.access.authority import create_authority, ensure_service
from cloud.objects import Objects
from cloud.store import open_engine, upgrade
from cloud.web.fleet import Deeds, NodeName
from cloud.web.nodes import node_app
from cloud.web.people import people_app
from scripts.lab.child import free_port
from shared.serve import Listener, serve
from shared.signin import Role
from shared.wire.enrolment import Welcome
from shared.wire.envelope import SealPrivate
from tests.simulators.release import HandClock

PASSWORD = "correct horse battery"


class LiveCloud:
    """`deeds` remembers what people set in motion, instead of a fleet that would do it."""

    def __init__(self, folder: Path, *, database: str = "") -> None:
        self.folder = folder
        self.clock = HandClock()
        url = database or f"sqlite:///{folder / 'cloud.sqlite'}"
        upgrade(url)
        self.engine = open_engine(url)
        self.authority = create_authority(folder / "pki", self.clock.now())
        ensure_service(self.authority, folder / "pki", "server", "server", ["localhost", "127.0.0.1"], self.clock.now())
        self.objects = Objects(str(folder / "objects"))
        (folder / "objects").mkdir()
        self.release, self.director = folder / "release", folder / "director"
        self.release.mkdir()
        self.director.mkdir()
        self.people_port, self.nodes_port = free_port(), free_port()
        self.deeds: list[tuple[Any, ...]] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"https://localhost:{self.people_port}"

    @property
    def nodes_url(self) -> str:
        return f"https://localhost:{self.nodes_port}"

    @property
    def ca(self) -> Path:
        return self.folder / "pki" / "ca.pem"

    def start(self) -> LiveCloud:
        ready = threading.Event()
        certificate, key = self.folder / "pki" / "server.pem", self.folder / "pki" / "server.key"
        port = people_app(self.engine, self.clock, self.authority, self.welcome, self._deeds())
        nodes = node_app(
            self.engine, self.clock, self.authority, self.objects, release=self.release, director=self.director
        )
        listeners = [
            Listener(port, "127.0.0.1", self.people_port, certificate, key),
            Listener(nodes, "127.0.0.1", self.nodes_port, certificate, key, self.ca),
        ]
        self._thread = threading.Thread(target=serve, args=(listeners, self._stop, ready.set), daemon=True)
        self._thread.start()
        assert ready.wait(30)
        return self

    def stop(self) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join(20)
        self.engine.dispose()

    def welcome(self) -> Welcome:
        return Welcome("ab" * 32, SealPrivate.generate().public.raw, b"{}", b"{}", "localhost", 8883, self.nodes_url)

    def invite(self, site: str = "hospital-a", node: str = "edge-1") -> str:
        with self.engine.begin() as conn:
            return enrolment.invite(conn, self.clock, self.authority, site, node, actor="test")

    def person(self, name: str, role: Role) -> str:
        """Invites a person, sets PASSWORD, and returns a bearer token."""
        with self.engine.begin() as conn:
            link = people.invite_person(conn, self.clock, name, role, actor="test")
            people.set_password(conn, self.clock, link, PASSWORD)
            token = people.sign_in(conn, self.clock, name, PASSWORD, "token")
        assert token
        return token

    def browser(self) -> httpx.Client:
        """A client that trusts our CA and keeps cookies."""
        return httpx.Client(base_url=self.url, verify=ssl.create_default_context(cafile=str(self.ca)), timeout=30)

    def node(self, state: Path) -> httpx.Client:
        """A client with the device certificate of an enrolled node."""
        context = ssl.create_default_context(cafile=str(self.ca))
        context.load_cert_chain(state / "pki" / "device.pem", state / "pki" / "device.key")
        return httpx.Client(base_url=self.nodes_url, verify=context, timeout=30)

    def audited(self) -> list[str]:
        """Returns the actions of the audit log, oldest first."""
        from cloud.access import audit

        with self.engine.connect() as conn:
            return [row.action for row in audit.newest(conn, 1000)][::-1]

    def _deeds(self) -> Deeds:
        def roll_out(_conn: Connection, release: int, nodes: Sequence[NodeName] | None, actor: str) -> None:
            self.deeds.append(("roll_out", release, nodes, actor))

        def roll_back(_conn: Connection, nodes: Sequence[NodeName] | None, actor: str) -> None:
            self.deeds.append(("roll_back", nodes, actor))

        def start(_conn: Connection, plan: Mapping[str, Any], actor: str) -> str:
            self.deeds.append(("campaign", dict(plan), actor))
            return "c1"

        return Deeds(roll_out, roll_back, start)
