"""One stored object, read as far as the model needs it: its head, which of the model's heads takes it, its frames.

`read_object` does it here; `Reader` has it done in a child that may die over it (`edge.imaging.cell`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import cv2
import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Struct
from msgspec.structs import replace

from edge.imaging.cell import Cell, Limits
from edge.imaging.read import ImageHead, Stack, decode_frames, describe, open_object, worklist_texts
from edge.imaging.route import NotAssessed, route
from edge.results.series import announcement
from shared.errors import PeerError
from shared.package.input_spec import to_model_input
from shared.package.manifest import Head

FRAMES_READ = 2048  # of one object: what all of them say is held until the last is read


class Opened(Struct, frozen=True, array_like=True):
    """What an object is, before any pixel is decoded."""

    image: ImageHead
    head: str  # name of the head that reads it, empty when none does
    reason: str  # why none does
    texts: dict[str, str]  # what the worklist shows of its study
    announced: tuple[str, int] | None  # edge.results.series.announcement
    read_ms: float


class Seen(Struct, frozen=True, array_like=True):
    """One frame as the model sees it: uint8 (height, width) of the head's input spec, row by row."""

    pixels: bytes
    stack: Stack
    decode_ms: float
    preprocess_ms: float


Parts = tuple[Opened, Iterator[Seen]]


class Reads(Protocol):
    """`read_object`, or `Reader.read`."""

    def __call__(self, path: Path, heads: Sequence[Head]) -> Parts:
        """Returns what an object is, and its frames in stored order; none when no head takes it.

        Raises:
            PeerError: it cannot be read; also while frames are taken. The reason is in the message.
            StateError: the file is gone or the disk fails.
        """


class Reader:
    """Reads objects in a child process."""

    def __init__(self, limits: Limits | None = None) -> None:
        self._cell = Cell(_work, limits)

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._cell.pid

    def read(self, path: Path, heads: Sequence[Head]) -> Parts:
        """See `Reads`."""
        slim = [replace(head, scope=None) for head in heads]  # statistics are for the answer, not for reading
        replies = self._cell.ask(msgspec.msgpack.encode(_Asked(str(path), slim)))
        try:
            opened = _OPENED.decode(next(replies))
        except (StopIteration, msgspec.MsgspecError) as exc:
            raise PeerError("Reading the object gave no answer.") from exc
        # Without a head there are no frames: the child's end of the request is waited for, or it would be cut short.
        return opened, _checked(replies) if opened.head else iter([_SEEN.decode(reply) for reply in replies])

    def close(self) -> None:
        """Ends the child."""
        self._cell.close()


def read_object(path: Path, heads: Sequence[Head]) -> Parts:
    """See `Reads`; in this process."""
    began = time.perf_counter()
    dataset = open_object(path)
    image = describe(dataset)
    found = route(heads, image)
    if not isinstance(found, NotAssessed) and image.frames > FRAMES_READ:
        found = NotAssessed(f"{image.frames} frames in one object are not assessed")
    head = None if isinstance(found, NotAssessed) or image.ours or not image.has_pixels else found
    opened = Opened(
        image=image,
        head=head.name if head else "",
        reason=found.reason if isinstance(found, NotAssessed) else "",
        texts=worklist_texts(dataset),
        announced=announcement(dataset),
        read_ms=(time.perf_counter() - began) * 1e3,
    )

    def frames() -> Iterator[Seen]:
        if head is None:
            return
        last = time.perf_counter()
        for frame in decode_frames(dataset, image):
            decoded = time.perf_counter()
            pixels = to_model_input(frame.pixels, frame.meaning, head.input)
            done = time.perf_counter()
            yield Seen(pixels.tobytes(), frame.stack, (decoded - last) * 1e3, (done - decoded) * 1e3)
            last = time.perf_counter()

    return opened, frames()


def pixels_of(seen: Seen, head: Head) -> npt.NDArray[np.uint8]:
    """Returns a frame as uint8 (H, W); PeerError when it is not of the head's size."""
    if len(seen.pixels) != head.input.height * head.input.width:
        raise PeerError("What was read has not the size that the model takes.")
    return np.frombuffer(seen.pixels, np.uint8).reshape(head.input.height, head.input.width)


def _checked(replies: Iterator[bytes]) -> Iterator[Seen]:
    for reply in replies:
        try:
            seen = _SEEN.decode(reply)
        except msgspec.MsgspecError as exc:
            raise PeerError("Reading the object gave no frame.") from exc
        yield seen


class _Asked(Struct, frozen=True, array_like=True):
    path: str
    heads: list[Head]


_ASKED = msgspec.msgpack.Decoder(_Asked)
_OPENED = msgspec.msgpack.Decoder(Opened)
_SEEN = msgspec.msgpack.Decoder(Seen)


def _work(request: bytes) -> Iterator[bytes]:
    cv2.setNumThreads(1)  # there is a process a core
    asked = _ASKED.decode(request)
    opened, frames = read_object(Path(asked.path), asked.heads)
    yield msgspec.msgpack.encode(opened)
    for seen in frames:
        yield msgspec.msgpack.encode(seen)
