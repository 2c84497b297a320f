"""The hot path: two Redis Streams, messages on their way up and receipts on their way down.

Redis is a conveyor, not a store: whatever it loses, the nodes' outboxes send again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import redis

from shared.errors import LinkError

UP = "radfleet:up"
DOWN = "radfleet:down"
GROUP = "radfleet"
LIMIT_ENTRIES = 2048  # of up to 256 KiB each: 512 MiB at most
CLAIM_AFTER_MS = 15_000
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Entry:
    """One payload under way; `topic` was proved by the broker's ACL."""

    id: str
    topic: str
    payload: bytes


class Stream:
    """One stream with one consumer group; `consumer` is this process's name in it.

    An entry that a consumer took and never finished (it was killed) is taken over after `claim_after_ms`.
    Every method raises LinkError when Redis is away.
    """

    def __init__(
        self,
        url: str,
        name: str,
        consumer: str,
        *,
        limit: int = LIMIT_ENTRIES,
        claim_after_ms: int = CLAIM_AFTER_MS,
    ) -> None:
        self._redis: Any = redis.Redis.from_url(url, socket_timeout=10, socket_connect_timeout=5)
        self._name = name
        self._consumer = consumer
        self._limit = limit
        self._claim_after_ms = claim_after_ms

    def push(self, topic: str, payload: bytes) -> bool:
        """Appends an entry; False, and nothing appended, when the stream is full and the caller must wait."""

        def append() -> bool:
            if self._redis.xlen(self._name) >= self._limit:
                return False
            self._redis.xadd(self._name, {"t": topic, "p": payload})
            return True

        return self._asked(append)

    def take(self, count: int, block_ms: int) -> list[Entry]:
        """Returns up to `count` entries: what others left unfinished, else new ones, waiting `block_ms`."""

        def claim_or_read() -> list[Entry]:
            _, left, _ = self._redis.xautoclaim(
                self._name, GROUP, self._consumer, self._claim_after_ms, "0-0", count=count
            )
            if left:
                return _entries(left)
            answer = self._redis.xreadgroup(
                GROUP, self._consumer, {self._name: ">"}, count=count, block=max(1, block_ms)
            )
            return _entries(answer[0][1]) if answer else []

        return self._asked(claim_or_read)

    def finish(self, ids: Sequence[str]) -> None:
        """Ends entries: acknowledged and deleted, so that the stream's length is what is still to be done."""

        def end() -> None:
            with self._redis.pipeline(transaction=True) as both:
                both.xack(self._name, GROUP, *ids)
                both.xdel(self._name, *ids)
                both.execute()

        if ids:
            self._asked(end)

    def close(self) -> None:
        self._redis.close()

    def _asked(self, question: Callable[[], _T]) -> _T:
        """Asks Redis; a Redis that was restarted empty has lost the group, which is made anew."""
        try:
            try:
                return question()
            except redis.ResponseError as exc:
                if "NOGROUP" not in str(exc):
                    raise
                self._redis.xgroup_create(self._name, GROUP, id="0", mkstream=True)
                return question()
        except redis.RedisError as exc:
            raise LinkError(f"Redis does not answer: {exc}.", cure="Start redis-server.") from exc


def _entries(raw: Sequence[tuple[bytes, Mapping[bytes, bytes]]]) -> list[Entry]:
    return [Entry(i.decode(), fields[b"t"].decode(), fields[b"p"]) for i, fields in raw if fields]
