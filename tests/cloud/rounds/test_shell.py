"""Campaigns on a real database: the whole path, handlers included, and processes killed between any two steps."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import numpy as np
import pytest
from sqlalchemy import Engine, func, select

from cloud.objects import Objects
from cloud.rounds.handlers import take_features, take_judgement, take_update
from cloud.rounds.lease import LEASE_S, hold
from cloud.rounds.machine import Built, Plan, State, Weights
from cloud.rounds.shell import Rounds, load, start_campaign
from cloud.rounds.tables import campaigns, events, features, judgements, rounds, updates
from cloud.store import open_engine, upgrade
from cloud.training import jobs
from cloud.training.gate import ReferenceHead, Verdict
from cloud.training.tables import jobs as job_rows
from cloud.training.trainer import Trainer
from shared.clock import SystemClock
from shared.errors import LinkError, PeerError, StateError
from shared.update.codec import encode
from shared.wire.envelope import Header
from shared.wire.records import (
    FeatureBatch,
    FeatureRow,
    HeadJudgement,
    Judgement,
    JudgeTask,
    ModelUpdate,
    NamedFile,
    TrainTask,
)

NODES = [("a", "n1"), ("b", "n1"), ("c", "n1")]
SHAPE = (3, 4)
WEIGHTS = Weights(NamedFile("weights.safetensors", "a" * 64, 10), [("head.weight", list(SHAPE))])
CHAMPION, CANDIDATE = "b" * 64, "c" * 64
BUILT = Built(
    CANDIDATE,
    NamedFile("manifest.json", CANDIDATE, 5),
    NamedFile("m.onnx", "d" * 64, 9),
    [ReferenceHead("x", [20, 20], 0.9, 0.9, 0.9, 0.0, 0.0)],
)
Task = TrainTask | JudgeTask | None


class HandClock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.at = datetime(2026, 11, 22, tzinfo=UTC)

    def now(self) -> datetime:
        return self.at

    def monotonic(self) -> float:
        return self.at.timestamp()


def header(site: str, stage: str = "update") -> Header:
    return Header(1, site, "n1", "i1", stage, "0" * 32, 1, "", "0" * 16, 0)  # type: ignore[arg-type]


def update_for(task: TrainTask, seed: int = 0, cases: int = 10) -> ModelUpdate:
    delta = {"head.weight": np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32) * 0.01}
    blob = encode(delta, None, 1.0, np.random.default_rng(0)).blob if cases else b""
    return ModelUpdate(task.round, task.weights.sha256, cases, 0.1, 1.0, 0.5, blob)


def judgement_for(task: JudgeTask, better: bool) -> Judgement:
    new = 0.95 if better else 0.7
    row = HeadJudgement("x", [12, 12], 0.7, new, new - 0.75, new - 0.65, 0.6, new, 0.2, False)
    return Judgement(task.round, task.package, task.candidate, [row])


class Cloud:
    """The rounds room on a database of its own; trainer and nodes are played by function calls."""

    def __init__(self, folder: Path) -> None:
        url = f"sqlite:///{folder}/cloud.sqlite"
        upgrade(url)
        self.engine: Engine = open_engine(url)
        self.objects = Objects(str(folder / "objects"))
        self.clock = HandClock()
        self.tasks: dict[tuple[str, str], Task] = {}
        self.registered: list[Verdict] = []
        self.rounds = self.mover("first")

    def mover(self, holder: str) -> Rounds:
        def assign(_conn: object, site: str, node: str, task: Task) -> None:
            self.tasks[site, node] = task

        return Rounds(self.engine, assign, self.registered.append, self.clock, holder)

    def start(self, id: str = "k", **plan: object) -> None:
        with self.engine.begin() as conn:
            start_campaign(
                conn,
                id=id,
                champion=CHAMPION,
                nodes=NODES,
                plan=Plan(**plan),
                now=self.clock.now(),  # type: ignore[arg-type]
            )

    def work(self, kind: str, _given: dict) -> dict:
        return msgspec.to_builtins(BUILT if kind == "build" else WEIGHTS)

    def settle(self) -> None:
        """Rounds and trainer do all they can."""
        trainer = Trainer(self.engine, self.work, self.clock, "t")
        while self.rounds.step() or trainer.step():
            pass

    def answer(self, site: str, *, better: bool = True, cases: int = 10) -> None:
        task = self.tasks[site, "n1"]
        with self.engine.begin() as conn:
            if isinstance(task, TrainTask):
                take_update(conn, header(site), update_for(task, ord(site), cases), self.objects, self.clock)
            elif isinstance(task, JudgeTask):
                take_judgement(conn, header(site), judgement_for(task, better), self.clock)

    def state(self, id: str = "k") -> State:
        with self.engine.connect() as conn:
            return load(conn, id).state


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    made = Cloud(tmp_path)
    yield made
    made.engine.dispose()


def round_trip(cloud: Cloud, *, better: bool) -> None:
    for _ in range(2):  # training, judging
        cloud.settle()
        for site, _ in NODES:
            cloud.answer(site, better=better)
    cloud.settle()


def test_from_features_to_registry(cloud: Cloud) -> None:
    cloud.start()
    round_trip(cloud, better=False)
    assert cloud.state() is State.TRAINING
    round_trip(cloud, better=True)
    assert cloud.state() is State.REGISTERED
    assert [v.decision for v in cloud.registered] == ["pass"]
    assert set(cloud.tasks.values()) == {None}
    with cloud.engine.connect() as conn:
        kept = conn.execute(select(rounds).order_by(rounds.c.number)).all()
        said = conn.execute(select(events.c.what).order_by(events.c.id)).scalars().all()
    assert [(row.id, row.verdict["decision"], row.candidate) for row in kept] == [
        ("k-1", "fail", CANDIDATE),
        ("k-2", "pass", CANDIDATE),
    ]
    one = ["training", "aggregating", "building", "judging"]
    assert said == ["started", *one, *one, "registered"]


def test_fast_lane_asks_no_hospital_to_train(cloud: Cloud) -> None:
    cloud.start(lane="fast")
    cloud.settle()
    assert all(isinstance(task, JudgeTask) for task in cloud.tasks.values())
    for site, _ in NODES:
        cloud.answer(site, better=False)
    cloud.settle()
    assert cloud.state() is State.EXHAUSTED
    assert cloud.registered == []


def test_one_campaign_at_a_time(cloud: Cloud) -> None:
    cloud.start()
    with pytest.raises(PeerError, match="is running"):
        cloud.start("other")


def test_a_silent_hospital_is_not_waited_for_beyond_the_deadline(cloud: Cloud) -> None:
    cloud.start()
    cloud.settle()
    cloud.answer("a")
    cloud.answer("b")
    cloud.settle()
    assert cloud.state() is State.TRAINING
    late = cloud.tasks["c", "n1"]
    assert isinstance(late, TrainTask)
    cloud.clock.at += timedelta(seconds=301)
    cloud.settle()
    assert cloud.state() is State.JUDGING
    with cloud.engine.begin() as conn:
        take_update(conn, header("c"), update_for(late), cloud.objects, cloud.clock)
        rows = conn.execute(select(updates.c.site, updates.c.late).order_by(updates.c.site)).all()
    assert [tuple(row) for row in rows] == [("a", False), ("b", False), ("c", True)]


def test_hospitals_without_cases_answer_and_have_no_part(cloud: Cloud) -> None:
    cloud.start()
    cloud.settle()
    for site, cases in (("a", 0), ("b", 0), ("c", 5)):
        cloud.answer(site, cases=cases)
    cloud.settle()
    assert cloud.state() is State.JUDGING


def test_a_failed_job_stops_the_campaign_with_its_reason(cloud: Cloud) -> None:
    cloud.start()

    def broken(_kind: str, _given: dict) -> dict:
        raise StateError("the disk is gone")

    assert Trainer(cloud.engine, broken, cloud.clock, "t").step()
    cloud.rounds.step()
    assert cloud.state() is State.STOPPED
    with cloud.engine.connect() as conn:
        assert load(conn, "k").progress.reason == "refit: the disk is gone"


class TestHandlers:
    def test_the_same_answer_twice_is_one_row(self, cloud: Cloud) -> None:
        cloud.start()
        cloud.settle()
        cloud.answer("a")
        cloud.answer("a")
        with cloud.engine.connect() as conn:
            assert conn.execute(select(func.count()).select_from(updates)).scalar() == 1

    def test_another_answer_is_refused(self, cloud: Cloud) -> None:
        cloud.start()
        cloud.settle()
        cloud.answer("a")
        task = cloud.tasks["a", "n1"]
        assert isinstance(task, TrainTask)
        with cloud.engine.begin() as conn, pytest.raises(PeerError, match="something else"):
            take_update(conn, header("a"), update_for(task, seed=9), cloud.objects, cloud.clock)

    def test_no_such_round(self, cloud: Cloud) -> None:
        sent = ModelUpdate("nobody-1", "a" * 64, 0, 0.0, 0.0, 0.0, b"")
        with cloud.engine.begin() as conn, pytest.raises(PeerError, match="no round"):
            take_update(conn, header("a"), sent, cloud.objects, cloud.clock)

    def test_judgement_of_another_candidate(self, cloud: Cloud) -> None:
        cloud.start(lane="fast")
        cloud.settle()
        task = cloud.tasks["a", "n1"]
        assert isinstance(task, JudgeTask)
        other = msgspec.structs.replace(judgement_for(task, better=True), candidate="e" * 64)
        with cloud.engine.begin() as conn, pytest.raises(PeerError, match="candidate"):
            take_judgement(conn, header("a"), other, cloud.clock)

    def test_a_judgement_that_is_no_number_is_kept_and_refused_by_the_gate(self, cloud: Cloud) -> None:
        cloud.start(lane="fast")
        cloud.settle()
        for site, _ in NODES:
            task = cloud.tasks[site, "n1"]
            assert isinstance(task, JudgeTask)
            said = judgement_for(task, better=True)
            bad = msgspec.structs.replace(said.heads[0], auc_candidate=float("nan"))
            with cloud.engine.begin() as conn:
                take_judgement(conn, header(site), msgspec.structs.replace(said, heads=[bad]), cloud.clock)
        cloud.settle()
        assert cloud.state() is State.EXHAUSTED
        assert cloud.registered == []

    def test_features_are_upserted_with_their_newest_label(self, cloud: Cloud) -> None:
        embedding = np.ones(192, "<f2").tobytes()
        with cloud.engine.begin() as conn:
            for label in (0, 2):
                row = FeatureRow("0" * 32, "x", label, False, embedding)
                take_features(conn, header("a", "features"), FeatureBatch(CHAMPION, "cpu-u8s8", [row]), cloud.clock)
            kept = conn.execute(select(features)).all()
        assert [(row.label, row.data) for row in kept] == [(2, embedding)]

    @pytest.mark.parametrize("data", [b"", b"1", bytes(2 * 5000), np.array([np.nan], "<f2").tobytes()])
    def test_embeddings_that_are_none(self, cloud: Cloud, data: bytes) -> None:
        batch = FeatureBatch(CHAMPION, "cpu-u8s8", [FeatureRow("0" * 32, "x", 0, False, data)])
        with cloud.engine.begin() as conn, pytest.raises(PeerError):
            take_features(conn, header("a", "features"), batch, cloud.clock)


class TestLease:
    def test_one_holder_until_it_lapses_then_another_with_a_higher_fence(self, cloud: Cloud) -> None:
        now = cloud.clock.now()
        with cloud.engine.begin() as conn:
            assert hold(conn, "rounds", "one", now) == 1
            assert hold(conn, "rounds", "two", now) is None
            assert hold(conn, "rounds", "one", now) == 1
            later = now + timedelta(seconds=LEASE_S + 1)
            assert hold(conn, "rounds", "two", later) == 2
            assert hold(conn, "rounds", "one", later) is None

    def test_a_holder_that_slept_past_its_lease_moves_nothing(self, cloud: Cloud) -> None:
        cloud.start()
        Trainer(cloud.engine, cloud.work, cloud.clock, "t").step()
        with cloud.engine.begin() as conn:
            hold(conn, "rounds", "second", cloud.clock.now() + timedelta(seconds=1))
        assert cloud.mover("first").step() is False
        assert cloud.state() is State.REFIT
        assert cloud.mover("second").step() is True


class TestJobs:
    def test_asked_twice_is_one(self, cloud: Cloud) -> None:
        with cloud.engine.begin() as conn:
            jobs.ask(conn, "k-1-build", "build", {})
            jobs.ask(conn, "k-1-build", "build", {})
            assert conn.execute(select(func.count()).select_from(job_rows)).scalar() == 1

    def test_a_dead_trainers_job_is_taken_over_and_its_output_ignored(self, cloud: Cloud) -> None:
        with cloud.engine.begin() as conn:
            jobs.ask(conn, "j", "build", {})
            first = jobs.claim(conn, "one", cloud.clock.now())
            assert first is not None
            assert jobs.claim(conn, "two", cloud.clock.now()) is None
            cloud.clock.at += timedelta(seconds=jobs.LEASE_S + 1)
            second = jobs.claim(conn, "two", cloud.clock.now())
            assert second is not None
            assert not jobs.extend(conn, first, cloud.clock.now())
            assert not jobs.finish(conn, first, {"stale": True})
            assert jobs.finish(conn, second, {"fresh": True})
            assert conn.execute(select(job_rows.c.output)).scalar() == {"fresh": True}

    def test_a_job_that_kills_trainers_fails_in_the_end(self, cloud: Cloud) -> None:
        with cloud.engine.begin() as conn:
            jobs.ask(conn, "j", "build", {})
            for turn in range(jobs.MAX_ATTEMPTS):
                assert jobs.claim(conn, f"t{turn}", cloud.clock.now()) is not None
                cloud.clock.at += timedelta(seconds=jobs.LEASE_S + 1)
            assert jobs.claim(conn, "last", cloud.clock.now()) is None
            row = conn.execute(select(job_rows)).one()
        assert (row.state, row.reason) == ("failed", "the trainer died 3 times at this job")

    def test_a_store_that_is_away_leaves_the_job_to_be_done(self, cloud: Cloud) -> None:
        with cloud.engine.begin() as conn:
            jobs.ask(conn, "j", "build", {})

        def away(_kind: str, _given: dict) -> dict:
            raise LinkError("no store")

        with pytest.raises(LinkError):
            Trainer(cloud.engine, away, cloud.clock, "t").step()
        cloud.clock.at += timedelta(seconds=jobs.LEASE_S + 1)
        assert Trainer(cloud.engine, cloud.work, cloud.clock, "t2").step()


CHILD = """
import sys, time
from pathlib import Path
from cloud.rounds.shell import Rounds
from cloud.store import open_engine
from cloud.training.trainer import Trainer
from shared.clock import SystemClock
from tests.cloud.rounds.test_shell import CANDIDATE, Cloud, FileTasks
import cloud.rounds.lease, cloud.training.jobs
cloud.rounds.lease.LEASE_S = cloud.training.jobs.LEASE_S = 0.3
cloud.training.jobs.MAX_ATTEMPTS = 1000
folder, holder = Path(sys.argv[1]), sys.argv[2]
engine = open_engine(f"sqlite:///{folder}/cloud.sqlite")
tasks = FileTasks(folder)
rounds = Rounds(engine, tasks.assign, tasks.register, SystemClock(), holder)
trainer = Trainer(engine, lambda kind, given: Cloud.work(None, kind, given), SystemClock(), holder)
print("up", flush=True)
while True:
    if not (rounds.step() or trainer.step()):
        time.sleep(0.005)
"""


class FileTasks:
    """What the killed process's actions leave behind: tasks as rows of a table, verdicts as files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def assign(self, conn, site: str, node: str, task: Task) -> None:
        conn.exec_driver_sql("CREATE TABLE IF NOT EXISTS tasks (site TEXT PRIMARY KEY, body BLOB)")
        conn.exec_driver_sql("INSERT OR REPLACE INTO tasks VALUES (?, ?)", (site, msgspec.json.encode(task)))

    def register(self, verdict: Verdict) -> None:
        (self.folder / f"registered-{verdict.candidate}").write_bytes(msgspec.json.encode(verdict))

    def read(self, conn) -> dict[str, Task]:
        if not conn.exec_driver_sql("SELECT name FROM sqlite_master WHERE name = 'tasks'").all():
            return {}
        rows = conn.exec_driver_sql("SELECT site, body FROM tasks").all()
        return {site: msgspec.json.decode(body, type=Task) for site, body in rows}


def test_killed_at_any_instruction_the_campaign_goes_on(tmp_path: Path) -> None:
    """Rounds and trainer are SIGKILLed at random while nodes answer; four rounds happen once each, in order."""
    cloud = Cloud(tmp_path)
    cloud.clock = SystemClock()  # type: ignore[assignment]
    cloud.start(max_rounds=4)
    rng, tasks, kills = random.Random(4), FileTasks(tmp_path), 0
    deadline = time.monotonic() + 120
    while cloud.state() not in {State.REGISTERED, State.EXHAUSTED, State.STOPPED}:
        assert time.monotonic() < deadline
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path), f"h{kills}"], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        child.stdout.readline()
        until = time.monotonic() + rng.uniform(0.0, 0.5)
        while time.monotonic() < until:
            with cloud.engine.begin() as conn:
                for site, task in tasks.read(conn).items():
                    if isinstance(task, TrainTask):
                        take_update(conn, header(site), update_for(task), cloud.objects, cloud.clock)
                    elif isinstance(task, JudgeTask):
                        last = task.round.endswith("-4")
                        take_judgement(conn, header(site), judgement_for(task, better=last), cloud.clock)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
        kills += 1
    assert kills >= 3
    assert cloud.state() is State.REGISTERED
    assert [p.name for p in tmp_path.glob("registered-*")] == [f"registered-{CANDIDATE}"]
    with cloud.engine.connect() as conn:
        ended = conn.execute(select(rounds.c.id, rounds.c.verdict).order_by(rounds.c.number)).all()
        asked = conn.execute(select(job_rows.c.key).order_by(job_rows.c.id)).scalars().all()
        answers = conn.execute(select(func.count()).select_from(updates)).scalar()
        judged = conn.execute(select(func.count()).select_from(judgements)).scalar()
        assert conn.execute(select(func.count()).select_from(campaigns)).scalar() == 1
    assert [row.id for row in ended] == ["k-1", "k-2", "k-3", "k-4"]
    assert [row.verdict["decision"] for row in ended] == ["fail", "fail", "fail", "pass"]
    assert asked == ["k-0-refit"] + [f"k-{n}-{kind}" for n in range(1, 5) for kind in ("aggregate", "build")]
    assert (answers, judged) == (12, 12)
    cloud.engine.dispose()
