"""A node's door for HTTP in this process: real spool, real handover, real server; no pipeline and no model."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import httpx
from dicomweb_client import DICOMwebClient
from pydicom.dataset import FileDataset
from requests import Session

from edge.forward.peer import Peer
from edge.intake.handover import Handover
from edge.intake.part import Arriving
from edge.intake.spool import Spool
from edge.intake.status import Outcome
from edge.intake.syntaxes import storage_classes, transfer_syntaxes
from edge.report import node_report
from edge.web.dicomweb.retention import Retention
from edge.web.dicomweb.routes import DicomWeb
from edge.web.dicomweb.search import Headers
from edge.web.door import Destination, Door
from edge.web.echo import ask
from edge.web.labels import Labels
from edge.web.site import web_app
from edge.web.studies import Studies
from scripts.lab.child import free_port
from shared.serve import Listener, serve
from shared.signin import Role
from tests.simulators.modality import encoded, split_file
from tests.simulators.node import make_spool
from tests.simulators.release import HandClock

VIEWER = "https://viewer.example"
PASSWORD = "correct horse battery"


class DicomWebNode:
    """Listens from `start` to `stop`; `spool` may be filled directly, as the DICOM door would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = HandClock()
        self.spool: Spool = make_spool(folder, self.clock)
        self.labels = Labels(folder / "labels.sqlite", self.clock)
        self.nudges = 0
        self.retention = Retention(folder / "intake.sqlite", folder / "spool")
        self.door = Door(
            folder / "intake.sqlite",
            Headers(self.retention),
            ae_title="RADFLEET",
            host="127.0.0.1",
            port=free_port(),
            tls_port=0,
            allowed=[],
            destinations=[],
            echo=self._echo,
        )
        self.socket = folder / "run" / "intake.sock"
        self.handover = Handover(
            self.socket, self.spool, storage=storage_classes(), syntaxes=transfer_syntaxes(), nudge=self._nudged
        )
        self.port = free_port()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> DicomWebNode:
        self.handover.start()
        ready = threading.Event()
        studies = Studies(
            self.folder / "results.sqlite",
            self.labels,
            labelled=lambda: None,
            report=lambda: node_report(self.folder, [], clock_trusted=True),
            link=lambda: "",
            degraded=lambda: "",
            site=lambda: "",
            pacs="",
        )
        dicomweb = DicomWeb(self.retention, self.socket, [VIEWER])
        app = web_app(studies, self.labels, self.clock, dicomweb=dicomweb, door=self.door)
        listeners = [Listener(app, "127.0.0.1", self.port)]
        self._thread = threading.Thread(target=serve, args=(listeners, self._stop, ready.set), daemon=True)
        self._thread.start()
        assert ready.wait(30)
        return self

    def stop(self) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join(20)
        self.handover.stop()
        self.labels.close()
        self.spool.close()

    def store(self, *items: FileDataset) -> None:
        """Stores objects as they would come by C-STORE."""
        for item in items:
            syntax = str(item.file_meta.TransferSyntaxUID)
            arriving = Arriving(str(item.SOPClassUID), str(item.SOPInstanceUID), syntax, calling_ae="MODALITY")
            assert self.spool.store(arriving, [encoded(item)]) is not None

    def store_files(self, paths: Sequence[Path]) -> list[Path]:
        """Stores files; returns those that are shown: the last of several under the same UIDs."""
        kept = []
        for path in paths:
            sop_class, sop_instance, syntax, data = split_file(path)
            arriving = Arriving(sop_class, sop_instance, syntax, calling_ae="MODALITY")
            if self.spool.store(arriving, [data]) in {Outcome.STORED, Outcome.CONFLICT}:
                kept.append(path)
        return kept

    def token(self, name: str, role: Role) -> str:
        """Invites a person, sets PASSWORD, and returns a bearer token."""
        self.labels.set_password(self.labels.invite(name, role, actor="test"), PASSWORD)
        token = self.labels.sign_in(name, PASSWORD, "token")
        assert token
        return token

    def client(self, token: str) -> httpx.Client:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx.Client(base_url=f"{self.url}/dicom-web", headers=headers, timeout=60)

    def foreign_client(self, token: str) -> DICOMwebClient:
        """A DICOMweb client that is not ours."""
        session = Session()
        session.trust_env = False
        session.headers["Authorization"] = f"Bearer {token}"
        return DICOMwebClient(f"{self.url}/dicom-web", session=session)

    def _echo(self, asked: Destination) -> None:
        ask(Peer(asked.name, asked.ae_title, asked.host, asked.port), "RADFLEET")

    def _nudged(self) -> None:
        self.nudges += 1
