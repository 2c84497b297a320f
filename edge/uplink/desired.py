"""What the cloud asks of this node: believed only when signed, for this node, and newer than what it knew.

`DesiredKeeper` listens (in the uplink's thread); `Obeyer` does, in a thread of its own, because a download
may take minutes and receipts must not wait for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Protocol

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from shared.clock import Clock
from shared.errors import LinkError, PeerError, StateError, TrustError
from shared.files import atomic_write, fsync_folder, read_limited
from shared.log import get_logger
from shared.wire.identity import Identity
from shared.wire.records import Desired, JudgeTask, NamedFile, ReleaseOrder, TrainTask
from shared.wire.signed import LIMIT_BYTES, verify_record

RETRY_S = (1.0, 60.0)  # first and longest wait after the cloud was away
_SLACK = timedelta(minutes=5)


class DesiredKeeper:
    """Remembers the newest document across restarts; a serial that goes back is refused, not obeyed.

    `folder` holds `desired-<incarnation>.signed`, the document as it came.
    """

    def __init__(
        self, folder: Path, *, identity: Identity, incarnation: str, cloud: Ed25519PublicKey, clock: Clock
    ) -> None:
        self._path = folder / f"desired-{incarnation}.signed"
        self._identity = identity
        self._cloud = cloud
        self._clock = clock
        self._log = get_logger()
        self.current: Desired | None = None
        if self._path.exists():
            try:
                self.current = self._read(read_limited(self._path, LIMIT_BYTES["desired"]))
            except (PeerError, TrustError) as exc:
                self._log.error("desired.kept_refused", reason=str(exc))

    def hear(self, document: bytes) -> bool:
        """Takes a document from the wire; True when it is news, which is then on disk.

        Raises:
            PeerError: it is malformed.
            TrustError: it is not the cloud's, not for this node, or older than one heard before.
            StateError: it cannot be kept.
        """
        heard = self._read(document)
        if self.current is not None:
            if heard.serial < self.current.serial:
                raise TrustError(
                    f"Desired state {heard.serial} is older than {self.current.serial}.",
                    cure="If the cloud was restored from a backup, enrol this node again.",
                )
            if heard.serial == self.current.serial:
                return False
        atomic_write(self._path, document)
        self.current = heard
        return True

    def clock_trusted(self) -> bool:
        """Tells whether this machine's clock is not before the newest document the cloud signed."""
        issued = datetime.fromisoformat(self.current.issued) if self.current else None
        return issued is None or self._clock.now() >= issued - _SLACK

    def _read(self, document: bytes) -> Desired:
        heard = verify_record(document, self._cloud, "desired", Desired)
        if Identity(heard.site, heard.node) != self._identity:
            raise TrustError(f"A desired state for {heard.site}/{heard.node} came to this node.")
        return heard


class Files(Protocol):
    """Fetches one blob; see edge.uplink.download.NodePort.download."""

    def download(self, path: str, target: Path, sha256: str, length: int) -> None: ...


class Obeyer:
    """Brings the node to the newest desired state, however often it must try.

    A task's files go to `learning/blobs/<sha256>`; only when all are there does `learning/task.json` name it.
    `order_step` is the release side's: it is called until it returns False, and again now and then.
    """

    def __init__(
        self,
        learning: Path,
        files: Files,
        order_step: Callable[[ReleaseOrder | None], bool],
        *,
        wait: Callable[[float], float],
        look_s: float = 5.0,
    ) -> None:
        """`wait(ceiling)` chooses how long to wait, for example `random.uniform(0, ceiling)`."""
        self._learning = learning
        self._files = files
        self._order_step = order_step
        self._wait = wait
        self._look_s = look_s
        self._news = threading.Event()
        self._log = get_logger()
        self._refused: tuple[int, str] | None = None

    def wake(self) -> None:
        """Says that there is a newer document."""
        self._news.set()

    def run(self, keeper: DesiredKeeper, stop: threading.Event) -> None:
        """Obeys until `stop`."""
        failures = 0
        while not stop.is_set():
            pause = self._look_s
            try:
                if keeper.current is not None:
                    self.step(keeper.current)
                failures = 0
            except (LinkError, StateError) as exc:
                failures += 1
                pause = 0.1 + self._wait(min(RETRY_S[1], RETRY_S[0] * 2 ** min(failures, 10)))
                self._log.warning("desired.waiting", reason=str(exc))
            self._news.wait(pause)
            self._news.clear()

    def step(self, wanted: Desired) -> None:
        """Does what is left to do for `wanted`.

        Raises:
            LinkError: the cloud is away.
            StateError: the disk is full or broken.
        """
        if self._refused is None or self._refused[0] != wanted.serial:
            try:
                self._prepare(wanted.task)
            except (TrustError, PeerError) as exc:
                self._refused = (wanted.serial, str(exc))
                self._log.error("desired.task_refused", serial=wanted.serial, reason=str(exc))
        while self._order_step(wanted.order):
            pass

    def _prepare(self, task: TrainTask | JudgeTask | None) -> None:
        path = self._learning / "task.json"
        if task is None:
            if path.exists():
                path.unlink()
                fsync_folder(path.parent)
            return
        written = msgspec.json.encode(task)
        if path.exists() and path.read_bytes() == written:
            return
        blobs = self._learning / "blobs"
        for file in _files_of(task):
            self._files.download(f"/blobs/{file.sha256}", blobs / file.sha256, file.sha256, file.length)
        atomic_write(path, written)
        self._log.info("desired.task", kind=type(task).__name__, round=task.round)
        named = {file.sha256 for file in _files_of(task)}
        for old in blobs.iterdir():
            if old.name.partition(".")[0] not in named:
                old.unlink()


def _files_of(task: TrainTask | JudgeTask) -> list[NamedFile]:
    return [task.weights] if isinstance(task, TrainTask) else [task.manifest, task.model]
