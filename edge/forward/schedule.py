"""When to try again and when to give up: what a peer's answer to a C-STORE means, back-off, and a circuit breaker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from msgspec import Struct

BACKOFF_BASE_S = 1.0
BACKOFF_CAP_S = 600.0
DEAD_AFTER = 5  # refusals of one object by the peer
CUT_AFTER = 10  # associations that ended while one object was sent
CRASH_AFTER = 3  # times that this process ended while it transcoded one object

State = Literal["waiting", "sent", "dead"]


class Verdict(Struct, frozen=True):
    """What becomes of one queued object; `busy`: the peer as a whole has no room now."""

    state: State
    error: str = ""
    cure: str = ""
    busy: bool = False


# Status ranges of C-STORE (PS3.4 table B.2-1) and general ones (PS3.7 annex C): what the peer says, and the cure.
_MEANS: tuple[tuple[int, int, str, str], ...] = (
    (0xA900, 0xA9FF, "the data set does not match its SOP class", "Look at the object; the peer will not take it."),
    (0xC000, 0xCFFF, "it cannot understand the data set", "Look at the object and at the peer's log."),
    (0x0122, 0x0122, "it does not support this SOP class", "Allow the SOP class at the peer."),
    (0x0124, 0x0124, "we are not authorised", "Let our AE title store at the peer."),
    (0x0117, 0x0117, "the SOP Instance UID is not valid", "The sender of the object must correct it."),
    (0x0110, 0x0110, "processing failed there", "Look at the peer's log."),
)


def judge(status: int, tries: int) -> Verdict:
    """Returns what a C-STORE status means for an object that was tried `tries` times before."""
    if status in (0x0000, 0x0111) or status & 0xF000 == 0xB000:  # success, it has it already, stored with a warning
        return Verdict("sent")
    if 0xA700 <= status <= 0xA7FF:
        return Verdict("waiting", f"the peer is out of resources (0x{status:04X})", "Free room at the peer.", busy=True)
    what, cure = next(
        ((what, cure) for low, high, what, cure in _MEANS if low <= status <= high),
        ("it refuses", "Look at the peer's log."),
    )
    return Verdict("waiting" if tries + 1 < DEAD_AFTER else "dead", f"the peer says 0x{status:04X}: {what}", cure)


def delay(failures: int, random_unit: Callable[[], float]) -> float:
    """Returns seconds to wait after the n-th failure in a row: exponential, capped, full jitter."""
    return float(min(BACKOFF_CAP_S, BACKOFF_BASE_S * 2.0 ** min(failures, 20)) * random_unit())


class Breaker:
    """Keeps a peer that is away from being asked all the time; one a peer, so none waits for another's.

    `random_unit` gives numbers 0..1. Times are seconds of any clock that does not go back.
    """

    def __init__(self, random_unit: Callable[[], float]) -> None:
        self._random_unit = random_unit
        self._until = 0.0
        self.failures = 0

    def closed(self, now: float) -> bool:
        """Whether the peer may be tried now."""
        return now >= self._until

    def failed(self, now: float) -> float:
        """Notes a failure and returns the seconds until the next try."""
        self.failures += 1
        wait = delay(self.failures, self._random_unit)
        self._until = now + wait
        return wait

    def worked(self) -> None:
        """Notes that the peer answers."""
        self.failures, self._until = 0, 0.0

    def try_now(self) -> None:
        """Forgets the pause: a person asked."""
        self._until = 0.0
