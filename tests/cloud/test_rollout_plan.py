"""The rollout's pure function over a thousand random fleets."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud.rollout.plan import Cohort, Halt, Hold, NodeState, Policy, Recall, Step, next_step

NOW = datetime(2026, 1, 1, tzinfo=UTC)

policies = st.builds(
    Policy,
    waves=st.lists(st.integers(1, 12), min_size=1, max_size=4).map(tuple),
    deadline_s=st.integers(100, 2000).map(float),
    soak_s=st.integers(0, 2000).map(float),
    tolerated=st.integers(0, 3),
)


# (ordered, committed, seen) as seconds ago, committed after ordered; then slot and fault.
times = st.none() | st.tuples(st.integers(0, 5000), st.none() | st.floats(0, 1), st.none() | st.integers(0, 5000))
slots = st.sampled_from(["", "SHADOW", "PROVISIONAL", "COMMITTED", "COMMITTED", "REFUSED", "ROLLED_BACK"])
faults = st.sampled_from(["", "", "", "", "serves other weights"])


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


def node(number: int, when: tuple[int, float | None, int | None] | None, slot: str, fault: str) -> NodeState:
    if when is None:
        return NodeState(f"s{number}", "n")
    ordered, share, seen = when
    committed = None if share is None else ago(ordered * share)
    return NodeState(f"s{number}", "n", ago(ordered), committed, None if seen is None else ago(seen), slot, fault)


fleets = st.lists(st.tuples(times, slots, faults), max_size=15).map(
    lambda rows: [node(i, *row) for i, row in enumerate(rows)]
)


def failures(fleet: list[NodeState], policy: Policy) -> tuple[set[str], set[str]]:
    """(bad, all failures), written out from the rules a second time, node by node."""
    bad, failed = set(), set()
    for n in fleet:
        if n.ordered_at is None:
            continue
        if n.slot == "ROLLED_BACK" or n.fault:
            bad.add(n.site)
        soaked = n.committed_at is not None and (NOW - n.committed_at).total_seconds() >= policy.soak_s
        heard = max(t for t in (n.committed_at or n.ordered_at, n.last_seen if n.committed_at else None) if t)
        silent = not soaked and (NOW - heard).total_seconds() > policy.deadline_s
        if n.site in bad or n.slot == "REFUSED" or silent:
            failed.add(n.site)
    return bad, failed


@settings(max_examples=1000, deadline=None)
@given(fleets, policies)
def test_the_rules_hold_for_any_fleet(fleet: list[NodeState], policy: Policy) -> None:
    step = next_step(fleet, policy, NOW)
    ordered = {n.name for n in fleet if n.ordered_at is not None}
    bad, failed = failures(fleet, policy)
    if len(failed) > policy.tolerated:
        assert isinstance(step, Recall if bad else Halt)
        assert set(step.nodes) <= ordered
        if isinstance(step, Recall):
            assert set(step.nodes) == ordered
    else:
        assert isinstance(step, Cohort | Hold)
    if isinstance(step, Cohort):
        assert step.nodes
        assert not set(step.nodes) & ordered
        assert len(step.nodes) <= max(policy.waves)
        unproven = [
            n
            for n in fleet
            if n.ordered_at is not None
            and n.site not in failed
            and (n.committed_at is None or (NOW - n.committed_at).total_seconds() < policy.soak_s)
        ]
        assert unproven == []  # so exposure to an unproven release is this wave and the failures that are borne
    if isinstance(step, Hold) and step.done:
        assert ordered == {n.name for n in fleet}


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 30), policies, st.data())
def test_a_bad_release_reaches_the_first_wave_only(size: int, policy: Policy, data: st.DataObject) -> None:
    """Every node rolls the release back, a fifth says nothing at all: simulated to the end."""
    policy = msgspec.structs.replace(policy, tolerated=0)
    silent = data.draw(st.sets(st.integers(0, size - 1), max_size=size // 5))
    fleet = [NodeState(f"s{i}", "n") for i in range(size)]
    fleet, step = simulate(fleet, policy, lambda i: "" if i in silent else "ROLLED_BACK")
    exposed = [n for n in fleet if n.ordered_at is not None]
    assert len(exposed) <= policy.waves[0]
    assert isinstance(step, Halt | Recall)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 30), policies)
def test_a_good_release_reaches_every_node(size: int, policy: Policy) -> None:
    fleet, step = simulate([NodeState(f"s{i}", "n") for i in range(size)], policy, lambda _: "COMMITTED")
    assert step == Hold("every node that was ordered serves it", done=True)
    assert all(n.committed_at is not None for n in fleet)


def simulate(fleet: list[NodeState], policy: Policy, behave: object) -> tuple[list[NodeState], Step]:
    """Runs the plan against nodes that do what `behave(index)` says one step after they were ordered."""
    now = NOW
    step: Step = Hold("")
    steps_a_wave = 6 + int(3 * policy.soak_s / policy.deadline_s)
    for _ in range(steps_a_wave * (len(fleet) + 1)):
        step = next_step(fleet, policy, now)
        if isinstance(step, Halt | Recall) or (isinstance(step, Hold) and step.done):
            break
        if isinstance(step, Cohort):
            fleet = [msgspec.structs.replace(n, ordered_at=now) if n.name in step.nodes else n for n in fleet]
        now += timedelta(seconds=policy.deadline_s / 3)
        fleet = [
            msgspec.structs.replace(
                n,
                slot=behave(i),  # type: ignore[operator]
                last_seen=now,
                committed_at=n.committed_at or (now if behave(i) == "COMMITTED" else None),  # type: ignore[operator]
            )
            if n.ordered_at is not None and behave(i)  # type: ignore[operator]
            else n
            for i, n in enumerate(fleet)
        ]
    return fleet, step


@pytest.mark.parametrize(("slot", "kind"), [("REFUSED", Halt), ("ROLLED_BACK", Recall), ("SHADOW", Hold), ("", Hold)])
def test_one_failure_in_the_first_wave(slot: str, kind: type) -> None:
    fleet = [NodeState("a", "n", NOW, slot=slot), NodeState("b", "n")]
    assert isinstance(next_step(fleet, Policy(), NOW), kind)


def test_silence_past_the_deadline_is_a_failure() -> None:
    fleet = [NodeState("a", "n", NOW - timedelta(seconds=901)), NodeState("b", "n")]
    step = next_step(fleet, Policy(deadline_s=900), NOW)
    assert step == Halt((("a", "n"),), "a/n: silent past the deadline")
