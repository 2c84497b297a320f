"""The engine: answers a second beside the bare loop, last image stored to answer visible, memory, and both rates."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pydicom
from pydicom.dataset import FileDataset
from pydicom.pixels.utils import compress
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, generate_uid
from pynetdicom import AE, Association, _config

from edge.sqlite import reading
from models.heads import BY_NAME
from models.package import BASELINE, U8S8
from models.phantom_dicom import Subject, to_bytes, wrap_phantom
from models.phantoms import SCANNERS, draw_phantom
from scripts.lab import bench_variants
from scripts.lab.cases import WHEN
from scripts.lab.child import Child, free_port, listens, peak_bytes, wait_until
from scripts.lab.fleet import BIN, run
from scripts.lab.table import Row

RADIOGRAPHS = 80  # 512 x 480 phantoms of one burst
TURNS = 3  # bare loop and node take turns, so that what else runs here hits both
FULL_SIZE = 10  # radiographs of 2048 x 2500 a transfer syntax
SLICES = 300
SLICES_PER_S = 100
SERIES = 3
LONG = 2000  # slices of the series whose memory is measured
SYNTAXES = {"uncompressed": None, "JPEG 2000": JPEG2000Lossless, "JPEG-LS": JPEGLSLossless}
DOCUMENTS = 20  # answers whose reports and pictures are waited for
_LOOK_S = 0.001
_PATIENCE_S = 300
_BUILT = "answers WHERE documents != ''"
_SUBJECT = Subject("BENCH", "Phantom^Bench", "19600101", "F", "BENCH", "BENCH")


def measure() -> list[Row]:
    """Returns every figure of the engine; the machine's cores are those of `taskset`."""
    _config.STORE_SEND_CHUNKED_DATASET = True  # the sender passes the file on and parses nothing
    cores = sorted(os.sched_getaffinity(0))
    rows = bench_variants.speed()
    with tempfile.TemporaryDirectory(prefix="radfleet-bench-") as name:
        made = _Made(Path(name))
        for count in (1, 2):
            if count <= len(cores):
                rows += _rates(made, cores[:count])
        rows += _latency(made)
        rows += _memory(made)
    return rows


@dataclass
class Node:
    """Door and pipeline of a node that nobody enrolled, on some cores."""

    folder: Path
    port: int
    pipeline: Child

    def send(self, files: Sequence[Path], *, per_second: float = 0) -> None:
        """Sends the files in one association, at most so many a second; every one must be taken."""
        heads = [pydicom.dcmread(file, stop_before_pixels=True) for file in files[:1]]
        ae = AE("MODALITY")
        ae.dimse_timeout = ae.network_timeout = _PATIENCE_S
        ae.add_requested_context(heads[0].SOPClassUID, heads[0].file_meta.TransferSyntaxUID)
        association = ae.associate("127.0.0.1", self.port, ae_title="RADFLEET")
        assert association.is_established
        with _without_reactor(association):
            began = time.monotonic()
            for number, file in enumerate(files):
                if per_second:
                    time.sleep(max(0.0, began + number / per_second - time.monotonic()))
                assert association.send_c_store(file).Status == 0
        association.release()

    def visible(self, study: str) -> float:
        """Returns when the study's answer was seen in results.sqlite, seconds since 1970."""
        with reading(self.folder / "state" / "results.sqlite") as db:
            assert db is not None
            end = time.monotonic() + _PATIENCE_S
            while not db.execute("SELECT 1 FROM answers WHERE study = ?", (study,)).fetchone():
                assert time.monotonic() < end, "no answer came"
                time.sleep(_LOOK_S)
            return time.time()

    def stored(self, study: str) -> float:
        """Returns when the study's last image was durable."""
        with reading(self.folder / "state" / "intake.sqlite") as db:
            assert db is not None
            return float(db.execute("SELECT MAX(stored_at) FROM objects WHERE study = ?", (study,)).fetchone()[0])

    def count(self, question: str) -> int:
        with reading(self.folder / "state" / "results.sqlite") as db:
            return int(db.execute(f"SELECT COUNT(*) FROM {question}").fetchone()[0]) if db else 0  # noqa: S608


@contextmanager
def _without_reactor(association: Association) -> Iterator[None]:
    """Keeps pynetdicom's reactor thread at rest: when sends follow each other closely it takes their answers away."""
    checkpoint: Any = association._reactor_checkpoint
    checkpoint.clear()
    wait_until("the reactor", lambda: association._is_paused)
    checkpoint.set = lambda: None
    yield
    del checkpoint.set
    checkpoint.set()


@contextmanager
def node(folder: Path, cores: Sequence[int], *, stored: Sequence[Path] = ()) -> Iterator[Node]:
    """Runs a node; `stored` is in its spool before its pipeline starts."""
    folder.mkdir()
    port = free_port()
    (folder / "edge.toml").write_text(
        f'[dicom]\nhost = "127.0.0.1"\nport = {port}\nallow = [{{ae_title = "MODALITY"}}]\n[series]\nquiet_s = 2.0\n'
    )
    run("radfleet-edge", "init", folder)
    children: list[Child] = []

    def start(name: str) -> Child:
        command: list[str | Path] = ["taskset", "-c", ",".join(map(str, cores))]
        command += [BIN / "radfleet-edge", "run", "--only", name, "--config", folder / "edge.toml"]
        children.append(Child(name, command, log=folder / f"{name}.log"))
        return children[-1]

    try:
        start("intake").wait_ready("the door", lambda: listens(port))
        if stored:
            Node(folder, port, children[0]).send(stored)
        pipeline = start("pipeline")
        pipeline.wait_ready("the pipeline", (folder / "state" / "run" / "pipeline.json").exists, seconds=60)
        yield Node(folder, port, pipeline)
    finally:
        for child in children:
            child.stop()


def _rates(made: _Made, cores: Sequence[int]) -> list[Row]:
    """Returns both rates of a burst that waits in the spool, and the bare loop's over the same files."""
    files = [made.radiograph(number) for number in range(RADIOGRAPHS)]
    bare, answers, documents = [], [], []
    for _ in range(TURNS):
        bare.append(_bare(files, cores))
        with node(made.fresh(), cores, stored=files) as here:
            wait_until("the answers", lambda: here.count("answers") == RADIOGRAPHS, seconds=120)
            with reading(here.folder / "state" / "results.sqlite") as db:
                assert db is not None
                first, last = db.execute("SELECT MIN(answered_at), MAX(answered_at) FROM answers").fetchone()
            answers.append((RADIOGRAPHS - 1) / (last - first))
            documents.append(_documents_a_second(here))
    what = f"{len(cores)} core{'s' if len(cores) > 1 else ''}"
    middle, peer = float(np.median(answers)), float(np.median(bare))
    return [
        Row(f"{what}: radiographs that wait in the spool, answered", middle, "answers/s", "bare loop", peer),
        Row(f"{what}: reports and pictures built, nothing else to do", float(np.median(documents)), "answers/s"),
    ]


def _documents_a_second(here: Node) -> float:
    done, began = here.count(_BUILT), time.monotonic()
    wanted = min(DOCUMENTS, RADIOGRAPHS - done)
    wait_until("the documents", lambda: here.count(_BUILT) >= done + wanted, seconds=120)
    return wanted / (time.monotonic() - began)


def _latency(made: _Made) -> list[Row]:
    """Returns last image stored to answer visible, for full-size radiographs and for a CT that streams in."""
    rows: list[Row] = []
    with node(made.fresh(), sorted(os.sched_getaffinity(0))) as here:
        for name, syntax in SYNTAXES.items():
            files = [made.full_size(number, syntax) for number in range(FULL_SIZE)]
            bare = 1000 / _bare(files, sorted(os.sched_getaffinity(0)))
            took = [_one(here, [file]) for file in [made.radiograph(900 + len(rows)), *files]][1:]
            rows += _percentiles(f"CR 2048 x 2500, {name}", took, "bare loop, one image", bare)
        slices = _bare([made.section(number, "") for number in range(40)], sorted(os.sched_getaffinity(0)))
        took = []
        for study in [generate_uid() for _ in range(SERIES)]:
            took.append(_one(here, [made.section(n, study) for n in range(SLICES)], per_second=SLICES_PER_S))
        what = f"CT of {SLICES} slices, {SLICES_PER_S} a second"
        rows.append(
            Row("CT slices, bare loop", slices, "slices/s", "sent a second, door and sender beside", SLICES_PER_S)
        )
        rows += _percentiles(what, took, "bare slice + 150 ms", 1000 / slices + 150)
    return rows


def _one(here: Node, files: Sequence[Path], *, per_second: float = 0) -> float:
    """Returns milliseconds from the last image stored to the answer seen."""
    study = str(pydicom.dcmread(files[0], stop_before_pixels=True).StudyInstanceUID)
    here.send(files, per_second=per_second)
    seen = here.visible(study)
    return (seen - here.stored(study)) * 1000


def _memory(made: _Made) -> list[Row]:
    """Returns the pipeline's peak memory under a long series beside that under a short one."""
    peaks = {}
    with node(made.fresh(), sorted(os.sched_getaffinity(0))) as here:
        for count in (LONG // 20, LONG):
            study = generate_uid()
            here.send([made.section(n, study) for n in range(count)])
            here.visible(study)
            peaks[count] = peak_bytes(here.pipeline.pid) / 1e6
    short, long = peaks.values()
    return [Row(f"peak memory of the pipeline, {LONG} slices", long, "MB", f"{LONG // 20} slices", short)]


def _percentiles(what: str, took: Sequence[float], beside: str, value: float) -> list[Row]:
    name = f"{what}: last image stored to answer visible"
    return [
        Row(f"{name}, p{percent} of {len(took)}", float(np.percentile(took, percent)), "ms", beside, value)
        for percent in (50, 95, 99)
    ]


def _bare(files: Sequence[Path], cores: Sequence[int]) -> float:
    """Returns images a second of decode, input spec and ONNX Runtime in one loop, on these cores."""
    command = ["taskset", "-c", ",".join(map(str, cores)), sys.executable, "-m", "scripts.lab.bench_inference"]
    done = subprocess.run([*command, *map(str, files)], capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout))


def bare_loop(files: Sequence[Path]) -> float:
    """See `_bare`; in this process, the faster of one thread and one a core, none of which spins."""
    cores = len(os.sched_getaffinity(0))
    return max(_loop(files, threads) for threads in sorted({1, cores}))


def _loop(files: Sequence[Path], threads: int) -> float:
    import onnxruntime

    from shared.package.input_spec import PixelMeaning, as_tensor, to_model_input

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    path = str(BASELINE / f"{U8S8}.onnx")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    began = 0.0
    for number, file in enumerate([*files[:3], *files]):  # the first ones warm up
        if number == 3:
            began = time.perf_counter()
        ds = pydicom.dcmread(file)
        spec = BY_NAME["chest-ct" if ds.Modality == "CT" else "chest-xray"].input
        slope, intercept = float(ds.get("RescaleSlope", 1)), float(ds.get("RescaleIntercept", 0))
        meaning = PixelMeaning(slope, intercept, inverted=ds.PhotometricInterpretation == "MONOCHROME1")
        image = to_model_input(ds.pixel_array, meaning, spec)  # (224,224)
        session.run(None, {"image": as_tensor(image[None])})
    return len(files) / (time.perf_counter() - began)


class _Made:
    """The files that are sent, drawn once below a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._nodes = 0
        self._large: dict[int, FileDataset] = {}
        self._series: dict[str, str] = {}
        self._sent: dict[tuple[int, str], FileDataset] = {}
        rng = np.random.default_rng(1)
        self._small = [_phantom(rng, "chest-xray", label % 3, 1)[0] for label in range(6)]
        self._sections = _phantom(rng, "chest-ct", 1, 12)

    def fresh(self) -> Path:
        """Returns the folder of a new node."""
        self._nodes += 1
        return self._folder / f"node-{self._nodes}"

    def radiograph(self, number: int) -> Path:
        return self._write(self._small[number % len(self._small)], f"small-{number}", generate_uid())

    def full_size(self, number: int, syntax: str | None) -> Path:
        """A radiograph of 2048 x 2500 with twelve significant bits and the noise of its size."""
        if not self._large:
            for index, one in enumerate(self._small[:3]):
                grown = cv2.resize(one.pixel_array, (2048, 2500), interpolation=cv2.INTER_CUBIC).astype(np.float32)
                grown += np.random.default_rng(index).normal(0, 12, grown.shape)
                large = pydicom.dcmread(self._write(one, f"large-{index}", generate_uid()))
                large.Rows, large.Columns = grown.shape
                large.PixelData = np.clip(grown, 0, 4095).astype(np.uint16).tobytes()
                self._large[index] = large
        key = (number % 3, syntax or "plain")
        if key not in self._sent:
            item = pydicom.dcmread(self._write(self._large[key[0]], f"base-{key[0]}-{key[1]}", generate_uid()))
            if syntax:
                compress(item, syntax, generate_instance_uid=False)
            self._sent[key] = item
        return self._write(self._sent[key], f"full-{number}-{key[1]}", generate_uid())

    def section(self, number: int, study: str) -> Path:
        item = self._sections[number % len(self._sections)]
        item.InstanceNumber = number + 1
        return self._write(
            item, f"section-{number}", study or generate_uid(), series=self._series.setdefault(study, generate_uid())
        )

    def _write(self, item: FileDataset, name: str, study: str, series: str = "") -> Path:
        item.StudyInstanceUID, item.SeriesInstanceUID = study, series or generate_uid()
        item.SOPInstanceUID = item.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        path = self._folder / f"{name}.dcm"
        path.write_bytes(to_bytes(item))
        return path


def _phantom(rng: np.random.Generator, head: str, label: int, slices: int) -> list[FileDataset]:
    phantom = draw_phantom(rng, head, label, next(iter(SCANNERS.values())), slices=slices)
    modality = "CR" if head == "chest-xray" else ""
    return wrap_phantom(phantom, _SUBJECT, new_uid=generate_uid, when=WHEN, modality=modality)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(bare_loop([Path(name) for name in sys.argv[1:]])))
