"""How good a reader is: AUC, balanced accuracy, calibration error, and intervals by the bootstrap.

Everywhere `scores` is (N, C), one column a class, larger is likelier (logits or probabilities); `labels` is (N,) of
0..C-1. A class without a case, or a bootstrap draw that loses one, is left out of the macro mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
Labels = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def probabilities(logits: Floats, temperature: float = 1.0) -> npt.NDArray[np.float64]:
    """Returns softmax(logits / temperature) along the last axis."""
    z = logits.astype(np.float64) / temperature
    z = np.exp(z - z.max(-1, keepdims=True))
    return np.asarray(z / z.sum(-1, keepdims=True))


def macro_auc(scores: Floats, labels: Labels) -> float:
    """Returns the mean over classes of the one-against-rest AUC of softmax(scores); NaN with fewer than two classes."""
    return float(
        _macro_auc(_ranked(probabilities(scores)), _one_hot(labels, scores.shape[1]), np.ones((1, len(labels))))[0]
    )


def balanced_accuracy(scores: Floats, labels: Labels) -> float:
    """Returns the mean over the classes present of the share of their cases answered right."""
    return float(_balanced(scores.argmax(1) == labels, _one_hot(labels, scores.shape[1]), np.ones((1, len(labels))))[0])


def calibration_error(chances: Floats, labels: Labels, bins: int = 10) -> float:
    """Returns the expected calibration error of probabilities (N, C): |confidence - accuracy|, by equal-width bins."""
    confidence, right = chances.max(1), chances.argmax(1) == labels
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [
        abs(confidence[index == b].mean() - right[index == b].mean()) * (index == b).mean() for b in np.unique(index)
    ]
    return float(np.sum(gaps))


def fit_temperature(logits: Floats, labels: Labels) -> float:
    """Returns the temperature in 0.25..4 under which softmax(logits / t) has the least cross-entropy."""
    grid = np.exp(np.linspace(np.log(0.25), np.log(4.0), 121))
    losses = [-np.log(probabilities(logits, t)[np.arange(len(labels)), labels] + 1e-12).mean() for t in grid]
    return float(grid[int(np.argmin(losses))])


def auc_interval(scores: Floats, labels: Labels, *, draws: int = 1000, seed: int = 0) -> Interval:
    """Returns macro AUC with its interval."""
    counts = _draws(labels, draws, seed)
    sample = _macro_auc(_ranked(probabilities(scores)), _one_hot(labels, scores.shape[1]), counts)
    return _interval(macro_auc(scores, labels), sample)


def accuracy_interval(scores: Floats, labels: Labels, *, draws: int = 1000, seed: int = 0) -> Interval:
    """Returns balanced accuracy with its interval."""
    sample = _balanced(scores.argmax(1) == labels, _one_hot(labels, scores.shape[1]), _draws(labels, draws, seed))
    return _interval(balanced_accuracy(scores, labels), sample)


def auc_difference(ours: Floats, theirs: Floats, labels: Labels, *, draws: int = 1000, seed: int = 0) -> Interval:
    """Returns macro AUC of `ours` less that of `theirs` on the same cases, paired: each draw takes the same cases."""
    counts, truth = _draws(labels, draws, seed), _one_hot(labels, ours.shape[1])
    one, two = (_macro_auc(_ranked(probabilities(s)), truth, counts) for s in (ours, theirs))
    return _interval(macro_auc(ours, labels) - macro_auc(theirs, labels), one - two)


def _one_hot(labels: Labels, classes: int) -> npt.NDArray[np.bool_]:
    return np.asarray(labels[:, None] == np.arange(classes)[None])  # (N, C)


def _draws(labels: Labels, draws: int, seed: int) -> npt.NDArray[np.float64]:
    """Returns how often each case is in each draw (B, N); drawn within each class, so that none is lost."""
    rng = np.random.default_rng(seed)
    counts = np.zeros((draws, len(labels)))
    for value in np.unique(labels):
        where = np.flatnonzero(labels == value)
        counts[:, where] = rng.multinomial(len(where), np.full(len(where), 1 / len(where)), size=draws)
    return counts


def _ranked(chances: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Returns dense ranks (N, C) from 0, equal scores sharing one."""
    return np.stack([np.unique(column, return_inverse=True)[1] for column in chances.T], 1)


def _macro_auc(
    ranks: npt.NDArray[np.int64], truth: npt.NDArray[np.bool_], counts: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Returns the macro AUC (B,) of cases weighted by counts (B, N): Mann-Whitney by weighted ranks, ties half."""
    columns = []
    for c in range(ranks.shape[1]):
        if not 0 < truth[:, c].sum() < len(truth):
            continue
        order = np.argsort(ranks[:, c], kind="stable")
        steps = np.flatnonzero(np.diff(ranks[order, c], prepend=-1))  # where each group of ties starts
        sick = np.add.reduceat(counts[:, order] * truth[order, c], steps, axis=1)  # (B, G)
        well = np.add.reduceat(counts[:, order] * ~truth[order, c], steps, axis=1)
        below = np.cumsum(well, 1) - well
        columns.append((sick * (below + well / 2)).sum(1) / (sick.sum(1) * well.sum(1)))
    return np.mean(columns, 0) if columns else np.full(len(counts), np.nan)


def _balanced(
    right: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_], counts: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    shares = [
        (counts * (truth[:, c] & right)).sum(1) / (counts * truth[:, c]).sum(1)
        for c in range(truth.shape[1])
        if truth[:, c].any()
    ]
    return np.asarray(np.mean(shares, 0))


def _interval(value: float, sample: npt.NDArray[np.float64]) -> Interval:
    low, high = np.nanpercentile(sample, [2.5, 97.5]) if np.isfinite(sample).any() else (np.nan, np.nan)
    return Interval(value, float(low), float(high))
