"""A node's reading page over HTTP in this process, with real answers that the real pipeline gave."""

from __future__ import annotations

import threading
from pathlib import Path

import httpx
from pydicom.dataset import FileDataset

from edge.intake.part import Arriving
from edge.report import node_report
from edge.web.dicomweb.retention import Retention
from edge.web.dicomweb.routes import DicomWeb
from edge.web.dicomweb.search import Headers
from edge.web.door import Door
from edge.web.labels import Labels
from edge.web.site import web_app
from edge.web.studies import Studies
from scripts.lab.child import free_port
from shared.serve import Listener, serve
from shared.signin import Role
from tests.simulators.modality import encoded, phantom_study
from tests.simulators.node import make_pipeline, make_spool, run_until_idle
from tests.simulators.release import HandClock

PASSWORD = "correct horse battery"


class ReadingNode:
    """Two radiographs answered, one body part that no head reads, one object that cannot be decoded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = HandClock()
        self.nudges = 0
        self._answer_studies()
        self.labels = Labels(folder / "labels.sqlite", self.clock)
        self.studies = Studies(
            folder / "results.sqlite",
            self.labels,
            labelled=self._nudged,
            report=lambda: node_report(folder, [], clock_trusted=True),
            link=lambda: "connected",
            degraded=lambda: "",
            site=lambda: "hospital-a/edge-1",
            pacs="",
        )
        self.port = free_port()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> ReadingNode:
        ready = threading.Event()
        retention = Retention(self.folder / "intake.sqlite", self.folder / "spool")
        dicomweb = DicomWeb(retention, self.folder / "intake.sock")
        app = web_app(self.studies, self.labels, self.clock, dicomweb=dicomweb, door=quiet_door(retention, self.folder))
        listeners = [Listener(app, "127.0.0.1", self.port)]
        self._thread = threading.Thread(target=serve, args=(listeners, self._stop, ready.set), daemon=True)
        self._thread.start()
        assert ready.wait(30)
        return self

    def stop(self) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join(20)
        self.labels.close()

    def person(self, name: str, role: Role) -> str:
        """Invites a person, sets PASSWORD, and returns a bearer token."""
        self.labels.set_password(self.labels.invite(name, role, actor="test"), PASSWORD)
        token = self.labels.sign_in(name, PASSWORD, "token")
        assert token
        return token

    def client(self, token: str = "") -> httpx.Client:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30)

    def _nudged(self) -> None:
        self.nudges += 1

    def _answer_studies(self) -> None:
        broken, elsewhere = phantom_study("chest-xray", 0, seed=3)[0], phantom_study("chest-xray", 0, seed=4)[0]
        broken.PixelData = broken.PixelData[:1000]
        elsewhere.BodyPartExamined = "KNEE"
        wanted = [phantom_study("chest-xray", label, seed=label + 1)[0] for label in (0, 1)]
        spool = make_spool(self.folder)
        for item in [*wanted, broken, elsewhere]:
            spool.store(_arriving(item), [encoded(item)])
        spool.close()
        run_until_idle(make_pipeline(self.folder, quiet_s=0.0))


def quiet_door(retention: Retention, state: Path) -> Door:
    """A Door page that knows nobody to echo."""
    return Door(
        state / "intake.sqlite", Headers(retention), "RADFLEET", "127.0.0.1", 104, 0, [], [], lambda _peer: None
    )


def _arriving(item: FileDataset) -> Arriving:
    transfer_syntax = str(item.file_meta.TransferSyntaxUID)
    return Arriving(str(item.SOPClassUID), str(item.SOPInstanceUID), transfer_syntax, "MODALITY")
