"""The main path upwards: absorb what was dropped, seal, keep, send in pieces, hear the verdict, end."""

from __future__ import annotations

import queue
import random
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from edge.uplink.desired import DesiredKeeper
from edge.uplink.link import Connected, Denied, Event, Heard, Lost, Taken, Transport
from edge.uplink.outbox import Outbox, Waiting
from shared.clock import Clock
from shared.errors import LinkError, PeerError, RadfleetError, RoomError, StateError, TrustError
from shared.files import read_limited
from shared.log import get_logger
from shared.wire import topics
from shared.wire.chunks import DATA_BYTES, missing, pack
from shared.wire.envelope import VERSION, Header, Observer, SealPublic, seal
from shared.wire.identity import Identity
from shared.wire.records import NodeReport, Receipt, UpStage
from shared.wire.signed import verify_record
from shared.wire.stages import STAGES, decode, encode

FLYING_LIMIT = 8  # publishes the broker has not taken yet: at most 2 MiB under way
ABSORB_AT_ONCE = 32
DENIED_WAIT_S = 60.0
LOOK_S = 1.0  # how often the node looks whether there is something new to report


@dataclass(frozen=True)
class Sealer:
    """Who this node is and to whom it seals."""

    identity: Identity
    incarnation: str
    device: Ed25519PrivateKey
    recipient: SealPublic
    new_id: Callable[[], str]  # 32 hexadecimal digits, never the same twice
    clock: Clock
    observe: Observer | None = None

    def seal(self, stage: UpStage, round_id: str, record: bytes, sequence: int) -> tuple[str, bytes]:
        """Returns the id and bytes of a sealed record; raises PeerError when it is over its limit."""
        header = Header(
            version=VERSION,
            site=self.identity.site,
            node=self.identity.node,
            incarnation=self.incarnation,
            stage=stage,
            id=self.new_id(),
            sequence=sequence,
            round=round_id,
            key_id=self.recipient.key_id,
            created=int(self.clock.now().timestamp() * 1000),
        )
        return header.id, seal(header, record, self.recipient, self.device, observe=self.observe)


@dataclass
class _Sending:
    """One message on its way: which pieces are to be sent, and when to ask again what the cloud holds."""

    row: Waiting
    todo: deque[int]
    due: float = 0.0
    begun: bool = False
    flying: set[int] = field(default_factory=set)


class Uplink:
    """Driven by one thread: `step` does what can be done and then waits for the next event."""

    def __init__(
        self,
        *,
        sealer: Sealer,
        outbox: Outbox,
        drops: Path,
        cloud: Ed25519PublicKey,
        connect: Callable[[Callable[[Event], None]], Transport],
        keeper: DesiredKeeper,
        on_news: Callable[[], None],
        report: Callable[[], NodeReport] | None,
        features_allowed: bool,
        clock: Clock,
        retry_s: tuple[float, float] = (20.0, 300.0),
        heartbeat_s: float = 30.0,
    ) -> None:
        """`retry_s` is how long a sent message waits for its verdict, first and at most."""
        self._sealer = sealer
        self._outbox = outbox
        self._drops = drops
        self._cloud = cloud
        self._keeper = keeper
        self._on_news = on_news
        self._report = report
        self._features_allowed = features_allowed
        self._clock = clock
        self._retry_s = retry_s
        self._heartbeat_s = heartbeat_s
        self._log = get_logger()
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._sending: dict[str, _Sending] = {}
        self._flying: dict[int, tuple[str, int]] = {}
        self._connected = False
        self._look_at = 0.0
        self._last_report: tuple[float, NodeReport] | None = None
        self.counts: Counter[str] = Counter()
        self._drops.mkdir(parents=True, exist_ok=True)
        self._link = connect(self._events.put)
        self._link.subscribe(topics.all_down(sealer.identity))

    def deliver(self, event: Event) -> None:
        """Puts an event before the uplink's thread; may be called from any thread."""
        self._events.put(event)

    def run(self, stop: threading.Event) -> None:
        """Works until `stop`; a disk that fails is waited for, and nothing is promised meanwhile."""
        while not stop.is_set():
            try:
                self.step(0.25)
            except StateError as exc:
                self._log.error("uplink.state", reason=str(exc))
                stop.wait(1.0)
        self.close()

    def step(self, seconds: float) -> None:
        """One turn; waits at most `seconds` for something to happen."""
        if self.absorb() == ABSORB_AT_ONCE:
            seconds = 0.0  # there is more
        if self._connected:
            self._heartbeat()
        self._outbox.expire()
        self._send()
        try:
            event = self._events.get(timeout=seconds)
            while True:
                self._hear(event)
                event = self._events.get_nowait()
        except queue.Empty:
            return

    def close(self) -> None:
        """Ends the connection; what is in the outbox stays there."""
        self._link.close()

    # -- absorb, seal, keep

    def absorb(self) -> int:
        """Seals what lies in the drop folder, oldest first; returns how many files were worked off."""
        files = sorted(self._drops.glob("[!.]*.msg"), key=lambda file: file.stat().st_mtime_ns)
        for file in files[:ABSORB_AT_ONCE]:
            name, _, stage = file.name.removesuffix(".msg").rpartition(".")
            try:
                self._absorb(file, name, stage)
            except RoomError as exc:
                self._log.error("uplink.no_room", reason=str(exc))
                return 0
            except PeerError as exc:
                self._log.error("uplink.drop_refused", file=file.name, reason=str(exc))
                self._outbox.count(stage, "malformed")
                bad = self._drops / "bad"
                bad.mkdir(exist_ok=True)
                file.replace(bad / file.name)
                continue
            file.unlink()
        return len(files[:ABSORB_AT_ONCE])

    def _absorb(self, file: Path, name: str, stage: str) -> None:
        if stage not in STAGES:
            raise PeerError(f"There is no stage {stage!r}.")
        data = read_limited(file, STAGES[stage].plain_limit)
        record = decode(data, STAGES[stage].record)
        if stage == "features" and not self._may_send_features():
            self._outbox.count(stage, "withheld")
            return
        self._put(cast(UpStage, stage), name, data, getattr(record, "round", ""))

    def _put(self, stage: UpStage, name: str, data: bytes, round_id: str) -> None:
        self._outbox.put(stage, name, data, lambda sequence: self._sealer.seal(stage, round_id, data, sequence))

    def _may_send_features(self) -> bool:
        wanted = self._keeper.current
        return self._features_allowed and (wanted is None or wanted.feature_policy == "features")

    def _heartbeat(self) -> None:
        """Reports when the node changed or the heart must beat; never while a report still waits.

        So at most one is under way, none is ever dropped, and the newest follows the last verdict.
        """
        now = self._clock.monotonic()
        if self._report is None or now < self._look_at or self._outbox.depth("report"):
            return
        self._look_at = now + LOOK_S
        report = self._report()
        if self._last_report is not None:
            at, last = self._last_report
            if now - at < self._heartbeat_s and _state_of(report) == _state_of(last):
                return
        self._put("report", f"report-{self._sealer.new_id()}", encode(report), "")
        self._last_report = (now, report)

    # -- send

    def _send(self) -> None:
        if not self._connected:
            return
        self._refresh()
        now = self._clock.monotonic()
        for sending in self._sending.values():
            while sending.todo or self._ask_again(sending, now):
                if len(self._flying) >= FLYING_LIMIT or now < sending.due:
                    break
                if not self._send_piece(sending):
                    return

    def _refresh(self) -> None:
        """Takes over what the outbox holds, the most urgent first."""
        rows = self._outbox.waiting()
        self._sending = {row.whole.id: self._sending.get(row.whole.id) or _new(row) for row in rows}

    def _ask_again(self, sending: _Sending, now: float) -> bool:
        """After a silence, the last piece goes again: the cloud answers its verdict or what it lacks."""
        if sending.flying or not sending.begun or now < sending.due:
            return False
        sending.begun = False
        sending.todo.append(sending.row.whole.count - 1)
        return True

    def _send_piece(self, sending: _Sending) -> bool:
        row, index = sending.row, sending.todo[0]
        if not sending.begun:
            self._outbox.attempted(row.whole.id)
            sending.row = row = Waiting(row.sequence, row.stage, row.whole, row.attempts + 1)
            sending.begun = True
        data = self._outbox.body(row.sequence, index * DATA_BYTES, row.whole.length(index))
        try:
            token = self._link.publish(topics.up(self._sealer.identity, row.stage), pack(row.whole, index, data))
        except LinkError:
            return False
        sending.todo.popleft()
        sending.flying.add(index)
        self._flying[token] = (row.whole.id, index)
        return True

    def _landed(self, token: int) -> _Sending | None:
        message_id, index = self._flying.pop(token, ("", 0))
        sending = self._sending.get(message_id)
        if sending is None:
            return None
        sending.flying.discard(index)
        if not sending.todo and not sending.flying:
            first, most = self._retry_s
            wait = min(most, first * 2 ** min(sending.row.attempts - 1, 10))
            sending.due = self._clock.monotonic() + wait * random.uniform(0.75, 1.25)  # noqa: S311
        return sending

    # -- hear

    def _hear(self, event: Event) -> None:
        match event:
            case Connected():
                self._connected = True
                self._forget_flights()
                self._outbox.note("link", "connected")
                self._log.info("uplink.connected")
            case Lost(reason):
                if self._connected or self.counts["lost"] == 0:
                    self._outbox.note("link", reason)
                    self._log.warning("uplink.lost", reason=reason)
                self.counts["lost"] += 1
                self._connected = False
                self._forget_flights()
            case Taken(token):
                self._landed(token)
            case Denied(token, reason):
                self._denied(token, reason)
            case Heard(topic, payload):
                self._heard(topic, payload)
            case _:
                pass

    def _forget_flights(self) -> None:
        """Nothing is known of what was in flight: messages begun ask for their state."""
        self._flying.clear()
        self._sending.clear()

    def _denied(self, token: int, reason: str) -> None:
        self.counts["denied"] += 1
        sending = self._landed(token)
        if sending is not None:
            sending.due = self._clock.monotonic() + DENIED_WAIT_S
            self._outbox.trouble(sending.row.whole.id, f"the broker refuses it: {reason}")
        self._outbox.note("link", f"the broker refuses to take messages: {reason}")
        self._log.error("uplink.denied", reason=reason)

    def _heard(self, name: str, payload: bytes) -> None:
        try:
            topic = topics.parse(name)
            if topic.identity != self._sealer.identity or topic.direction != "down":
                raise PeerError(f"A message on {name} is not for this node.")
            if topic.stage == "receipt":
                self._receipt(verify_record(payload, self._cloud, "receipt", Receipt))
            elif payload and self._keeper.hear(payload):
                self._on_news()
        except (PeerError, TrustError) as exc:
            self.counts["refused_from_cloud"] += 1
            self._outbox.note("alarm", str(exc))
            self._log.error("uplink.refused", topic=name, reason=str(exc))
        except RadfleetError as exc:
            self._log.error("uplink.trouble", topic=name, reason=str(exc))

    def _receipt(self, receipt: Receipt) -> None:
        self.counts[receipt.verdict] += 1
        if receipt.verdict != "partial":
            if self._outbox.end(receipt.id, receipt.verdict, receipt.reason):
                self._sending.pop(receipt.id, None)
                if receipt.verdict == "refused":
                    self._log.error("uplink.message_refused", id=receipt.id, reason=receipt.reason)
            return
        sending = self._sending.get(receipt.id)
        if sending is not None and not sending.todo:
            sending.todo.extend(missing(receipt.held, sending.row.whole.count))
            sending.due = 0.0


def _new(row: Waiting) -> _Sending:
    """A message sent before, in a connection that ended, first asks what the cloud holds of it."""
    count = row.whole.count
    return _Sending(row, deque([count - 1] if row.attempts else range(count)))


def _state_of(report: NodeReport) -> NodeReport:
    """Returns a report without its running counters: a change of what is left is told at once."""
    return msgspec.structs.replace(report, studies=0, labelled=0, outbox_waiting=0)
