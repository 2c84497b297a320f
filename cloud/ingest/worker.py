"""Opens what the door let in: check, store, decide, and only after the commit, the signed verdict.

A worker may be killed at any instruction. Before the commit nothing happened and the entry is taken again;
after it the same bytes are answered `duplicate`. So every message has its effect once.
"""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol, TypeAlias

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Connection, Engine, delete, insert, select, update
from sqlalchemy.exc import SQLAlchemyError

from cloud.ingest import assembly
from cloud.ingest.devices import Devices
from cloud.ingest.replay import use_once
from cloud.ingest.streams import Entry, Stream
from cloud.ingest.tables import messages, refusals
from cloud.objects import Objects
from shared.clock import Clock
from shared.errors import PeerError, RadfleetError, TrustError
from shared.log import get_logger
from shared.wire import topics
from shared.wire.chunks import Whole, unpack
from shared.wire.envelope import Header, Observer, SealPrivate, open_sealed, read_header
from shared.wire.identity import Identity, agree
from shared.wire.records import Receipt
from shared.wire.signed import sign_record
from shared.wire.stages import decode, stage_named
from shared.wire.topics import Topic

Handler: TypeAlias = Callable[[Connection, Header, Any], None]
"""Stores what a record means, in the transaction of its `messages` row; PeerError or TrustError refuses."""

REPORTS_KEPT = 100  # rows of `messages` a node; the report itself lives in `nodes`


class Audit(Protocol):
    """Writes one line of the audit log in the caller's transaction (cloud.access.audit.record)."""

    def __call__(self, conn: Connection, *, actor: str, action: str, subject: str, **detail: Any) -> None: ...


@dataclass(frozen=True)
class Opener:
    """What opening a message takes: our keys, and who is enrolled."""

    recipients: Sequence[SealPrivate]
    devices: Devices
    observe: Observer | None = None

    def open(self, conn: Connection, topic: Topic, whole: Whole, sealed: bytes) -> tuple[Header, bytes]:
        """Returns header and record bytes of a message whose every claim of origin agrees.

        Raises:
            PeerError: a form or limit is broken.
            TrustError: unknown or revoked device, names that differ, signature or decryption failed.
        """
        header = read_header(sealed)
        known = self.devices(conn, topic.identity)
        if not known:
            raise TrustError(f"{topic.identity.common_name} is not enrolled.")
        live = [device for device in known if not device.revoked]
        if not live:
            raise TrustError(f"Every device of {topic.identity.common_name} is revoked.")
        for device in live:
            agree(certificate=device.identity, topic=topic.identity, header=header.identity)
        if header.stage != topic.stage or header.id != whole.id:
            raise TrustError("The sealed header is of another stage or message than its topic and chunks say.")
        return open_sealed(sealed, self.recipients, [device.key for device in live], observe=self.observe)


class Worker:
    """Takes entries from `up`, answers on `down`; any number of workers may run."""

    def __init__(
        self,
        engine: Engine,
        up: Stream,
        down: Stream,
        *,
        opener: Opener,
        objects: Objects,
        handlers: Mapping[str, Handler],
        sign: Ed25519PrivateKey,
        clock: Clock,
        audit: Audit,
    ) -> None:
        self._engine = engine
        self._up = up
        self._down = down
        self._opener = opener
        self._objects = objects
        self._handlers = dict(handlers)
        self._sign = sign
        self._clock = clock
        self._audit = audit
        self._log = get_logger()
        self.counts: Counter[str] = Counter()  # verdicts since this process began

    def run(self, stop: threading.Event) -> None:
        """Works until `stop`; a Redis or database that is away is waited for."""
        while not stop.is_set():
            try:
                self.step(block_ms=500)
            except RadfleetError as exc:
                self._log.warning("worker.waiting", reason=str(exc))
                stop.wait(1.0)

    def step(self, *, block_ms: int = 0, count: int = 16) -> int:
        """Handles up to `count` entries and returns how many there were.

        Raises:
            LinkError: Redis is away; what was committed is answered when the entries are taken again.
        """
        entries = self._up.take(count, block_ms)
        for entry in entries:
            try:
                receipt, identity = self._decide(entry)
            except (RadfleetError, SQLAlchemyError) as exc:
                # Ours, not the message's: the entry stays pending and is claimed again.
                self._log.error("worker.postponed", reason=str(exc), entry=entry.id)
                continue
            except Exception:  # noqa: BLE001
                # A defect of a handler must not stop the belt: no verdict, so the node sends again.
                self._log.exception("worker.defect", entry=entry.id, topic=entry.topic)
                self.counts["defect"] += 1
                self._up.finish([entry.id])
                continue
            if receipt is not None and identity is not None:
                signed = sign_record(receipt, self._sign, "receipt")
                self._down.push(topics.down(identity, "receipt"), signed)
                self.counts[receipt.verdict] += 1
            self._up.finish([entry.id])
        return len(entries)

    def _decide(self, entry: Entry) -> tuple[Receipt | None, Identity | None]:
        """Commits what the entry means and returns the verdict to send, if there is one yet."""
        now = self._clock.now()
        try:
            topic = topics.parse(entry.topic)
            chunk = unpack(entry.payload, stage_named(topic.stage).sealed_limit)
        except PeerError as exc:
            # No message can be named, so nobody can be answered: counted and audited once.
            self._refuse_unread(entry, str(exc), now)
            return None, None
        whole, identity = chunk.whole, topic.identity
        last = chunk.index == whole.count - 1
        with self._engine.begin() as conn:
            known = self._known(conn, identity, whole, now)
            if known is not None:
                return (known if last else None), identity
            try:
                sealed = chunk.data if whole.count == 1 else assembly.collect(conn, identity, chunk, now)
                if sealed is None:
                    if not last:
                        return None, identity
                    return Receipt(whole.id, "partial", "", assembly.held(conn, identity, whole)), identity
                if whole.count == 1 and hashlib.sha256(sealed).digest() != whole.digest:
                    raise TrustError("The chunk does not have the digest it claims.")
                with conn.begin_nested():
                    self._accept(conn, topic, whole, sealed, now)
            except (PeerError, TrustError) as exc:
                return self._refuse(conn, topic, whole, exc, now), identity
            return Receipt(whole.id, "accepted", "", b""), identity

    def _known(self, conn: Connection, identity: Identity, whole: Whole, now: datetime) -> Receipt | None:
        """Returns the verdict that these very bytes got before."""
        digest = whole.digest.hex()
        accepted = conn.execute(
            select(messages.c.id).where(
                messages.c.site == identity.site,
                messages.c.node == identity.node,
                messages.c.digest == digest,
            )
        ).scalar_one_or_none()
        if accepted is not None:
            return Receipt(accepted, "duplicate", "", b"")
        this = (refusals.c.site == identity.site) & (refusals.c.node == identity.node) & (refusals.c.digest == digest)
        refused = conn.execute(select(refusals.c.id, refusals.c.reason).where(this)).first()
        if refused is None:
            return None
        conn.execute(update(refusals).where(this).values(times=refusals.c.times + 1, last_at=now))
        return Receipt(refused.id, "refused", refused.reason, b"")

    def _accept(self, conn: Connection, topic: Topic, whole: Whole, sealed: bytes, now: datetime) -> None:
        header, data = self._opener.open(conn, topic, whole, sealed)
        record = decode(data, stage_named(header.stage).record)
        use_once(conn, header)
        names = {"site": header.site, "node": header.node, "incarnation": header.incarnation}
        conn.execute(
            insert(messages).values(
                **names,
                sequence=header.sequence,
                id=header.id,
                digest=whole.digest.hex(),
                stage=header.stage,
                round=header.round,
                record="" if header.stage == "report" else self._objects.put(data),
                length=len(sealed),
                received_at=now,
            )
        )
        self._handlers[header.stage](conn, header, record)
        if header.stage == "report":
            self._forget_old_reports(conn, header)

    def _forget_old_reports(self, conn: Connection, header: Header) -> None:
        """Keeps `messages` from growing by every heartbeat; the replay window still knows their sequences."""
        end = header.sequence - REPORTS_KEPT
        conn.execute(
            delete(messages).where(
                messages.c.site == header.site,
                messages.c.node == header.node,
                messages.c.incarnation == header.incarnation,
                messages.c.sequence.between(end - 10 * REPORTS_KEPT, end),
                messages.c.stage == "report",
            )
        )

    def _refuse(self, conn: Connection, topic: Topic, whole: Whole, exc: RadfleetError, now: datetime) -> Receipt:
        """Records why, so that the same bytes are answered at once the next time."""
        identity, reason = topic.identity, exc.message[:1000]
        conn.execute(
            insert(refusals).values(
                site=identity.site,
                node=identity.node,
                digest=whole.digest.hex(),
                id=whole.id,
                stage=topic.stage,
                reason=reason,
                times=1,
                first_at=now,
                last_at=now,
            )
        )
        self._audit(
            conn,
            actor=f"node:{identity.common_name}",
            action="ingest.refused",
            subject=whole.id,
            stage=topic.stage,
            family=type(exc).__name__,
            reason=reason,
        )
        self._log.warning("worker.refused", node=identity.common_name, stage=topic.stage, reason=reason)
        return Receipt(whole.id, "refused", reason, b"")

    def _refuse_unread(self, entry: Entry, reason: str, now: datetime) -> None:
        self.counts["unreadable"] += 1
        try:
            topic = topics.parse(entry.topic)
        except PeerError:
            self._log.warning("worker.unreadable", reason=reason)
            return
        whole = Whole("0" * 32, hashlib.sha256(entry.payload).digest(), len(entry.payload))
        with self._engine.begin() as conn:
            if self._known(conn, topic.identity, whole, now) is None:
                self._refuse(conn, topic, whole, PeerError(reason), now)
