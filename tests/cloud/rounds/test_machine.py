"""The machine as a table: every state, what moves it, what it asks for; nothing but its arguments decides."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud.rounds import machine
from cloud.rounds.machine import FINAL, Built, Campaign, Facts, Plan, Progress, State, Weights, advance
from cloud.training.gate import ReferenceHead
from shared.wire.records import HeadJudgement, NamedFile

NOW = datetime(2026, 11, 22, tzinfo=UTC)
WEIGHTS = Weights(NamedFile("weights.safetensors", "a" * 64, 10), [("head.bias", [3])])
REFERENCE = [ReferenceHead("chest-xray", [20, 20], 0.9, 0.9, 0.9, 0.0, 0.0)]
BUILT = Built("c" * 64, NamedFile("manifest.json", "c" * 64, 5), NamedFile("m.onnx", "d" * 64, 9), REFERENCE)
NODES = (("a", "edge"), ("b", "edge"), ("c", "edge"))


def campaign(state: State, number: int = 1, **plan: object) -> Campaign:
    progress = Progress(weights=WEIGHTS, built=BUILT if state is State.JUDGING else None)
    return Campaign("k", state, "b" * 64, NODES, Plan(**plan), number, progress, NOW)  # type: ignore[arg-type]


def head(old: float, new: float, low: float, high: float, n: int = 12) -> HeadJudgement:
    return HeadJudgement("chest-xray", [n, n], old, new, low, high, old, new, 0.1, True)


BETTER = {"c": [head(0.6, 0.9, 0.2, 0.4)], "a": [head(0.95, 0.95, -0.02, 0.02)]}
SAME = {"c": [head(0.6, 0.6, -0.05, 0.05)]}
FEW = {"c": [head(0.6, 0.9, 0.2, 0.4, n=2)]}


def kinds(actions: tuple[machine.Action, ...]) -> list[str]:
    return [type(action).__name__ + getattr(action, "kind", "") for action in actions]


class TestMainPath:
    def test_refit_opens_the_first_round(self) -> None:
        after, actions = advance(campaign(State.REFIT, 0), Facts(job=WEIGHTS), NOW)
        assert (after.state, after.number) == (State.TRAINING, 1)
        assert actions == (machine.OpenRound(train=True),)

    def test_fast_lane_builds_at_once_and_gives_no_training(self) -> None:
        after, actions = advance(campaign(State.REFIT, 0, lane="fast"), Facts(job=WEIGHTS), NOW)
        assert (after.state, after.number) == (State.BUILDING, 0)
        assert actions == (machine.OpenRound(train=False), machine.StartJob("build"))

    def test_all_answers_close_the_collection_before_the_deadline(self) -> None:
        after, actions = advance(campaign(State.TRAINING), Facts(answered=3, useful=1), NOW)
        assert after.state is State.AGGREGATING
        assert kinds(actions) == ["StartJobaggregate"]

    def test_average_then_build_then_judges(self) -> None:
        after, actions = advance(campaign(State.AGGREGATING), Facts(job=WEIGHTS), NOW)
        assert (after.state, kinds(actions)) == (State.BUILDING, ["StartJobbuild"])
        after, actions = advance(after, Facts(job=BUILT), NOW)
        assert (after.state, kinds(actions)) == (State.JUDGING, ["AskJudges"])
        assert after.progress.built == BUILT

    def test_a_pass_registers(self) -> None:
        after, actions = advance(campaign(State.JUDGING), Facts(answered=3, sites=BETTER), NOW)
        assert after.state is State.REGISTERED
        assert kinds(actions) == ["CloseRound", "Register", "Dismiss"]
        assert after.progress.verdict is not None
        assert after.progress.verdict.strength == "weak"  # phantoms only

    @pytest.mark.parametrize("sites", [SAME, FEW])
    def test_no_pass_opens_the_next_round_from_the_averaged_weights(self, sites: dict) -> None:
        after, actions = advance(campaign(State.JUDGING, 2), Facts(answered=3, sites=sites), NOW)
        assert (after.state, after.number) == (State.TRAINING, 3)
        assert after.progress.weights == WEIGHTS
        assert after.progress.built is None
        closed = actions[0]
        assert isinstance(closed, machine.CloseRound)
        assert closed.round == "k-2"
        assert actions[1:] == (machine.OpenRound(train=True),)

    def test_the_last_round_ends_exhausted_and_registers_nothing(self) -> None:
        after, actions = advance(campaign(State.JUDGING, 2, max_rounds=2), Facts(answered=3, sites=SAME), NOW)
        assert after.state is State.EXHAUSTED
        assert kinds(actions) == ["CloseRound", "Dismiss"]
        assert "no hospital is proven better" in after.progress.reason


class TestDeadlines:
    late = NOW + timedelta(seconds=301)

    def test_before_the_deadline_it_waits(self) -> None:
        one = campaign(State.TRAINING)
        assert advance(one, Facts(answered=2, useful=2), NOW) == (one, ())

    def test_a_quorum_is_enough_at_the_deadline(self) -> None:
        after, _ = advance(campaign(State.TRAINING), Facts(answered=2, useful=2), self.late)
        assert after.state is State.AGGREGATING

    def test_less_than_a_quorum_stops(self) -> None:
        after, actions = advance(campaign(State.TRAINING), Facts(answered=1, useful=1), self.late)
        assert (after.state, kinds(actions)) == (State.STOPPED, ["Dismiss"])
        assert "1 of 3 nodes" in after.progress.reason

    def test_nobody_has_cases(self) -> None:
        after, _ = advance(campaign(State.TRAINING), Facts(answered=3, useful=0), NOW)
        assert after.state is State.STOPPED
        assert "no hospital holds a confirmed case" in after.progress.reason

    def test_judges_need_a_quorum_too(self) -> None:
        after, _ = advance(campaign(State.JUDGING), Facts(answered=1, sites=BETTER), self.late)
        assert after.state is State.STOPPED


@pytest.mark.parametrize("state", [State.REFIT, State.AGGREGATING, State.BUILDING])
def test_a_failed_job_stops_with_its_reason(state: State) -> None:
    after, actions = advance(campaign(state), Facts(failed="the disk is full"), NOW)
    assert (after.state, kinds(actions)) == (State.STOPPED, ["Dismiss"])
    assert after.progress.reason == f"{state.value}: the disk is full"


@pytest.mark.parametrize("state", sorted(FINAL))
def test_nothing_moves_the_dead(state: State) -> None:
    one = campaign(state)
    assert advance(one, Facts(job=BUILT, failed="x", answered=9, useful=9, sites=BETTER), NOW) == (one, ())


@settings(max_examples=300, deadline=None)
@given(
    state=st.sampled_from(list(State)),
    job=st.sampled_from([None, WEIGHTS, BUILT]),
    answered=st.integers(0, 4),
    useful=st.integers(0, 4),
    sites=st.sampled_from([{}, BETTER, SAME, FEW]),
    seconds=st.floats(0, 600),
    number=st.integers(0, 6),
    lane=st.sampled_from(["both", "fast", "slow"]),
)
def test_rounds_are_bounded_and_only_a_pass_registers(
    state, job, answered, useful, sites, seconds, number, lane
) -> None:
    before = campaign(state, 0 if state is State.REFIT else number, lane=lane)
    facts = Facts(job=job, answered=answered, useful=useful, sites=sites)
    after, actions = advance(before, facts, NOW + timedelta(seconds=seconds))
    assert after.number <= before.plan.max_rounds
    assert after.number - before.number in {0, 1}
    registers = machine.Register() in actions
    assert registers == (after.state is State.REGISTERED and before.state is not State.REGISTERED)
    if registers:
        assert after.progress.verdict is not None
        assert after.progress.verdict.decision == "pass"
    if not actions:
        assert replace(after, since=before.since) == before
