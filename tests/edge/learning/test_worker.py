"""The learning process on the shipped baseline: trains, judges, answers when it cannot, survives SIGKILL."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load, save_file

from edge.learning import worker
from edge.learning.cases import read_cases
from edge.learning.judging import judge, open_model
from edge.learning.training import PrefixCache, train
from edge.learning.worker import linger, run_once
from edge.results.cases import CaseStore
from edge.sqlite import open_owned, transaction
from models.data import phantoms
from models.package import BASELINE
from shared.errors import StateError, TrustError
from shared.files import sha256_file
from shared.package.manifest import MANIFEST_NAME, decode_manifest
from shared.update.codec import decode
from shared.update.layout import Layout, norm
from shared.wire.records import Judgement, JudgeTask, ModelUpdate, NamedFile, TrainTask
from shared.wire.stages import decode as decode_record

CHAMPION = sha256_file(BASELINE / MANIFEST_NAME)
MANIFEST = decode_manifest((BASELINE / MANIFEST_NAME).read_bytes())
DRAWN = phantoms(9, "chest-xray", 24, scanner="C", slices=1, keep=1)


def named(path: Path) -> NamedFile:
    return NamedFile(path.name, sha256_file(path), path.stat().st_size)


WEIGHTS = BASELINE / MANIFEST.weights
MODEL = BASELINE / MANIFEST.variant("cpu-u8s8").file


def train_task(number: int = 1, campaign: str = "k", **changes: object) -> TrainTask:
    values: dict = {
        "round": f"{campaign}-{number}", "number": number, "package": CHAMPION, "weights": named(WEIGHTS),
        "trainable": MANIFEST.trainable, "epochs": 1, "learning_rate": 3e-4, "batch": 8, "seed": 3,
        "keep": 0.05, "max_norm": 10.0, "deadline": "",
    }  # fmt: skip
    return TrainTask(**(values | changes))


def judge_task(**changes: object) -> JudgeTask:
    values: dict = {
        "round": "k-1", "package": CHAMPION, "candidate": CHAMPION, "manifest": named(BASELINE / MANIFEST_NAME),
        "model": named(MODEL), "variant": "cpu-u8s8", "deadline": "",
    }  # fmt: skip
    return JudgeTask(**(values | changes))


class Node:
    """A node's state folder as pipeline and uplink leave it."""

    def __init__(self, folder: Path, cases: int = 24) -> None:
        self.state = folder
        (folder / "models").mkdir()
        (folder / "models" / CHAMPION).symlink_to(BASELINE)
        (folder / "learning" / "blobs").mkdir(parents=True)
        for path in (WEIGHTS, MODEL, BASELINE / MANIFEST_NAME):
            shutil.copy(path, folder / "learning" / "blobs" / sha256_file(path))
        (folder / "cases").mkdir()
        CaseStore(folder / "cases" / "cases.sqlite").close()
        db = open_owned(folder / "cases" / "cases.sqlite", "", 2)
        with transaction(db):
            for i in range(cases):
                row = (f"{i:032x}", "chest-xray", int(DRAWN.labels[i]), int(i >= 12), 1, DRAWN.images[i].tobytes())
                db.execute("INSERT INTO cases VALUES (?, ?, ?, ?, ?, ?, 224, 224, x'00', 'p', 'v', 0)", row)
        db.close()
        self.cache = PrefixCache()

    def give(self, task: TrainTask | JudgeTask) -> None:
        (self.state / "learning" / "task.json").write_bytes(msgspec.json.encode(task))

    def run(self) -> bool:
        return run_once(self.state, self.cache)

    def dropped(self) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in (self.state / "outbox" / "drop").glob("*.msg")}

    def update(self, round: str) -> ModelUpdate:
        return decode_record(self.dropped()[f"train-{round}.update.msg"], ModelUpdate)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def layout(_node: Node) -> Layout:
    weights = {n: np.asarray(v, np.float32) for n, v in load(WEIGHTS.read_bytes()).items()}
    return Layout.of(weights, MANIFEST.trainable)


def test_two_rounds_then_a_new_campaign(node: Node) -> None:
    node.give(train_task(1))
    assert node.run()
    assert not node.run()  # done is done
    first = node.update("k-1")
    assert (first.cases, first.base) == (12, sha256_file(WEIGHTS))  # held-out cases do not train
    assert 0 < first.norm <= 10.0
    assert norm(decode(first.blob, layout(node))) == pytest.approx(first.norm, rel=1e-5)
    assert len(first.blob) < 4 * layout(node).size / 25
    residual = (node.state / "learning" / "residual.safetensors").read_bytes()

    node.give(train_task(2))
    assert node.run()
    second = node.update("k-2")
    # the second round sends what the first held back: the same training alone would send something else
    (node.state / "alone").mkdir()
    alone = Node(node.state / "alone")
    alone.give(train_task(2))
    assert alone.run()
    assert alone.update("k-2").blob != second.blob
    assert (node.state / "learning" / "residual.safetensors").read_bytes() != residual

    node.give(train_task(2, campaign="other"))
    assert node.run()
    alone.give(train_task(2, campaign="other"))
    (alone.state / "learning" / "residual.safetensors").unlink()
    assert alone.run()
    assert node.update("other-2").blob == alone.update("other-2").blob  # another lineage: the residual is dropped


def test_training_is_deterministic_and_lowers_the_loss(node: Node) -> None:
    weights = {n: np.asarray(v, np.float32) for n, v in load(WEIGHTS.read_bytes()).items()}
    cases = read_cases(node.state / "cases" / "cases.sqlite", MANIFEST.heads, held_out=False)
    task = train_task(epochs=3, batch=4)
    one = train(weights, cases, MANIFEST.heads, task, PrefixCache())
    two = train(weights, cases, MANIFEST.heads, task, node.cache)
    assert all(np.array_equal(one.delta[n], two.delta[n]) for n in one.delta)
    assert one.loss_after < one.loss_before
    assert set(one.delta) == set(MANIFEST.trainable)
    short = train(weights, cases, MANIFEST.heads, train_task(max_norm=0.01), node.cache)
    assert norm(short.delta) == pytest.approx(0.01, rel=1e-4)


def test_judging_the_champion_against_itself_finds_nothing(node: Node) -> None:
    node.give(judge_task())
    assert node.run()
    said = decode_record(node.dropped()["judge-k-1.judgement.msg"], Judgement)
    (head,) = said.heads
    assert (head.head, head.per_class, head.phantom) == ("chest-xray", [4, 4, 4], True)
    assert head.auc_champion == head.auc_candidate
    assert (head.auc_difference_low, head.auc_difference_high, head.flipped) == (0.0, 0.0, 0.0)


def test_judging_sees_a_better_and_a_constant_model(node: Node) -> None:
    cases = read_cases(node.state / "cases" / "cases.sqlite", MANIFEST.heads, held_out=True)
    old = open_model(MODEL)
    labels = {image.tobytes(): label for image, label in zip(cases.images, cases.labels, strict=True)}

    def knows(images: np.ndarray) -> np.ndarray:
        return np.stack([8.0 * np.eye(10, dtype=np.float32)[labels[i.tobytes()]] for i in images])

    (better,) = judge(old, knows, cases, MANIFEST.heads)
    assert better.auc_candidate == 1.0
    assert better.balanced_candidate == 1.0
    (constant,) = judge(old, lambda images: np.zeros((len(images), 10), np.float32), cases, MANIFEST.heads)
    assert constant.auc_candidate == 0.5
    assert constant.balanced_candidate == pytest.approx(1 / 3)


class TestAnswersThatItCannotTakePart:
    def expect_none(self, node: Node) -> None:
        assert node.run()
        update = node.update("k-1")
        assert (update.cases, update.blob) == (0, b"")

    def test_no_cases(self, tmp_path: Path) -> None:
        node = Node(tmp_path, cases=0)
        node.give(train_task())
        self.expect_none(node)
        node.give(judge_task())
        assert node.run()
        assert decode_record(node.dropped()["judge-k-1.judgement.msg"], Judgement).heads == []

    def test_another_champion(self, node: Node) -> None:
        node.give(train_task(package="0" * 64))
        self.expect_none(node)

    def test_a_tensor_that_may_not_be_trained(self, node: Node) -> None:
        node.give(train_task(trainable=["stem.weight"]))
        self.expect_none(node)

    def test_weights_of_another_architecture(self, node: Node) -> None:
        path = node.state / "w"
        save_file({"head.bias": np.zeros(3, np.float32)}, path)
        path.rename(node.state / "learning" / "blobs" / sha256_file(path))
        task = train_task()
        blob = next(p for p in (node.state / "learning" / "blobs").iterdir() if p.stat().st_size < 500)
        node.give(msgspec.structs.replace(task, weights=NamedFile("w", blob.name, blob.stat().st_size)))
        self.expect_none(node)

    def test_a_model_that_the_candidates_manifest_does_not_name(self, node: Node) -> None:
        node.give(judge_task(model=named(WEIGHTS)))
        assert node.run()
        assert decode_record(node.dropped()["judge-k-1.judgement.msg"], Judgement).heads == []


def test_weights_changed_on_this_disk_are_not_trained_from(node: Node) -> None:
    blob = node.state / "learning" / "blobs" / sha256_file(WEIGHTS)
    blob.write_bytes(blob.read_bytes()[:-1] + b"\1")
    node.give(train_task())
    with pytest.raises(StateError, match="were changed"):
        node.run()
    assert node.dropped() == {}


def test_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"nothing")
    with pytest.raises(TrustError):
        open_model(tmp_path / "m.onnx")


def test_it_ends_when_no_task_comes_and_a_broken_one_does_not_end_it(node: Node) -> None:
    class Stop:
        waits = 0

        def wait(self, _timeout: float) -> bool:
            Stop.waits += 1
            if Stop.waits == 2:
                node.give(judge_task())
            return False

    (node.state / "learning" / "task.json").write_bytes(b"{")
    linger(node.state, seconds=1.0, poll=0.25, stop=Stop())
    assert set(node.dropped()) == {"judge-k-1.judgement.msg"}
    assert Stop.waits >= 4


def test_killed_at_any_instruction_there_is_one_answer(node: Node) -> None:
    node.give(train_task(epochs=2))
    code = "import sys; from pathlib import Path; from edge.learning.training import PrefixCache\n"
    code += "from edge.learning.worker import run_once\nprint('up', flush=True)\n"
    code += "run_once(Path(sys.argv[1]), PrefixCache())"
    rng, seen = random.Random(2), set()
    done = node.state / "learning" / "done" / "k-1-train"
    deadline = time.monotonic() + 200
    wait = 0.2
    while not done.exists():
        assert time.monotonic() < deadline
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(node.state)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert child.stdout is not None
        child.stdout.readline()
        until = time.monotonic() + wait * rng.uniform(0.5, 1.5)
        while time.monotonic() < until and child.poll() is None and not done.exists():
            seen |= set(node.dropped().values())
            time.sleep(0.001)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
        wait *= 2.5
    seen |= set(node.dropped().values())
    assert len(seen) == 1
    assert not node.run()
    assert not list((node.state / "learning").glob("*.answer"))
    assert not list((node.state / "learning").glob("k-1.residual"))


@pytest.mark.parametrize("cut", ["answer", "residual", "done"])
def test_cut_between_any_two_writes(node: Node, monkeypatch: pytest.MonkeyPatch, cut: str) -> None:
    """The process dies right before one of its writes; the next one ends the task with the same bytes."""
    whole = worker.atomic_write

    class PowerCutError(BaseException):
        pass

    def cutting(path: Path, data: bytes, **more: object) -> None:
        if path.suffix == f".{cut}" or (cut == "done" and path.parent.name == "done"):
            raise PowerCutError
        whole(path, data, **more)  # type: ignore[arg-type]

    node.give(train_task())
    monkeypatch.setattr(worker, "atomic_write", cutting)
    with pytest.raises(PowerCutError):
        node.run()
    before = node.dropped()
    monkeypatch.setattr(worker, "atomic_write", whole)
    assert node.run()
    after = node.dropped()
    assert len(after) == 1
    assert before in ({}, after)
    assert (node.state / "learning" / "residual.safetensors").exists()
