"""What an answer is delivered as: the report, the evidence image, and the picture for the page."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import cv2
import numpy as np
import numpy.typing as npt
from msgspec import Struct

from edge.imaging.read import decode_frames, describe, open_object
from edge.results.cases import why_withheld
from edge.results.picture import build_picture, display_image
from edge.results.report import Document, build_report
from edge.results.tables import AnswerRecord
from shared.errors import PeerError, StateError
from shared.log import get_logger

P = ParamSpec("P")
R = TypeVar("R")

_NICE = 10
_PR_SET_PDEATHSIG = 1  # prctl(2)


class Documents(Struct, frozen=True):
    """`state` is "built", or why nothing could be; `display` a PNG, None when no head read the image."""

    state: str
    display: bytes | None
    rows: list[dict[str, Any]]  # of the table deliveries


class Builder:
    """Builds documents and looks at originals for burned-in text, in a niced child process: no answer waits for either.

    The child ends with its parent, also when that is killed. A child that dies over a document gives no document and
    the reason; the next one gets a new child.
    """

    def __init__(self, done: Callable[[], None] = lambda: None) -> None:
        """`done` is called, from a thread of the pool, whenever something is finished."""
        self._done = done
        self._pool = self._start()

    def submit(self, record: AnswerRecord, spool: Path, now: float) -> Future[Documents]:
        """Returns at once; the future's result is that of `build_documents`."""
        return self._run(build_documents, record, spool, now)

    def look(self, path: Path, frame: int) -> Future[str]:
        """Returns at once; the future's result is that of `edge.results.cases.why_withheld`."""
        return self._run(why_withheld, path, frame)

    def _run(self, work: Callable[P, R], *args: P.args, **named: P.kwargs) -> Future[R]:
        try:
            future = self._pool.submit(work, *args, **named)
        except BrokenProcessPool:
            self._pool = self._start()
            future = self._pool.submit(work, *args, **named)
        future.add_done_callback(lambda _: self._done())
        return future

    def close(self) -> None:
        """Ends the child."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _start(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_be_a_child)


def finished(future: Future[Documents]) -> Documents:
    """Returns a future's documents, or why there are none."""
    try:
        return future.result()
    except BrokenProcessPool:
        return Documents("not built: the process that builds documents died over it", None, [])


def _be_a_child() -> None:
    os.nice(_NICE)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def build_documents(record: AnswerRecord, spool: Path, now: float) -> Documents:
    """Returns an answer's documents, made from its record and from the shown image in the spool folder.

    An image whose own attributes cannot be written as DICOM gives no documents, and the reason; the
    answer stands.
    """
    try:
        files = (record.shown.file, *(one.file for one in record.inputs))  # of a late version some have left
        file = next((one for one in files if (spool / one).exists()), record.shown.file)
        dataset = open_object(spool / file)
        documents = [build_report(record, dataset)]
        display = None
        if record.input is not None and file == record.shown.file:
            frames = decode_frames(dataset, describe(dataset))
            frame = next(islice(frames, record.shown.frame, None))
            image = display_image(frame, record.input)
            documents.append(build_picture(record, image, dataset))
            display = png(image)
    except Exception as exc:  # noqa: BLE001 pydicom and highdicom name no family for what a source may hold
        get_logger().error("results.not_built", answer=record.answer, error=f"{type(exc).__name__}")
        reason = exc.message if isinstance(exc, (PeerError, StateError)) else type(exc).__name__
        return Documents(f"not built: {reason}", None, [])
    return Documents("built", display, [_row(one, record, now) for one in documents])


def png(image: npt.NDArray[np.uint8]) -> bytes:
    """Returns a PNG of uint8 (H, W), (H, W, 3) in RGB or (H, W, 4) in RGBA."""
    if image.ndim == 3:
        order = [2, 1, 0, 3][: image.shape[2]]
        image = np.ascontiguousarray(image[..., order])  # OpenCV wants BGR
    done, data = cv2.imencode(".png", image)
    if not done:
        raise StateError("OpenCV cannot write a PNG.")
    return bytes(data.tobytes())


def _row(document: Document, record: AnswerRecord, now: float) -> dict[str, Any]:
    return {
        "sop_instance": document.sop_instance,
        "sop_class": document.sop_class,
        "transfer_syntax": document.transfer_syntax,
        "answer": record.answer,
        "version": record.version,
        "kind": document.kind,
        "data": document.data,
        "state": "waiting",
        "tries": 0,
        "next_at": now,
        "last_error": "",
    }
