"""The facts of an object that rules look at, from its data set or from the beginning of its file."""

from __future__ import annotations

import math
import zlib
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, cast

from msgspec import Struct
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset

from edge.forward.rules import Facts
from edge.imaging.read import MANUFACTURER, body_part, lenient_text
from shared.errors import StateError

IMPLICIT = "1.2.840.10008.1.2"
BIG_ENDIAN = "1.2.840.10008.1.2.2"
DEFLATED = "1.2.840.10008.1.2.1.99"
HEAD_LIMIT_BYTES = 4 * 1024 * 1024  # what a rule looks at stands before this, long values aside
VALUE_LIMIT_BYTES = 64 * 1024  # longer ones are no fact
_LAST_TAG = 0x00200010  # identifiers, descriptions and body part stand up to here
_TEXT = 256  # characters of a value that patterns are compared with


def facts_of(dataset: Dataset, *, calling_ae: str, called_ae: str = "", sop_class: str = "") -> Facts:
    """Returns the facts of a data set, or of its head; what cannot be read is empty."""
    return Facts(
        modality=lenient_text(dataset, "Modality", _TEXT),
        calling_ae=calling_ae,
        called_ae=called_ae,
        sop_class=sop_class or lenient_text(dataset, "SOPClassUID", 64),
        body_part=_lenient_body_part(dataset),
        study_description=lenient_text(dataset, "StudyDescription", _TEXT),
        series_description=lenient_text(dataset, "SeriesDescription", _TEXT),
        ours=lenient_text(dataset, "Manufacturer", _TEXT) == MANUFACTURER,
    )


class FactsHead(Struct, frozen=True):
    """The elements that were read, and why not all that rules may look at; `fault` is empty when they were."""

    dataset: Dataset
    fault: str = ""


def read_facts_head(path: Path, offset: int, transfer_syntax: str, *, last_tag: int = _LAST_TAG) -> FactsHead:
    """Returns the elements of the data set at `offset` (bytes) of a file up to the study's and series' identifiers.

    Or up to another `last_tag`.

    Values longer than VALUE_LIMIT_BYTES are passed over, and at most HEAD_LIMIT_BYTES are read, so a lying length
    allocates nothing; of a deflated data set as much is inflated.

    Raises:
        StateError: the file is gone or the disk fails.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            if transfer_syntax != DEFLATED:
                return _walk(_Limited(file, path.name), transfer_syntax, last_tag)
            deflated = file.read(HEAD_LIMIT_BYTES)
    except OSError as exc:
        raise StateError(f"Cannot read {path.name}: {exc.strerror}.") from exc
    try:
        head = zlib.decompressobj(-zlib.MAX_WBITS).decompress(deflated, HEAD_LIMIT_BYTES)
    except zlib.error:
        return FactsHead(Dataset(), "it cannot be inflated")
    return _walk(_Limited(BytesIO(head), path.name), transfer_syntax, last_tag)


class _LimitError(Exception):
    """HEAD_LIMIT_BYTES were read."""


class _Limited:
    """A file of which a bounded number of bytes is read; what the disk fails with is told apart from odd bytes."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self.name = name
        self.seek = file.seek
        self.tell = file.tell
        self.left = HEAD_LIMIT_BYTES

    def read(self, size: int = -1) -> bytes:
        """As a file's own, of HEAD_LIMIT_BYTES altogether."""
        if size < 0 or size > self.left:
            raise _LimitError
        try:
            data = self._file.read(size)
        except OSError as exc:
            raise StateError(f"Cannot read {self.name}: {exc.strerror}.") from exc
        self.left -= len(data)
        return data


def _walk(file: _Limited, transfer_syntax: str, last_tag: int) -> FactsHead:
    start, at, stopped = file.tell(), 0, False

    def read(until: float) -> Dataset:
        def stop(tag: int, _vr: str | None, _length: int) -> bool:
            nonlocal at, stopped
            at = file.tell()
            stopped = tag > last_tag
            return stopped or at >= until

        file.seek(start)
        file.left = HEAD_LIMIT_BYTES
        return read_dataset(
            cast(BinaryIO, file),
            transfer_syntax == IMPLICIT,
            transfer_syntax != BIG_ENDIAN,
            stop_when=stop,
            defer_size=VALUE_LIMIT_BYTES,
        )

    fault = ""
    try:
        dataset = read(math.inf)
        if at and not stopped and not len(dataset):
            fault = "it ends inside an element"  # the library says so in a warning and gives nothing
    except StateError:
        raise
    except _LimitError:
        fault = f"its beginning is longer than {HEAD_LIMIT_BYTES} bytes"
    except Exception as exc:  # noqa: BLE001 pydicom names no family for damaged input
        fault = f"an element cannot be read ({type(exc).__name__})"
    if fault:
        with suppress(_LimitError, ValueError, LookupError, TypeError, ArithmeticError):
            dataset = read(at)  # once more, as far as the element that it met
            return FactsHead(_without_long(dataset), fault)
        return FactsHead(Dataset(), fault)
    return FactsHead(_without_long(dataset))


def _without_long(dataset: Dataset) -> Dataset:
    for tag in [one.tag for one in dataset.values() if one.value is None]:
        del dataset[tag]
    return dataset


def _lenient_body_part(dataset: Dataset) -> str:
    try:
        return body_part(dataset)[:_TEXT]
    except Exception:  # noqa: BLE001 pydicom names no family for values it cannot read
        return ""
