"""Every file of the two folders of real and hostile objects, sent by senders that are not ours, and what became of it.

DCMTK's `storescu` reads the files; Orthanc is given them by REST and sends them as a modality. What a sender put on
the wire is taken from the wire (scripts.lab.tap) and compared with what the spool holds, byte for byte.
"""

from __future__ import annotations

import csv
import hashlib
import sqlite3
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import pydicom

from scripts.lab.child import listens
from scripts.lab.parts import Orthanc, start_orthanc
from scripts.lab.tap import Conversation, Tap

PATIENCE_S = 60.0
# What storescu must be told to propose, by transfer syntax; it has no JPEG 2000, HTJ2K or JPEG XL decoder.
_PROPOSE = {
    "1.2.840.10008.1.2": "-xi",
    "1.2.840.10008.1.2.2": "-xb",
    "1.2.840.10008.1.2.1.99": "-xd",
    "1.2.840.10008.1.2.4.50": "-xy",
    "1.2.840.10008.1.2.4.51": "-xx",
    "1.2.840.10008.1.2.4.70": "-xs",
    "1.2.840.10008.1.2.4.80": "-xt",
    "1.2.840.10008.1.2.4.81": "-xu",
    "1.2.840.10008.1.2.4.90": "-xv",
    "1.2.840.10008.1.2.4.91": "-xw",
    "1.2.840.10008.1.2.4.100": "-xm",
    "1.2.840.10008.1.2.4.102": "-xn",
    "1.2.840.10008.1.2.5": "-xr",
}
NOT_SENT, FELL = "refused by the sender", "the sender fell over it"
NO_CONTEXT, NO_ANSWER, LOST = "no context", "NO ANSWER", "NOT IDENTICAL"
STORED = "stored"


@dataclass(frozen=True)
class Item:
    """One file of a corpus."""

    path: Path
    category: str


@dataclass(frozen=True)
class Fate:
    """What became of one file: STORED, one of the words above, or the outcome of the door's quarantine."""

    item: Item
    outcome: str
    digest: str = ""  # of the object in the spool


def corpus(data: Path) -> list[Item]:
    """Returns every file that the two manifests name."""
    items = []
    for folder in ("dicom", "dicom_hostile"):
        with (data / folder / "manifest.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                category = f"{folder}: {row.get('category') or row.get('kind') or ''}".rstrip(": ")
                items.append(Item(data / folder / row["file"], category))
    return items


class SenderFellError(Exception):
    """The sender crashed or hung on a file."""


def storescu(item: Item, port: int) -> None:
    """Sends a file with DCMTK, which proposes the file's own transfer syntax where it knows it.

    Raises:
        SenderFellError: it ended by a signal, or not at all.
    """
    option = _PROPOSE.get(_transfer_syntax(item.path))
    command = ["storescu", "-R", *([option] if option else []), "-aet", "MODALITY", "-aec", "RADFLEET"]
    try:
        done = subprocess.run(
            [*command, "127.0.0.1", str(port), str(item.path)],
            capture_output=True,
            check=False,
            timeout=PATIENCE_S,
            env={"PATH": "/usr/bin:/bin", "TCP_NODELAY": "1"},
        )
    except subprocess.TimeoutExpired as exc:
        raise SenderFellError from exc
    if done.returncode < 0:
        raise SenderFellError


class OrthancSender:
    """An Orthanc that is given files by REST and sends them to the door behind a tap; started again when it fell."""

    def __init__(self, folder: Path, port: int) -> None:
        self._server = start_orthanc(folder, aet="MODALITY", peers=[("RADFLEET", port)], DicomAssociationCloseDelay=0)

    def send(self, item: Item, _port: int) -> None:
        """Sends a file, unless Orthanc does not take it.

        Raises:
            SenderFellError: Orthanc crashed, or gave no answer.
        """
        try:
            _by_orthanc(self._server, item)
        except httpx.TransportError as exc:
            self._server.child.stop()
            self._server.child.restart()
            self._server.child.wait_ready("orthanc", lambda: listens(self._server.http_port), seconds=60)
            raise SenderFellError from exc

    def close(self) -> None:
        """Stops it."""
        self._server.child.stop()


def _by_orthanc(server: Orthanc, item: Item) -> None:
    rest = f"http://127.0.0.1:{server.http_port}"
    taken = httpx.post(f"{rest}/instances", content=item.path.read_bytes(), timeout=PATIENCE_S)
    if taken.status_code != httpx.codes.OK:
        return
    instance = taken.json()["ID"]
    httpx.post(f"{rest}/modalities/RADFLEET/store", json={"Resources": [instance]}, timeout=PATIENCE_S)
    httpx.delete(f"{rest}/instances/{instance}", timeout=PATIENCE_S)  # the next may have the same identifiers


def send_all(items: Sequence[Item], tap: Tap, send: Callable[[Item, int], None], state: Path) -> list[Fate]:
    """Sends files one by one through the tap to the door of the node at `state`, and looks at each."""
    fates = []
    for item in items:
        try:
            send(item, tap.port)
            fell = False
        except SenderFellError:
            fell = True
        fates.append(_fate(item, tap.heard(), state, fell=fell))
    return fates


def _fate(item: Item, conversations: Sequence[Conversation], state: Path, *, fell: bool) -> Fate:
    transfers = [transfer for one in conversations for transfer in one.transfers()]
    if not transfers and fell:
        return Fate(item, FELL)
    if not transfers:
        asked = any(one.answered and not one.accepted() for one in conversations)
        return Fate(item, NO_CONTEXT if asked else NOT_SENT)
    last = transfers[-1]
    digest = hashlib.sha256(last.transfer_syntax.encode() + b"\0" + last.data).hexdigest()
    if last.status == -1:
        return Fate(item, NO_ANSWER)
    database = sqlite3.connect(f"file:{state / 'intake.sqlite'}?mode=ro", uri=True, timeout=30)
    try:
        if last.status == 0:
            row = database.execute("SELECT file, offset FROM objects WHERE digest = ?", (digest,)).fetchone()
            whole = row is not None and (state / "spool" / row[0]).read_bytes()[row[1] :] == last.data
            return Fate(item, STORED if whole else LOST, digest)
        row = database.execute("SELECT file, outcome FROM quarantine WHERE digest = ?", (digest,)).fetchone()
    finally:
        database.close()
    if row is None:
        return Fate(item, f"{LOST}, status {last.status:#06x}")
    kept = (state / "quarantine" / row[0]).read_bytes()
    return Fate(item, row[1] if kept.endswith(last.data) else LOST)


def _transfer_syntax(path: Path) -> str:
    try:
        return str(pydicom.dcmread(path, stop_before_pixels=True, specific_tags=[]).file_meta.TransferSyntaxUID)
    except Exception:  # noqa: BLE001 damaged on purpose
        return ""
