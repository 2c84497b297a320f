"""The forward process: follows what intake stores, sends it on, fetches what rules ask for, and takes requests."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Protocol

from edge.forward.fetch import Fetcher
from edge.forward.follow import Follower
from edge.forward.queue import Queue
from edge.forward.reading import Requests
from edge.forward.sender import Sender
from shared.errors import RadfleetError
from shared.log import get_logger

_LOOK_S = 0.5  # intake nudges the pipeline, not us


class Ear(Protocol):
    """Who wakes the process (edge.nudge.Ear)."""

    def wait(self, seconds: float) -> bool:
        """Returns True as soon as a nudge came, False after `seconds`."""


class Forward:
    """The parts of the process; `run` is its main thread."""

    def __init__(
        self,
        queue: Queue,
        follower: Follower,
        senders: Mapping[str, Sender],
        fetchers: Sequence[Fetcher],
        requests: Requests,
    ) -> None:
        self._queue = queue
        self._follower = follower
        self._senders = senders
        self._fetchers = fetchers
        self._requests = requests

    def run(self, ear: Ear, stop: threading.Event) -> None:
        """Works until `stop`; what is queued stays queued."""
        parts: list[Sender | Fetcher] = [*self._senders.values(), *self._fetchers]
        for part in parts:
            part.start()
        while not stop.is_set():
            if not self.step():
                ear.wait(_LOOK_S)
        for part in parts:
            part.stop()

    def step(self) -> bool:
        """Takes requests and routes a few new objects; False when there was nothing to do."""
        worked = False
        try:
            for request in self._requests.take():
                change = self._queue.retry if request.action == "retry" else self._queue.drop
                count = change(request.ids, request.destination)
                get_logger().info(f"forward.{request.action}", by=request.by, name=request.destination, objects=count)
                self._wake(at_once=True)
                worked = True
            if self._follower.step():
                self._wake()
                worked = True
        except RadfleetError as exc:
            get_logger().error("forward.failed", error=exc.message)
        return worked

    def _wake(self, *, at_once: bool = False) -> None:
        for sender in self._senders.values():
            sender.wake(at_once=at_once)
