"""Metrics against scikit-learn, and intervals that cover what they should."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from models import metrics


def draw(seed: int, n: int = 200, classes: int = 3, skill: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    scores = rng.normal(size=(n, classes))
    scores[np.arange(n), labels] += skill
    return scores, labels


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_auc_and_balanced_accuracy_are_those_of_scikit_learn(classes: int) -> None:
    scores, labels = draw(1, classes=classes)
    scores = np.round(scores, 1)  # ties
    chances = metrics.probabilities(scores)
    ours = metrics.macro_auc(scores, labels)
    theirs = np.mean([roc_auc_score(labels == c, chances[:, c]) for c in range(classes)])
    assert ours == pytest.approx(theirs, abs=1e-12)
    assert metrics.balanced_accuracy(scores, labels) == pytest.approx(balanced_accuracy_score(labels, scores.argmax(1)))


def test_a_class_without_cases_is_left_out_of_the_mean() -> None:
    scores, labels = draw(2, classes=3)
    kept = labels != 2
    chances = metrics.probabilities(scores[kept])
    expected = np.mean([roc_auc_score(labels[kept] == c, chances[:, c]) for c in (0, 1)])
    assert metrics.macro_auc(scores[kept], labels[kept]) == pytest.approx(expected)
    assert np.isnan(metrics.macro_auc(scores[labels == 1], labels[labels == 1]))


def test_a_better_reader_is_told_from_a_worse_one_and_not_from_itself() -> None:
    better, labels = draw(3, skill=2.5)
    worse = draw(3, skill=0.3)[0]
    apart = metrics.auc_difference(better, worse, labels)
    assert apart.low > 0
    same = metrics.auc_difference(better, better, labels)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    truth = metrics.macro_auc(*draw(99, n=100_000))
    intervals = [metrics.auc_interval(*draw(seed, n=120), draws=300) for seed in range(60)]
    hits = sum(i.low <= truth <= i.high for i in intervals)
    assert hits >= 50


def test_temperature_undoes_overconfidence() -> None:
    scores, labels = draw(5, n=4000)
    assert metrics.fit_temperature(scores * 3, labels) == pytest.approx(
        3 * metrics.fit_temperature(scores, labels), rel=0.05
    )
    right = metrics.probabilities(scores * 3, metrics.fit_temperature(scores * 3, labels))
    wrong = metrics.probabilities(scores * 3)
    assert metrics.calibration_error(right, labels) < metrics.calibration_error(wrong, labels)
