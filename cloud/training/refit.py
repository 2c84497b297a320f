"""The fast lane: new heads for an unchanged backbone, from the embeddings of confirmed studies.

A head is linear on the mean token, which is the embedding itself, so fitting it here is fitting it exactly.
Reference cases are replayed beside the hospitals' so that what the head knew stays known, and it is pulled
towards what it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from shared.errors import StateError

Matrix = npt.NDArray[np.float32]
PULL = 0.05  # weight of |head - champion's head|^2 per feature, in units of the features' variance
STEPS = 60


@dataclass(frozen=True)
class Rows:
    """Embeddings of one head: `features` (N, D), `labels` (N,), `weights` (N,) of each row in the loss."""

    features: Matrix
    labels: npt.NDArray[np.int64]
    weights: Matrix


def balanced(features: Matrix, labels: npt.NDArray[np.int64], groups: Sequence[str]) -> Rows:
    """Returns rows weighed so that every group (hospital, reference) counts equally, and in it every class.

    A large hospital must not drown a small one, nor a frequent class a rare one: each group's classes share a
    weight that is the square root of the group's size, so more cases still say more.
    """
    weights = np.zeros(len(labels), np.float32)
    names = np.array(groups)
    for group in np.unique(names):
        mine = names == group
        classes = np.unique(labels[mine])
        for label in classes:
            here = mine & (labels == label)
            weights[here] = np.sqrt(mine.sum()) / len(classes) / here.sum()
    return Rows(features, labels, weights / max(weights.sum(), 1e-9))


def refit(weight: Matrix, bias: Matrix, rows: Rows, *, pull: float = PULL) -> tuple[Matrix, Matrix]:
    """Returns the head (C, D), (C,) that fits the rows best without leaving the champion's head far behind.

    Multinomial logistic regression by L-BFGS from the champion's head; the result is the same for the same
    input.

    Raises:
        StateError: the fit is not finite.
    """
    torch.set_num_threads(1)  # a fit this small only loses by being shared out
    features = torch.from_numpy(rows.features)  # (N, D)
    labels, weights = torch.from_numpy(rows.labels), torch.from_numpy(rows.weights)
    spread = features.var(0, unbiased=False) + 1e-4  # (D,)
    old = torch.from_numpy(np.array(weight)), torch.from_numpy(np.array(bias))
    new = [t.clone().requires_grad_() for t in old]
    optimiser = torch.optim.LBFGS(new, max_iter=STEPS, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        each = functional.cross_entropy(features @ new[0].T + new[1], labels, reduction="none")  # (N,)
        drift = (((new[0] - old[0]) ** 2) * spread).sum()
        loss = (each * weights).sum() + pull * drift
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    fitted = [t.detach().numpy().astype(np.float32) for t in new]
    if not all(np.isfinite(t).all() for t in fitted):
        raise StateError("The refit of a head is not finite.", cure="Look at the hospitals' embeddings.")
    return fitted[0], fitted[1]
