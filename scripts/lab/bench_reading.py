"""What it costs to open, decode and resize an object in a child process instead of here (docs/adr/0008)."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from pydicom.dataset import FileDataset
from pydicom.uid import UID, JPEG2000Lossless, JPEGLSLossless

from edge.imaging.reading import Reader, Reads, read_object
from models.package import BASELINE
from models.phantom_dicom import Subject, to_bytes, wrap_phantom
from models.phantoms import SCANNERS, draw_phantom
from scripts.lab.cases import WHEN
from scripts.lab.table import Row
from shared.package.manifest import MANIFEST_NAME, Head, decode_manifest

SIDES = 2500, 2048
RUNS = 9
STARTS = 3


def measure() -> list[Row]:
    """Returns the best of RUNS reads of each kind of object in the child beside this process, and a child's start."""
    heads = decode_manifest((BASELINE / MANIFEST_NAME).read_bytes()).heads
    rows = []
    with tempfile.TemporaryDirectory(prefix="radfleet-bench-") as name:
        folder = Path(name)
        kinds = {
            "CT slice, uncompressed": _write(folder / "ct.dcm", _phantom("chest-ct")),
            f"CR {SIDES[1]} x {SIDES[0]} 16-bit, uncompressed": _write(folder / "cr.dcm", _radiograph(None)),
            f"CR {SIDES[1]} x {SIDES[0]} 16-bit, JPEG-LS": _write(folder / "jls.dcm", _radiograph(JPEGLSLossless)),
            f"CR {SIDES[1]} x {SIDES[0]} 16-bit, JPEG 2000": _write(folder / "j2k.dcm", _radiograph(JPEG2000Lossless)),
        }
        reader = Reader()
        for kind, path in kinds.items():
            here, child = _best(read_object, path, heads), _best(reader.read, path, heads)
            rows.append(Row(f"{kind}: read in a child", child, "ms", "in this process", here))
        reader.close()
        rows.append(Row("a child's start, its first CT slice included", _start(folder / "ct.dcm", heads), "ms"))
    return rows


def _best(read: Reads, path: Path, heads: Sequence[Head]) -> float:
    took = []
    for _ in range(RUNS):
        began = time.perf_counter()
        _, frames = read(path, heads)
        list(frames)
        took.append(time.perf_counter() - began)
    return min(took) * 1e3


def _start(path: Path, heads: Sequence[Head]) -> float:
    took = []
    for _ in range(STARTS):
        began = time.perf_counter()
        reader = Reader()
        list(reader.read(path, heads)[1])
        took.append(time.perf_counter() - began)
        reader.close()
    return min(took) * 1e3


def _radiograph(syntax: UID | None) -> FileDataset:
    """A phantom of a detector's size with its noise, which is what a codec works on."""
    item = _phantom("chest-xray")
    grown = cv2.resize(item.pixel_array.astype(np.float32), SIDES[::-1], interpolation=cv2.INTER_CUBIC) * 8
    noisy = grown + np.random.default_rng(0).normal(0, 8, grown.shape)
    item.Rows, item.Columns, item.BitsAllocated, item.BitsStored, item.HighBit = *SIDES, 16, 16, 15
    item.PixelData = np.clip(noisy, 0, 65535).astype(np.uint16).tobytes()
    if syntax is not None:
        item.compress(syntax, generate_instance_uid=False)
    return item


def _phantom(head: str) -> FileDataset:
    scanner = next(iter(SCANNERS.values()))
    drawn = draw_phantom(np.random.default_rng(1), head, 1, scanner, slices=1)
    uids = iter(range(1, 100))
    subject = Subject("P1", "DOE^JANE", "19700101", "F", "A1", "STATION1")
    return wrap_phantom(drawn, subject, new_uid=lambda: f"2.25.{next(uids)}", when=WHEN)[0]


def _write(path: Path, item: FileDataset) -> Path:
    path.write_bytes(to_bytes(item))
    return path
