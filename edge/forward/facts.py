"""The facts of an object that rules look at, from its data set or from the beginning of its file."""

from __future__ import annotations

import zlib
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, cast

from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset

from edge.forward.rules import Facts
from edge.imaging.read import body_part, lenient_text
from shared.errors import PeerError, StateError

MANUFACTURER = "Radfleet"  # as edge.results.report writes it; a test holds that they are the same
IMPLICIT = "1.2.840.10008.1.2"
BIG_ENDIAN = "1.2.840.10008.1.2.2"
DEFLATED = "1.2.840.10008.1.2.1.99"
HEAD_LIMIT_BYTES = 4 * 1024 * 1024  # what a rule looks at stands before this
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


def read_facts_head(path: Path, offset: int, transfer_syntax: str) -> Dataset:
    """Returns the elements of the data set at `offset` (bytes) of a file up to the study's and series' identifiers.

    At most HEAD_LIMIT_BYTES are read, so a lying length allocates nothing; of a deflated data set as much is inflated.

    Raises:
        PeerError: the beginning cannot be walked.
        StateError: the file is gone or the disk fails.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            head = file.read(HEAD_LIMIT_BYTES)
    except OSError as exc:
        raise StateError(f"Cannot read {path.name}: {exc.strerror}.") from exc
    try:
        if transfer_syntax == DEFLATED:
            head = zlib.decompressobj(-zlib.MAX_WBITS).decompress(head, HEAD_LIMIT_BYTES)
        return read_dataset(
            cast(BinaryIO, BytesIO(head)),
            transfer_syntax == IMPLICIT,
            transfer_syntax != BIG_ENDIAN,
            stop_when=lambda tag, _vr, _length: tag > _LAST_TAG,
        )
    except Exception as exc:  # pydicom names no family for damaged input
        raise PeerError(f"The beginning of the data set cannot be read: {type(exc).__name__}.") from exc


def _lenient_body_part(dataset: Dataset) -> str:
    try:
        return body_part(dataset)[:_TEXT]
    except Exception:  # noqa: BLE001 pydicom names no family for values it cannot read
        return ""
