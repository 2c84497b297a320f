"""Senders that share no code with us: DCMTK's `storescu` and Orthanc by C-STORE, `curl` and `wget` by STOW-RS.

The first two send what their own toolkit takes for DICOM, encoded anew where it likes; the last two send any bytes.
"""

from __future__ import annotations

import json
import struct
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pydicom

from scripts.lab.child import listens
from scripts.lab.parts import Orthanc, start_orthanc
from scripts.lab.tap import Tap

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
NOT_SENT, FELL, NO_CONTEXT = "refused by the sender", "the sender fell over it", "no context"
NO_ANSWER = -1
_STORE_TYPE = 'Content-Type: multipart/related; type="application/dicom"'
_ANY_SYNTAX = 'Accept: multipart/related; type="application/dicom"; transfer-syntax=*'
_BOUNDARY = "the-line-between-the-parts"
_LONG_VRS = {b"OB", b"OW", b"OF", b"OD", b"OL", b"OV", b"SQ", b"UC", b"UN", b"UR", b"UT", b"SV", b"UV"}


class NotSentError(Exception):
    """Nothing of the file came to the node; the text is NOT_SENT, FELL or NO_CONTEXT."""


class SenderFellError(Exception):
    """The sender crashed or hung on a file."""


@dataclass(frozen=True)
class Sent:
    """What a sender put on the wire for one file, and how it was answered.

    `forms` are (transfer syntax, data) by which the node may have taken it: the data set, and by HTTP the whole file
    where the node cannot tell one in it. `status` is the standard's, 0 for success, NO_ANSWER where none came;
    `seconds` the longest time that a word of the node took.
    """

    forms: tuple[tuple[str, bytes], ...]
    status: int
    seconds: float


Sender = Callable[[Path], Sent]


def by_dicom(tap: Tap, send: Callable[[Path, int], None]) -> Sender:
    """Returns a sender that gives files to `send` and takes what it put on the wire from the tap."""

    def sender(path: Path) -> Sent:
        try:
            send(path, tap.port)
            fell = False
        except SenderFellError:
            fell = True
        heard = tap.heard()
        transfers = [transfer for one in heard for transfer in one.transfers()]
        if not transfers:
            asked = any(one.answered and not one.accepted() for one in heard)
            raise NotSentError(FELL if fell else NO_CONTEXT if asked else NOT_SENT)
        last = transfers[-1]
        return Sent(((last.transfer_syntax, last.data),), last.status, max(one.waited_s for one in heard))

    return sender


def storescu(path: Path, port: int) -> None:
    """Sends a file with DCMTK, which proposes the file's own transfer syntax where it knows it.

    Raises:
        SenderFellError: it ended by a signal, or not at all.
    """
    option = _PROPOSE.get(_transfer_syntax(path))
    command = ["storescu", "-R", *([option] if option else []), "-aet", "MODALITY", "-aec", "RADFLEET"]
    try:
        done = subprocess.run(
            [*command, "127.0.0.1", str(port), str(path)],
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

    def send(self, path: Path, _port: int) -> None:
        """Sends a file, unless Orthanc does not take it.

        Raises:
            SenderFellError: Orthanc crashed, or gave no answer.
        """
        try:
            _by_orthanc(self._server, path)
        except httpx.TransportError as exc:
            self._server.child.stop()
            self._server.child.restart()
            self._server.child.wait_ready("orthanc", lambda: listens(self._server.http_port), seconds=60)
            raise SenderFellError from exc

    def close(self) -> None:
        """Stops it."""
        self._server.child.stop()


def _by_orthanc(server: Orthanc, path: Path) -> None:
    rest = f"http://127.0.0.1:{server.http_port}"
    taken = httpx.post(f"{rest}/instances", content=path.read_bytes(), timeout=PATIENCE_S)
    if taken.status_code != httpx.codes.OK:
        return
    instance = taken.json()["ID"]
    httpx.post(f"{rest}/modalities/RADFLEET/store", json={"Resources": [instance]}, timeout=PATIENCE_S)
    httpx.delete(f"{rest}/instances/{instance}", timeout=PATIENCE_S)  # the next may have the same identifiers


@dataclass(frozen=True)
class Web:
    """A node's DICOMweb, spoken to by `curl` and `wget`; `folder` is for what they read."""

    url: str
    token: str
    folder: Path

    def curl(self, path: Path) -> Sent:
        """Posts a file by STOW-RS; `curl` itself makes the multipart body."""
        form = ["-H", _STORE_TYPE, "-F", f'file=@"{path}";type=application/dicom']
        status, seconds, _, body = self._curl(f"{self.url}/dicom-web/studies", *form)
        return _answered(path, status, body, seconds)

    def wget(self, path: Path) -> Sent:
        """Posts a file by STOW-RS; `wget` knows no multipart, its body is put together here."""
        whole = self.folder / "body"
        part = f"--{_BOUNDARY}\r\nContent-Type: application/dicom\r\n\r\n".encode()
        whole.write_bytes(part + path.read_bytes() + f"\r\n--{_BOUNDARY}--\r\n".encode())
        command = ["wget", "--quiet", "--server-response", "--content-on-error", "--output-document=-", "--tries=1"]
        command += [f"--timeout={PATIENCE_S:.0f}", f"--header=Authorization: Bearer {self.token}"]
        command += [f"--header={_STORE_TYPE}; boundary={_BOUNDARY}", f"--post-file={whole}"]
        started = time.monotonic()
        done = subprocess.run([*command, f"{self.url}/dicom-web/studies"], capture_output=True, check=False)
        seconds = time.monotonic() - started
        said = [line.split() for line in done.stderr.decode("latin-1").splitlines() if "HTTP/1." in line]
        return _answered(path, int(said[-1][1]) if said else 0, done.stdout, seconds)

    def fetch(self, study: str, series: str, instance: str) -> tuple[str, bytes, float]:
        """Returns transfer syntax and data set of an instance by WADO-RS with `curl`, as stored, and the seconds.

        Both are empty where the answer is not one Part 10 file.
        """
        url = f"{self.url}/dicom-web/studies/{study}/series/{series}/instances/{instance}"
        status, seconds, kind, body = self._curl(url, "-H", _ANY_SYNTAX)
        boundary = kind.partition("boundary=")[2].strip('"').encode()
        start, end = b"--" + boundary + b"\r\n", b"\r\n--" + boundary + b"--\r\n"
        if status != httpx.codes.OK or not boundary or not body.startswith(start) or not body.endswith(end):
            return "", b"", seconds
        found = split_file(body[body.index(b"\r\n\r\n") + 4 : -len(end)], by_length=True)
        return (*found, seconds) if found else ("", b"", seconds)

    def _curl(self, url: str, *words: str) -> tuple[int, float, str, bytes]:
        """Returns HTTP status (0: no answer), seconds, Content-Type and body."""
        header = self.folder / "authorization"  # not on the command line, where every user of the machine sees it
        header.write_text(f"Authorization: Bearer {self.token}\n")
        said = "%{stderr}\n%{http_code} %{time_total} %{content_type}"
        command = ["curl", "--silent", "--max-time", f"{PATIENCE_S:.0f}", "-H", f"@{header}", "-w", said, *words, url]
        done = subprocess.run(command, capture_output=True, check=False)
        status, seconds, kind = done.stderr.decode().splitlines()[-1].split(" ", 2)
        return int(status), float(seconds), kind, done.stdout


def split_file(data: bytes, *, by_length: bool = False) -> tuple[str, bytes] | None:
    """Returns the transfer syntax that a Part 10 file names, and its data set; None where it is no such file.

    Read without the node's own reader, so that both cannot be wrong in the same way. The file meta information ends
    at the first element of another group, since hostile files lie about its length, or `by_length`.
    """
    if data[128:132] != b"DICM":
        return None
    at, meta = 132, {}
    stop = 144 + int.from_bytes(data[140:144], "little") if by_length else len(data)
    with suppress(struct.error):
        while at < stop and data[at : at + 2] == b"\x02\0":
            element, vr, length = struct.unpack_from("<2xH2sH", data, at)
            at += 8
            if vr in _LONG_VRS:
                (length,) = struct.unpack_from("<L", data, at)
                at += 4
            meta[element] = data[at : at + length].decode("latin-1").strip(" \0")
            at += length
    if not all(meta.get(element) for element in (0x0002, 0x0003, 0x0010)):
        return None
    return meta[0x0010], data[at:]


def _answered(path: Path, http: int, body: bytes, seconds: float) -> Sent:
    data = path.read_bytes()
    split = split_file(data)
    forms = (*([split] if split else []), ("", data))
    if http == httpx.codes.OK:
        return Sent(forms, 0, seconds)
    with suppress(ValueError, KeyError):
        said = json.loads(body)
        failed = said.get("00081198") or said["0008119A"]
        return Sent(forms, int(failed["Value"][0]["00081197"]["Value"][0]), seconds)
    return Sent(forms, NO_ANSWER, seconds)


def _transfer_syntax(path: Path) -> str:
    try:
        return str(pydicom.dcmread(path, stop_before_pixels=True, specific_tags=[]).file_meta.TransferSyntaxUID)
    except Exception:  # noqa: BLE001 damaged on purpose
        return ""
