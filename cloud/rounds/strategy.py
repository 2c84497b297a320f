"""How many differences become one: a strategy holds one model's worth of numbers, however many hospitals."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from shared.errors import PeerError, StateError
from shared.update.layout import Layout, Tensors, Vector


class Strategy(Protocol):
    """Takes the differences of one round one by one, in any order, and gives their combination."""

    def add(self, update: Tensors, weight: float) -> None:
        """Takes one hospital's difference; it is not kept.

        Args:
            update: float32 tensors of the strategy's layout.
            weight: above 0, finite.

        Raises:
            PeerError: another layout, a value that is not finite, or a weight that is not positive.
        """

    def result(self) -> dict[str, Vector]:
        """Returns the combined difference, float32, in the layout; StateError when nothing was added."""


class FedAvg:
    """The mean of differences weighted by cases (McMahan et al., 2017), summed in double precision."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._weight = 0.0
        self._sum: dict[str, npt.NDArray[np.float64]] = {
            entry.name: np.zeros(entry.shape, np.float64) for entry in layout.entries
        }

    def add(self, update: Tensors, weight: float) -> None:
        """See Strategy.add."""
        self._layout.check(update)
        if not 0 < weight < np.inf:
            raise PeerError(f"An update cannot weigh {weight}.")
        for name in self._sum:
            self._sum[name] += weight * update[name]
        self._weight += weight

    def result(self) -> dict[str, Vector]:
        """See Strategy.result."""
        if self._weight == 0:
            raise StateError("There is no update to average.")
        return {name: np.asarray(total / self._weight, np.float32) for name, total in self._sum.items()}
