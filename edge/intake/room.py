"""Room: which objects may leave the spool, and the keeper that lets them go.

An object leaves when nothing is owed for it any more (edge.intake.debts) and its time is over: `full_s` after it was
stored or promised to its sender by Storage Commitment. When the spool fills above HIGH, what was never promised may
leave after `short_s`, oldest first, until LOW is reached. Everything else stays, however full the spool is: the door
refuses (association rejected as transient above FULL, 0xA700 at the limit) rather than lose what it answered for.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from itertools import islice

from msgspec import Struct

from edge.intake import index as states
from edge.intake.debts import Books
from edge.intake.release import asked, stuck
from edge.intake.services import FULL
from edge.intake.spool import Spool
from shared.clock import Clock
from shared.errors import RadfleetError
from shared.log import get_logger

HIGH, LOW = 0.80, 0.70  # of the spool's room: a warning and early leaving begin; early leaving ends
EVERY_S = 10.0
TIDY_EVERY_S = 3600.0
_REST = 20  # a step may take a twentieth of the time, so that a large index does not hold up the door
IDENTITY = "in identity conflict"
_PAGE = 400  # objects looked at together
_BATCH = 64  # files that go in one hold of the spool's lock
_ROWS_KEPT_S = 366 * 86400.0  # how long the index remembers what left


class Candidate(Struct, frozen=True):
    """One object that is kept; times are seconds since 1970."""

    digest: str
    length: int  # bytes
    stored_at: float
    promised_at: float = 0.0  # reported by Storage Commitment; 0 when nobody asked
    conflict: bool = False  # other bytes came under the same SOP Instance UID
    owed: str = ""  # why it must stay; empty when nothing is owed


class Retention(Struct, frozen=True):
    """Seconds that an object stays: normally, and at least when the spool is short of room."""

    full_s: float
    short_s: float


class Limits(Struct, frozen=True):
    """Bytes: above `high` objects leave early until `low` is reached."""

    high: float
    low: float


class Told(Struct, frozen=True):
    """What the keeper says about the room; `level` is "", "warning" or "full", `held` counts objects by what they
    wait for."""

    used_bytes: int
    capacity_bytes: int
    level: str
    held: dict[str, int]


def plan(
    objects: Iterable[Candidate], *, now: float, used: int, limits: Limits, retention: Retention
) -> Iterator[Candidate]:
    """Yields the objects that may leave, in the order given (oldest first); `used` bytes are held now."""
    short = used >= limits.high
    for one in objects:
        if one.owed:
            continue
        age = now - max(one.stored_at, one.promised_at)
        early = short and used > limits.low and not one.promised_at and not one.conflict
        if age >= retention.full_s or (early and age >= retention.short_s):
            used -= one.length
            yield one


def level(used: int, capacity: int) -> str:
    """Returns how short of room the spool is: "", "warning" or "full"."""
    if used >= FULL * capacity:
        return "full"
    return "warning" if used >= HIGH * capacity else ""


class Keeper:
    """Keeps room in the spool, in a thread of the intake process; a test calls `step` instead."""

    def __init__(self, spool: Spool, books: Books, retention: Retention, clock: Clock) -> None:
        """`books` says what is owed for an object."""
        self._spool = spool
        self._books = books
        self._retention = retention
        self._clock = clock
        self._level = ""
        self._tidy_at = 0.0
        self._told: Told | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Steps every EVERY_S seconds until `stop`."""
        self._thread = threading.Thread(target=self._run, name="intake-room", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; call it before the spool is closed."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(30.0)

    def step(self) -> int:
        """Lets go of what may leave and returns how many objects did.

        Raises:
            StateError: a database or the disk failed; nothing that is owed was touched.
        """
        now = self._clock.now().timestamp()
        used, capacity = self._spool.room()
        self._warn(used, capacity)
        limits = Limits(HIGH * capacity, LOW * capacity)
        held: dict[str, int] = {}
        objects = self._candidates(now, early=used >= limits.high, held=held)
        leaving = plan(objects, now=now, used=used, limits=limits, retention=self._retention)
        gone = self._release(now)
        while batch := [one.digest for one in islice(leaving, _BATCH)]:
            gone += self._spool.evict(batch, promised_before=now - self._retention.full_s)
        if gone:
            get_logger().info("intake.evicted", objects=gone)
        unclear = self._spool.index.rows("SELECT COUNT(*) FROM objects WHERE state = ?", states.IDENTITY_CONFLICT)[0][0]
        if unclear:
            held[IDENTITY] = unclear
        used, capacity = self._spool.room()
        self._warn(used, capacity)
        self._tell(Told(used, capacity, self._level, held), now)
        if self._clock.monotonic() >= self._tidy_at:
            self._tidy_at = self._clock.monotonic() + TIDY_EVERY_S
            self._spool.index.tidy(associations_before=now - self._retention.full_s, evicted_before=now - _ROWS_KEPT_S)
        return gone

    def _release(self, now: float) -> int:
        """Lets go of what a person asked for; only of what waits for a person, and not before a commitment is over."""
        gone = 0
        requests = asked(self._books.state)
        waiting = {one.digest for one in stuck(self._books.state)} if requests else set()
        for request in requests:
            if request.name in waiting:
                released = self._spool.evict([request.name], promised_before=now - self._retention.full_s)
                if not released:
                    continue  # committed: asked again until then
                get_logger().warning("intake.released", digest=request.name[:12])
                gone += released
            request.unlink(missing_ok=True)
        return gone

    def _candidates(self, now: float, *, early: bool, held: dict[str, int]) -> Iterator[Candidate]:
        """Yields what is old enough to be looked at, oldest first, and counts in `held` what must stay."""
        old = now - (min(self._retention.short_s, self._retention.full_s) if early else self._retention.full_s)
        at, number = float("-inf"), 0
        with self._books.opened() as owed:
            while True:
                rows = self._spool.index.rows(
                    "SELECT * FROM objects WHERE state = ? AND stored_at <= ? AND (stored_at, id) > (?, ?)"
                    " ORDER BY stored_at, id LIMIT ?",
                    *(states.KEPT, old, at, number, _PAGE),
                )
                if not rows:
                    return
                at, number = rows[-1]["stored_at"], rows[-1]["id"]
                reasons = owed(rows)
                for row in rows:
                    reason = reasons.get(row["digest"], "")
                    if reason:
                        held[reason] = held.get(reason, 0) + 1
                    yield Candidate(
                        digest=row["digest"],
                        length=row["offset"] + row["length"],
                        stored_at=row["stored_at"],
                        promised_at=row["committed_at"] or 0.0,
                        conflict=bool(row["conflict"]),
                        owed=reason,
                    )

    def _warn(self, used: int, capacity: int) -> None:
        """One line in the log for each crossing of a mark."""
        before, self._level = self._level, level(used, capacity)
        if self._level == before:
            return
        facts = {"used_bytes": used, "capacity_bytes": capacity}
        if self._level == "full":
            get_logger().error("intake.room_full", cure="See `radfleet-edge status` for what waits.", **facts)
        elif self._level:
            get_logger().warning("intake.room_short", **facts)
        else:
            get_logger().info("intake.room_enough", **facts)

    def _tell(self, told: Told, now: float) -> None:
        if told != self._told:
            self._spool.index.tell_room(told.used_bytes, told.capacity_bytes, told.level, told.held, now)
            self._told = told

    def _run(self) -> None:
        while not self._stop.is_set():
            began = self._clock.monotonic()
            try:
                self.step()
            except RadfleetError as exc:
                get_logger().error("intake.room_failed", error=exc.message)
            except Exception as exc:  # noqa: BLE001 without a keeper the spool would fill without a word
                get_logger().error("intake.room_failed", error=type(exc).__name__)
            self._stop.wait(max(EVERY_S, _REST * (self._clock.monotonic() - began)))
