"""What an update must be before it may touch a model. Robust rounds open updates one by one; this is one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from shared.errors import PeerError
from shared.update.codec import decode
from shared.update.layout import Layout, norm
from shared.wire.records import ModelUpdate

MAX_CASES = 1_000_000
MAX_LOSS = 1e6
NORM_SLACK = 1.01  # stochastic rounding may lengthen what the sender clipped, by far less than this
OUTLIER_TIMES = 5.0  # a norm this many times the round's median is an outlier; asked of three updates or more
WEIGHT_TIMES = 4.0  # no hospital weighs more than this many times the median hospital


def inspect(update: ModelUpdate, layout: Layout, base: str, max_norm: float) -> float:
    """Returns the measured L2 norm of the difference; 0.0 for a hospital that answers with no cases.

    Raises:
        PeerError: wrong base, a number out of range, a blob that does not decode, a norm beyond the limit.
    """
    if update.base != base:
        raise PeerError("The update started from other weights than the round's.")
    losses = (update.loss_before, update.loss_after)
    if not 0 <= update.cases <= MAX_CASES or not all(0 <= loss <= MAX_LOSS for loss in losses):
        raise PeerError("The update's number of cases or its losses are out of range.")
    if update.cases == 0:
        if update.blob:
            raise PeerError("An update of no cases cannot carry a difference.")
        return 0.0
    length = norm(decode(update.blob, layout))
    if not math.isfinite(length) or length > max_norm * NORM_SLACK:
        raise PeerError(f"The update's norm {length:.4g} is beyond the round's limit {max_norm:.4g}.")
    return length


@dataclass(frozen=True)
class Weighed:
    """One update's part in the average; `reason` says why it has none when `weight` is 0."""

    weight: float
    reason: str


def weigh(cases: Sequence[int], norms: Sequence[float]) -> list[Weighed]:
    """Returns each update's weight: its cases, at most WEIGHT_TIMES the median, none for an outlier.

    Both sequences are of one round and in one order.
    """
    trained = [(n, length) for n, length in zip(cases, norms, strict=True) if n > 0]
    if not trained:
        return [Weighed(0.0, "no cases") for _ in cases]
    cap = WEIGHT_TIMES * median(n for n, _ in trained)
    usual = median(length for _, length in trained)
    weighed = []
    for n, length in zip(cases, norms, strict=True):
        if n == 0:
            weighed.append(Weighed(0.0, "no cases"))
        elif len(trained) >= 3 and length > OUTLIER_TIMES * usual:
            weighed.append(Weighed(0.0, f"outlier: norm {length:.4g}, the round's median is {usual:.4g}"))
        else:
            weighed.append(Weighed(float(min(n, cap)), ""))
    return weighed
