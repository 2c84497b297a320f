"""The Door page on a real DICOM door: callers are DCMTK's, the browser is Chromium, the keyboard is enough."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from pynetdicom import AE, evt
from pynetdicom.sop_class import CTImageStorage, Verification

from edge.intake.door import Door
from edge.intake.index import Visit
from edge.intake.part import Arriving, RefusedError
from edge.intake.peers import AllowList, Peer, admitted_callers
from edge.intake.services import NAGLE
from edge.intake.status import Outcome
from edge.web import echo
from edge.web.labels import MAY
from scripts.lab.child import Child, free_port, listens, wait_until
from shared.signin import ROLES
from tests.simulators.browser import Browser
from tests.simulators.dicomweb import PASSWORD, DicomWebNode
from tests.simulators.modality import EXPLICIT, encoded, phantom_study, storescu, write_files

ITEM = phantom_study("chest-xray", 0, seed=1)[0]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[DicomWebNode]:
    running = DicomWebNode(tmp_path).start()
    yield running
    running.stop()


@pytest.fixture
def door(node: DicomWebNode) -> Iterator[Door]:
    one = Door(
        node.spool,
        ae_title="RADFLEET",
        host="127.0.0.1",
        port=node.door.port,
        allow=AllowList([Peer("CT1")], admitted_callers(node.folder / "labels.sqlite")),
        nudge=lambda: None,
        clock=node.clock,
    )
    one.start()
    yield one
    one.stop()


@pytest.fixture
def administrator(node: DicomWebNode) -> Iterator[httpx.Client]:
    """A browser without scripts."""
    node.token("root", "administrator")
    with signed_in(node, "root") as client:
        yield client


@contextmanager
def signed_in(node: DicomWebNode, name: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=node.url, timeout=60) as client:
        assert client.post("/login", data={"name": name, "password": PASSWORD}).status_code == 303
        yield client


def mark(client: httpx.Client) -> str:
    found = re.search('name="csrf" value="([0-9a-f]+)"', client.get("/door").text)
    assert found
    return found[1]


def shown(window: Browser, selector: str) -> str:
    """Returns an element's text in one step: between finding and reading the page may have renewed it."""
    return str(window.script(f"return document.querySelector('{selector}')?.innerText ?? ''"))


def echoscu(port: int, calling: str, called: str = "RADFLEET") -> bool:
    """Tells whether DCMTK's echo is answered."""
    command = ["echoscu", "-to", "10", "-aet", calling, "-aec", called, "127.0.0.1", str(port)]
    return subprocess.run(command, capture_output=True, timeout=30, check=False).returncode == 0


@pytest.mark.e2e
def test_an_unknown_caller_is_admitted_with_one_key_and_calls_again(
    node: DicomWebNode, door: Door, tmp_path: Path
) -> None:
    node.token("root", "administrator")
    assert not echoscu(door.port, "MR NEW")
    window = Browser(tmp_path)
    try:
        window.open(f"{node.url}/login")
        window.press("root", "Tab", PASSWORD, "Enter")
        wait_until("the worklist", lambda: window.url == f"{node.url}/")
        window.open(f"{node.url}/door")
        wait_until("the caller", lambda: "MR NEW" in shown(window, "#live"))
        window.script("document.querySelector('[id^=admit-]').focus()")
        renewed = "return document.querySelector('[id^=admit-]').dataset.old === undefined"
        window.script("document.querySelector('[id^=admit-]').dataset.old = 'yes'")
        wait_until("the part to be renewed", lambda: bool(window.script(renewed)))
        assert str(window.script("return document.activeElement.id")).startswith("admit-")  # the focus stays
        window.press("Enter")
        wait_until("the admission", lambda: "admitted by root" in shown(window, "#live"))
        assert "Nobody unknown has called" in shown(window, "#live")
        assert echoscu(door.port, "MR NEW")
        wait_until("their echo", lambda: "just now" in shown(window, "#live"))
        peer = free_port()
        window.script(f"document.querySelector('[name=port]').value = '{peer}'")
        window.script("document.querySelector('[name=host]').focus()")
        window.press("127.0.0.1", "Tab", "Tab", "PACS", "Enter")
        wait_until("our echo", lambda: "Nobody listens" in shown(window, "#echo-result"))
        window.script("window.scrollTo(0, 0)")
        window.screenshot(tmp_path / "door.png")
    finally:
        window.close()
    rows = node.labels._all("SELECT actor, action, subject FROM audit WHERE action LIKE 'door.%' ORDER BY serial")
    assert rows[0] == {"actor": "root", "action": "door.admitted", "subject": "MR NEW at 127.0.0.1"}


def test_a_revoked_caller_is_refused_again(node: DicomWebNode, door: Door, administrator: httpx.Client) -> None:
    form = {"csrf": mark(administrator), "ae_title": "CT9", "address": "127.0.0.1"}
    assert not echoscu(door.port, "CT9")
    assert administrator.post("/door/admit", data=form).headers["location"] == "/door"
    assert echoscu(door.port, "CT9")
    assert not echoscu(door.port, "CT8")  # one caller, not all of that address
    administrator.post("/door/revoke", data=form)
    assert not echoscu(door.port, "CT9")
    actions = [row["action"] for row in node.labels._all("SELECT action FROM audit WHERE action LIKE 'door.%'")]
    assert actions == ["door.admitted", "door.revoked"]


@pytest.mark.parametrize(
    ("ae_title", "address"), [("", "10.0.0.1"), ("A" * 17, ""), ("CT\n9", ""), ("CT9", "nowhere"), ("CT9", "1" * 65)]
)
def test_what_is_no_caller_is_not_admitted(
    node: DicomWebNode, administrator: httpx.Client, ae_title: str, address: str
) -> None:
    form = {"csrf": mark(administrator), "ae_title": ae_title, "address": address}
    assert administrator.post("/door/admit", data=form).status_code in {400, 422}
    assert node.labels.admitted() == []


def test_only_administrators_admit_and_echo(node: DicomWebNode, door: Door) -> None:
    echoscu(door.port, "CT9")
    for role in ROLES:
        node.token(f"one {role}", role)
        with signed_in(node, f"one {role}") as client:
            page = client.get("/door")
            assert (page.status_code == 200) == (role in MAY["door.read"])
            assert "CT9" in page.text
            assert ("Admit" in page.text) == (role in MAY["door.admit"])
            assert ("Identity conflicts" in page.text) == (role in MAY["study.read"])
            for path, form in (
                ("/door/admit", {"ae_title": "CT9", "address": "127.0.0.1"}),
                ("/door/revoke", {"ae_title": "CT9", "address": "127.0.0.1"}),
                ("/door/echo", {"host": "127.0.0.1", "port": "1", "ae_title": "X"}),
            ):
                assert client.post(path, data=form).status_code == 403  # without the page's mark
                answer = client.post(path, data={**form, "csrf": mark(client)})
                assert (answer.status_code != 403) == (role in MAY["door.admit"]), (role, path)


def test_titles_from_the_network_are_text(node: DicomWebNode, administrator: httpx.Client) -> None:
    node.spool.index.caller("<b>x</b>'\"", "10.0.0.9", "RADFLEET", "<script>alert(1)</script>", 0.0)
    text = administrator.get("/door").text
    assert "<script>alert" not in text
    assert "<b>x" not in text
    assert "&lt;b&gt;x" in text


def test_refused_objects_and_identity_conflicts_are_shown(
    node: DicomWebNode, door: Door, administrator: httpx.Client, tmp_path: Path
) -> None:
    other = phantom_study("chest-xray", 0, seed=1)[0]
    other.PatientID, other.PatientName = "P-OTHER", "ROE^RICHARD"
    sent = storescu(door.port, write_files(tmp_path / "sent", [ITEM, other]), calling="CT1")
    assert sent.returncode == 0, sent.stderr
    arriving = Arriving(str(ITEM.SOPClassUID), "1.2.3", EXPLICIT, calling_ae="CT1", address="10.0.0.4")
    with pytest.raises(RefusedError):
        node.spool.store(arriving, [encoded(phantom_study("chest-xray", 0, seed=2)[0])])
    text = administrator.get("/door").text
    assert Outcome.MISMATCH.value in text
    assert "10.0.0.4" in text
    conflict = text[text.index("Identity conflicts") :]
    for shown in ("DOE, JANE", "ROE, RICHARD", "P-OTHER", ITEM.SOPInstanceUID, "Kept", "Beside"):
        assert shown in conflict, shown
    # What stands beside is in no DICOMweb answer.
    with node.client(node.token("ada", "radiologist")) as client:
        assert [one["00100020"]["Value"] for one in client.get("/studies").json()] == [["P1"]]


def test_slow_peers_are_named_with_the_cure(node: DicomWebNode, administrator: httpx.Client) -> None:
    node.spool.association_ended("a", Visit("CT1", "10.0.0.7", objects=3, bytes=9, note=NAGLE))
    text = administrator.get("/door").text
    assert "10.0.0.7" in text
    assert "TCP_NODELAY=1 in the environment" in text


def test_an_older_index_shows_an_empty_page(node: DicomWebNode, administrator: httpx.Client) -> None:
    with node.spool.index.durable() as db:
        for table in ("callers", "peers", "quarantine"):
            db.execute(f"DROP TABLE {table}")
        db.execute("DROP INDEX IF EXISTS objects_state")
        db.execute("ALTER TABLE objects DROP COLUMN state")
    page = administrator.get("/door")
    assert page.status_code == 200
    assert "Nobody unknown has called" in page.text


class TestEcho:
    """We call them: every cause in plain words."""

    def ask(self, client: httpx.Client, port: int | str, title: str = "PACS", host: str = "127.0.0.1") -> str:
        form = {"csrf": mark(client), "host": host, "port": str(port), "ae_title": title}
        answer = client.post("/door/echo", data=form, headers={"hx-request": "true"})
        assert answer.status_code == 200
        return re.sub(r"<[^>]+>", " ", answer.text)

    def test_it_is_answered(self, administrator: httpx.Client, tmp_path: Path) -> None:
        port = free_port()
        child = Child("storescp", ["storescp", "-aet", "PACS", str(port)], log=tmp_path / "scp.log")
        try:
            child.wait_ready("storescp", lambda: listens(port))
            assert "PACS at 127.0.0.1:" in self.ask(administrator, port)
            assert "answered our echo" in self.ask(administrator, port)
        finally:
            child.stop()

    def test_nobody_listens(self, administrator: httpx.Client) -> None:
        said = self.ask(administrator, free_port())
        assert "Nobody listens" in said
        assert "correct the port" in said

    def test_it_does_not_know_us(self, administrator: httpx.Client) -> None:
        with _acceptor(require_calling=["SOMEBODY"]) as port:
            said = self.ask(administrator, port)
        assert "does not know the calling AE title RADFLEET" in said
        assert "Add RADFLEET" in said

    def test_it_has_another_title(self, administrator: httpx.Client) -> None:
        with _acceptor(require_called=True) as port:
            assert "has no AE title WRONG" in self.ask(administrator, port, "WRONG")

    def test_it_offers_no_echo(self, administrator: httpx.Client) -> None:
        with _acceptor(context=CTImageStorage) as port:
            assert "accepts none of what was proposed" in self.ask(administrator, port)

    def test_it_wants_tls(self, administrator: httpx.Client, tmp_path: Path) -> None:
        certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
        subject = ["-subj", "/CN=pacs", "-days", "2", "-nodes", "-newkey", "rsa:2048"]
        command = ["openssl", "req", "-x509", *subject, "-keyout", str(key), "-out", str(certificate)]
        subprocess.run(command, check=True, capture_output=True)
        port = free_port()
        options = ["+tls", str(key), str(certificate), "-ic"]
        child = Child("storescp", ["storescp", *options, str(port)], log=tmp_path / "scp.log")
        try:
            child.wait_ready("storescp", lambda: listens(port))
            assert "speaks TLS only" in self.ask(administrator, port)
        finally:
            child.stop()

    def test_it_says_nothing(self, administrator: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("edge.forward.peer.CONNECT_S", 0.5)
        monkeypatch.setattr(echo, "PROBE_S", 0.5)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            assert "says nothing" in self.ask(administrator, silent.getsockname()[1])

    @pytest.mark.parametrize(
        ("host", "port", "title"),
        [
            ("a b", "104", "X"),
            ("-x", "104", "X"),
            ("h", "0", "X"),
            ("h", "70000", "X"),
            ("h", "x", "X"),
            ("h", "1", "\\"),
        ],
    )
    def test_what_cannot_be_called_is_not_called(
        self, administrator: httpx.Client, host: str, port: int | str, title: str
    ) -> None:
        assert "This is no" in self.ask(administrator, port, title, host)


class _acceptor:  # noqa: N801 reads as a verb at the with statement
    """pynetdicom as a PACS that is not set up for us."""

    def __init__(
        self, *, require_calling: list[str] | None = None, require_called: bool = False, context: str = Verification
    ) -> None:
        ae = AE(ae_title="PACS")
        ae.require_calling_aet = require_calling or []
        ae.require_called_aet = require_called
        ae.add_supported_context(context)
        self._ae = ae

    def __enter__(self) -> int:
        self._server = self._ae.start_server(
            ("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_ECHO, lambda _event: 0x0000)]
        )
        assert self._server is not None
        return int(self._server.server_address[1])

    def __exit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.shutdown()
