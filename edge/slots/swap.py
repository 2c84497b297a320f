"""The pipeline's half of an installation: load, prove, shadow, swap, and undo.

Everything happens between two studies in the process that serves, so no study is refused and the proof is that of the
server itself. The model in place stays loaded until its successor is committed: undoing a swap is one assignment.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from edge.slots.fetch import STAGING, remove_damaged
from edge.slots.journal import ATTEMPTS, Journal, State
from shared.clock import Clock
from shared.errors import RadfleetError, StateError, TrustError
from shared.files import atomic_write, fsync_folder, read_limited, sha256_file
from shared.log import get_logger
from shared.package.manifest import FILE_LIMIT_BYTES, MANIFEST_NAME, Manifest, verify_package

log = get_logger()

Images = npt.NDArray[np.uint8]
Logits = npt.NDArray[np.float32]


class Outputs(Protocol):
    """What one forward pass gives; a swap looks at the logits only."""

    @property
    def logits(self) -> Logits:
        """float32 (N, K)"""


class Engine(Protocol):
    """A loaded variant (edge.inference.engine.Engine)."""

    @property
    def variant(self) -> str:
        """Name of the variant in the manifest."""

    @property
    def provider(self) -> str:
        """The execution provider that really runs it."""

    @property
    def digest(self) -> str:
        """SHA-256 of the ONNX bytes that were loaded."""

    @property
    def degraded(self) -> str:
        """Why a better provider is not in use; empty when none is missing."""

    def run(self, images: Images) -> Outputs:
        """Runs uint8 (N, H, W)."""


class Proof(Protocol):
    """What reproducing the golden outputs gave (edge.inference.engine.GoldenProof)."""

    @property
    def digest(self) -> str:
        """SHA-256 of the outputs that this process computed."""


E = TypeVar("E", bound=Engine)


@dataclass(frozen=True)
class Policy:
    """How long a new model is watched before it serves, and while it serves, until it is committed.

    Each stage ends with `*_studies` studies or after `*_seconds`, whichever comes first: a quiet hospital must not
    stay behind for ever. The seconds are those of the process, so a wrong clock changes nothing.
    """

    shadow_studies: int = 3
    shadow_seconds: float = 20.0
    provisional_studies: int = 3
    provisional_seconds: float = 20.0


@dataclass(frozen=True)
class Loaded(Generic[E]):
    """A package in memory, proven. `golden` is the digest of the golden outputs that this process computed."""

    engine: E
    manifest: Manifest
    digest: str
    golden: str


@dataclass(frozen=True)
class ServingRecord:
    """What this process really serves; written at every change, reported to the cloud."""

    package: str
    release: int
    variant: str
    provider: str
    degraded: str
    weights_loaded: str
    golden: str
    pid: int


@dataclass
class _Watch(Generic[E]):
    """The candidate of this process while it is SHADOW or PROVISIONAL."""

    loaded: Loaded[E]
    state: State
    since: float
    studies: int = 0
    agreed: int = 0


def install_baseline(models: Path, journal: Journal, package: Path) -> str:
    """Copies the shipped package into `models`/<digest>, commits it on a node that has no model, returns its digest.

    May be repeated, and repairs a copy that was cut off.

    Raises:
        TrustError: the shipped package is damaged.
        RoomError: the disk is full.
    """
    digest = sha256_file(package / MANIFEST_NAME)
    manifest = verify_package(package, digest)
    final = models / digest
    if not _is_whole(final, digest):
        remove_damaged(final)
        staging = models / STAGING / digest
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        for name in [MANIFEST_NAME, *(entry.name for entry in manifest.files)]:
            atomic_write(staging / name, read_limited(package / name, FILE_LIMIT_BYTES), mode=0o644)
        verify_package(staging, digest)
        staging.rename(final)
        fsync_folder(models)
    journal.install(digest, manifest.release)
    return digest


class Swapper(Generic[E]):
    """Holds the engine that serves and, during an installation, the one that will."""

    def __init__(
        self,
        models: Path,
        journal: Journal,
        *,
        load: Callable[[Path, Manifest], E],
        prove: Callable[[E, Path, Manifest], Proof],
        record: Callable[[ServingRecord], None],
        clock: Clock,
        policy: Policy | None = None,
        better: Callable[[Path, Manifest], E | None] = lambda _folder, _manifest: None,
    ) -> None:
        """Loads what is committed, or the newest before it that can be.

        Args:
            models: the state folder's models/.
            journal: slots.sqlite; unfinished business of the process before is settled here.
            load: parses a model file only after comparing it with the manifest; RadfleetError when it cannot serve.
            prove: RadfleetError when the engine does not reproduce the golden outputs.
            record: is told at every change what this process serves.
            clock: only its monotonic seconds are used.
            policy: how long to watch.
            better: gives the committed package's engine anew when something for it has been built meanwhile.

        Raises:
            StateError: no committed model can be loaded; `install_baseline` brings the shipped one back.
        """
        self._models = models
        self._journal = journal
        self._load = load
        self._prove = prove
        self._record = record
        self._clock = clock
        self._policy = policy or Policy()
        self._better = better
        self._watch: _Watch[E] | None = None
        self._journal.recover()
        self._committed = self._load_committed()
        self._serving = self._committed
        self._announce()

    def serving(self) -> tuple[E, Manifest, str]:
        """Returns the engine that answers now, its manifest and the package's digest."""
        return self._serving.engine, self._serving.manifest, self._serving.digest

    def step(self) -> bool:
        """Takes an installation one step on; call it between studies. True when something changed."""
        watch = self._watch
        if watch is None:
            return self._stage() or self._upgrade()
        slot = self._journal.get(watch.loaded.digest)
        if slot is None or slot.state != watch.state:
            self._watch = None  # the uplink withdrew or superseded it
            return True
        if watch.state == "SHADOW" and self._is_over(watch, self._policy.shadow_studies, self._policy.shadow_seconds):
            self._swap(watch)
            return True
        if watch.state == "PROVISIONAL" and self._is_over(
            watch, self._policy.provisional_studies, self._policy.provisional_seconds
        ):
            self._journal.commit(watch.loaded.digest, f"{watch.studies} studies answered well")
            self._committed = watch.loaded
            self._watch = None
            log.info("slots.committed", package=watch.loaded.digest, release=watch.loaded.manifest.release)
            return True
        return False

    def observe(self, images: Images, head: str, logits: Logits) -> None:
        """Shows the swapper one study that was just answered, after its answer was delivered.

        Args:
            images: uint8 (N, H, W), what the model saw.
            head: the head that read it.
            logits: float32 (N, K), what the serving engine said.
        """
        watch = self._watch
        if watch is None:
            return
        if watch.state == "PROVISIONAL":
            if np.isfinite(logits).all():
                watch.studies += 1
            else:
                self.failed("its outputs are not finite")
            return
        try:
            shadow = watch.loaded.engine.run(images).logits  # (N, K)
        except RadfleetError as exc:
            self._refuse(watch, f"it failed on a local study: {exc.message}")
            return
        if shadow.shape[0] != len(images) or not np.isfinite(shadow).all():
            self._refuse(watch, "its outputs on a local study are not finite")
            return
        watch.studies += 1
        watch.agreed += self._answer(self._serving.manifest, head, logits) == self._answer(
            watch.loaded.manifest, head, shadow
        )

    def failed(self, reason: str) -> bool:
        """The serving engine failed on a study: True when the previous model serves again, so ask that one."""
        watch = self._watch
        if watch is None or watch.state != "PROVISIONAL":
            return False
        self._watch = None
        self._serving = self._committed
        self._journal.roll_back(watch.loaded.digest, reason, final=True)
        self._announce()
        log.error("slots.rolled_back", package=watch.loaded.digest, reason=reason)
        return True

    def _load_committed(self) -> Loaded[E]:
        while (committed := self._journal.committed()) is not None:
            try:
                return self._open(committed[0])
            except RadfleetError as exc:
                log.error("slots.abandoned", package=committed[0], reason=exc.message)
                self._journal.abandon(committed[0], exc.message)
        raise StateError("This node has no model that it can serve.", cure="radfleet-edge init")

    def _open(self, digest: str) -> Loaded[E]:
        """Loads and proves a package: its manifest, the bytes in the session, and the outputs it computes here."""
        folder = self._models / digest
        manifest = verify_package(folder, digest, names=[])
        return self._proven(self._load(folder, manifest), folder, manifest, digest)

    def _proven(self, engine: E, folder: Path, manifest: Manifest, digest: str) -> Loaded[E]:
        named = manifest.file(manifest.variant(engine.variant).file).sha256
        if engine.digest != named:
            raise TrustError(f"The engine holds {engine.digest[:12]}, the manifest names {named[:12]}.")
        return Loaded(engine, manifest, digest, self._prove(engine, folder, manifest).digest)

    def _stage(self) -> bool:
        slot = self._journal.waiting("DOWNLOADED")
        if slot is None:
            return False
        try:
            self._journal.advance(slot.package, "STAGED", f"attempt {slot.attempts} of {ATTEMPTS}")
            loaded = self._open(slot.package)
            self._journal.advance(slot.package, "SHADOW")
        except RadfleetError as exc:
            self._journal.refuse(slot.package, exc.message, final=isinstance(exc, TrustError))
            log.error("slots.refused", package=slot.package, release=slot.release, reason=exc.message)
            return True
        self._watch = _Watch(loaded, "SHADOW", self._clock.monotonic())
        log.info("slots.shadow", package=slot.package, release=slot.release)
        return True

    def _upgrade(self) -> bool:
        """Lets a better engine of the same package serve, once it has reproduced the golden outputs."""
        loaded = self._committed
        folder = self._models / loaded.digest
        try:
            engine = self._better(folder, loaded.manifest)
            if engine is None:
                return False
            self._committed = self._serving = self._proven(engine, folder, loaded.manifest, loaded.digest)
        except RadfleetError as exc:
            log.error("slots.not_upgraded", package=loaded.digest, reason=exc.message)
            return True
        self._announce()
        log.info("slots.upgraded", package=loaded.digest, provider=engine.provider)
        return True

    def _swap(self, watch: _Watch[E]) -> None:
        seen = f"{watch.agreed} of {watch.studies} shadow studies agree"
        try:
            self._journal.advance(watch.loaded.digest, "READY", seen)
            self._journal.advance(watch.loaded.digest, "PROVISIONAL", seen)
        except StateError:
            self._watch = None  # superseded between two steps
            return
        self._serving = watch.loaded
        self._watch = _Watch(watch.loaded, "PROVISIONAL", self._clock.monotonic())
        self._announce()
        log.info("slots.provisional", package=watch.loaded.digest, shadow=watch.studies, agreed=watch.agreed)

    def _refuse(self, watch: _Watch[E], reason: str) -> None:
        self._watch = None
        self._journal.refuse(watch.loaded.digest, reason, final=True)
        log.error("slots.refused", package=watch.loaded.digest, reason=reason)

    def _is_over(self, watch: _Watch[E], studies: int, seconds: float) -> bool:
        return watch.studies >= studies or self._clock.monotonic() - watch.since >= seconds

    def _answer(self, manifest: Manifest, name: str, logits: Logits) -> str:
        """The class a head gives; a series is pooled by the mean, as its answer is."""
        head = next((h for h in manifest.heads if h.name == name), None)
        if head is None:
            return ""
        pooled = logits.mean(axis=0)[head.offset : head.offset + len(head.classes)]  # (C,)
        return head.classes[int(pooled.argmax())].name

    def _announce(self) -> None:
        loaded = self._serving
        self._record(
            ServingRecord(
                package=loaded.digest,
                release=loaded.manifest.release,
                variant=loaded.engine.variant,
                provider=loaded.engine.provider,
                degraded=loaded.engine.degraded,
                weights_loaded=loaded.engine.digest,
                golden=loaded.golden,
                pid=os.getpid(),
            )
        )


def _is_whole(folder: Path, digest: str) -> bool:
    try:
        verify_package(folder, digest)
    except RadfleetError:
        return False
    return True
