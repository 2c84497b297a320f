"""Frames, pictures and whole objects decoded in child processes: a damaged object ends no page (edge.imaging.cell)."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import msgspec
import numpy as np
import pydicom
from msgspec import Struct
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from edge.imaging.cell import Cells, Limits
from edge.intake.head import BIG_ENDIAN
from edge.web.dicomweb.elements import Header, opened
from edge.web.dicomweb.frames import NoFrameError, Pixels, UndecodableError
from edge.web.dicomweb.media import NATIVE
from edge.web.dicomweb.picture import Picture, render
from edge.web.dicomweb.retention import Kept
from shared.errors import PeerError
from shared.files import read_limited

TRANSCODED_BYTES = 256 * 1024 * 1024  # objects that are larger, or decode to more, are given as stored or not at all
_AT_ONCE = 2  # children: a picture takes several times its frame
_LIMITS = Limits(cpu_s=10, memory_bytes=2 * 1024**3, reply_bytes=TRANSCODED_BYTES + 64 * 1024**2)
_UNDECODABLE, _DONE = b"u", b"d"  # how a reply begins


class UnconvertibleError(PeerError):
    """The object cannot be brought into explicit VR little endian here."""


class _Asked(Struct, frozen=True):
    path: str
    kept: Kept
    number: int = 0  # of a frame; 0: the whole object
    picture: Picture | None = None


def frame(path: Path, kept: Kept, number: int) -> bytes:
    """Returns a frame as explicit VR little endian holds it.

    Raises:
        UndecodableError: it cannot be decoded.
    """
    try:
        return _ask(_Asked(str(path), kept, number))
    except UndecodableError:
        raise
    except PeerError as exc:
        raise UndecodableError(exc.message, cure="Ask for it as it is stored.") from exc


def picture(path: Path, kept: Kept, number: int, wanted: Picture) -> bytes:
    """Returns a frame as JPEG or PNG; raises as `edge.web.dicomweb.picture.render` does."""
    return _ask(_Asked(str(path), kept, number, wanted))


def explicit(path: Path, kept: Kept) -> bytes:
    """Returns an object as a Part 10 file in explicit VR little endian.

    Raises:
        UnconvertibleError: that cannot be done here.
    """
    decoded = _decoded_bytes(path, kept)
    if decoded > TRANSCODED_BYTES:
        raise UnconvertibleError(f"Decoded, the object has {decoded} bytes.")
    try:
        return _ask(_Asked(str(path), kept))
    except PeerError as exc:
        raise UnconvertibleError(exc.message) from exc


def _ask(asked: _Asked) -> bytes:
    reply = b"".join(_CELLS.ask(msgspec.msgpack.encode(asked)))
    if reply.startswith(_UNDECODABLE):
        raise UndecodableError(reply[1:].decode("utf-8", "replace"), cure="Ask for it as it is stored.")
    return reply[1:]


def _work(request: bytes) -> Iterator[bytes]:
    asked = _ASKED.decode(request)
    path, kept = Path(asked.path), asked.kept
    try:
        if not asked.number:
            data = _explicit(path, kept)
        else:
            with opened(path, kept) as file:
                pixels = Pixels(Header(file, kept.transfer_syntax), kept.transfer_syntax)
                wanted = asked.picture
                data = render(pixels, asked.number, wanted) if wanted else pixels.decoded(asked.number)
    except UndecodableError as exc:
        yield _UNDECODABLE + exc.message.encode()
        return
    yield _DONE + data


_ASKED = msgspec.msgpack.Decoder(_Asked)
_CELLS = Cells(_work, _AT_ONCE, _LIMITS)


def _decoded_bytes(path: Path, kept: Kept) -> int:
    try:
        with opened(path, kept) as file:
            pixels = Pixels(Header(file, kept.transfer_syntax), kept.transfer_syntax)
            return pixels.frame_bits // 8 * pixels.frames
    except NoFrameError:
        return 0
    except PeerError as exc:
        raise UnconvertibleError(exc.message) from exc


def _explicit(path: Path, kept: Kept) -> bytes:
    decoded = _decoded_bytes(path, kept)
    data = read_limited(path, TRANSCODED_BYTES)
    try:
        dataset = pydicom.dcmread(BytesIO(data))
        if kept.transfer_syntax not in NATIVE and decoded:
            dataset.decompress(generate_instance_uid=False)
        elif kept.transfer_syntax == BIG_ENDIAN:
            _swap(dataset)
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        out = BytesIO()
        dataset.save_as(out, implicit_vr=False, little_endian=True)
        return out.getvalue()
    except Exception as exc:  # pydicom and the codecs name no family
        raise UnconvertibleError(f"The object cannot be converted: {type(exc).__name__}.") from exc


def _swap(dataset: Dataset) -> None:
    """Pixels keep their order when pydicom writes another one."""
    if "PixelData" in dataset and int(dataset.BitsAllocated) == 16:
        dataset.PixelData = np.frombuffer(dataset.PixelData, ">u2").astype("<u2").tobytes()
