"""C-STORE: objects a second that are durable when answered, beside Orthanc and DCMTK's `storescp` in the same run.

The sender is always DCMTK's `storescu`. Receivers take turns (ours, Orthanc, storescp, ours, …), each run begins with
an empty store, and the median of the runs counts.
"""

from __future__ import annotations

import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from pynetdicom import AE, Association

from scripts.lab.certificates import Certificates
from scripts.lab.child import Child, free_port, listens, peak_bytes
from scripts.lab.fleet import BIN, run
from scripts.lab.modality import store
from scripts.lab.parts import start_orthanc
from scripts.lab.table import Row

SIZES = {"33 KB": (128, 128, 300), "0.5 MB": (512, 512, 120), "15 MB": (2500, 3000, 12)}  # rows, columns, objects
ASSOCIATIONS = (1, 4, 10)
NAGLE_OBJECTS = 40  # a sender that waits 40 ms and more for each needs no more
RUNS = 3
_ALLOW = '{ae_title = "MODALITY"}'


@dataclass(frozen=True)
class Server:
    """A receiver that runs: its port, and its process."""

    port: int
    pid: int


def write_objects(folder: Path, rows: int, columns: int, count: int) -> list[Path]:
    """Writes `count` distinct CT objects and returns their paths."""
    rng = np.random.default_rng(1)
    study = generate_uid()
    paths = []
    for number in range(count):
        ds = Dataset()
        ds.SOPClassUID = CTImageStorage
        ds.SOPInstanceUID = generate_uid()
        ds.StudyInstanceUID = study
        ds.SeriesInstanceUID = generate_uid()
        ds.Modality = "CT"
        ds.PatientID = f"BENCH{number}"
        ds.PatientName = "Bench^Object"
        ds.StudyDate = "20260101"
        ds.Rows, ds.Columns = rows, columns
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
        ds.PixelData = rng.integers(0, 4096, (rows, columns), dtype=np.uint16).tobytes()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        paths.append(folder / f"{number:04}.dcm")
        ds.save_as(paths[-1], enforce_file_format=True)
    return paths


def rate(
    files: Sequence[Path],
    associations: int,
    port: int,
    called: str,
    *,
    nodelay: bool = True,
    options: Sequence[str] = (),
) -> float:
    """Returns objects a second over all associations; raises when the receiver did not accept every one."""
    parts = [files[i::associations] for i in range(associations)]
    start = time.perf_counter()
    with ThreadPoolExecutor(associations) as pool:
        sent = list(
            pool.map(lambda part: store(part, port=port, called=called, nodelay=nodelay, options=options), parts)
        )
    seconds = time.perf_counter() - start
    if sum(s.accepted for s in sent) != len(files):
        raise RuntimeError(f"{called} accepted {sum(s.accepted for s in sent)} of {len(files)} objects.")
    return len(files) / seconds


@contextmanager
def our_door(folder: Path, tls: Certificates | None = None) -> Iterator[Server]:
    """Runs the intake process of a node that nobody enrolled."""
    port, tls_port = free_port(), free_port()
    text = (
        f'[node]\nstate = "state"\n[dicom]\nae_title = "RADFLEET"\nhost = "127.0.0.1"\nport = {port}\n'
        f"allow = [{_ALLOW}]\n"
    )
    if tls:
        text += f'[dicom.tls]\nport = {tls_port}\ncertificate = "{tls.server[0]}"\nkey = "{tls.server[1]}"\n'
        text += f'ca = "{tls.ca}"\n'
    (folder / "edge.toml").write_text(text)
    run("radfleet-edge", "init", folder)
    command: list[str | Path] = [BIN / "radfleet-edge", "run", "--only", "intake", "--config", folder / "edge.toml"]
    child = Child("intake", command, log=folder / "intake.log")
    try:
        child.wait_ready("our door", lambda: listens(tls_port if tls else port))
        yield Server(tls_port if tls else port, child.pid)
    finally:
        child.stop()


@contextmanager
def orthanc(folder: Path, tls: Certificates | None = None) -> Iterator[Server]:
    """Runs Debian's Orthanc (it fsyncs each object; its index is flushed lazily)."""
    server = start_orthanc(folder, tls=(*tls.server, tls.ca) if tls else None)
    try:
        yield Server(server.dicom_port, server.child.pid)
    finally:
        server.child.stop()


@contextmanager
def storescp(folder: Path, tls: Certificates | None = None) -> Iterator[Server]:
    """Runs DCMTK's `storescp` (a process an association, no fsync)."""
    port = free_port()
    secure = ["+tls", str(tls.server[1]), str(tls.server[0]), "+cf", str(tls.ca)] if tls else []
    command: list[str | Path] = ["storescp", "--fork", "+B", "--promiscuous", *secure, "-od", folder, str(port)]
    child = Child("storescp", command, log=folder / "storescp.log", env={"TCP_NODELAY": "1"})
    try:
        child.wait_ready("storescp", lambda: listens(port))
        yield Server(port, child.pid)
    finally:
        child.stop()


Start = Callable[[Path, Certificates | None], AbstractContextManager[Server]]
PEERS: dict[str, Start] = {"ours": our_door, "Orthanc (Debian)": orthanc, "DCMTK storescp, no fsync": storescp}


def measure() -> list[Row]:
    """Returns the rates beside both peers, peak memory, and the wait of one sender while nine others saturate."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="radfleet-bench-") as name:
        root = Path(name)
        certificates = Certificates(root / "pki")
        sources = {}
        for size, shape in SIZES.items():
            (root / size).mkdir()
            sources[size] = write_objects(root / size, *shape)
        for size, files in sources.items():
            for associations in ASSOCIATIONS:
                rows += _cell(root, f"{size}, {associations} associations, plain", files, associations)
                if size != "15 MB":
                    rows += _cell(root, f"{size}, {associations} associations, TLS", files, associations, certificates)
                    few = files[: NAGLE_OBJECTS * min(associations, 4)]
                    rows += _cell(root, f"{size}, {associations} associations, Nagle on", few, associations, nagle=True)
        rows += _fairness(root)
        rows += _memory(root, sources["33 KB"][0])
    return rows


def _cell(
    root: Path,
    what: str,
    files: Sequence[Path],
    associations: int,
    tls: Certificates | None = None,
    *,
    nagle: bool = False,
) -> list[Row]:
    options = ["+tls", str(tls.client[1]), str(tls.client[0]), "+cf", str(tls.ca)] if tls else []
    rates: dict[str, list[float]] = {name: [] for name in PEERS}
    peaks: dict[str, int] = {}
    for _ in range(RUNS):
        for name, start in PEERS.items():
            with tempfile.TemporaryDirectory(dir=root) as folder, start(Path(folder), tls) as server:
                one = rate(files, associations, server.port, "RADFLEET", nodelay=not nagle, options=options)
                rates[name].append(one)
                peaks[name] = max(peaks.get(name, 0), peak_bytes(server.pid))
    middle = {name: statistics.median(found) for name, found in rates.items()}
    ours = middle.pop("ours")
    rows = [Row(what, ours, "objects/s, durable", peer, theirs) for peer, theirs in middle.items()]
    if associations > 1 and not tls and not nagle:
        peer = "Orthanc (Debian)"
        rows.append(Row(f"{what}: peak memory", peaks["ours"] / 1e6, "MB", peer, peaks[peer] / 1e6))
    return rows


def _fairness(root: Path) -> list[Row]:
    """How long one association waits for its answers while nine others send distinct objects without a pause."""
    (root / "many").mkdir()
    files = write_objects(root / "many", 128, 128, 2000)
    waits: dict[str, list[float]] = {}
    for name in ("ours", "Orthanc (Debian)"):
        with tempfile.TemporaryDirectory(dir=root) as folder, PEERS[name](Path(folder), None) as server:
            parts = [files[200 + number :: 9] for number in range(9)]
            others = [threading.Thread(target=_send, args=(part, server.port)) for part in parts]
            for other in others:
                other.start()
            association = _association(server.port)
            waits[name] = []
            for path in files[:200]:
                begin = time.perf_counter()
                association.send_c_store(path)
                waits[name].append((time.perf_counter() - begin) * 1e3)
                if not any(other.is_alive() for other in others):
                    break
            association.release()
            for other in others:
                other.join()
    ours, theirs = (np.percentile(waits[name], (50, 99)) for name in ("ours", "Orthanc (Debian)"))
    return [
        Row(f"33 KB, one association while nine saturate, p{rank}", float(one), "ms", "Orthanc (Debian)", float(other))
        for rank, one, other in zip((50, 99), ours, theirs, strict=True)
    ]


def _send(files: Sequence[Path], port: int) -> None:
    store(files, port=port, called="RADFLEET")


def _association(port: int) -> Association:
    ae = AE(ae_title="MODALITY")
    ae.add_requested_context(CTImageStorage, ExplicitVRLittleEndian)
    association = ae.associate("127.0.0.1", port, ae_title="RADFLEET")
    association.dul.socket.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return association


def _memory(root: Path, file: Path) -> list[Row]:
    """Peak memory of our door with a hundred associations open that each stored an object."""
    with tempfile.TemporaryDirectory(dir=root) as folder, our_door(Path(folder)) as server:
        held = [_association(server.port) for _ in range(100)]
        for association in held:
            association.send_c_store(file)
        peak = peak_bytes(server.pid)
        established = sum(association.is_established for association in held)
        for association in held:
            association.abort()
    return [Row(f"peak memory with {established} associations open", peak / 1e6, "MB")]
