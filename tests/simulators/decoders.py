"""Decoders that misbehave, for `edge.imaging.cell`: `work` is what a child imports."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from shared.errors import PeerError, StateError

GIB = 1024**3


def work(request: bytes) -> Iterator[bytes]:
    """Yields twice; in between it does what the request's first word says, to the path that is the second."""
    what, _, path = request.decode().partition(" ")
    yield b"begun"
    yield _DEEDS[what](Path(path)) or b"done"


def _crash(_path: Path) -> None:
    ctypes.string_at(0)


def _crash_once(path: Path) -> None:
    if not path.exists():
        path.touch()
        ctypes.string_at(0)


def _spin(path: Path) -> None:
    _count(path)
    while True:
        pass


def _swell(path: Path) -> None:
    _count(path)
    bytearray(GIB)


def _peer(_path: Path) -> None:
    raise PeerError("The object is not to our taste.")


def _state(_path: Path) -> None:
    raise StateError("The disk is gone.")


def _defect(_path: Path) -> None:
    raise IndexError("DOE^JANE")


def _count(path: Path) -> None:
    with path.open("a") as file:
        file.write("x")


_DEEDS: dict[str, Callable[[Path], bytes | None]] = {
    "fine": lambda _path: None,
    "crash": _crash,
    "once": _crash_once,
    "spin": _spin,
    "sleep": lambda _path: time.sleep(3600),
    "swell": _swell,
    "flood": lambda _path: bytes(2_000_000),
    "peer": _peer,
    "state": _state,
    "defect": _defect,
    "exit": lambda _path: os._exit(3),
}
