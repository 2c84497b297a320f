"""The identifiers that the door needs from a data set, and whether it is whole. No pixel is looked at."""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import zlib
from pathlib import Path

import msgspec
from msgspec import Struct
from pydicom import config

from edge.intake.walk import PIXELS, CutError, OddError, Walk

IMPLICIT = "1.2.840.10008.1.2"
BIG_ENDIAN = "1.2.840.10008.1.2.2"
DEFLATED = "1.2.840.10008.1.2.1.99"

# pydicom's warnings quote values, and a value may name a patient: no check that nobody acts on.
config.settings.reading_validation_mode = config.IGNORE
config.settings.writing_validation_mode = config.IGNORE

NO_UID = "not a UID"  # stands for an identifier that is there and is none; what it says may be anything
_UID = re.compile(r"[0-9]{1,64}(\.[0-9]{1,64})+")
_WANTED = {
    0x00080016: "sop_class",
    0x00080018: "sop_instance",
    0x00080060: "modality",
    0x0020000D: "study",
    0x0020000E: "series",
}
_PATIENT_ID = 0x00100020
_TAKEN = frozenset({_PATIENT_ID, *_WANTED})
_VALUE_BYTES = 4096  # longer values are skipped, never read
_COPIED_BYTES = 256 * 1024  # up to here a copy costs less than a mapping
_INFLATED_KEPT_BYTES = 4 * 1024 * 1024  # of a deflated data set only the beginning is looked at
INFLATED_LIMIT_BYTES = 512 * 1024 * 1024  # a deflate bomb is given up here


class DatasetHead(Struct, frozen=True):
    """Identifiers, empty where absent; `fault` says why reading stopped early, if it did.

    What is there and not a UID is NO_UID as SOP class or instance, since no command can agree with it, else empty.
    """

    sop_class: str = ""
    sop_instance: str = ""
    study: str = ""
    series: str = ""
    modality: str = ""
    patient: str = ""  # SHA-256 of PatientID
    fault: str = ""
    pixels_at: int = -1  # where the pixel data's value starts in the file; -1 without pixels or when deflated


def valid_uid(text: str) -> bool:
    """Tells whether `text` can be a UID: digits and dots, at most 64 (PS3.5 9.1; leading zeros pass)."""
    return len(text) <= 64 and _UID.fullmatch(text) is not None


def read_head(path: Path, offset: int, transfer_syntax: str) -> DatasetHead:
    """Returns the head of the data set that starts at `offset` (bytes) of a file, having walked to its end.

    Values longer than 4 KiB and what sequences hold are skipped (`edge.intake.walk`). A data set that cannot be walked
    for another reason than being cut is not refused here: its head carries the fault, and imaging quarantines it.

    Raises:
        CutError: an element or a sequence reaches beyond the end, or the deflate stream has no end.
    """
    with path.open("rb") as file:
        return read_head_of(file.fileno(), offset, transfer_syntax)


def read_head_of(descriptor: int, offset: int, transfer_syntax: str) -> DatasetHead:
    """`read_head` of an open file."""
    size = os.fstat(descriptor).st_size
    if size <= offset:
        raise CutError("The data set is empty.")
    if size <= _COPIED_BYTES:
        return _head(os.pread(descriptor, size, 0), offset, transfer_syntax)
    with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as view:
        return _head(view, offset, transfer_syntax)


def _head(view: bytes | mmap.mmap, offset: int, transfer_syntax: str) -> DatasetHead:
    if transfer_syntax == DEFLATED:
        beginning, fault = _inflate(view, offset)
        head = _walk(beginning, 0, transfer_syntax, whole=False)
        return msgspec.structs.replace(head, fault=fault or head.fault)
    return _walk(view, offset, transfer_syntax, whole=True)


def _walk(data: bytes | mmap.mmap, offset: int, transfer_syntax: str, *, whole: bool) -> DatasetHead:
    """`whole` tells whether the data set must end where `data` does; otherwise it is only its beginning."""
    found: dict[str, str] = {}
    fault, last, pixels_at = "", offset, -1
    elements = Walk(data, little=transfer_syntax != BIG_ENDIAN).elements(offset, implicit=transfer_syntax == IMPLICIT)
    try:
        for tag, value_at, value_end, end in elements:
            last = end
            if tag in PIXELS and whole:
                pixels_at = value_at
            elif tag in _TAKEN and value_end - value_at <= _VALUE_BYTES:
                _take(tag, data[value_at:value_end], found)
        if whole:
            fault = _leftover(data[last : last + 8], len(data) - last)
    except CutError:
        if whole:
            raise
    except OddError as exc:
        fault = exc.message
    for name in ("sop_class", "sop_instance", "study", "series"):
        if not valid_uid(found.get(name, "")):
            found[name] = NO_UID if found.get(name) and name.startswith("sop_") else ""
    return DatasetHead(**found, fault=fault, pixels_at=pixels_at)


def same_pixels(one: Path, one_offset: int, two: Path, two_offset: int, transfer_syntax: str) -> bool:
    """Tells whether two data sets of one transfer syntax hold the same pixel data, byte for byte, or both hold none.

    True as well where that cannot be told (a deflated or damaged data set): nobody is accused without a proof.
    """
    try:
        digests = {
            _pixel_digest(path, offset, transfer_syntax) for path, offset in ((one, one_offset), (two, two_offset))
        }
    except (CutError, OSError):
        return True
    return len(digests) == 1


def _pixel_digest(path: Path, offset: int, transfer_syntax: str) -> str:
    head = read_head(path, offset, transfer_syntax)
    if head.pixels_at < 0:
        return ""
    with path.open("rb") as file:
        file.seek(head.pixels_at)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _take(tag: int, value: bytes, found: dict[str, str]) -> None:
    if tag == _PATIENT_ID:
        patient = value.strip(b" \0")
        found["patient"] = hashlib.sha256(patient).hexdigest() if patient else ""
    else:
        found[_WANTED[tag]] = _text(value)


def _leftover(beginning: bytes, rest: int) -> str:
    if rest >= 8:
        return f"{rest} bytes follow what looked like the end of the data set"
    if beginning.strip(b"\0"):  # a lone pad byte is tolerated
        raise CutError(f"The data set ends inside an element: {rest} bytes of it are there.")
    return ""


def _text(value: bytes) -> str:
    return value.decode("ascii", "replace").strip(" \0")[:65]  # one more than a UID may have: none is cut to be one


def _inflate(view: bytes | mmap.mmap, offset: int) -> tuple[bytes, str]:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    kept = bytearray()
    total, position, pending = 0, offset, b""
    while not inflater.eof:
        if not pending:
            pending = view[position : position + 65536]
            position += len(pending)
            if not pending:
                raise CutError("The deflated data set has no end.")
        try:
            out = inflater.decompress(pending, 1024 * 1024)
        except zlib.error as exc:
            raise CutError(f"The deflated data set is damaged: {exc}.") from exc
        pending = inflater.unconsumed_tail
        total += len(out)
        kept += out[: max(0, _INFLATED_KEPT_BYTES - len(kept))]
        if total > INFLATED_LIMIT_BYTES:
            return bytes(kept), f"the data set inflates to more than {INFLATED_LIMIT_BYTES} bytes"
    return bytes(kept), ""
