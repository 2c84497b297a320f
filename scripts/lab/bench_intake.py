"""C-STORE: objects a second that are durable when answered, beside Orthanc and DCMTK's `storescp` in the same run."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from scripts.lab.child import Child, free_port, listens
from scripts.lab.fleet import BIN, run
from scripts.lab.modality import store
from scripts.lab.parts import start_orthanc
from scripts.lab.table import Row

SIZES = {"33 KB": (128, 128, 300), "0.5 MB": (512, 512, 120)}  # rows, columns, objects
ASSOCIATIONS = (1, 4)


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


def rate(files: list[Path], associations: int, port: int, called: str) -> float:
    """Returns objects a second over all associations; raises when the receiver did not accept every one."""
    parts = [files[i::associations] for i in range(associations)]
    start = time.perf_counter()
    with ThreadPoolExecutor(associations) as pool:
        sent = list(pool.map(lambda part: store(part, port=port, called=called), parts))
    seconds = time.perf_counter() - start
    if sum(s.accepted for s in sent) != len(files):
        raise RuntimeError(f"{called} accepted {sum(s.accepted for s in sent)} of {len(files)} objects.")
    return len(files) / seconds


@contextmanager
def our_door(folder: Path) -> Iterator[int]:
    """Runs the intake process of a node that nobody enrolled and yields its port."""
    port = free_port()
    (folder / "edge.toml").write_text(
        f'[node]\nstate = "state"\n[dicom]\nae_title = "RADFLEET"\nhost = "127.0.0.1"\nport = {port}\n'
        'allow = [{ae_title = "MODALITY"}]\n'
    )
    run("radfleet-edge", "init", folder)
    command = [BIN / "radfleet-edge", "run", "--only", "intake", "--config", folder / "edge.toml"]
    child = Child("intake", command, log=folder / "intake.log")
    try:
        child.wait_ready("our door", lambda: listens(port))
        yield port
    finally:
        child.stop()


@contextmanager
def orthanc(folder: Path) -> Iterator[int]:
    """Runs Debian's Orthanc (it fsyncs each object; its index is flushed lazily) and yields its port."""
    server = start_orthanc(folder)
    try:
        yield server.dicom_port
    finally:
        server.child.stop()


@contextmanager
def storescp(folder: Path) -> Iterator[int]:
    """Runs DCMTK's `storescp` (a process an association, no fsync) and yields its port."""
    port = free_port()
    command = ["storescp", "--fork", "+B", "--promiscuous", "-od", folder, str(port)]
    child = Child("storescp", command, log=folder / "storescp.log", env={"TCP_NODELAY": "1"})
    try:
        child.wait_ready("storescp", lambda: listens(port))
        yield port
    finally:
        child.stop()


def measure() -> list[Row]:
    """Returns one row a size and number of associations for each peer."""
    rows = []
    peers: dict[str, Callable[[Path], object]] = {"Orthanc (Debian)": orthanc, "DCMTK storescp, no fsync": storescp}
    with tempfile.TemporaryDirectory(prefix="radfleet-bench-") as name:
        root = Path(name)
        for size, (height, width, count) in SIZES.items():
            source = root / size.replace(" ", "")
            source.mkdir()
            files = write_objects(source, height, width, count)
            for associations in ASSOCIATIONS:
                ours = _fresh(root, our_door, files, associations)
                for peer, start in peers.items():
                    theirs = _fresh(root, start, files, associations)
                    what = f"C-STORE {size}, {associations} associations, TCP_NODELAY"
                    rows.append(Row(what, ours, "objects/s, fsynced", peer, theirs))
    return rows


def _fresh(root: Path, start: Callable[[Path], object], files: list[Path], associations: int) -> float:
    """Returns the median of three runs, each against a receiver with an empty store."""
    rates = []
    for _ in range(3):
        with tempfile.TemporaryDirectory(dir=root) as folder, start(Path(folder)) as port:  # type: ignore[attr-defined]
            rates.append(rate(files, associations, port, "RADFLEET"))
    return sorted(rates)[1]
