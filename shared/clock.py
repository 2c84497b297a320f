"""Time as an argument: every stage that needs the time takes a Clock."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """Where a stage gets its time from; tests pass one that they move by hand."""

    def now(self) -> datetime:
        """Returns the wall clock, timezone-aware UTC."""

    def monotonic(self) -> float:
        """Returns seconds that never go back; only differences mean anything."""


class SystemClock:
    """The machine's own clocks."""

    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic(self) -> float:
        return time.monotonic()
