"""The gate, rule by rule, and what must never pass it."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from cloud.training.gate import Bars, ReferenceHead, Verdict, judge
from models.metrics import auc_difference, balanced_accuracy, macro_auc
from shared.wire.records import HeadJudgement

BARS = Bars()
REFERENCE = [ReferenceHead("x", [20, 20], 0.95, 0.95, 0.95, 0.01, 0.0)]


def row(old: float, new: float, half: float = 0.05, *, n: int = 12, phantom: bool = False) -> HeadJudgement:
    change = new - old
    return HeadJudgement("x", [n, n], old, new, change - half, change + half, old, new, 0.1, phantom)


def verdict(sites: dict, reference: list[ReferenceHead] = REFERENCE, bars: Bars = BARS) -> Verdict:
    return judge("a" * 64, "b" * 64, sites, reference, bars)


GOOD = {"c": [row(0.6, 0.9)], "a": [row(0.97, 0.97, 0.02)]}


def test_better_somewhere_and_worse_nowhere_passes() -> None:
    given = verdict(GOOD)
    assert (given.decision, given.strength) == ("pass", "full")
    assert given.reasons == ["c, x: AUC 0.600 to 0.900 (+0.250 to +0.350)"]
    assert msgspec.json.decode(msgspec.json.encode(given), type=Verdict) == given


def test_phantoms_only_is_weak() -> None:
    assert verdict({"c": [row(0.6, 0.9, phantom=True)]}).strength == "weak"
    mixed = {"c": [row(0.6, 0.9, phantom=True)], "a": [row(0.9, 0.9, n=2)]}
    assert verdict(mixed).strength == "weak"  # the real cases were too few to count


def test_nothing_better_fails() -> None:
    given = verdict({"c": [row(0.9, 0.9)]})
    assert (given.decision, given.reasons) == ("fail", ["no hospital is proven better than before"])


def test_a_gain_that_chance_explains_fails() -> None:
    assert verdict({"c": [row(0.8, 0.85, half=0.06)]}).decision == "fail"


def test_many_comparisons_ask_for_more() -> None:
    gain = row(0.80, 0.853, half=0.05)  # just above zero alone
    assert verdict({"c": [gain]}).decision == "pass"
    others = {f"s{i}": [row(0.9, 0.9, 0.02)] for i in range(8)}
    assert verdict({"c": [gain]} | others).decision == "fail"


def test_a_gain_in_auc_that_costs_balanced_accuracy_is_no_gain() -> None:
    assert verdict({"c": [msgspec.structs.replace(row(0.6, 0.9), balanced_candidate=0.2)]}).decision == "fail"


def test_harm_to_one_hospital_outweighs_gain_at_another() -> None:
    given = verdict(GOOD | {"b": [row(0.95, 0.85)]})
    assert given.decision == "fail"
    assert given.reasons == ["b, x: AUC changes by -0.100 (-0.150 to -0.050)"]


def test_plausible_harm_is_harm() -> None:
    assert verdict(GOOD | {"b": [row(0.95, 0.94, half=0.12)]}).decision == "fail"


def test_too_few_cases_is_insufficient_not_a_pass() -> None:
    assert verdict({"c": [row(0.6, 0.9, n=4)]}).decision == "insufficient"
    one_class = msgspec.structs.replace(row(0.6, 0.9), per_class=[40, 0])
    assert verdict({"c": [one_class]}).decision == "insufficient"
    assert verdict({"c": [], "a": []}).decision == "insufficient"
    assert verdict({}).decision == "insufficient"


def test_min_sites() -> None:
    assert verdict({"c": [row(0.6, 0.9)]}, bars=Bars(min_sites=2)).decision == "insufficient"


def test_lost_on_the_reference_set() -> None:
    given = verdict(GOOD, [ReferenceHead("x", [20, 20], 0.95, 0.92, 0.92, 0.0, 0.0)])
    assert given.decision == "fail"
    assert "reference set" in given.reasons[0]


@pytest.mark.parametrize(
    ("full", "flipped", "low"),
    [(0.956, 0.0, 0.001), (0.972, 0.0, -0.01), (0.95, 0.2, 0.0)],
    ids=["a proven loss", "a loss too large to ask", "other answers"],
)
def test_eight_bits_that_answer_otherwise(full: float, flipped: float, low: float) -> None:
    given = verdict(GOOD, [ReferenceHead("x", [20, 20], 0.95, 0.95, full, flipped, low)])
    assert given.decision == "fail"
    assert "eight bits" in given.reasons[0]


def test_a_loss_to_eight_bits_that_chance_explains() -> None:
    assert verdict(GOOD, [ReferenceHead("x", [20, 20], 0.95, 0.95, 0.956, 0.0, -0.01)]).decision == "pass"


def test_no_reference_at_all() -> None:
    assert verdict(GOOD, []).decision == "fail"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -9.0])
@pytest.mark.parametrize("field", ["auc_champion", "auc_candidate", "auc_difference_low", "balanced_candidate"])
def test_numbers_that_are_none(value: float, field: str) -> None:
    broken = msgspec.structs.replace(row(0.6, 0.9), **{field: value})
    assert verdict({"c": [broken]}).decision == "fail"
    few = msgspec.structs.replace(row(0.6, 0.9, n=1), **{field: value})
    assert verdict(GOOD | {"b": [few]}).decision == "fail"  # too few to count, but not to warn


def test_reference_numbers_that_are_none() -> None:
    assert verdict(GOOD, [ReferenceHead("x", [9, 9], 0.9, float("nan"), 0.9, 0.0, 0.0)]).decision == "fail"


def test_interval_upside_down() -> None:
    turned = msgspec.structs.replace(row(0.6, 0.9), auc_difference_low=0.4, auc_difference_high=0.2)
    assert verdict({"c": [turned]}).decision == "fail"


def measured(rng: np.random.Generator, skill: float, better: float, n: int, *, permute: bool) -> HeadJudgement:
    """A hospital that reads n cases a class with a champion of `skill` and a candidate of `better`."""
    labels = np.repeat([0, 1, 2], n)
    truth = np.eye(3)[labels]
    old = skill * truth + rng.normal(size=truth.shape)
    new = better * truth + 0.7 * (old - skill * truth) + 0.7 * rng.normal(size=truth.shape)
    if permute:
        labels = rng.permutation(labels)
    change = auc_difference(new, old, labels, draws=400)
    return HeadJudgement(
        "x", [n, n, n], macro_auc(old, labels), macro_auc(new, labels), change.low, change.high,
        balanced_accuracy(old, labels), balanced_accuracy(new, labels), 0.3, True,
    )  # fmt: skip


def test_permuted_labels_hardly_ever_pass() -> None:
    rng = np.random.default_rng(0)
    passed = sum(
        verdict({s: [measured(rng, 1.0, 1.0, 16, permute=True)] for s in "abc"}).decision == "pass" for _ in range(200)
    )
    assert passed <= 10  # 5 %, and harm elsewhere is looked at besides


def test_a_true_gain_passes_nearly_always() -> None:
    rng = np.random.default_rng(1)
    passed = sum(verdict({"c": [measured(rng, 0.3, 2.5, 16, permute=False)]}).decision == "pass" for _ in range(50))
    assert passed >= 45


def test_a_constant_model_is_refused() -> None:
    labels = np.repeat([0, 1, 2], 12)
    rng = np.random.default_rng(2)
    old, new = 2.0 * np.eye(3)[labels] + rng.normal(size=(36, 3)), np.ones((36, 3))
    change = auc_difference(new, old, labels)
    judged = HeadJudgement(
        "x", [12] * 3, macro_auc(old, labels), macro_auc(new, labels), change.low, change.high,
        balanced_accuracy(old, labels), balanced_accuracy(new, labels), 0.6, False,
    )  # fmt: skip
    assert verdict({"a": [judged]}).decision == "fail"
