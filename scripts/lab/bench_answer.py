"""Stored to answered on a running node, and answers a second beside a bare loop of decode, resize, ONNX Runtime."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pydicom

from models.heads import BY_NAME
from models.package import BASELINE
from scripts.lab.cases import Case, Source, draw_cases
from scripts.lab.lone import LoneNode, lone_node
from scripts.lab.modality import store
from scripts.lab.table import Row
from shared.package.input_spec import PixelMeaning, as_tensor, to_model_input
from shared.package.manifest import MANIFEST_NAME, decode_manifest

ALONE = 60  # radiographs sent one by one
SERIES = 10
SLICES = 24
BURST = 200  # radiographs in one association
MODALITIES = {"chest-xray": "radiograph", "chest-ct": f"CT of {SLICES} slices", "brain-mri": f"MR of {SLICES} slices"}


def measure_latency() -> list[Row]:
    """Returns p50, p95, p99 from the last image stored to the answer on record, and the stages' medians."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="radfleet-bench-") as name, lone_node(Path(name)) as node:
        cases = _cases(Path(name), ALONE, SERIES)
        _warm(node, Path(name))
        for case in cases:
            sent = store(list(case.files), port=node.dicom_port, called="RADFLEET")
            assert sent.accepted == len(case.files)
            node.answers({case.study})
        found = node.answers({case.study for case in cases})
        details = {row["study"]: node.page.get(f"/api/answers/{row['answer']}") for row in found}
        model = _model_ms()
        for head, what in MODALITIES.items():
            mine = [row for row in found if row["head"] == head]
            took = np.array([(row["answered_at"] - row["stored_at"]) * 1000 for row in mine])
            for percent in (50, 95, 99):
                label = f"{what}: last image stored to answered, p{percent} of {len(took)}"
                rows.append(Row(label, float(np.percentile(took, percent)), "ms", "model alone, one image", model))
            stages: dict[str, list[float]] = {}
            for row in mine:
                for stage, value in details[row["study"]]["timings"].items():
                    stages.setdefault(stage, []).append(value)
            rows += [Row(f"{what}: stage {s}, p50", float(np.median(v)), "ms") for s, v in stages.items()]
    return rows


def measure_rate() -> list[Row]:
    """Returns answers a second when a burst arrives, beside the bare loop over the same files."""
    with tempfile.TemporaryDirectory(prefix="radfleet-bench-") as name, lone_node(Path(name)) as node:
        cases = _cases(Path(name), BURST, 0)
        _warm(node, Path(name))
        files = [case.files[0] for case in cases]
        assert store(files, port=node.dicom_port, called="RADFLEET").accepted == len(files)
        found = node.answers({case.study for case in cases})
        took = max(row["answered_at"] for row in found) - min(row["stored_at"] for row in found)
        documented = _documents_seconds(node, len(files))
        bare = _bare_loop(files)
    return [
        Row(
            "radiographs answered, sender and node on the same cores", len(files) / took, "answers/s", "bare loop", bare
        ),
        Row("reports and pictures built after the answers", len(files) / documented, "answers/s"),
    ]


def _cases(folder: Path, radiographs: int, sections: int) -> list[Case]:
    target = folder / f"cases-{radiographs}"
    target.mkdir()
    return draw_cases(
        Source(None), target, scanner="A", purpose="bench", radiographs=radiographs, sections=sections, slices=SLICES
    )


def _warm(node: LoneNode, folder: Path) -> None:
    cases = _cases(folder, 5, 0)
    again = [case.again() for case in cases]
    store([case.files[0] for case in again], port=node.dicom_port, called="RADFLEET")
    node.answers({case.study for case in again})


def _documents_seconds(node: LoneNode, count: int) -> float:
    """Returns the seconds until report and picture of the burst were built, from when the last answer was there."""
    began = time.perf_counter()
    while True:
        rows = node.page.get("/api/worklist")
        if sum(row["documents"] >= 2 for row in rows) >= count:
            return time.perf_counter() - began
        time.sleep(0.1)


def _session() -> onnxruntime.InferenceSession:
    manifest = decode_manifest((BASELINE / MANIFEST_NAME).read_bytes())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    path = BASELINE / manifest.variant("cpu-u8s8").file
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _model_ms() -> float:
    session = _session()
    image = np.random.default_rng(0).random((1, 1, 224, 224), dtype=np.float32)  # (1,1,224,224)
    times = []
    for _ in range(60):
        began = time.perf_counter()
        session.run(None, {"image": image})
        times.append(time.perf_counter() - began)
    return float(np.median(times[10:])) * 1000


def _bare_loop(files: list[Path]) -> float:
    """Returns images a second of what cannot be left out: decode, input spec, one pass."""
    session, spec = _session(), BY_NAME["chest-xray"].input
    began = time.perf_counter()
    for file in files:
        ds = pydicom.dcmread(file)
        meaning = PixelMeaning(inverted=ds.PhotometricInterpretation == "MONOCHROME1")
        image = to_model_input(ds.pixel_array, meaning, spec)  # (224,224)
        session.run(None, {"image": as_tensor(image[None])})
    return len(files) / (time.perf_counter() - began)
