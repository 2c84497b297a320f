"""One compressed frame without what is no picture: comments, application data, and whatever follows its end.

Walked without decoding: JPEG and JPEG-LS (ISO/IEC 10918-1, 14495-1), JPEG 2000 with its high-throughput form
(15444-1, 15444-15), and RLE (PS3.5 Annex G). What a decoder reads stays byte for byte.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from msgspec import Struct
from pydicom import uid
from pydicom.uid import UID

from shared.errors import PeerError

_JPEG = [f"1.2.840.10008.1.2.4.{process}" for process in (*range(50, 67), 70)]  # retired processes included
_ENTROPY_END = re.compile(
    rb"\xff[\x80-\xcf\xd8-\xfe]"
)  # in JPEG-LS 00 to 7F follow FF, in JPEG only 00; D0 to D7 restart
_JPEG_FRAMES = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
_JPEG_KEPT = _JPEG_FRAMES | {0xC4, 0xCC, 0xDA, 0xDB, 0xDC, 0xDD, 0xF8}
_JPEG_DROPPED = {*range(0xE0, 0xF0), 0xFE}
_WRAPPER_BYTES = 4096  # a JP2 file around a JPEG 2000 stream tells before this where it begins
_J2K_MAIN = {0x50, 0x51, 0x52, 0x53, 0x55, 0x56, 0x57, 0x58, 0x59, 0x5C, 0x5D, 0x5E, 0x5F, 0x60, 0x61, 0x63}


class Stream(Struct, frozen=True):
    """A frame's `data` and the part of it that is `header`: tables and parameters, no pixels."""

    data: bytes
    header: bytes


def clean_frame(syntax: UID, frame: bytes, pixels: int, planes: int) -> Stream:
    """Returns a frame without comments, application data that no decoder needs, and what follows its end.

    Args:
        syntax: an encapsulated transfer syntax.
        frame: all fragments of one frame.
        pixels: bytes of one plane, Rows times Columns, an eighth of it for single bits.
        planes: of bytes, Samples per Pixel times Bits Allocated / 8.

    Raises:
        PeerError: of a form that is not walked here, or broken.
    """
    walk = _WALKS.get(syntax)
    if walk is None:
        raise PeerError("The pixels are compressed in a form that is not looked into.")
    try:
        return walk(frame, pixels, planes)
    except IndexError as exc:
        raise PeerError("The compressed pixels end before they should.") from exc


def sides(frame: bytes) -> tuple[int, int] | None:
    """Returns rows and columns that a JPEG, JPEG-LS or JPEG 2000 stream itself tells; None where it does not."""
    start = frame.find(b"\xff\x4f\xff\x51", 0, _WRAPPER_BYTES)
    if start >= 0:
        right, low, left, top = (int.from_bytes(frame[at : at + 4], "big") for at in range(start + 8, start + 24, 4))
        return low - top, right - left
    at = 2
    while frame[:2] == b"\xff\xd8" and at + 9 <= len(frame) and frame[at] == 0xFF:
        kind, length = frame[at + 1], int.from_bytes(frame[at + 2 : at + 4], "big")
        if kind in _JPEG_FRAMES:
            rows, columns = (int.from_bytes(frame[place : place + 2], "big") for place in (at + 5, at + 7))
            return (rows, columns) if rows else None  # told at the end of the first scan
        at += 1 if kind == 0xFF else 2 + length
    return None


def _jpeg(frame: bytes, _pixels: int, _planes: int) -> Stream:
    if frame[:2] != b"\xff\xd8":
        raise PeerError("The compressed pixels do not start as their transfer syntax asks.")
    out, header = [b"\xff\xd8"], []
    at, frames = 2, 0
    while at < len(frame):
        if frame[at] != 0xFF:
            raise PeerError("The compressed pixels have bytes between their parts.")
        kind = frame[at + 1]
        if kind == 0xFF:  # a fill byte
            at += 1
            continue
        if kind == 0xD9:
            out.append(b"\xff\xd9")
            break
        end = at + 2 + _number(frame, at + 2)
        segment = frame[at:end]
        if kind in _JPEG_KEPT or _needed(segment):
            out.append(segment)
            header.append(segment)
        elif kind not in _JPEG_DROPPED:
            raise PeerError("The compressed pixels have a part that no standard knows.")
        frames += kind in _JPEG_FRAMES
        at = end
        if kind == 0xDA:
            found = _ENTROPY_END.search(frame, at)
            end = found.start() if found else len(frame)
            out.append(frame[at:end])
            at = end
    if frames != 1:
        raise PeerError("The compressed pixels hold more or less than one picture.")
    return Stream(b"".join(out), b"".join(header))


def _needed(segment: bytes) -> bool:
    """Application data that decoders go by: JFIF without a thumbnail, Adobe's and HP's colour transforms."""
    kind, length, body = segment[1], len(segment), segment[4:]
    return (
        (kind == 0xE0 and body.startswith(b"JFIF\0") and length == 18)
        or (kind == 0xEE and body.startswith(b"Adobe") and length == 16)
        or (kind == 0xE8 and body.startswith(b"mrfx") and length == 9)
    )


def _j2k(frame: bytes, _pixels: int, _planes: int) -> Stream:
    if frame[:4] != b"\xff\x4f\xff\x51":
        raise PeerError("The compressed pixels do not start as their transfer syntax asks.")
    out, at = [b"\xff\x4f"], 2
    while frame[at : at + 2] != b"\xff\x90":
        kind, end = frame[at + 1], at + 2 + _number(frame, at + 2)
        if frame[at] != 0xFF or not (kind in _J2K_MAIN or kind == 0x64):
            raise PeerError("The compressed pixels have a part that no standard knows.")
        if kind != 0x64:
            out.append(frame[at:end])
        at = end
    header = b"".join(out)
    while frame[at : at + 2] == b"\xff\x90":
        length = int.from_bytes(frame[at + 6 : at + 10], "big") or max(frame.rfind(b"\xff\xd9"), at + 12) - at
        inside = at + 12
        while frame[inside : inside + 2] != b"\xff\x93":
            if frame[inside] != 0xFF or frame[inside + 1] not in _J2K_MAIN:
                raise PeerError("The compressed pixels have a comment inside of a tile.")
            inside += 2 + _number(frame, inside + 2)
        out.append(frame[at : at + length])
        at += max(length, 14)
    if frame[at : at + 2] not in (b"\xff\xd9", b""):
        raise PeerError("The compressed pixels have bytes between their parts.")
    out.append(frame[at : at + 2])
    return Stream(b"".join(out), header)


def _rle(frame: bytes, pixels: int, planes: int) -> Stream:
    """Every segment ends where its last pixel does, but for one byte that makes it even."""
    numbers = [int.from_bytes(frame[at : at + 4], "little") for at in range(0, 64, 4)]
    count, starts = numbers[0], numbers[1:]
    if count != planes or starts[0] != 64 or any(starts[count:]):
        raise PeerError("The compressed pixels do not start as their transfer syntax asks.")
    at = 64
    for index in range(count):
        if starts[index] not in (at, at + 1):
            raise PeerError("The compressed pixels have bytes between their parts.")
        if starts[index] != at and frame[at]:
            raise PeerError("The compressed pixels have bytes between their parts.")
        at, left = starts[index], pixels
        while left > 0:
            byte = frame[at]
            at, left = (at + 2 + byte, left - byte - 1) if byte < 128 else (at + 2, left - 257 + byte)
            if byte == 128:
                at, left = at - 1, left + 129
    if at > len(frame):
        raise PeerError("The compressed pixels end before they should.")
    return Stream(frame[:at] + b"\0" * (at % 2), b"")


def _number(frame: bytes, at: int) -> int:
    """The length that a segment says, itself included."""
    length = frame[at] << 8 | frame[at + 1]
    if length < 2 or at + length > len(frame):
        raise IndexError
    return length


_WALKS: dict[str, Callable[[bytes, int, int], Stream]] = {
    **dict.fromkeys((*_JPEG, *uid.JPEGLSTransferSyntaxes), _jpeg),
    **dict.fromkeys((*uid.JPEG2000TransferSyntaxes, uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K), _j2k),
    uid.RLELossless: _rle,
}
