"""An object's header, read by bounded means, and its elements in the DICOM JSON model (PS3.18 annex F).

Values longer than BULK_BYTES are neither read nor sent: they are named by a bulk data URI.
"""

from __future__ import annotations

import base64
import mmap
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, cast

import msgspec
import pydicom
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset
from pydicom.tag import BaseTag, Tag

from edge.intake.head import BIG_ENDIAN, DEFLATED, IMPLICIT
from edge.intake.walk import CutError, OddError, Walk
from edge.web.dicomweb.plain import plain
from edge.web.dicomweb.retention import Kept
from shared.errors import PeerError, StateError

# pydicom's warnings quote values, and a value may name a patient: no check that nobody acts on.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE

BULK_BYTES = 4096  # a longer value is bulk data
SEQUENCE_BYTES = 16 * 1024 * 1024  # the longest sequence that is read
INFLATED_BYTES = 256 * 1024 * 1024  # of a deflated data set; a bomb is given up here
PIXELS = (0x7FE00008, 0x7FE00009, 0x7FE00010)  # float, double float, integer pixel data

Json = dict[str, Any]
encode_json = msgspec.json.Encoder(enc_hook=str).encode  # pydicom's UIDs are a kind of text
BulkUri = Callable[[str], str]

_BINARY = frozenset({"OB", "OD", "OF", "OL", "OV", "OW", "UN", "OB or OW"})
_ENOUGH = 0x7FE00000  # the pixels' group


@contextmanager
def opened(path: Path, kept: Kept, beginning: int = 0) -> Iterator[BinaryIO]:
    """Gives the object's data set as a file that starts at 0; reads are bounded by what is there.

    With `beginning`, so many bytes of it at most (all of a deflated one), which is faster than the whole.

    Raises:
        StateError: the file is gone or cannot be read.
        PeerError: it is deflated and cannot be inflated within INFLATED_BYTES.
    """
    with ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("rb"))
            if beginning and kept.transfer_syntax != DEFLATED:
                file.seek(kept.offset)
                yield BytesIO(file.read(beginning))
                return
            view = stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError) as exc:  # ValueError: the file is empty
            raise StateError(f"Cannot read {path.name}: {type(exc).__name__}.") from exc
        if kept.transfer_syntax == DEFLATED:
            yield BytesIO(_inflated(view, kept.offset))
        else:
            yield cast(BinaryIO, _Shifted(view, kept.offset))


class Header:
    """All elements before the pixels. `pixels_at` is where the element after them starts, in bytes."""

    def __init__(self, file: BinaryIO, transfer_syntax: str, tags: list[int] | None = None) -> None:
        """Reads from the start of a data set; with `tags` these only.

        Raises:
            PeerError: the data set cannot be walked.
        """
        self.file = file
        self.implicit = transfer_syntax == IMPLICIT
        self.little = transfer_syntax != BIG_ENDIAN
        last = max(tags) if tags else _ENOUGH - 1
        wanted: list[BaseTag | int] | None = list(tags) if tags else None
        self._ask_elements(last)
        file.seek(0)
        try:
            self.dataset = read_dataset(
                file,
                self.implicit,
                self.little,
                stop_when=lambda tag, _vr, _length: int(tag) > last,
                defer_size=BULK_BYTES,
                specific_tags=wanted,
            )
        except Exception as exc:  # pydicom names no family for damaged input
            raise PeerError(f"The object's header cannot be read: {type(exc).__name__}.") from exc
        self.pixels_at = file.tell()

    def _ask_elements(self, last: int) -> None:
        """Raises PeerError when there are more elements or items than are walked in a second: pydicom builds each."""
        self.file.seek(0)
        shifted = self.file if isinstance(self.file, _Shifted) else None
        data, at = (shifted.view, shifted.start) if shifted else (self.file.read(), 0)
        try:
            for tag, *_ in Walk(data, little=self.little).elements(at, implicit=self.implicit):
                if tag > last:
                    return
        except CutError:  # a beginning was given, or the reader says it better
            return
        except OddError as exc:
            raise PeerError(f"The object's header cannot be read: {exc.message}.") from exc

    def raw(self, tag: int) -> RawDataElement | DataElement:
        """Returns an element as it was read; the value of a raw one is None where it was longer than BULK_BYTES."""
        return self.dataset.get_item(BaseTag(tag), keep_deferred=True)

    def element(self, tag: int) -> DataElement | None:
        """Returns an element with its value, None where that is bulk data; of sequences up to SEQUENCE_BYTES.

        Raises:
            PeerError: the value cannot be read.
        """
        raw = self.raw(tag)
        try:
            if isinstance(raw, RawDataElement) and raw.value is None and raw.length:
                if vr_of(raw) != "SQ" or raw.length > SEQUENCE_BYTES:
                    return None
                self.dataset[tag] = raw._replace(value=self.bytes_of(raw), VR="SQ")
            return self.dataset[tag]
        except Exception as exc:  # pydicom names no family for damaged input
            raise PeerError(f"The element {Tag(tag)} cannot be read: {type(exc).__name__}.") from exc

    def take(self, names: Iterable[str]) -> Dataset:
        """Returns some elements, by keyword, with their values however long, up to SEQUENCE_BYTES each.

        Raises:
            PeerError: a value is longer or cannot be read.
        """
        found = Dataset()
        found.set_original_encoding(self.implicit, self.little, self.dataset.original_character_set)
        for name in names:
            tag = Tag(name)
            if tag not in self.dataset:
                continue
            raw = self.raw(tag)
            if isinstance(raw, RawDataElement) and raw.value is None and raw.length:
                if raw.length > SEQUENCE_BYTES:
                    raise PeerError(f"The element {tag} has {raw.length} bytes.")
                raw = raw._replace(value=self.bytes_of(raw))
            found[tag] = raw
        try:
            found.decode()
        except Exception as exc:  # pydicom names no family for damaged input
            raise PeerError(f"The object's description cannot be read: {type(exc).__name__}.") from exc
        return found

    def bytes_of(self, raw: RawDataElement) -> bytes:
        """Reads the value of a raw element from the file."""
        self.file.seek(raw.value_tell)
        return self.file.read(raw.length)


def vr_of(raw: RawDataElement | DataElement) -> str:
    """Returns an element's value representation, by the dictionary where the file does not say; UN when unknown."""
    if raw.VR and raw.VR != "UN":
        return str(raw.VR)
    try:
        return dictionary_VR(raw.tag)
    except KeyError:
        return "UN"


def to_json(header: Header, bulk_uri: BulkUri, tags: list[int] | None = None) -> Json:
    """Returns a header in the DICOM JSON model; an element that cannot be read keeps its VR and loses its value."""
    found: Json = {}
    there = set(map(int, header.dataset.keys()))
    for tag in sorted(there if tags is None else there & set(tags)):
        if tag >> 16 == 2 or not tag & 0xFFFF:
            continue
        name = f"{tag:08X}"
        raw = header.raw(tag)
        quick = plain(raw) if isinstance(raw, RawDataElement) else None
        if quick is not None:
            found[name] = quick
            continue
        try:
            element = header.element(tag)
        except PeerError:
            found[name] = {"vr": vr_of(raw)}
            continue
        if element is None:
            found[name] = {"vr": _single(vr_of(raw)), "BulkDataURI": bulk_uri(name)}
        else:
            found[name] = element_to_json(element, bulk_uri, name)
    if "00080005" in found:
        found["00080005"] = {"vr": "CS", "Value": ["ISO_IR 192"]}  # what JSON is encoded in, whatever the file was
    return found


def element_to_json(element: DataElement, bulk_uri: BulkUri, path: str) -> Json:
    """Returns one element; `path` leads to it through sequences, for its bulk data URI (`0040A730/0/0040A160`)."""
    vr = _single(str(element.VR))
    try:
        if vr == "SQ":
            return {"vr": "SQ", "Value": [_item(item, bulk_uri, f"{path}/{i}") for i, item in enumerate(element.value)]}
        if vr in _BINARY:
            return _binary(element.value or b"", vr, bulk_uri, path)
        found: Json = element.to_json_dict(None, 0)
        values = found.get("Value")
        if values and "" in values:
            found["Value"] = [None if value == "" else value for value in values]  # PS3.18 F.2.5
        if values is not None and len(str(values)) > 16 * BULK_BYTES:
            return {"vr": vr, "BulkDataURI": bulk_uri(path)}
        return found | {"vr": vr}
    except Exception:  # noqa: BLE001 a value that is not what its VR says
        return {"vr": vr}


def identity(kept: Kept) -> Json:
    """Returns what the index itself knows of an object."""
    known = {
        "00080016": kept.sop_class,
        "00080018": kept.sop_instance,
        "0020000D": kept.study,
        "0020000E": kept.series,
    }
    return {name: {"vr": "UI", "Value": [value]} for name, value in known.items()}


def text_of(json: Json, name: str) -> str:
    """Returns the first value of an element of a DICOM JSON object as text, empty where there is none."""
    values = json.get(name, {}).get("Value") or [""]
    first = values[0]
    return str(first.get("Alphabetic", "") if isinstance(first, dict) else "" if first is None else first)


def _item(item: Dataset, bulk_uri: BulkUri, path: str) -> Json:
    found: Json = {}
    for tag in sorted(item.keys()):
        try:
            found[f"{tag:08X}"] = element_to_json(item[tag], bulk_uri, f"{path}/{tag:08X}")
        except Exception:  # noqa: BLE001 pydicom names no family for damaged input
            found[f"{tag:08X}"] = {"vr": "UN"}
    return found


def _binary(value: bytes, vr: str, bulk_uri: BulkUri, path: str) -> Json:
    if not value:
        return {"vr": vr}
    if len(value) > BULK_BYTES:
        return {"vr": vr, "BulkDataURI": bulk_uri(path)}
    return {"vr": vr, "InlineBinary": base64.b64encode(value).decode()}


def _single(vr: str) -> str:
    """The dictionary leaves some VRs open ("OB or OW"); JSON takes one."""
    return vr.rpartition(" ")[2]


def _inflated(view: mmap.mmap, offset: int) -> bytes:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        data = inflater.decompress(view[offset:], INFLATED_BYTES)
    except zlib.error as exc:
        raise PeerError("The deflated data set is damaged.") from exc
    if inflater.unconsumed_tail:
        raise PeerError(f"The data set inflates to more than {INFLATED_BYTES} bytes.")
    return data


class _Shifted:
    """A memory-mapped file seen from `start`: positions are those of the data set."""

    def __init__(self, view: mmap.mmap, start: int) -> None:
        self.view = view
        self.start = start
        view.seek(start)

    def read(self, length: int = -1) -> bytes:
        return self.view.read(None if length < 0 else length)

    def seek(self, position: int, whence: int = 0) -> int:
        if whence == 0:
            self.view.seek(position + self.start)
        elif whence == 1:
            self.view.seek(position, 1)
        else:
            self.view.seek(position, 2)
        return self.tell()

    def tell(self) -> int:
        return self.view.tell() - self.start
