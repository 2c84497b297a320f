"""Objects are opened and decoded before the main path asks for them: beside the inference, a few at a time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

from msgspec import Struct

from edge.imaging.reading import Parts, Reads
from shared.package.manifest import Head

_FRAMES = 64  # of one object that are held at most; of a longer one, each frame is decoded when it is asked for


class _Wanted(Struct, frozen=True):
    path: Path
    heads: Sequence[Head]
    parts: Future[Parts]


class Ahead:
    """One thread a reader. What is begun is bounded by who begins it."""

    def __init__(self, readers: Sequence[Reads]) -> None:
        """Takes the readers; each is used by one thread at a time."""
        self._waiting: deque[_Wanted] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [threading.Thread(target=self._live, args=(read,), daemon=True) for read in readers]
        for thread in self._threads:
            thread.start()

    def begin(self, path: Path, heads: Sequence[Head], *, urgent: bool) -> Future[Parts]:
        """Returns at once; the future is done, or has failed as `Reads` does, when the frames are there.

        What is urgent goes before everything that no reader has taken up yet.
        """
        wanted = _Wanted(path, heads, Future())
        with self._changed:
            (self._waiting.appendleft if urgent else self._waiting.append)(wanted)
            self._changed.notify()
        return wanted.parts

    def close(self) -> None:
        """Ends the threads when they have finished what they read."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()

    def _live(self, read: Reads) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                wanted = self._waiting.popleft()
            try:
                opened, frames = read(wanted.path, wanted.heads)
                held = frames if opened.image.frames > _FRAMES else iter(list(frames))
                wanted.parts.set_result((opened, held))
            except BaseException as exc:  # noqa: BLE001 whoever waits gets it
                wanted.parts.set_exception(exc)
