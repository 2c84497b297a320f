"""The learning process: do the task that the uplink left, drop the answer, remember that it is done.

An answer is written to `learning/<round>-<kind>.answer` before it is dropped: that is the moment from which
it is the answer. Killed before, the task is done anew; killed after, the same bytes are dropped again under
the same name, which is one message. The residual of error feedback is replaced only after the record that it
belongs to.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from edge.learning.cases import read_cases
from edge.learning.judging import judge, open_model
from edge.learning.training import PrefixCache, train
from edge.uplink.outbox import drop
from shared.errors import RadfleetError, StateError, TrustError
from shared.files import atomic_write, read_limited, sha256_hex
from shared.log import get_logger
from shared.package.manifest import MANIFEST_LIMIT_BYTES, MANIFEST_NAME, Manifest, decode_manifest
from shared.update.codec import encode
from shared.update.layout import Layout, Vector, clip, norm
from shared.wire.records import Judgement, JudgeTask, ModelUpdate, NamedFile, TrainTask
from shared.wire.stages import decode as decode_record
from shared.wire.stages import encode as encode_record

TASK_LIMIT_BYTES = 1_000_000
WEIGHTS_LIMIT_BYTES = 256 * 1024 * 1024
CASES = Path("cases") / "cases.sqlite"

Task = TrainTask | JudgeTask
Answer = ModelUpdate | Judgement


class Stop(Protocol):
    """A threading.Event, or what a test moves by hand."""

    def wait(self, timeout: float) -> bool:
        """Returns True once the process shall end, False after `timeout` seconds."""


def run_once(state: Path, cache: PrefixCache) -> bool:
    """Does the task in `learning/task.json`; False when there is none or it is done.

    A node that cannot take part (it does not hold the champion, it has no case, the task is not for its
    software) answers so, with no cases, because a round waits for answers.

    Args:
        state: the node's state folder.
        cache: kept by the caller from task to task.

    Raises:
        StateError: this node's disk or databases failed; the task stays to be done.
    """
    folder = state / "learning"
    task = read_task(folder / "task.json")
    if task is None:
        return False
    kind = "train" if isinstance(task, TrainTask) else "judge"
    done = folder / "done" / f"{task.round}-{kind}"
    answer, residual = folder / f"{task.round}-{kind}.answer", folder / f"{task.round}.residual"
    if done.exists():
        answer.unlink(missing_ok=True)  # left behind by a process that was killed right here
        return False
    if not answer.exists():
        made, left = _answer(state, task, cache)
        if left is not None:
            atomic_write(residual, left)
        atomic_write(answer, encode_record(made))
    kept, folder_out = read_limited(answer, WEIGHTS_LIMIT_BYTES), state / "outbox" / "drop"
    if isinstance(task, TrainTask):
        drop(folder_out, "update", decode_record(kept, ModelUpdate), name=f"train-{task.round}")
    else:
        drop(folder_out, "judgement", decode_record(kept, Judgement), name=f"judge-{task.round}")
    if residual.exists():
        residual.replace(folder / "residual.safetensors")
    done.parent.mkdir(exist_ok=True)
    atomic_write(done, b"")
    answer.unlink()
    get_logger().info("learning.done", round=task.round, kind=kind)
    return True


def read_task(path: Path) -> Task | None:
    """Returns the task in the file, None when there is none.

    Raises:
        StateError: the file is there and is not a task.
    """
    if not path.exists():
        return None
    try:
        return msgspec.json.decode(read_limited(path, TASK_LIMIT_BYTES), type=TrainTask | JudgeTask | None)
    except msgspec.MsgspecError as exc:
        raise StateError(f"{path} is not a task: {exc}.") from exc


def _answer(state: Path, task: Task, cache: PrefixCache) -> tuple[Answer, bytes | None]:
    try:
        if isinstance(task, TrainTask):
            return _train(state, task, cache)
        return _judge(state, task), None
    except StateError:
        raise
    except RadfleetError as exc:
        get_logger().warning("learning.cannot", round=task.round, reason=str(exc))
    if isinstance(task, TrainTask):
        return _no_cases(task), None
    return Judgement(task.round, task.package, task.candidate, []), None


def _train(state: Path, task: TrainTask, cache: PrefixCache) -> tuple[ModelUpdate, bytes | None]:
    manifest = _manifest(state / "models" / task.package / MANIFEST_NAME, task.package)
    cases = read_cases(state / CASES, manifest.heads, held_out=False)
    if not len(cases):
        return _no_cases(task), None
    trained = train(_weights(state, task.weights), cases, manifest.heads, task, cache)
    residual = _residual(state / "learning" / "residual.safetensors", task, Layout.of(trained.delta))
    rng = np.random.default_rng([task.seed, *task.round.encode()])
    # Clipped with what was left from earlier rounds: the bound is true for what leaves the hospital.
    total = clip(_sum(trained.delta, residual), task.max_norm)
    coded = encode(total, None, task.keep, rng)
    update = ModelUpdate(
        round=task.round,
        base=task.weights.sha256,
        cases=len(cases),
        norm=norm(coded.sent),
        loss_before=trained.loss_before,
        loss_after=trained.loss_after,
        blob=coded.blob,
    )
    get_logger().info(
        "learning.trained", round=task.round, cases=len(cases), length=len(coded.blob),
        norm=round(update.norm, 4), before=round(trained.loss_before, 4), after=round(trained.loss_after, 4),
    )  # fmt: skip
    return update, save(coded.residual, metadata={"lineage": _lineage(task)})


def _judge(state: Path, task: JudgeTask) -> Judgement:
    champion = state / "models" / task.package
    manifest = _manifest(champion / MANIFEST_NAME, task.package)
    proposed = _manifest(_blob(state, task.manifest), task.candidate)
    named = proposed.file(proposed.variant(task.variant).file)
    if (named.name, named.sha256) != (task.model.name, task.model.sha256):
        raise TrustError("The task's model is not the variant that the candidate's manifest names.")
    cases = read_cases(state / CASES, manifest.heads, held_out=True)
    if not len(cases):
        return Judgement(task.round, task.package, task.candidate, [])
    old = open_model(champion / manifest.variant(task.variant).file)
    new = open_model(_blob(state, task.model))
    return Judgement(task.round, task.package, task.candidate, judge(old, new, cases, manifest.heads))


def _no_cases(task: TrainTask) -> ModelUpdate:
    return ModelUpdate(task.round, task.weights.sha256, 0, 0.0, 0.0, 0.0, b"")


def _manifest(path: Path, digest: str) -> Manifest:
    if not path.is_file():
        raise TrustError(f"This node does not hold the package {digest[:12]}.")
    data = read_limited(path, MANIFEST_LIMIT_BYTES)
    if sha256_hex(data) != digest:
        raise TrustError(f"{path} is not the manifest {digest[:12]}.")
    return decode_manifest(data)


def _blob(state: Path, file: NamedFile) -> Path:
    """The uplink verified the blob before it wrote the task."""
    path = state / "learning" / "blobs" / file.sha256
    if not path.is_file():
        raise StateError(f"The task's file {file.name} is not in learning/blobs.")
    return path


def _weights(state: Path, file: NamedFile) -> Mapping[str, Vector]:
    data = read_limited(_blob(state, file), WEIGHTS_LIMIT_BYTES)
    if sha256_hex(data) != file.sha256:
        raise StateError(f"The weights in learning/blobs/{file.sha256[:12]} were changed on this disk.")
    try:
        return {name: np.asarray(value, np.float32) for name, value in load(data).items()}
    except SafetensorError as exc:
        raise TrustError(f"The task's weights cannot be read: {exc}.") from exc


def _lineage(task: TrainTask) -> str:
    """A residual makes sense against weights that descend from its own: one campaign, champion and layout."""
    campaign = task.round.rpartition("-")[0]
    return sha256_hex(msgspec.json.encode([campaign, task.package, sorted(task.trainable)]))


def _residual(path: Path, task: TrainTask, layout: Layout) -> dict[str, Vector] | None:
    """Returns what earlier rounds of this campaign left unsent; None when there is none of this lineage."""
    if not path.is_file():
        return None
    data = read_limited(path, WEIGHTS_LIMIT_BYTES)
    try:
        metadata = msgspec.json.decode(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        if metadata["lineage"] != _lineage(task):
            return None
        tensors = {name: np.asarray(value, np.float32) for name, value in load(data).items()}
        layout.check(tensors)
    except (SafetensorError, msgspec.MsgspecError, RadfleetError, KeyError, ValueError):
        get_logger().warning("learning.residual_dropped", round=task.round)
        return None
    return tensors


def _sum(delta: Mapping[str, Vector], residual: Mapping[str, Vector] | None) -> dict[str, Vector]:
    return dict(delta) if residual is None else {name: delta[name] + residual[name] for name in delta}


def linger(state: Path, *, seconds: float, poll: float, stop: Stop) -> None:
    """Does tasks until none came for `seconds` or `stop` is set; the supervisor starts it for the next.

    A round follows the last within seconds, and torch takes longer to load than a hospital needs to train.
    """
    cache = PrefixCache()
    idle = 0.0
    while idle < seconds:
        try:
            worked = run_once(state, cache)
        except StateError as exc:  # a file of a task that was just taken back, or a disk that may recover
            get_logger().warning("learning.waiting", reason=str(exc))
            worked = False
        if worked:
            idle = 0.0
        elif stop.wait(poll):
            return
        else:
            idle += poll
