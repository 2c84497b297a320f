"""An answer's record out of what the stages of the main path made."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from edge.imaging.pseudonym import case_pseudonym, is_held_out
from edge.imaging.read import ImageHead, Stack
from edge.inference.decide import Answer
from edge.inference.engine import Engine, Outputs
from edge.results.store import Claimed
from edge.results.tables import AnswerRecord, InputRef, SliceRecord, Subject
from shared.package.manifest import Head, Manifest

Array = npt.NDArray[np.float32]


class Serving(Struct, frozen=True):
    """What answers now: one engine, its package's manifest, and the manifest's digest."""

    engine: Engine
    manifest: Manifest
    digest: str


def answer_id(study: str, series: str, sop_instance: str, head: str) -> str:
    """Returns the name of an answer over all its versions; `sop_instance` is empty for a series."""
    return hashlib.sha256("\0".join((study, series, sop_instance, head)).encode()).hexdigest()[:32]


def subject_of(image: ImageHead, site_key: bytes, uid: str) -> Subject:
    """Returns the subject of an answer; `uid` is that of the image or of the series."""
    return Subject(
        study=image.study,
        series=image.series,
        modality=image.modality,
        case=case_pseudonym(site_key, image.patient_id, uid),
        held_out=is_held_out(site_key, image.patient_id, image.study),
        phantom=image.phantom,
    )


def study_row(texts: Mapping[str, str], image: ImageHead, claimed: Claimed) -> dict[str, str | float]:
    """Returns the worklist's row of a study, `texts` being `worklist_texts`; it stays on the node."""
    return {"study": image.study, **texts, "first_stored_at": claimed.stored_at}


def slice_record(
    claimed: Claimed, image: ImageHead, frame: int, stack: Stack, head: Head, outputs: Outputs
) -> SliceRecord:
    """Returns what one frame says to one head: the head's own classes out of the outputs of one image."""
    classes = slice(head.offset, head.offset + len(head.classes))
    evidence = outputs.evidence[0, classes]  # (C, h, w)
    return SliceRecord(
        source=input_ref(claimed, image, frame),
        logits=outputs.logits[0, classes].astype("<f4").tobytes(),
        evidence=evidence.astype("<f4").tobytes(),
        evidence_shape=(evidence.shape[0], evidence.shape[1], evidence.shape[2]),
        features=outputs.features[0].astype("<f4").tobytes(),
        stored_at=claimed.stored_at,
        stack=stack,
    )


def unread_slice(claimed: Claimed, image: ImageHead) -> SliceRecord:
    """Returns the record of an object that no head reads."""
    return SliceRecord(input_ref(claimed, image, 0), b"", b"", (0, 0, 0), b"", claimed.stored_at)


def input_ref(claimed: Claimed, image: ImageHead, frame: int) -> InputRef:
    """Returns the reference to one frame of one object."""
    return InputRef(image.sop_instance, image.sop_class, claimed.digest, claimed.file, frame)


def answer_record(
    *,
    answer: str,
    subject: Subject,
    serving: Serving,
    head: Head | None,
    decided: Answer | None,
    unassessed: str,
    inputs: Sequence[InputRef],
    shown: SliceRecord,
    image: npt.NDArray[np.uint8],
    logits: Array,
    features: Array,
    conflict: bool,
    complete: str,
    received_at: float,
    stored_at: float,
    answered_at: float,
    timings: Mapping[str, float],
) -> AnswerRecord:
    """Returns the record of one answer, version 0 (the store numbers it).

    Args:
        answer: its name (`answer_id`).
        subject: whom it is about.
        serving: what answered; for the package's identity in the record.
        head: the head that read it, with `decided`; None when no head did, with `unassessed` saying why.
        decided: the head's answer.
        unassessed: the reason when `head` is None.
        inputs: everything that went in.
        shown: the one image or slice that page and report show, with its evidence.
        image: its model input, uint8 (H, W).
        logits: float32 (C,), pooled for a series.
        features: float32 (D,), pooled for a series; kept as float16.
        conflict: other bytes came under the same SOP Instance UID.
        complete: why the series was thought complete.
        received_at: first byte of the first image, seconds since 1970.
        stored_at: last image durable, seconds since 1970.
        answered_at: now, seconds since 1970.
        timings: milliseconds by stage.
    """
    return AnswerRecord(
        answer=answer,
        version=0,
        study=subject.study,
        series=subject.series,
        modality=subject.modality,
        head=head.name if head else "",
        title=head.title if head else "",
        classes=tuple(head.classes) if head else (),
        normal=head.normal if head else -1,
        input=head.input if head else None,
        probabilities=decided.probabilities if decided else (),
        chosen=decided.chosen if decided else -1,
        reason=decided.reason if decided else unassessed,
        distance=decided.distance if decided else 0.0,
        package=serving.digest,
        package_name=serving.manifest.name,
        release=serving.manifest.release,
        variant=serving.engine.variant,
        provider=serving.engine.provider,
        degraded=serving.engine.degraded,
        weights=serving.engine.digest,
        inputs=tuple(inputs),
        shown=shown.source,
        image=image.tobytes(),
        image_shape=(image.shape[0], image.shape[1]),
        logits=logits.astype("<f4").tobytes(),
        evidence=shown.evidence,
        evidence_shape=shown.evidence_shape,
        features=features.astype("<f2").tobytes(),
        case=subject.case,
        held_out=subject.held_out,
        phantom=subject.phantom,
        conflict=conflict,
        complete=complete,
        received_at=received_at,
        stored_at=stored_at,
        answered_at=answered_at,
        timings=dict(timings),
    )
