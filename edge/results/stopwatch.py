"""Milliseconds by stage of one unit of work."""

from __future__ import annotations

from shared.clock import Clock


class Stopwatch:
    """`lap(stage)` adds the time since the last lap to the stage; `laps` holds milliseconds."""

    def __init__(self, clock: Clock, *, wait_ms: float) -> None:
        self._clock = clock
        self._last = clock.monotonic()
        self.laps: dict[str, float] = {"wait": max(0.0, wait_ms)}

    def lap(self, stage: str) -> None:
        """Ends a stage."""
        now = self._clock.monotonic()
        self.laps[stage] = self.laps.get(stage, 0.0) + (now - self._last) * 1e3
        self._last = now
