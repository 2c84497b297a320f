"""Guard, strategy and average: nothing poisoned gets in, and memory is the model's, not the fleet's."""

from __future__ import annotations

import tracemalloc
from functools import partial

import numpy as np
import pytest

from cloud.rounds.aggregate import Sent, average, by_stage
from cloud.rounds.guard import inspect, weigh
from cloud.rounds.strategy import FedAvg, Strategy
from shared.errors import PeerError, StateError
from shared.update.codec import encode
from shared.update.layout import Layout, Vector, norm
from shared.wire.records import ModelUpdate

SHAPES = {"blocks.0.up.weight": (96, 64), "head.weight": (3, 64), "head.bias": (3,)}
BASE = "f" * 64


def delta(seed: int, scale: float = 0.01) -> dict[str, Vector]:
    rng = np.random.default_rng(seed)
    return {name: (rng.normal(size=shape) * scale).astype(np.float32) for name, shape in SHAPES.items()}


LAYOUT = Layout.of(delta(0))


def blob(tensors: dict[str, Vector]) -> bytes:
    return encode(tensors, None, 1.0, np.random.default_rng(0)).blob


class StrategyContract:
    """What every strategy promises."""

    def make(self, layout: Layout) -> Strategy:
        raise NotImplementedError

    def test_one_update_comes_out_as_it_went_in(self) -> None:
        strategy = self.make(LAYOUT)
        strategy.add(delta(1), 7.0)
        result = strategy.result()
        LAYOUT.check(result)
        for name, value in delta(1).items():
            np.testing.assert_allclose(result[name], value, rtol=1e-6)

    def test_order_does_not_matter(self) -> None:
        results = []
        for order in ((1, 2, 3), (3, 1, 2)):
            strategy = self.make(LAYOUT)
            for seed in order:
                strategy.add(delta(seed), seed)
            results.append(strategy.result())
        for name in SHAPES:
            np.testing.assert_allclose(results[0][name], results[1][name], rtol=1e-5, atol=1e-9)

    def test_an_added_update_is_not_kept(self) -> None:
        strategy, update = self.make(LAYOUT), delta(1)
        strategy.add(update, 1.0)
        for value in update.values():
            value[...] = 99.0
        np.testing.assert_allclose(strategy.result()["head.bias"], delta(1)["head.bias"], rtol=1e-6)

    def test_nothing_added(self) -> None:
        with pytest.raises(StateError):
            self.make(LAYOUT).result()

    @pytest.mark.parametrize("weight", [0.0, -1.0, np.nan, np.inf])
    def test_a_weight_that_is_none(self, weight: float) -> None:
        with pytest.raises(PeerError):
            self.make(LAYOUT).add(delta(1), weight)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_a_value_that_is_none(self, value: float) -> None:
        update = delta(1)
        update["head.bias"][0] = value
        with pytest.raises(PeerError):
            self.make(LAYOUT).add(update, 1.0)

    def test_another_layout(self) -> None:
        with pytest.raises(PeerError):
            self.make(LAYOUT).add({"head.bias": delta(1)["head.bias"]}, 1.0)

    def test_memory_does_not_grow_with_hospitals(self) -> None:
        layout = Layout.of({"w": np.zeros((500, 1000), np.float32)})

        def peak(hospitals: int) -> int:
            tracemalloc.start()
            strategy = self.make(layout)
            for seed in range(hospitals):
                strategy.add({"w": np.full((500, 1000), seed, np.float32)}, 1.0)
            strategy.result()
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            return peak

        assert peak(200) < 1.1 * peak(10)


class TestFedAvg(StrategyContract):
    def make(self, layout: Layout) -> Strategy:
        return FedAvg(layout)

    def test_weights_are_cases(self) -> None:
        strategy = FedAvg(LAYOUT)
        strategy.add(delta(1), 30)
        strategy.add(delta(2), 10)
        expected = 0.75 * delta(1)["head.bias"] + 0.25 * delta(2)["head.bias"]
        np.testing.assert_allclose(strategy.result()["head.bias"], expected, rtol=1e-5)


class TestGuard:
    def update(self, **changes: object) -> ModelUpdate:
        values = {
            "round": "k-1", "base": BASE, "cases": 10, "norm": 1.0, "loss_before": 1.0, "loss_after": 0.5,
            "blob": blob(delta(1)),
        }  # fmt: skip
        return ModelUpdate(**(values | changes))  # type: ignore[arg-type]

    def test_measures_the_norm_itself(self) -> None:
        assert inspect(self.update(norm=0.0), LAYOUT, BASE, 10.0) == pytest.approx(norm(delta(1)), rel=0.01)

    def test_no_cases_no_blob(self) -> None:
        assert inspect(self.update(cases=0, blob=b""), LAYOUT, BASE, 10.0) == 0.0

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"base": "0" * 64}, "other weights"),
            ({"cases": -1}, "out of range"),
            ({"cases": 10**9}, "out of range"),
            ({"loss_after": float("nan")}, "out of range"),
            ({"cases": 0}, "cannot carry"),
            ({"blob": b"RFU1"}, "Not an update"),
            ({"blob": blob(delta(1, scale=50.0))}, "beyond the round's limit"),
            ({"blob": blob({"head.bias": delta(1)["head.bias"]})}, "other tensors"),
        ],
    )
    def test_poisoned(self, changes: dict, reason: str) -> None:
        with pytest.raises(PeerError, match=reason):
            inspect(self.update(**changes), LAYOUT, BASE, 10.0)

    def test_an_outlier_is_named_and_has_no_weight(self) -> None:
        weighed = weigh([10, 10, 10], [1.0, 1.2, 9.0])
        assert [w.weight for w in weighed] == [10, 10, 0]
        assert "median" in weighed[2].reason

    def test_two_hospitals_have_no_outlier(self) -> None:
        assert [w.weight for w in weigh([10, 10], [1.0, 90.0])] == [10, 10]

    def test_nobody_buys_the_average_with_cases(self) -> None:
        assert [w.weight for w in weigh([10, 10, 1_000_000], [1, 1, 1])] == [10, 10, 40]

    def test_no_cases_no_weight(self) -> None:
        assert [w.weight for w in weigh([0, 5], [0, 1])] == [0, 5]
        assert weigh([0, 0], [0, 0])[0].reason == "no cases"


class TestAverage:
    def sent(self, seed: int, cases: int, scale: float = 0.01) -> Sent:
        tensors = delta(seed, scale)
        return Sent(f"site{seed}", "edge", cases, norm(tensors), partial(blob, tensors))

    def test_moves_the_trainable_tensors_and_no_other(self) -> None:
        base = delta(9) | {"stem.weight": np.ones(4, np.float32)}
        after, record = average(base, LAYOUT, [self.sent(1, 10), self.sent(2, 30)], FedAvg(LAYOUT))
        np.testing.assert_array_equal(after["stem.weight"], base["stem.weight"])
        expected = base["head.bias"] + 0.25 * delta(1)["head.bias"] + 0.75 * delta(2)["head.bias"]
        np.testing.assert_allclose(after["head.bias"], expected, atol=2e-4)
        assert [part.weight for part in record.parts] == [10, 30]
        assert record.moved == pytest.approx(np.sqrt(sum(v**2 for v in record.stages.values())))

    def test_an_outlier_stays_out(self) -> None:
        sent = [self.sent(1, 10), self.sent(2, 10), self.sent(3, 10, scale=1.0)]
        after, record = average(delta(9), LAYOUT, sent, FedAvg(LAYOUT))
        assert [part.weight for part in record.parts] == [10, 10, 0]
        assert abs(after["head.bias"] - delta(9)["head.bias"]).max() < 0.1

    def test_nobody_trained(self) -> None:
        with pytest.raises(StateError):
            average(delta(9), LAYOUT, [Sent("a", "edge", 0, 0.0, bytes)], FedAvg(LAYOUT))


def test_stages_are_named_by_the_first_two_parts() -> None:
    one = np.ones((1, 1), np.float32)
    groups = by_stage({"blocks.0.up.weight": one, "blocks.0.out.weight": one, "head.weight": one})
    assert groups == {"blocks.0": pytest.approx(np.sqrt(2)), "head": 1.0}
