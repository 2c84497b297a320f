"""THE MAIN PATH of a node: claim, read, preprocess, infer, explain, decide, deliver, enqueue.

One process, one thread beside those that read ahead, one unit of work a step. What a step did is in one transaction
of results.sqlite, so a SIGKILL anywhere loses nothing acknowledged and doubles nothing that shows: a claim lapses and
the object is read again, an answer with the same inputs is no new version, a document built again has the same UID and
bytes.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from msgspec import Struct
from msgspec.structs import replace

from edge.forward.rules import Decision
from edge.imaging.ahead import Ahead
from edge.imaging.reading import Opened, Reads, Seen, pixels_of, read_object
from edge.inference.decide import SliceOutputs, decide, is_blank, pool
from edge.inference.engine import Engine, Outputs
from edge.line import Coming, Line
from edge.results import compose
from edge.results.cases import CaseStore, Confirmations, Enqueue
from edge.results.compose import Serving
from edge.results.documents import Builder, Documents, build_documents, finished
from edge.results.series import Rules, completeness, mixed, reopened, without
from edge.results.stopwatch import Stopwatch
from edge.results.store import Claimed, OpenSeries, Store
from edge.results.tables import AnswerRecord, SliceRecord
from shared.clock import Clock
from shared.errors import PeerError, StateError
from shared.log import get_logger
from shared.package.manifest import Head, Manifest

_MODELS_EVERY_S = 0.25
_POOL_EVERY_S = 0.05  # while objects wait to be read
_PRUNE_EVERY_S = 3600.0
_DOCUMENTS_EVERY_S = 0.05  # while objects wait to be read
_DOCUMENTS_AFTER_S = 5.0  # an answer's documents wait so long for a quiet moment
_NO_IMAGE = np.zeros((0, 0), dtype=np.uint8)
_NO_VECTOR = np.zeros(0, dtype=np.float32)

Images = npt.NDArray[np.uint8]
Vector = npt.NDArray[np.float32]
_Read = tuple[SliceRecord, Images, Outputs | None]  # one frame: what it says, what the model saw, all it gave
_After = Callable[[], None]  # what is done when a write is on disk


class _Work(Struct, frozen=True):
    """One object whose frames, uint8 (H, W) each, the model has to see."""

    claimed: Claimed
    serving: Serving
    opened: Opened
    head: Head
    seen: Sequence[Seen]
    pixels: Sequence[Images]
    watch: Stopwatch


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
        readers: Sequence[Reads] = (read_object,),
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
            readers: open and decode objects, each in a thread: in processes of their own
            (`edge.imaging.reading.Reader`), or in this one.
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
        self._ahead = Ahead(readers)
        self._line = Line(store, spool, models, self._ahead, routes)
        self._builder = builder
        self._building: tuple[AnswerRecord, Future[Documents]] | None = None
        self._models_at = self._prune_at = self._pool_at = self._documents_at = 0.0
        self._keep_s = keep_s
        self._pacs = pacs
        self._held: list[Callable[[], _After]] = []  # what came of objects, not yet written
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
            or self._pool_in_time()
            or self._document_in_time()
            or self._read_some()
            or self._pool_one()
            or self._document_one()
            or self._confirmations.step()
            or self._prune()
        )

    def close(self) -> None:
        """Ends the threads that read ahead."""
        self._ahead.close()

    def _read_some(self) -> bool:
        """Answers what has been read by now: one object that came alone, or those that were read beside the last."""
        taken = self._line.take(self._now())  # claim, read, preprocess
        works: list[_Work] = []
        for coming in taken:
            with self._quarantining(coming.claimed):
                works += self._open(coming)
        outputs = self._infer(works)  # infer, explain
        for work in works:
            with self._quarantining(work.claimed):
                mine = [next(outputs) for _ in work.pixels]
                work.watch.lap("infer")
                self._keep(work, mine)
        self._write_held()
        return bool(taken)

    @contextmanager
    def _quarantining(self, claimed: Claimed) -> Iterator[None]:
        """What one object is to blame for puts that object aside, and nothing else."""
        try:
            yield
        except PeerError as exc:
            self._store.quarantine(claimed, exc.message, self._now())
            get_logger().warning("imaging.quarantined", digest=claimed.digest[:12], reason=exc.message)
        except (TypeError, ValueError, LookupError, ArithmeticError, NotImplementedError, RecursionError) as exc:
            # A defect of ours that one object found: it must not keep all others from being answered.
            self._store.quarantine(claimed, f"Reading failed with {type(exc).__name__}.", self._now())
            where = traceback.extract_tb(exc.__traceback__)[-1]  # not the message: it may quote the data set
            get_logger().error("imaging.defect", digest=claimed.digest[:12], at=f"{where.name}:{where.lineno}")

    def _open(self, coming: Coming) -> list[_Work]:
        """Returns the object when the model has to see it; holds what is to be written otherwise."""
        claimed, serving = coming.claimed, coming.serving
        if coming.outcome:
            self._held.append(lambda: self._finished(claimed, coming.outcome))
            return []
        opened, frames = coming.parts.result()
        image = opened.image
        if image.ours or not (image.has_pixels or image.rows):
            self._held.append(lambda: self._finished(claimed, "ignored"))  # a report, a plan, or a result of ours
            return []
        if not image.has_pixels:
            raise PeerError("The image has no pixel data.")
        if not opened.head:
            self._keep_slice(claimed, opened, serving, None, [])
            return []
        head = serving.manifest.head(opened.head)
        seen = list(frames)
        if not seen:
            raise PeerError("The object holds no frame.")
        stages = {
            "read": opened.read_ms,
            "decode": sum(one.decode_ms for one in seen),
            "preprocess": sum(one.preprocess_ms for one in seen),
        }
        waited = (self._now() - claimed.stored_at) * 1e3 - sum(stages.values())
        watch = Stopwatch(self._clock, wait_ms=waited)
        watch.laps.update(stages)
        return [_Work(claimed, serving, opened, head, seen, [pixels_of(one, head) for one in seen], watch)]

    def _infer(self, works: Sequence[_Work]) -> Iterator[Outputs]:
        """Yields what the model gives for every frame of every object, in runs of as many as pay."""
        pixels = [one for work in works for one in work.pixels]
        if not pixels:
            return
        engine = works[0].serving.engine  # the line gives what was read for one package
        for start in range(0, len(pixels), engine.batch):
            part = pixels[start : start + engine.batch]
            same = [one for one in part if one.shape == part[0].shape]
            runs = [np.stack(part)] if len(same) == len(part) else [one[None] for one in part]
            for run in runs:  # (N, H, W)
                outputs = self._run(engine, run)
                for n in range(len(run)):
                    one = slice(n, n + 1)
                    yield Outputs(outputs.logits[one], outputs.evidence[one], outputs.features[one])

    def _keep(self, work: _Work, outputs: Sequence[Outputs]) -> None:
        """Decides for a projection image, keeps slices until their series is complete."""
        read: list[_Read] = [
            (compose.slice_record(work.claimed, work.opened.image, index, seen.stack, work.head, gave), pixels, gave)
            for index, (seen, pixels, gave) in enumerate(zip(work.seen, work.pixels, outputs, strict=True))
        ]
        if work.head.series:
            self._keep_slice(work.claimed, work.opened, work.serving, work.head, read)
        else:
            self._answer_image(work, read[0])

    def _finished(self, claimed: Claimed, outcome: str) -> _After:
        self._store.finish(claimed, outcome)
        return lambda: None

    def _answer_image(self, work: _Work, read: _Read) -> None:
        claimed, image, head, watch = work.claimed, work.opened.image, work.head, work.watch
        one, pixels, outputs = read
        logits, features = _vector(one.logits), _vector(one.features)
        decided = decide(head, logits, features)  # decide
        if is_blank(pixels):
            decided = replace(decided, reason="the image is blank")
        watch.lap("decide")

        study = compose.study_row(work.opened.texts, image, claimed)
        record = compose.answer_record(
            answer=compose.answer_id(image.study, image.series, image.sop_instance, head.name),
            subject=compose.subject_of(image, self._site_key, image.sop_instance),
            serving=work.serving,
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
            answered_at=0.0,
            timings={},
        )

        def write() -> _After:
            watch.lap("turn")  # of those that were taken together
            self._store.note_study(study)
            stored = self._store.add_answer(replace(record, answered_at=self._now(), timings=dict(watch.laps)))
            self._store.finish(claimed, "answered")

            def after() -> None:
                watch.lap("record")
                self._tell(stored, watch)
                if outputs is not None:
                    self._models.observe(pixels[None], head.name, outputs.logits)

            return after

        self._held.append(write)

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

        def write() -> _After:
            self._store.note_study(study)
            if announced:
                self._store.announce(image.series, *announced)
            first = False
            for record, pixels, _ in read:
                key = f"{image.sop_instance}#{record.source.frame:05d}"
                first |= self._store.add_slice(series, key, record, claimed.association, pixels.tobytes())
            self._store.finish(claimed, "slice" if head else "unassessed")
            _, pixels, outputs = read[0]

            def after() -> None:
                if first and outputs is not None:
                    self._models.observe(pixels[None], name, outputs.logits)

            return after

        self._held.append(write)

    def _write_held(self) -> None:
        """Writes what came of all objects taken together in one transaction: one wait for the disk, not eight."""
        held, self._held = self._held, []
        if held:
            with self._store.writing():
                done = [write() for write in held]
            for after in done:
                after()

    def _pool_in_time(self) -> bool:
        """A series that is complete does not wait for everything else that arrives."""
        now = self._clock.monotonic()
        if now < self._pool_at:
            return False
        self._pool_at = now + _POOL_EVERY_S
        return self._pool_one()

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

    def _document_in_time(self) -> bool:
        """Documents are made when nothing waits to be answered, but they do not wait for that for ever."""
        now = self._clock.monotonic()
        if self._builder is None or now < self._documents_at:
            return False
        self._documents_at = now + _DOCUMENTS_EVERY_S
        if self._building is None:
            record = self._store.undocumented()
            if record is None or self._now() - record.answered_at < _DOCUMENTS_AFTER_S:
                return False
        return self._document_one()

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

    def _run(self, engine: Engine, images: Images) -> Outputs:
        try:
            return engine.run(images)
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
