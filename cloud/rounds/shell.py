"""The thin shell round the machine: facts from SQL, one transition, its actions, all in one transaction.

Killed between any two instructions, the next `step` finds either the old state or the new one with everything
that belongs to it: tasks, jobs and registry entries are rows of the same transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import msgspec
from sqlalchemy import Connection, Engine, Row, insert, select, update

from cloud.rounds import machine
from cloud.rounds.lease import hold
from cloud.rounds.machine import Built, Campaign, Facts, Plan, Progress, State, Weights
from cloud.rounds.tables import campaigns, events, judgements, rounds, updates
from cloud.training import jobs
from cloud.training.gate import Verdict
from cloud.training.tables import jobs as job_rows
from shared.clock import Clock
from shared.errors import PeerError, StateError
from shared.log import get_logger
from shared.wire.records import HeadJudgement, JudgeTask, TrainTask

Assign = Callable[[Connection, str, str, TrainTask | JudgeTask | None], None]  # site, node, its task
Register = Callable[[Verdict], None]  # the same verdict twice is one entry

T = TypeVar("T")
_KIND = {State.REFIT: "refit", State.AGGREGATING: "aggregate", State.BUILDING: "build"}
_OUTPUT: Mapping[str, type[Weights] | type[Built]] = {"refit": Weights, "aggregate": Weights, "build": Built}


def start_campaign(
    conn: Connection, *, id: str, champion: str, nodes: Sequence[tuple[str, str]], plan: Plan, now: datetime
) -> None:
    """Records a campaign and asks for its first job.

    Args:
        conn: in a transaction.
        id: at most 16 characters of a-z, 0-9; a new one.
        champion: digest of the package whose manifest and files are in the object store.
        nodes: (site, node) of those that take part.
        plan: how to learn.
        now: the time.

    Raises:
        PeerError: no node, or a campaign is still running: a node has one task at a time.
    """
    if not nodes:
        raise PeerError("A campaign needs at least one node.")
    if active(conn):
        raise PeerError("A campaign is running.", cure="Wait for its end; a node has one task at a time.")
    campaign = Campaign(id, State.REFIT, champion, tuple(nodes), plan, 0, Progress(), now)
    conn.execute(insert(campaigns).values(started_at=now, **_row(campaign)))
    _note(conn, campaign, now, "started", {"nodes": len(nodes), "lane": plan.lane})
    _start_job(conn, campaign, "refit")


def active(conn: Connection) -> list[Campaign]:
    """Returns the campaigns that have not ended."""
    rows = conn.execute(select(campaigns).where(campaigns.c.state.not_in([s.value for s in machine.FINAL])))
    return [_campaign(row) for row in rows]


def load(conn: Connection, id: str) -> Campaign:
    """Returns one campaign; PeerError when there is none."""
    row = conn.execute(select(campaigns).where(campaigns.c.id == id)).first()
    if row is None:
        raise PeerError(f"There is no campaign {id}.")
    return _campaign(row)


@dataclass(frozen=True)
class Rounds:
    """Moves every campaign that can move.

    `assign` writes in the transaction it is given; `register` must take the same verdict twice.
    """

    engine: Engine
    assign: Assign
    register: Register
    clock: Clock
    holder: str  # unique to this process

    def step(self) -> bool:
        """Moves each campaign at most one transition; True when one moved."""
        with self.engine.connect().execution_options(read_only=True) as conn:
            due = [c.id for c in active(conn) if self._next(conn, c)[1]]
        moved = False
        for id in due:
            with self.engine.begin() as conn:
                if hold(conn, "rounds", self.holder, self.clock.now()) is None:
                    return moved
                moved |= self._move(conn, id)
        return moved

    def _next(self, conn: Connection, campaign: Campaign) -> machine.Step:
        return machine.advance(campaign, facts(conn, campaign), self.clock.now())

    def _move(self, conn: Connection, id: str) -> bool:
        before = load(conn, id)
        after, actions = self._next(conn, before)
        if not actions:
            return False
        conn.execute(update(campaigns).where(campaigns.c.id == id).values(_row(after)))
        for action in actions:
            self._perform(conn, after, action)
        now = self.clock.now()
        seconds = round((now - before.since).total_seconds(), 3)
        detail = {"from": before.state.value, "round": after.number, "seconds": seconds}
        _note(
            conn,
            after,
            now,
            after.state.value,
            detail | ({"reason": after.progress.reason} if after.progress.reason else {}),
        )
        get_logger().info("rounds.moved", campaign=id, to=after.state.value, **detail)
        return True

    def _perform(self, conn: Connection, campaign: Campaign, action: machine.Action) -> None:
        now = self.clock.now()
        match action:
            case machine.StartJob(kind):
                _start_job(conn, campaign, kind)
                if kind == "aggregate":
                    _set_round(conn, campaign.round, collecting=False)
            case machine.OpenRound(train):
                _open_round(conn, campaign, train, now)
                if train:
                    self._give(conn, campaign, _train_task(campaign, now))
            case machine.AskJudges():
                task = _judge_task(campaign, now)
                _set_round(conn, campaign.round, candidate=task.candidate)
                self._give(conn, campaign, task)
            case machine.CloseRound(round, verdict):
                _set_round(conn, round, verdict=msgspec.to_builtins(verdict), closed_at=now)
                get_logger().info("rounds.gated", round=round, decision=verdict.decision, reasons=verdict.reasons)
            case machine.Register():
                self.register(_made(campaign.progress.verdict))
            case machine.Dismiss():
                self._give(conn, campaign, None)

    def _give(self, conn: Connection, campaign: Campaign, task: TrainTask | JudgeTask | None) -> None:
        for site, node in campaign.nodes:
            self.assign(conn, site, node, task)


def facts(conn: Connection, campaign: Campaign) -> Facts:
    """Returns what the database knows about the state the campaign is in."""
    if campaign.state in _KIND:
        kind = _KIND[campaign.state]
        row = conn.execute(select(job_rows).where(job_rows.c.key == _key(campaign, kind))).first()
        if row is None or row.state not in {"done", "failed"}:
            return Facts()
        if row.state == "failed":
            return Facts(failed=row.reason)
        return Facts(job=msgspec.convert(row.output, _OUTPUT[kind]))
    if campaign.state is State.TRAINING:
        here = (updates.c.round == campaign.round) & updates.c.late.is_(False)
        cases = conn.execute(select(updates.c.cases).where(here)).scalars().all()
        return Facts(answered=len(cases), useful=sum(n > 0 for n in cases))
    if campaign.state is State.JUDGING:
        rows = conn.execute(select(judgements).where(judgements.c.round == campaign.round)).all()
        sites: dict[str, list[HeadJudgement]] = {}
        for row in rows:
            sites.setdefault(row.site, []).extend(msgspec.convert(row.heads, list[HeadJudgement]))
        return Facts(answered=len(rows), useful=sum(bool(row.heads) for row in rows), sites=sites)
    return Facts()


def _start_job(conn: Connection, campaign: Campaign, kind: str) -> None:
    progress = campaign.progress
    given: dict[str, Any] = {"champion": campaign.champion, "round": campaign.round, "plan": campaign.plan}
    if progress.weights is not None:
        given["weights"] = progress.weights
    jobs.ask(conn, _key(campaign, kind), kind, msgspec.to_builtins(given))


def _key(campaign: Campaign, kind: str) -> str:
    return f"{campaign.round}-{kind}"


def _open_round(conn: Connection, campaign: Campaign, train: bool, now: datetime) -> None:
    weights = _made(campaign.progress.weights)
    row = {
        "id": campaign.round, "campaign": campaign.id, "number": campaign.number, "base": weights.file.sha256,
        "layout": msgspec.to_builtins(weights.layout), "max_norm": campaign.plan.max_norm,
        "collecting": train, "opened_at": now,
    }  # fmt: skip
    conn.execute(insert(rounds).values(row))


def _made(part: T | None) -> T:
    """Returns what the machine promises to have made before the action that asks for it."""
    if part is None:
        raise StateError("A campaign's record lacks what its state needs.", cure="Restore the database.")
    return part


def _set_round(conn: Connection, id: str, **values: object) -> None:
    conn.execute(update(rounds).where(rounds.c.id == id).values(**values))


def _train_task(campaign: Campaign, now: datetime) -> TrainTask:
    plan, weights = campaign.plan, _made(campaign.progress.weights)
    return TrainTask(
        round=campaign.round,
        number=campaign.number,
        package=campaign.champion,
        weights=weights.file,
        trainable=[name for name, _ in weights.layout],
        epochs=plan.epochs,
        learning_rate=plan.learning_rate,
        batch=plan.batch,
        seed=plan.seed + campaign.number,
        keep=plan.keep,
        max_norm=plan.max_norm,
        deadline=(now + timedelta(seconds=plan.train_seconds)).isoformat(),
    )


def _judge_task(campaign: Campaign, now: datetime) -> JudgeTask:
    plan, built = campaign.plan, _made(campaign.progress.built)
    return JudgeTask(
        round=campaign.round,
        package=campaign.champion,
        candidate=built.candidate,
        manifest=built.manifest,
        model=built.model,
        variant=plan.variant,
        deadline=(now + timedelta(seconds=plan.judge_seconds)).isoformat(),
    )


def _note(conn: Connection, campaign: Campaign, now: datetime, what: str, detail: dict[str, Any]) -> None:
    conn.execute(insert(events).values(campaign=campaign.id, at=now, what=what, detail=detail))


def _row(campaign: Campaign) -> dict[str, Any]:
    return {
        "id": campaign.id,
        "state": campaign.state.value,
        "champion": campaign.champion,
        "nodes": [list(pair) for pair in campaign.nodes],
        "plan": msgspec.to_builtins(campaign.plan),
        "number": campaign.number,
        "body": msgspec.to_builtins(campaign.progress),
        "since": campaign.since,
    }


def _campaign(row: Row[Any]) -> Campaign:
    since = row.since if row.since.tzinfo else row.since.replace(tzinfo=UTC)  # SQLite drops the zone; all is UTC
    nodes = tuple((site, node) for site, node in row.nodes)
    plan, progress = msgspec.convert(row.plan, Plan), msgspec.convert(row.body, Progress)
    return Campaign(row.id, State(row.state), row.champion, nodes, plan, row.number, progress, since)
