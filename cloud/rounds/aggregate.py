"""One round's average: weigh each update, open it, add it to the base.

The memory is one model's, however many hospitals: norms were measured when updates came in, so who is an
outlier is known before the first one is opened again, and only one is ever open.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from msgspec import Struct

from cloud.rounds.guard import weigh
from cloud.rounds.strategy import Strategy
from shared.errors import StateError
from shared.update.codec import decode
from shared.update.layout import Layout, Tensors, Vector, norm


@dataclass(frozen=True)
class Sent:
    """One update as collected; `read` returns its blob when it is its turn."""

    site: str
    node: str
    cases: int
    norm: float
    read: Callable[[], bytes]


class Part(Struct, frozen=True):
    """One hospital's part in an average, for the record."""

    site: str
    node: str
    cases: int
    norm: float
    weight: float
    reason: str  # why it has no weight


class Average(Struct, frozen=True):
    """What a round did: who had a part, how far the model moved, and each backbone stage of it (L2)."""

    parts: list[Part]
    moved: float
    stages: dict[str, float]


def average(
    base: Mapping[str, Vector], layout: Layout, sent: Sequence[Sent], strategy: Strategy
) -> tuple[dict[str, Vector], Average]:
    """Returns the base with the combined difference added to its trainable tensors, and the record of it.

    Args:
        base: float32 tensors, at least those of `layout`.
        layout: the trainable tensors.
        sent: the round's updates that came in time, each accepted by the guard.
        strategy: empty, of the same layout.

    Raises:
        StateError: no update has weight, or the sum is not finite.
    """
    weights = weigh([one.cases for one in sent], [one.norm for one in sent])
    for one, weighed in zip(sent, weights, strict=True):
        if weighed.weight > 0:
            strategy.add(decode(one.read(), layout), weighed.weight)
    difference = strategy.result()
    after = dict(base) | {name: base[name] + value for name, value in difference.items()}
    if not all(np.isfinite(after[name]).all() for name in difference):
        raise StateError("The average is not finite.", cure="Lower the round's norm limit.")
    parts = [
        Part(one.site, one.node, one.cases, one.norm, weighed.weight, weighed.reason)
        for one, weighed in zip(sent, weights, strict=True)
    ]
    return after, Average(parts, norm(difference), by_stage(difference))


def by_stage(difference: Tensors) -> dict[str, float]:
    """Returns the L2 norm of each stage of the model: tensors grouped by their name's first two parts."""
    groups: dict[str, dict[str, Vector]] = {}
    for name, value in difference.items():
        parts = name.split(".")
        stage = ".".join(parts[:2]) if len(parts) > 2 else parts[0]
        groups.setdefault(stage, {})[name] = value
    return {stage: norm(group) for stage, group in sorted(groups.items())}
