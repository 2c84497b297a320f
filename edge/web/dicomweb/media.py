"""Media types: what a caller accepts (PS3.18 8.7), and multipart/related answers written piece by piece."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from msgspec import Struct

from shared.errors import PeerError

EXPLICIT = "1.2.840.10008.1.2.1"
DICOM = "application/dicom"
JSON = "application/dicom+json"
OCTETS = "application/octet-stream"
# Transfer syntaxes whose pixels are not compressed, a deflated data set's included.
NATIVE = frozenset({EXPLICIT, "1.2.840.10008.1.2", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"})
BOUNDARY = "radfleet-part"  # parts are DICOM or images: the line `--radfleet-part` at a line's start is in none
PIECE_BYTES = 128 * 1024

# The media type of a compressed frame as stored (PS3.18 table 8.7.3-5).
COMPRESSED = {
    "1.2.840.10008.1.2.4.50": "image/jpeg",
    "1.2.840.10008.1.2.4.51": "image/jpeg",
    "1.2.840.10008.1.2.4.57": "image/jpeg",
    "1.2.840.10008.1.2.4.70": "image/jpeg",
    "1.2.840.10008.1.2.4.80": "image/jls",
    "1.2.840.10008.1.2.4.81": "image/jls",
    "1.2.840.10008.1.2.4.90": "image/jp2",
    "1.2.840.10008.1.2.4.91": "image/jp2",
    "1.2.840.10008.1.2.4.110": "image/jxl",
    "1.2.840.10008.1.2.4.111": "image/jxl",
    "1.2.840.10008.1.2.4.112": "image/jxl",
    "1.2.840.10008.1.2.4.201": "image/jphc",
    "1.2.840.10008.1.2.4.202": "image/jphc",
    "1.2.840.10008.1.2.4.203": "image/jphc",
    "1.2.840.10008.1.2.5": "image/dicom-rle",
}


class NotAcceptableError(PeerError):
    """The object cannot be given in any media type that the caller accepts."""


class Accepted(Struct, frozen=True):
    """One media range of a caller; `transfer_syntax` is empty where it names none."""

    media: str
    multipart: bool
    transfer_syntax: str
    quality: float

    def fits(self, media: str) -> bool:
        """Tells whether a media type is inside the range."""
        kind = media.partition("/")[0]
        return self.media in {media, "*/*", f"{kind}/*"}


def accepted(header: str) -> list[Accepted]:
    """Returns what an Accept header wants, best first; an empty header accepts everything."""
    found = []
    for part in _split(header or "*/*", ","):
        media, *parameters = (piece.strip() for piece in _split(part, ";"))
        values = {
            name.strip().lower(): value.strip().strip('"')
            for name, _, value in (piece.partition("=") for piece in parameters)
        }
        media = media.lower()
        multipart = media == "multipart/related"
        if multipart:
            media = values.get("type", "*/*").lower()
        found.append(Accepted(media, multipart, values.get("transfer-syntax", ""), _quality(values.get("q", "1"))))
    return sorted((one for one in found if one.quality > 0), key=lambda one: -one.quality)


def content_type(header: str) -> tuple[str, dict[str, str]]:
    """Returns the media type of a Content-Type header in lower case, and its parameters."""
    media, *parameters = (piece.strip() for piece in _split(header, ";"))
    pairs = (piece.partition("=") for piece in parameters)
    return media.lower(), {name.strip().lower(): value.strip().strip('"') for name, _, value in pairs}


def multipart_type(media: str) -> str:
    """Returns the Content-Type of an answer whose parts have the type `media`."""
    return f'multipart/related; type="{media}"; boundary={BOUNDARY}'


def multipart(parts: Iterable[tuple[str, Iterable[bytes]]]) -> Iterator[bytes]:
    """Gives a multipart body: for each part its Content-Type, then its pieces."""
    for kind, pieces in parts:
        yield f"--{BOUNDARY}\r\nContent-Type: {kind}\r\n\r\n".encode()
        yield from pieces
        yield b"\r\n"
    yield f"--{BOUNDARY}--\r\n".encode()


def file_pieces(path: Path, start: int = 0, length: int | None = None) -> Iterator[bytes]:
    """Gives a file, or a stretch of it, in pieces."""
    with path.open("rb") as file:
        file.seek(start)
        left = length
        while left is None or left > 0:
            piece = file.read(PIECE_BYTES if left is None else min(PIECE_BYTES, left))
            if not piece:
                return
            left = None if left is None else left - len(piece)
            yield piece


def _split(text: str, separator: str) -> list[str]:
    """Splits outside of double quotes."""
    return re.findall(rf'(?:[^{separator}"]|"[^"]*"?)+', text)[:64]


def _quality(text: str) -> float:
    try:
        return min(max(float(text), 0.0), 1.0)
    except ValueError:
        return 0.0
