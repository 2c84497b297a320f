"""From any transfer syntax that pydicom can decode to little endian, for peers that take nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.filewriter import dcmwrite
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from edge.imaging.cell import Cells, Limits
from edge.imaging.read import DECODED_LIMIT_BYTES, ask_streams, open_object
from shared.errors import PeerError

# Bytes of one word where a value is kept as bytes (PS3.5 6.2, PS3.5 7.3): these pydicom does not turn itself.
_WORD = {"OW": 2, "OF": 4, "OL": 4, "OD": 8, "OV": 8}


def to_little_endian(path: Path, target: Path, *, implicit: bool) -> None:
    """Writes an object to `target` with its pixels uncompressed and the same SOP Instance UID, in a child process.

    Raises:
        PeerError: it cannot be decoded, or would be larger than DECODED_LIMIT_BYTES.
        StateError: the file is gone.
    """
    _CELLS.ask(msgspec.msgpack.encode(_Asked(str(path), str(target), implicit)))


class _Asked(Struct, frozen=True):
    path: str
    target: str
    implicit: bool


def _work(request: bytes) -> Iterator[bytes]:
    asked = msgspec.msgpack.decode(request, type=_Asked)
    _transcode(Path(asked.path), Path(asked.target), implicit=asked.implicit)
    yield b""


_CELLS = Cells(_work, 1, Limits(cpu_s=300, wall_s=1200.0, memory_bytes=4 * 1024**3))  # all frames of an object at once


def _transcode(path: Path, target: Path, *, implicit: bool) -> None:
    dataset = open_object(path)
    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        if syntax.is_compressed and not syntax.is_deflated:
            _ask_size(dataset)
            dataset.decompress(as_rgb=True, generate_instance_uid=False)
        elif syntax == ExplicitVRBigEndian:
            for element in _walk(dataset):
                _turn(element, dataset)
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
        dcmwrite(target, dataset, implicit_vr=implicit, little_endian=True, enforce_file_format=True)
    except PeerError:
        raise
    except Exception as exc:  # pydicom and the codecs name no family
        raise PeerError(f"{type(exc).__name__}.") from exc


def _ask_size(dataset: Dataset) -> None:
    """Refuses before a decoder allocates."""
    wanted = [dataset.get(name) for name in ("Rows", "Columns", "BitsAllocated")]
    rows, columns, bits = (int(one or 0) for one in wanted)
    if bits % 8:
        raise PeerError(f"{bits} bits allocated are not supported.")
    frames, samples = int(dataset.get("NumberOfFrames") or 1), int(dataset.get("SamplesPerPixel") or 1)
    size = rows * columns * bits * frames * samples // 8
    if not 0 < size <= DECODED_LIMIT_BYTES:
        raise PeerError(f"the pixels would take {size} bytes, the limit is {DECODED_LIMIT_BYTES}.")
    ask_streams(dataset, rows, columns, frames)


def _walk(dataset: Dataset) -> Iterator[DataElement]:
    for element in dataset:
        if element.VR == "SQ":
            for item in element.value:
                yield from _walk(item)
        else:
            yield element


def _turn(element: DataElement, dataset: Dataset) -> None:
    value: Any = element.value
    size = _WORD.get(str(element.VR), 0)
    if size and element.keyword == "PixelData":
        size = max(
            2, int(dataset.get("BitsAllocated") or 0) // 8
        )  # pydicom takes a sample, not a word, as what is turned
    if size in (2, 4, 8) and isinstance(value, bytes) and len(value) >= size:
        whole = len(value) // size * size
        element.value = np.frombuffer(value[:whole], f">u{size}").byteswap().tobytes()
