"""A whole fleet on one machine, brought up by the same commands that an administrator types."""

from __future__ import annotations

import re
import secrets
import sqlite3
import ssl
import subprocess
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any, TypeVar

import httpx

from scripts.lab.child import Child, free_port, listens
from scripts.lab.parts import Orthanc, Redis, start_mosquitto, start_orthanc, start_redis

ROOT = Path(__file__).resolve().parent.parent.parent
BIN = ROOT / ".venv" / "bin"
OFFICERS = ("clinical", "technical")
T = TypeVar("T")


class CommandError(RuntimeError):
    """One of our own commands ended with an error; the text is what it printed."""


def run(program: str, *words: str | Path) -> str:
    """Runs `radfleet-edge` or `radfleet-cloud` and returns what it printed.

    Raises:
        CommandError: it ended with another status than 0.
    """
    command = [str(BIN / program), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise CommandError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


class Page:
    """The JSON interface of one side's pages, signed in as a person with a password of their own."""

    def __init__(self, url: str, link: str, name: str, *, ca: Path | None = None) -> None:
        verify = ssl.create_default_context(cafile=str(ca)) if ca else True
        self.url = url
        self.name = name
        self.password = secrets.token_urlsafe(16)
        self._http = httpx.Client(base_url=url, verify=verify, timeout=30)
        self.post("/api/welcome", link=link.rsplit("/", 1)[1], password=self.password)
        token = self.post("/api/login", name=name, password=self.password)["token"]
        self.token = token
        self._http.headers["Authorization"] = f"Bearer {token}"

    def answers(self) -> bool:
        """Tells whether somebody listens at the page's address."""
        return listens(int(self.url.rsplit(":", 1)[1]))

    def get(self, path: str) -> Any:
        """Returns the answer's JSON; raises httpx.HTTPStatusError for an error status."""
        return self._http.get(path).raise_for_status().json()

    def post(self, path: str, **body: object) -> Any:
        """Returns the answer's JSON; raises with the answer's text for an error status."""
        answer = self._http.post(path, json=body)
        if answer.is_error:
            raise CommandError(f"POST {path} answered {answer.status_code}: {answer.text[:500]}")
        return answer.json() if answer.content else None


@dataclass
class Cloud:
    """The cloud's folder, its process and its page."""

    folder: Path
    link: str
    broker_port: int
    child: Child | None = None
    _page: Page | None = None

    @property
    def config(self) -> Path:
        return self.folder / "cloud.toml"

    @property
    def page(self) -> Page:
        """The administrator's signed-in page; there is one after the first start."""
        return _there(self._page)

    @property
    def state(self) -> Path:
        return self.folder / "state"

    def command(self, *words: str | Path) -> str:
        """Runs `radfleet-cloud` on this cloud."""
        return run("radfleet-cloud", *words, "--config", self.config)

    def start(self) -> None:
        """Starts all processes and waits until each is ready; the first start signs the administrator in."""
        command = [BIN / "radfleet-cloud", "run", "--config", self.config]
        self.child = Child("cloud", command, log=self.folder / "cloud.log")
        self.child.wait_ready("the cloud", (self.state / "run" / "ready.json").exists, seconds=90)
        if self._page is None:
            url = self.link.split("/welcome/")[0]
            self._page = Page(url, self.link, "administrator", ca=self.state / "pki" / "ca.pem")

    def blob(self, sha256: str) -> Path:
        """Returns where the object store keeps a blob."""
        return self.state / "objects" / sha256[:2] / sha256

    def ask(self, query: str, *values: object) -> list[Any]:
        """Returns the rows of a read-only query on the cloud's SQLite."""
        with closing(sqlite3.connect(f"file:{self.state / 'cloud.sqlite'}?mode=ro", uri=True)) as connection:
            return connection.execute(query, values).fetchall()

    def sign(self, proposal: Path, officers: Path) -> str:
        """Has both officers, each a process with a folder of its own, sign the proposal, and publishes it."""
        for officer in OFFICERS:
            run("radfleet-cloud", "release", "sign", officers / officer, proposal)
        return self.command("release", "publish", proposal)


@dataclass
class Hospital:
    """One hospital's node: its folder, its ports, its process and its reading page."""

    site: str
    node: str
    folder: Path
    dicom_port: int
    web_port: int
    link: str
    child: Child | None = None
    _page: Page | None = None
    sent: int = 0  # objects that the modality offered
    accepted: int = 0  # and that were answered with Success

    @property
    def config(self) -> Path:
        return self.folder / "edge.toml"

    @property
    def page(self) -> Page:
        """The administrator's signed-in page; there is one after the first start."""
        return _there(self._page)

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.web_port}"

    def launch(self) -> None:
        """Starts all processes of the node without waiting for them."""
        command = [BIN / "radfleet-edge", "run", "--config", self.config]
        self.child = Child(self.site, command, log=self.folder / "edge.log")

    def wait_ready(self) -> None:
        """Waits until every process is ready; the first time signs the radiologist in."""
        _there(self.child).wait_ready(self.site, (self.state / "run" / "ready.json").exists, seconds=120)
        if self._page is None:
            self._page = Page(self.url, self.link, "administrator")

    def start(self) -> None:
        """Starts all processes and waits until each is ready."""
        self.launch()
        self.wait_ready()


class Fleet:
    """Redis, Mosquitto, the cloud, a PACS and hospitals below one folder; `stop` ends every child process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.redis: Redis | None = None
        self.mosquitto: Child | None = None
        self._pacs: Orthanc | None = None
        self._cloud: Cloud | None = None
        self.hospitals: list[Hospital] = []

    @property
    def cloud(self) -> Cloud:
        """The cloud, after `found`."""
        return _there(self._cloud)

    @property
    def pacs(self) -> Orthanc:
        """The PACS, after `start_pacs`."""
        return _there(self._pacs)

    @property
    def officers(self) -> Path:
        return self.folder / "officers"

    def found(self) -> Cloud:
        """Starts Redis, makes the cloud, its officers and root of trust, starts Mosquitto and the cloud."""
        self.redis = start_redis(self.folder / "redis")
        folder = self.folder / "cloud"
        folder.mkdir(parents=True)
        broker_port = free_port()
        (folder / "cloud.toml").write_text(
            f"[people]\nport = {free_port()}\n[nodes]\nport = {free_port()}\n"
            f'[broker]\nport = {broker_port}\n[redis]\nurl = "{self.redis.url}"\n[rollout]\nsoak_s = 2.0\n'
        )
        link = _link(run("radfleet-cloud", "init", folder))
        self._cloud = Cloud(folder, link, broker_port)
        publics = []
        for officer in OFFICERS:
            run("radfleet-cloud", "release", "officer", self.officers / officer, officer)
            publics.append(self.officers / officer / "public.json")
        proposal = Path(self.cloud.command("release", "propose", *publics).strip())
        self.cloud.sign(proposal, self.officers)
        self.start_broker()
        self.cloud.start()
        return self.cloud

    def start_broker(self) -> None:
        """Starts Mosquitto with the configuration that deploys it anywhere, plus its log of every publication."""
        folder = self.folder / "mosquitto"
        folder.mkdir(exist_ok=True)
        source = ROOT / "deploy" / "mosquitto"
        values = {
            "port": str(self.cloud.broker_port),
            "address": "127.0.0.1",
            "pki": str(self.cloud.state / "pki"),
            "acl": str(source / "acl"),
        }
        text = Template((source / "mosquitto.conf.template").read_text()).substitute(values)
        config = folder / "mosquitto.conf"
        # Started by root, Mosquitto would become a user who may not read the folder; here it stays who started it.
        config.write_text(text + "user root\nlog_type debug\n")
        self.mosquitto = start_mosquitto(config)
        port = self.cloud.broker_port
        self.mosquitto.wait_ready("mosquitto", lambda: listens(port))

    def start_pacs(self) -> Orthanc:
        """Starts the PACS that every hospital reports to."""
        self._pacs = start_orthanc(self.folder / "pacs")
        return self.pacs

    def enrol(self, site: str, node: str = "edge-1") -> Hospital:
        """Makes a node by `init`, `invite` and `enrol`, and launches it without waiting."""
        folder = self.folder / site
        folder.mkdir()
        dicom_port, web_port = free_port(), free_port()
        pacs = ""
        if self._pacs:
            pacs = f'[pacs]\nae_title = "{self.pacs.aet}"\nhost = "127.0.0.1"\nport = {self.pacs.dicom_port}\n'
        (folder / "edge.toml").write_text(
            f'[dicom]\nhost = "127.0.0.1"\nport = {dicom_port}\n'
            'allow = [{ae_title = "MODALITY", address = "127.0.0.1"}]\n'
            f"{pacs}[web]\nport = {web_port}\n[series]\nquiet_s = 1.0\n"
        )
        link = _link(run("radfleet-edge", "init", folder))
        token = self.cloud.command("invite", site, node).strip()
        run("radfleet-edge", "enrol", self.cloud.page.url, token, "--config", folder / "edge.toml")
        hospital = Hospital(site, node, folder, dicom_port, web_port, link)
        hospital.launch()
        self.hospitals.append(hospital)
        return hospital

    def children(self) -> list[Child]:
        """Returns every child process, in the order in which they should end."""
        found = [h.child for h in self.hospitals]
        found += [self._cloud.child if self._cloud else None, self.mosquitto]
        found += [self.redis.child if self.redis else None, self._pacs.child if self._pacs else None]
        return [child for child in found if child is not None]

    def stop(self) -> list[str]:
        """Ends every child process and returns the names of those that ended."""
        children = self.children()
        for child in children:
            if child.alive():
                child.process.terminate()
        for child in children:
            child.stop(seconds=25)
        return [child.name for child in children]

    def updates(self, site: str) -> int:
        """Returns how many updates of a hospital the cloud has taken."""
        return int(self.cloud.ask("SELECT count(*) FROM updates WHERE site = ? AND blob IS NOT NULL", site)[0][0])

    def features(self, site: str) -> int:
        """Returns of how many confirmed cases the cloud holds features of a hospital."""
        return int(self.cloud.ask("SELECT count(*) FROM features WHERE site = ?", site)[0][0])

    def broker_bytes(self) -> dict[str, dict[str, int]]:
        """Returns, by site and stage, the payload bytes that the broker logged as received from nodes."""
        pattern = re.compile(r"Received PUBLISH from .*'radfleet/1/([^/]+)/[^/]+/up/([a-z]+)'.*\((\d+) bytes\)")
        found: dict[str, dict[str, int]] = {}
        for line in _there(self.mosquitto).log.read_text(errors="replace").splitlines():
            if match := pattern.search(line):
                stages = found.setdefault(match[1], {})
                stages[match[2]] = stages.get(match[2], 0) + int(match[3])
        return found


def _there(part: T | None) -> T:
    """Returns a part of the fleet; asking for one before it was started is a mistake of the caller."""
    if part is None:
        raise RuntimeError("This part of the fleet was not started yet.")
    return part


def _link(text: str) -> str:
    match = re.search(r"https?://\S+/welcome/\S+", text)
    if not match:
        raise CommandError(f"No one-time link in:\n{text}")
    return match[0]
