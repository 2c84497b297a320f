"""The intake process as the composition root builds it: which ports it opens, and that it ends when its door does."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from edge.app import run_intake
from edge.config import EdgeConfig, load_config
from edge.intake.door import Door
from scripts.lab.certificates import Certificates
from scripts.lab.child import free_port, listens, wait_until
from scripts.lab.modality import store
from shared.errors import StateError
from tests.simulators.modality import phantom_study, write_files


def config(folder: Path, more: str = "") -> EdgeConfig:
    path = folder / "edge.toml"
    path.write_text(
        '[node]\nstate = "state"\n[dicom]\nhost = "127.0.0.1"\n'
        f'port = {free_port()}\nallow = [{{ae_title = "MODALITY"}}]\n{more}'
    )
    read = load_config(path)
    read.state.mkdir()
    return read


def test_a_door_with_tls_closes_its_plain_port(tmp_path: Path) -> None:
    pki, port = Certificates(tmp_path / "pki"), free_port()
    files = f'certificate = "{pki.server[0]}"\nkey = "{pki.server[1]}"\nca = "{pki.ca}"\n'
    node, stop = config(tmp_path, f"[dicom.tls]\nport = {port}\n{files}"), threading.Event()
    process = threading.Thread(target=run_intake, args=(node, stop))
    process.start()
    try:
        wait_until("the door", lambda: listens(port))
        sent = store(
            write_files(tmp_path / "send", [phantom_study("chest-xray", 0, seed=1)[0]]),
            port=port,
            called="RADFLEET",
            options=["+tls", str(pki.client[1]), str(pki.client[0]), "+cf", str(pki.ca)],
        )
        assert sent.accepted == 1
        assert not listens(node.dicom.port)
    finally:
        stop.set()
        process.join(20)
    assert not process.is_alive()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_process_ends_when_nobody_listens_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The supervisor starts a process again that ended; one that stays and is deaf would be for ever."""

    def dying(*_: object) -> None:
        raise SystemExit

    monkeypatch.setattr(Door, "_accept", dying)
    node, failed = config(tmp_path), threading.Event()

    def run() -> None:
        with pytest.raises(StateError, match="ended by itself"):
            run_intake(node, threading.Event())
        failed.set()

    process = threading.Thread(target=run, daemon=True)
    process.start()
    wait_until("the door", lambda: listens(node.dicom.port))
    socket.create_connection(("127.0.0.1", node.dicom.port)).close()
    assert failed.wait(20)
