"""A campaign's life as a pure function: where it stands and what is known give where it goes and what to do.

    REFIT ─> TRAINING ─> AGGREGATING ─> BUILDING ─> JUDGING ─> REGISTERED     the gate passed a candidate
      │          ▲                         ▲           ├─────> next TRAINING  it did not, and rounds are left
      │          └─────────────────────────┼───────────┤
      └── fast lane only ──────────────────┘           └─────> EXHAUSTED      it did not, and none are left
    STOPPED(reason) from anywhere: a job failed, or too few hospitals answered in time.

Nothing here reads a clock, a database or a message: `shell.Rounds` does, in one transaction.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Annotated, Literal

from msgspec import Meta, Struct, field

from cloud.training.gate import Bars, ReferenceHead, Verdict, judge
from shared.wire.records import HeadJudgement, Hex64, NamedFile

Lane = Literal["both", "fast", "slow"]


class State(StrEnum):
    """Where a campaign stands; the last three are final."""

    REFIT = "refit"
    TRAINING = "training"
    AGGREGATING = "aggregating"
    BUILDING = "building"
    JUDGING = "judging"
    REGISTERED = "registered"
    EXHAUSTED = "exhausted"
    STOPPED = "stopped"


FINAL = frozenset({State.REGISTERED, State.EXHAUSTED, State.STOPPED})


class Plan(Struct, frozen=True, forbid_unknown_fields=True):
    """How a campaign learns. `quorum` is the share of its nodes whose answer a deadline may settle for."""

    lane: Lane = "both"
    max_rounds: Annotated[int, Meta(ge=1, le=1000)] = 6
    variant: str = "cpu-u8s8"
    quorum: Annotated[float, Meta(gt=0, le=1)] = 0.6
    train_seconds: Annotated[float, Meta(gt=0)] = 300.0
    judge_seconds: Annotated[float, Meta(gt=0)] = 300.0
    epochs: Annotated[int, Meta(ge=1, le=100)] = 2
    learning_rate: Annotated[float, Meta(gt=0, le=1)] = 4e-4
    batch: Annotated[int, Meta(ge=1, le=512)] = 8
    keep: Annotated[float, Meta(gt=0, le=1)] = 0.1
    max_norm: Annotated[float, Meta(gt=0)] = 10.0
    seed: int = 0
    bars: Bars = field(default_factory=Bars)


class Weights(Struct, frozen=True):
    """Weights in the object store, and the tensors of them that hospitals train as [name, shape]."""

    file: NamedFile
    layout: list[tuple[str, list[int]]]


class Built(Struct, frozen=True):
    """A candidate package in the object store and how it compares on the reference set."""

    candidate: Hex64
    manifest: NamedFile
    model: NamedFile
    reference: list[ReferenceHead]


class Progress(Struct, frozen=True):
    """What a campaign has made so far."""

    weights: Weights | None = None
    built: Built | None = None
    verdict: Verdict | None = None
    reason: str = ""  # why it ended, for people


@dataclass(frozen=True)
class Campaign:
    """One campaign as stored; `since` is when its state was entered."""

    id: str
    state: State
    champion: str
    nodes: tuple[tuple[str, str], ...]  # (site, node)
    plan: Plan
    number: int
    progress: Progress
    since: datetime

    @property
    def round(self) -> str:
        """Returns the id of the round it is in."""
        return f"{self.id}-{self.number}"


@dataclass(frozen=True)
class Facts:
    """What is known about the state a campaign is in.

    `job` is the finished job's output, or None; `failed` is its reason when it failed for good.
    `answered` counts nodes that sent this round's update or judgement, `useful` those of them with cases.
    """

    job: Weights | Built | None = None
    failed: str = ""
    answered: int = 0
    useful: int = 0
    sites: Mapping[str, Sequence[HeadJudgement]] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class StartJob:
    """Ask the trainer for one job of this campaign's state and round."""

    kind: Literal["refit", "aggregate", "build"]


@dataclass(frozen=True)
class OpenRound:
    """Record the round and, when hospitals have a part in it, give every node its TrainTask."""

    train: bool


@dataclass(frozen=True)
class AskJudges:
    """Record the round's candidate and give every node its JudgeTask."""


@dataclass(frozen=True)
class CloseRound:
    """Record the gate's verdict on the round of that id."""

    round: str
    verdict: Verdict


@dataclass(frozen=True)
class Register:
    """Put the candidate, with its verdict, into the registry."""


@dataclass(frozen=True)
class Dismiss:
    """Take the task away from every node."""


Action = StartJob | OpenRound | AskJudges | CloseRound | Register | Dismiss
Step = tuple[Campaign, tuple[Action, ...]]


def advance(campaign: Campaign, facts: Facts, now: datetime) -> Step:
    """Returns the campaign after one step and what must happen with it; () when nothing is due."""
    if campaign.state in FINAL:
        return campaign, ()
    if facts.failed:
        return _stop(campaign, f"{campaign.state.value}: {facts.failed}", now)
    if campaign.state is State.TRAINING:
        return _collect(campaign, facts, now)
    if campaign.state is State.JUDGING:
        return _gate(campaign, facts, now)
    return _after_job(campaign, facts.job, now)


def _after_job(campaign: Campaign, output: Weights | Built | None, now: datetime) -> Step:
    match campaign.state, output:
        case State.REFIT, Weights() as weights if campaign.plan.lane == "fast":
            campaign = _with(campaign, weights=weights)
            return _enter(campaign, State.BUILDING, now, OpenRound(train=False), StartJob("build"))
        case State.REFIT, Weights() as weights:
            return _open(_with(campaign, weights=weights), now)
        case State.AGGREGATING, Weights() as weights:
            return _enter(_with(campaign, weights=weights), State.BUILDING, now, StartJob("build"))
        case State.BUILDING, Built() as built:
            return _enter(_with(campaign, built=built), State.JUDGING, now, AskJudges())
    return campaign, ()


def _open(campaign: Campaign, now: datetime) -> Step:
    following = replace(campaign, number=campaign.number + 1)
    return _enter(_with(following, built=None, verdict=None), State.TRAINING, now, OpenRound(train=True))


def _collect(campaign: Campaign, facts: Facts, now: datetime) -> Step:
    settled = _settled(campaign, facts, now, campaign.plan.train_seconds)
    if settled is None:
        return campaign, ()
    if not settled:
        return _stop(campaign, _silence(campaign, facts), now)
    if facts.useful == 0:
        return _stop(campaign, "training: no hospital holds a confirmed case to train on", now)
    return _enter(campaign, State.AGGREGATING, now, StartJob("aggregate"))


def _gate(campaign: Campaign, facts: Facts, now: datetime) -> Step:
    settled = _settled(campaign, facts, now, campaign.plan.judge_seconds)
    built = campaign.progress.built
    if settled is None or built is None:
        return campaign, ()
    if not settled:
        return _stop(campaign, _silence(campaign, facts), now)
    verdict = judge(campaign.champion, built.candidate, facts.sites, built.reference, campaign.plan.bars)
    campaign = _with(campaign, verdict=verdict)
    close = CloseRound(campaign.round, verdict)
    if verdict.decision == "pass":
        return _enter(campaign, State.REGISTERED, now, close, Register(), Dismiss())
    if campaign.plan.lane == "fast" or campaign.number >= campaign.plan.max_rounds:
        ended = _with(
            campaign,
            reason=f"{verdict.decision} after {campaign.number} rounds: {'; '.join(verdict.reasons)}",
        )
        return _enter(ended, State.EXHAUSTED, now, close, Dismiss())
    following, actions = _open(campaign, now)
    return following, (close, *actions)


def _settled(campaign: Campaign, facts: Facts, now: datetime, seconds: float) -> bool | None:
    """Returns True when all answered or the deadline found a quorum, False when none, None before it."""
    if facts.answered >= len(campaign.nodes):
        return True
    if now < campaign.since + timedelta(seconds=seconds):
        return None
    return facts.answered >= campaign.plan.quorum * len(campaign.nodes)


def _silence(campaign: Campaign, facts: Facts) -> str:
    count = f"{facts.answered} of {len(campaign.nodes)} nodes"
    return f"{campaign.state.value}: {count} answered before the deadline"


def _stop(campaign: Campaign, reason: str, now: datetime) -> Step:
    return _enter(_with(campaign, reason=reason), State.STOPPED, now, Dismiss())


def _enter(campaign: Campaign, state: State, now: datetime, *actions: Action) -> Step:
    return replace(campaign, state=state, since=now), actions


def _with(campaign: Campaign, **changes: object) -> Campaign:
    known = {name: getattr(campaign.progress, name) for name in Progress.__struct_fields__}
    return replace(campaign, progress=Progress(**(known | changes)))
