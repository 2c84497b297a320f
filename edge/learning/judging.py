"""A hospital's own view of a candidate: champion and candidate on the same held-out cases, metrics only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime

from edge.learning.cases import Cases
from models.metrics import auc_difference, balanced_accuracy, macro_auc
from shared.errors import TrustError
from shared.package.input_spec import as_tensor
from shared.package.manifest import Head
from shared.wire.records import HeadJudgement

BATCH = 8
Reader = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]  # (N, H, W) to logits (N, K)


def open_model(path: Path) -> Reader:
    """Returns the reader in an ONNX file, on one thread of the CPU: the process is a guest on this machine.

    Raises:
        TrustError: not a model with an input `image` and an output `logits`.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        session.run(["logits"], {"image": np.zeros((1, 1, 224, 224), np.float32)})
    except Exception as exc:  # onnxruntime's classes have no common base
        raise TrustError(f"{path.name} is not a model that can be judged: {exc}.") from exc

    def read(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        parts = [
            session.run(["logits"], {"image": as_tensor(images[i : i + BATCH])})[0]
            for i in range(0, len(images), BATCH)
        ]
        return np.asarray(np.concatenate(parts), np.float32)  # (N, K)

    return read


def judge(champion: Reader, candidate: Reader, cases: Cases, heads: Sequence[Head]) -> list[HeadJudgement]:
    """Returns one paired comparison a head that has held-out cases of two classes or more."""
    judged = []
    for index, head in enumerate(heads):
        mine = cases.of(index)
        if len(np.unique(mine.labels)) > 1:
            judged.append(_compare(champion(mine.images), candidate(mine.images), mine, head))
    return judged


def _compare(old: npt.NDArray[np.float32], new: npt.NDArray[np.float32], cases: Cases, head: Head) -> HeadJudgement:
    if not 0 <= head.offset <= head.offset + len(head.classes) <= min(old.shape[1], new.shape[1]):
        raise TrustError(f"A model has no columns for the head {head.name}.")
    span = slice(head.offset, head.offset + len(head.classes))
    ours, theirs = new[:, span], old[:, span]  # (n, C)
    difference = auc_difference(ours, theirs, cases.labels)
    return HeadJudgement(
        head=head.name,
        per_class=[int(n) for n in np.bincount(cases.labels, minlength=len(head.classes))],
        auc_champion=macro_auc(theirs, cases.labels),
        auc_candidate=macro_auc(ours, cases.labels),
        auc_difference_low=difference.low,
        auc_difference_high=difference.high,
        balanced_champion=balanced_accuracy(theirs, cases.labels),
        balanced_candidate=balanced_accuracy(ours, cases.labels),
        flipped=float((ours.argmax(1) != theirs.argmax(1)).mean()),
        phantom=bool(cases.phantom.all()),
    )
