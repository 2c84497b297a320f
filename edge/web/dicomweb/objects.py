"""WADO-RS (PS3.18 10.4): whole objects, metadata, bulk data, frames and pictures of what is kept."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from io import BytesIO
from itertools import chain
from pathlib import Path

from msgspec import Struct
from pydicom.dataelem import RawDataElement
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import UID

from edge.intake.head import BIG_ENDIAN, DEFLATED
from edge.web.dicomweb import decoding
from edge.web.dicomweb.decoding import TRANSCODED_BYTES, UnconvertibleError
from edge.web.dicomweb.elements import Header, encode_json, identity, opened, to_json
from edge.web.dicomweb.frames import NoFrameError, Pixels
from edge.web.dicomweb.media import (
    DICOM,
    EXPLICIT,
    NATIVE,
    OCTETS,
    PIECE_BYTES,
    Accepted,
    NotAcceptableError,
    file_pieces,
    multipart,
    multipart_type,
)
from edge.web.dicomweb.picture import Picture
from edge.web.dicomweb.retention import Kept, NotKeptError, Retention
from shared.errors import PeerError, StateError

_TRANSCODING = threading.BoundedSemaphore(1)
_UNDEFINED = 0xFFFFFFFF


class Body(Struct, frozen=True):
    """An answer's Content-Type and its pieces."""

    media: str
    pieces: Iterator[bytes]


def retrieve(retention: Retention, objects: list[Kept], wanted: list[Accepted]) -> Body:
    """Returns objects as Part 10 files: as stored, or in explicit VR little endian where the caller asks for it.

    A caller that names no transfer syntax gets explicit VR little endian (the standard's default) where the object
    can be converted, else what is stored.

    Raises:
        NotAcceptableError: nothing that the caller accepts can be given.
    """
    for one in wanted:
        single = not one.multipart and one.media == DICOM
        if not one.fits(DICOM) or (single and len(objects) > 1):
            continue
        if one.transfer_syntax == EXPLICIT and not all(_convertible(kept) for kept in objects):
            continue
        named = one.transfer_syntax not in {"", "*", EXPLICIT}
        if named and any(kept.transfer_syntax != one.transfer_syntax for kept in objects):
            continue
        parts = (_part(retention.path(kept), kept, one.transfer_syntax) for kept in objects)
        try:
            first = next(parts)  # before the answer begins, so that a fault still has a status
        except UnconvertibleError:
            continue
        if single:
            return Body(*first)
        return Body(multipart_type(DICOM), multipart(chain([first], parts)))
    raise NotAcceptableError("The objects cannot be given in a form that is accepted.", cure='Accept "*".')


def metadata(retention: Retention, objects: list[Kept], base: str) -> Iterator[bytes]:
    """Gives the DICOM JSON of objects, one by one: an array that is never in memory as a whole."""
    separator = b"["
    for kept in objects:
        path = f"{base}/studies/{kept.study}/series/{kept.series}/instances/{kept.sop_instance}"
        try:
            yield separator + _metadata_of(retention, kept, f"{path}/bulkdata")
        except (PeerError, StateError):  # one damaged object does not hide its series
            yield separator + encode_json(identity(kept))
        separator = b","
    yield b"]" if objects else b"[]"


def bulk(retention: Retention, kept: Kept, path: str, wanted: list[Accepted]) -> Body:
    """Returns one value as bytes, little endian; `path` leads to it as in the metadata's bulk data URI.

    Compressed pixel data is given as its frames, one part each.

    Raises:
        NotKeptError: there is no such value.
        NotAcceptableError: the caller accepts no octets.
    """
    one = next((one for one in wanted if one.fits(OCTETS)), None)
    if one is None:
        raise NotAcceptableError("Bulk data is given as application/octet-stream.")
    with ExitStack() as stack:
        header = Header(stack.enter_context(opened(retention.path(kept), kept)), kept.transfer_syntax)
        if path in {"7FE00008", "7FE00009", "7FE00010"}:
            pixels = Pixels(header, kept.transfer_syntax)
            if pixels.compressed:
                as_stored = Accepted(OCTETS, True, "*", 1.0)
                return frames(retention, kept, list(range(1, pixels.frames + 1)), [as_stored])
            if kept.transfer_syntax in {BIG_ENDIAN, DEFLATED}:  # rare: frame by frame, brought into order
                later = stack.pop_all()
                pieces = _closing(later, (pixels.stored(n) for n in range(1, pixels.frames + 1)))
            else:
                pieces = file_pieces(retention.path(kept), kept.offset + pixels.value_at, pixels.length)
        else:
            pieces = iter([_value_at(header, path)])
    if one.multipart or one.media == "*/*":
        return Body(multipart_type(OCTETS), multipart([(OCTETS, pieces)]))
    return Body(OCTETS, pieces)


def frames(retention: Retention, kept: Kept, numbers: list[int], wanted: list[Accepted]) -> Body:
    """Returns frames, counted from 1: as stored where the caller takes that, else decoded to little endian.

    Raises:
        NoFrameError: there are none, or not so many.
        NotAcceptableError: nothing that the caller accepts can be given.
    """
    with ExitStack() as stack:
        file = stack.enter_context(opened(retention.path(kept), kept))
        pixels = Pixels(Header(file, kept.transfer_syntax), kept.transfer_syntax)
        if not numbers or max(numbers) > pixels.frames or min(numbers) < 1:
            raise NoFrameError(f"The object has {pixels.frames} frames.")
        for one in wanted:
            single = not one.multipart and one.media != "*/*"
            kind = _frame_kind(pixels, one)
            if kind is None or (single and len(numbers) > 1):
                continue
            media, decode = kind
            away = partial(decoding.frame, retention.path(kept), kept)
            read = away if decode and pixels.compressed else pixels.stored
            syntax = EXPLICIT if decode or not pixels.compressed else kept.transfer_syntax
            first = read(numbers[0])  # before the answer begins, so that a fault still has a status
            later = stack.pop_all()
            if single:
                return Body(f"{media}; transfer-syntax={syntax}", _closing(later, iter([first])))
            parts = (
                (f"{media}; transfer-syntax={syntax}", [first if i == 0 else read(number)])
                for i, number in enumerate(numbers)
            )
            return Body(multipart_type(media), _closing(later, multipart(parts)))
    raise NotAcceptableError("The frames cannot be given in a form that is accepted.", cure='Accept "*".')


def rendered(retention: Retention, kept: Kept, number: int, picture: Picture) -> bytes:
    """Returns one frame as a picture.

    Raises:
        NoFrameError: the object has no such frame.
        PeerError: it cannot be decoded.
    """
    with opened(retention.path(kept), kept) as file:
        Pixels(Header(file, kept.transfer_syntax), kept.transfer_syntax).stored(number)  # is it there at all?
    return decoding.picture(retention.path(kept), kept, number, picture)


def _frame_kind(pixels: Pixels, one: Accepted) -> tuple[str, bool] | None:
    """Returns the media type for one media range, and whether the frame must be decoded; None when it cannot be."""
    as_stored = one.transfer_syntax == "*" or (one.transfer_syntax == pixels.transfer_syntax and pixels.compressed)
    if one.fits(OCTETS):
        if as_stored:
            return OCTETS, False
        if one.transfer_syntax in {"", EXPLICIT, "1.2.840.10008.1.2"}:
            return OCTETS, True
    if pixels.media and one.fits(pixels.media) and (as_stored or not one.transfer_syntax):
        return pixels.media, False
    return None


def _metadata_of(retention: Retention, kept: Kept, bulk_base: str) -> bytes:
    with opened(retention.path(kept), kept) as file:
        header = Header(file, kept.transfer_syntax)
        found = to_json(header, lambda path: f"{bulk_base}/{path}") | identity(kept)
        found["00083002"] = {"vr": "UI", "Value": [kept.transfer_syntax]}  # how it is stored
        try:
            pixels = Pixels(header, kept.transfer_syntax)
        except PeerError:
            return encode_json(found)
        name = f"{pixels.tag:08X}"
        vr = {"7FE00008": "OF", "7FE00009": "OD"}.get(name, "OB" if pixels.compressed or pixels.bits <= 8 else "OW")
        found[name] = {"vr": vr, "BulkDataURI": f"{bulk_base}/{name}"}
        return encode_json(found)


def _value_at(header: Header, path: str) -> bytes:
    missing = NotKeptError("The object has no such value.")
    names = path.split("/")
    try:
        tags = [int(name, 16) for name in names[0::2]]
        items = [int(name) for name in names[1::2]]
    except ValueError as exc:
        raise missing from exc
    if len(tags) != len(items) + 1 or tags[0] not in header.dataset:
        raise missing
    if len(tags) == 1:
        raw = header.raw(tags[0])
        if isinstance(raw, RawDataElement):
            return header.bytes_of(raw)
    element = header.element(tags[0])
    for item, tag in zip(items, tags[1:], strict=True):
        if (
            element is None
            or element.VR != "SQ"
            or not 0 <= item < len(element.value)
            or tag not in element.value[item]
        ):
            raise missing
        element = element.value[item][tag]
    value = element.value if element is not None else None
    return value if isinstance(value, bytes) else str(value or "").encode()


def _convertible(kept: Kept) -> bool:
    if kept.transfer_syntax == EXPLICIT:
        return True
    if kept.length > TRANSCODED_BYTES:
        return False
    if kept.transfer_syntax in NATIVE:
        return True
    try:
        return bool(get_decoder(UID(kept.transfer_syntax)).is_available)
    except NotImplementedError:
        return False


def _part(path: Path, kept: Kept, wanted: str) -> tuple[str, Iterator[bytes]]:
    syntax = kept.transfer_syntax
    if wanted in {"", EXPLICIT} and syntax != EXPLICIT and _convertible(kept):
        try:
            with _TRANSCODING:
                return f"{DICOM}; transfer-syntax={EXPLICIT}", _pieces(decoding.explicit(path, kept))
        except UnconvertibleError:
            if wanted:
                raise
    return f"{DICOM}; transfer-syntax={syntax}", file_pieces(path)


def _pieces(data: bytes) -> Iterator[bytes]:
    return iter(partial(BytesIO(data).read, PIECE_BYTES), b"")


def _closing(stack: ExitStack, pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Gives the pieces, then closes what they were read from; also when nobody wants the rest."""
    with stack:
        yield from pieces
