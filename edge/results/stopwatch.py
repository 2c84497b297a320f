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
        self._put(stage, (now - self._last) * 1e3)
        self._last = now

    def took(self, **stages: float) -> None:
        """Ends several stages, of which another process measured the milliseconds; what is left is "handover"."""
        for stage, ms in stages.items():
            self._put(stage, ms)
        self.lap("handover")
        self.laps["handover"] = max(0.0, self.laps["handover"] - sum(stages.values()))

    def _put(self, stage: str, ms: float) -> None:
        self.laps[stage] = self.laps.get(stage, 0.0) + ms
