"""THE MAIN PATH of a node: claim, read, preprocess, infer, explain, decide, deliver, enqueue.

One process, one thread, one unit of work a step. What a step did is in one transaction of results.sqlite,
so a SIGKILL anywhere loses nothing acknowledged and doubles nothing that shows: a claim lapses and the
object is read again, an answer with the same inputs is no new version, a document built again has the
same UID and bytes.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from edge.forward.rules import OUTCOME, Decision
from edge.imaging.reading import Opened, Reads, pixels_of, read_object
from edge.inference.decide import SliceOutputs, decide, is_blank, pool
from edge.inference.engine import Engine, Outputs
from edge.results import compose
from edge.results.cases import CaseStore, Confirmations, Enqueue
from edge.results.compose import Serving
from edge.results.documents import Builder, Documents, build_documents, finished
from edge.results.series import Rules, completeness, mixed, reopened, without
from edge.results.stopwatch import Stopwatch
from edge.results.store import MAX_TRIES, Claimed, OpenSeries, Store
from edge.results.tables import AnswerRecord, SliceRecord
from shared.clock import Clock
from shared.errors import PeerError, StateError
from shared.log import get_logger
from shared.package.manifest import Head, Manifest

_MODELS_EVERY_S = 0.25
_PRUNE_EVERY_S = 3600.0
_NO_IMAGE = np.zeros((0, 0), dtype=np.uint8)
_NO_VECTOR = np.zeros(0, dtype=np.float32)

Images = npt.NDArray[np.uint8]
Vector = npt.NDArray[np.float32]
_Read = tuple[SliceRecord, Images, Outputs | None]  # one frame: what it says, what the model saw, all it gave


class Models(Protocol):
    """Who decides which model answers (edge.slots.swap.Swapper)."""

    def serving(self) -> tuple[Engine, Manifest, str]:
        """Returns the engine, its manifest and the package's digest."""

    def step(self) -> bool:
        """Takes an installation one step on, between two studies; True when something changed."""

    def observe(self, images: Images, head: str, logits: Vector) -> None:
        """Is shown a study after its answer: uint8 (N, H, W) and float32 (N, K)."""

    def failed(self, reason: str) -> bool:
        """Is told that the serving engine failed; True when another one serves now."""


class Pipeline:
    """The main path and what it takes; `step` is called again at once while it returns True."""

    def __init__(
        self,
        store: Store,
        spool: Path,
        models: Models,
        *,
        cases: CaseStore,
        labels: Path,
        site_key: bytes,
        rules: Rules,
        keep_s: float,
        pacs: bool,
        enqueue: Enqueue | None,
        delivered: Callable[[], None],
        clock: Clock,
        read: Reads = read_object,
        builder: Builder | None = None,
        routes: Callable[[Path, Claimed], Decision] | None = None,
    ) -> None:
        """Takes the collaborators.

        Args:
            store: results.sqlite.
            spool: intake's folder of objects, only read.
            models: who decides which model answers.
            cases: where confirmed cases go.
            labels: the web process's labels.sqlite, followed read-only; it need not exist yet.
            site_key: 32 bytes that never leave the node.
            rules: when a series is complete.
            keep_s: how long an answer keeps what only its making needs.
            pacs: documents wait for a PACS, however long.
            enqueue: leaves a confirmed case's features for the uplink; None when the hospital's policy is
            "off".
            delivered: wakes the sender when documents wait for the PACS.
            clock: the time.
            read: opens and decodes objects: in a process of its own (`edge.imaging.reading.Reader`), or in this one.
            builder: builds documents and looks for burned-in text in a process of its own; None does both here, between
            two studies.
            routes: tells whether the configured rules let the models read an object; None reads everything.
        """
        self._store = store
        self._spool = spool
        self._models = models
        self._site_key = site_key
        self._rules = rules
        self._delivered = delivered
        self._clock = clock
        self._open = read
        self._builder = builder
        self._routes = routes
        self._building: tuple[AnswerRecord, Future[Documents]] | None = None
        self._models_at = self._prune_at = 0.0
        self._keep_s = keep_s
        self._pacs = pacs
        self._held: list[tuple[Callable[[], bool], Callable[[], None]]] = []  # slices read, not yet written
        self._confirmations = Confirmations(
            store, cases, labels, enqueue, spool=spool, look=builder.look if builder else None
        )

    def step(self) -> bool:
        """Does one unit of work, the most urgent first; False when there was none.

        Raises:
            StateError: our disk, database or runtime failed; the process ends and its supervisor starts
            it again.
        """
        return (
            self._models_step()
            or self._read_one()
            or self._pool_one()
            or self._document_one()
            or self._confirmations.step()
            or self._prune()
        )

    def _read_one(self) -> bool:
        claimed = self._store.claim(self._now())  # claim
        if claimed is None:
            return False
        try:
            if claimed.tries > MAX_TRIES:
                raise PeerError(f"Reading this object ended the process {MAX_TRIES} times.")
            if claimed.fault:
                raise PeerError(f"The data set cannot be walked: {claimed.fault}.")
            self._read(claimed)
        except PeerError as exc:
            self._store.quarantine(claimed, exc.message, self._now())
            get_logger().warning("imaging.quarantined", digest=claimed.digest[:12], reason=exc.message)
        except (TypeError, ValueError, LookupError, ArithmeticError, NotImplementedError, RecursionError) as exc:
            # A defect of ours that one object found: it must not keep all others from being answered.
            self._store.quarantine(claimed, f"Reading failed with {type(exc).__name__}.", self._now())
            where = traceback.extract_tb(exc.__traceback__)[-1]  # not the message: it may quote the data set
            get_logger().error("imaging.defect", digest=claimed.digest[:12], at=f"{where.name}:{where.lineno}")
        if not self._store.leased:
            self._write_held()
        return True

    def _read(self, claimed: Claimed) -> None:
        watch = Stopwatch(self._clock, wait_ms=(self._now() - claimed.stored_at) * 1e3)
        serving = Serving(*self._models.serving())
        decision = self._routes(self._spool / claimed.file, claimed) if self._routes else None
        if decision and not decision.read:
            with self._store.writing():
                self._store.finish(claimed, f"{OUTCOME}{decision.action}")
            return
        opened, frames = self._open(self._spool / claimed.file, serving.manifest.heads)  # read
        image = opened.image
        if image.ours or not (image.has_pixels or image.rows):
            with self._store.writing():  # a report, a plan, or one of our own results that came back
                self._store.finish(claimed, "ignored")
            return
        if not image.has_pixels:
            raise PeerError("The image has no pixel data.")
        if not opened.head:
            self._keep_slice(claimed, opened, serving, None, [])
            return
        head = serving.manifest.head(opened.head)
        read: list[_Read] = []
        watch.took(read=opened.read_ms)
        for index, seen in enumerate(frames):  # decode, preprocess
            watch.took(decode=seen.decode_ms, preprocess=seen.preprocess_ms)
            pixels = pixels_of(seen, head)
            outputs = self._infer(serving, pixels)  # infer, explain
            watch.lap("infer")
            read.append((compose.slice_record(claimed, image, index, seen.stack, head, outputs), pixels, outputs))
        if not read:
            raise PeerError("The object holds no frame.")
        if head.series:
            self._keep_slice(claimed, opened, serving, head, read)
        else:
            self._answer_image(claimed, opened, serving, head, read[0][0], pixels, outputs, watch)

    def _answer_image(
        self,
        claimed: Claimed,
        opened: Opened,
        serving: Serving,
        head: Head,
        one: SliceRecord,
        pixels: Images,
        outputs: Outputs,
        watch: Stopwatch,
    ) -> None:
        image = opened.image
        logits, features = _vector(one.logits), _vector(one.features)
        decided = decide(head, logits, features)  # decide
        if is_blank(pixels):
            decided = replace(decided, reason="the image is blank")
        watch.lap("decide")
        record = compose.answer_record(
            answer=compose.answer_id(image.study, image.series, image.sop_instance, head.name),
            subject=compose.subject_of(image, self._site_key, image.sop_instance),
            serving=serving,
            head=head,
            decided=decided,
            unassessed="",
            inputs=[one.source],
            shown=one,
            image=pixels,
            logits=logits,
            features=features,
            conflict=claimed.conflict,
            complete="",
            received_at=claimed.received_at,
            stored_at=claimed.stored_at,
            answered_at=self._now(),
            timings=watch.laps,
        )
        with self._store.writing():
            self._store.note_study(compose.study_row(opened.texts, image, claimed))
            stored = self._store.add_answer(record)
            self._store.finish(claimed, "answered")
        watch.lap("record")
        self._tell(stored, watch)
        self._models.observe(pixels[None], head.name, outputs.logits)

    def _keep_slice(
        self,
        claimed: Claimed,
        opened: Opened,
        serving: Serving,
        head: Head | None,
        read: list[_Read],
    ) -> None:
        """Keeps what the frames of one object say until their series is complete."""
        image = opened.image
        name = head.name if head else ""
        series = OpenSeries(
            answer=compose.answer_id(image.study, image.series, "", name),
            study=image.study,
            series=image.series,
            head=name,
            package=serving.digest,
            reason=opened.reason,
            subject=compose.subject_of(image, self._site_key, image.series),
            association=claimed.association,
            pending_since=claimed.stored_at,
            first_received_at=claimed.received_at,
            last_stored_at=claimed.stored_at,
        )
        if head is None:
            read = [(compose.unread_slice(claimed, image), _NO_IMAGE, None)]
        study, announced = compose.study_row(opened.texts, image, claimed), opened.announced

        def write() -> bool:
            self._store.note_study(study)
            if announced:
                self._store.announce(image.series, *announced)
            first = False
            for record, pixels, _ in read:
                key = f"{image.sop_instance}#{record.source.frame:05d}"
                first |= self._store.add_slice(series, key, record, claimed.association, pixels.tobytes())
            self._store.finish(claimed, "slice" if head else "unassessed")
            return first

        def show() -> None:
            _, pixels, outputs = read[0]
            if outputs is not None:
                self._models.observe(pixels[None], name, outputs.logits)

        self._held.append((write, show))

    def _write_held(self) -> None:
        """Writes the slices of all objects leased together in one transaction: one wait for the disk, not eight."""
        held, self._held = self._held, []
        if held:
            with self._store.writing():
                first = [write() for write, _ in held]
            for is_first, (_, show) in zip(first, held, strict=True):
                if is_first:
                    show()

    def _pool_one(self) -> bool:
        now = self._now()
        for series in self._store.open_series():
            complete = completeness(self._rules, now, self._store.evidence(series))
            if complete:
                self._answer_series(series, complete)
                return True
        return False

    def _answer_series(self, series: OpenSeries, complete: str) -> None:
        watch = Stopwatch(self._clock, wait_ms=(self._now() - series.last_stored_at) * 1e3)
        serving = Serving(*self._models.serving())
        slices = self._store.slices(series.answer)
        if not slices:  # all of them were quarantined when they were read again
            with self._store.writing():
                self._store.close_series(series.answer)
            return
        shown = next(iter(slices.values()))
        head, decided, image = None, None, _NO_IMAGE
        logits = features = _NO_VECTOR
        if series.head:
            if series.package != serving.digest:  # swapped between the last slice and now
                with self._store.writing():
                    self._store.reread(series.answer, series.series, serving.digest)
                return
            head = serving.manifest.head(series.head)
            logits, features = pool(
                [SliceOutputs(key, _vector(one.logits), _vector(one.features)) for key, one in slices.items()]
            )
            watch.lap("pool")
            decided = decide(head, logits, features)
            missing = self._store.gone(series.series)
            if missing:
                decided = replace(decided, reason=f"{missing} earlier images of the series have left this node")
            key, stored_image = self._store.peak(series.answer, decided.chosen)
            shown = slices[key]
            image = np.frombuffer(stored_image, np.uint8).reshape(head.input.height, head.input.width)
            why = mixed(one.stack for one in slices.values())
            if why or is_blank(image):
                decided = replace(decided, reason=why or "the images are blank")
            watch.lap("decide")
        record = compose.answer_record(
            answer=series.answer,
            subject=series.subject,
            serving=serving,
            head=head,
            decided=decided,
            unassessed=series.reason,
            inputs=[one.source for one in slices.values()],
            shown=shown,
            image=image,
            logits=logits,
            features=features,
            conflict=False,
            complete=without(
                reopened(complete, self._late(series.answer, slices)), self._store.unreadable(series.series)
            ),
            received_at=series.first_received_at,
            stored_at=series.last_stored_at,
            answered_at=self._now(),
            timings=watch.laps,
        )
        with self._store.writing():
            stored = self._store.add_answer(record)
            self._store.close_series(series.answer)
        watch.lap("record")
        self._tell(stored, watch)

    def _late(self, answer: str, slices: Mapping[str, SliceRecord]) -> int:
        """Returns how many objects came after the answer that stands; 0 when there is none."""
        latest = self._store.latest(answer)
        if latest is None:
            return 0
        return len({one.source.sop_instance for one in slices.values()} - {one.sop_instance for one in latest.inputs})

    def _document_one(self) -> bool:
        if self._building is None:
            record = self._store.undocumented()
            if record is None:
                return False
            if self._builder is None:
                self._deliver(record, build_documents(record, self._spool, self._now()))
                return True
            self._building = record, self._builder.submit(record, self._spool, self._now())
        record, future = self._building
        if not future.done():
            return False
        self._building = None
        self._deliver(record, finished(future))
        return True

    def _deliver(self, record: AnswerRecord, documents: Documents) -> None:
        self._store.add_documents(record, documents.state, documents.display, documents.rows)  # deliver
        self._delivered()

    def _infer(self, serving: Serving, pixels: Images) -> Outputs:
        try:
            return serving.engine.run(pixels[None])
        except StateError as exc:
            if not self._models.failed(exc.message):
                raise
            # The claim stays open; the supervisor's restart reads it again with the model that serves now.
            raise StateError("The model was undone while it read this object.") from exc

    def _models_step(self) -> bool:
        now = self._clock.monotonic()
        if now < self._models_at:
            return False
        self._models_at = now + _MODELS_EVERY_S
        return self._models.step()

    def _prune(self) -> bool:
        now = self._clock.monotonic()
        if now < self._prune_at:
            return False
        if self._store.prune(self._now() - self._keep_s, undelivered=not self._pacs):
            return True
        self._prune_at = now + _PRUNE_EVERY_S
        return False

    def _tell(self, record: AnswerRecord | None, watch: Stopwatch) -> None:
        if record is not None:
            get_logger().info(
                "pipeline.answered",
                answer=record.answer,
                version=record.version,
                head=record.head,
                assessed=record.assessed,
                stored_to_answer_ms=round((record.answered_at - record.stored_at) * 1e3, 1),
                stages={name: round(ms, 1) for name, ms in watch.laps.items()},
            )

    def _now(self) -> float:
        return self._clock.now().timestamp()


def _vector(data: bytes) -> Vector:
    return np.frombuffer(data, dtype="<f4")
