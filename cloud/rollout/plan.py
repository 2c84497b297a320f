"""What to do next with a release that goes out: a pure function of the fleet, the policy and the time.

A release goes to a first small wave and waits; a wave follows only when every node before it serves the release,
proved it, and stayed well for the soak time. Silence past a deadline is a failure. So the number of nodes that run a
release nobody has proven is never larger than one wave.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from msgspec import Struct


class NodeState(Struct, frozen=True):
    """One node of a rollout. `slot` is what its journal says of the release since it was ordered."""

    site: str
    node: str
    ordered_at: datetime | None = None  # None: not named yet
    committed_at: datetime | None = None  # when the cloud first saw it serve the release, proven
    last_seen: datetime | None = None
    slot: str = ""
    fault: str = ""  # the node reports to serve something that the release does not hold

    @property
    def name(self) -> tuple[str, str]:
        """(site, node)."""
        return self.site, self.node


class Policy(Struct, frozen=True):
    """Sizes of the waves (the last repeats), times in seconds, and how many failures are borne."""

    waves: tuple[int, ...] = (1, 3, 10, 30)
    deadline_s: float = 900.0
    soak_s: float = 600.0
    tolerated: int = 0


class Cohort(Struct, frozen=True):
    """Order the release on these nodes now."""

    nodes: tuple[tuple[str, str], ...]


class Hold(Struct, frozen=True):
    """Nothing to do now; `done` when every node serves the release."""

    reason: str
    done: bool = False


class Halt(Struct, frozen=True):
    """Stop: take the order back from these nodes, which do not serve it yet; order no other."""

    nodes: tuple[tuple[str, str], ...]
    reason: str


class Recall(Struct, frozen=True):
    """The release does harm: send these nodes, all that were ever ordered, back to what they served before."""

    nodes: tuple[tuple[str, str], ...]
    reason: str


Step = Cohort | Hold | Halt | Recall


def next_step(fleet: Sequence[NodeState], policy: Policy, now: datetime) -> Step:
    """Returns what to do; `fleet` is in the order in which nodes are to be served."""
    ordered = [n for n in fleet if n.ordered_at is not None]
    bad = [n for n in ordered if n.slot == "ROLLED_BACK" or n.fault]
    stuck = [n for n in ordered if n not in bad and (n.slot == "REFUSED" or _is_silent(n, policy, now))]
    if len(bad) + len(stuck) > policy.tolerated:
        if bad:
            return Recall(tuple(n.name for n in ordered), _why(bad))
        return Halt(tuple(n.name for n in ordered if n.committed_at is None), _why(stuck))
    failed = {n.name for n in (*bad, *stuck)}
    unproven = [n for n in ordered if n.name not in failed and not _is_proven(n, policy, now)]
    if unproven:
        return Hold(f"waiting for {_names(unproven)}")
    waiting = [n for n in fleet if n.ordered_at is None]
    if not waiting:
        return Hold("every node that was ordered serves it", done=True)
    return Cohort(tuple(n.name for n in waiting[: _wave(policy, len(ordered))]))


def _wave(policy: Policy, ordered: int) -> int:
    """The size of the wave that follows on `ordered` nodes."""
    reached = 0
    for size in policy.waves:
        reached += size
        if ordered < reached:
            return min(size, reached - ordered)
    return policy.waves[-1]


def _is_proven(node: NodeState, policy: Policy, now: datetime) -> bool:
    return node.committed_at is not None and now - node.committed_at >= timedelta(seconds=policy.soak_s)


def _is_silent(node: NodeState, policy: Policy, now: datetime) -> bool:
    """No commit in time, or no word in time while it soaks."""
    deadline = timedelta(seconds=policy.deadline_s)
    if node.ordered_at is None or _is_proven(node, policy, now):
        return False
    if node.committed_at is None:
        return now - node.ordered_at > deadline
    return now - max(node.committed_at, node.last_seen or node.committed_at) > deadline


def _why(nodes: Sequence[NodeState]) -> str:
    return "; ".join(f"{n.site}/{n.node}: {n.fault or n.slot or 'silent past the deadline'}" for n in nodes)


def _names(nodes: Sequence[NodeState]) -> str:
    return ", ".join(f"{n.site}/{n.node}" for n in nodes)
