"""The input spec's one implementation: its short cuts give the bits of the plain way."""

from __future__ import annotations

import numpy as np
import pytest

from shared.package import input_spec
from shared.package.input_spec import InputSpec, Percentile, PixelMeaning, to_model_input

RULES = [Percentile(1.0, 99.0), Percentile(0.0, 100.0), Percentile(2.5, 97.3)]


def plainly(pixels: np.ndarray, meaning: PixelMeaning, rule: Percentile) -> tuple[float, float]:
    image = pixels.astype(np.float32) * np.float32(meaning.slope) + np.float32(meaning.intercept)
    low, high = np.percentile(image, [rule.low, rule.high])
    return float(low), float(high)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16])
@pytest.mark.parametrize("meaning", [PixelMeaning(), PixelMeaning(-1.7, 3.1), PixelMeaning(0.3, -1024.0)])
def test_counted_percentiles_are_those_of_numpy_to_the_bit(dtype: type, meaning: PixelMeaning) -> None:
    rng = np.random.default_rng(1)
    limits = np.iinfo(dtype)
    for shape in ((1, 1), (1, 2), (7, 13), (101, 64), (300, 257)):
        for pixels in (
            rng.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True),
            np.clip(rng.normal(0, 20, shape), limits.min, limits.max).astype(dtype),
            np.full(shape, limits.max, dtype=dtype),
        ):
            for rule in RULES:
                assert input_spec._counted(pixels, meaning, rule) == plainly(pixels, meaning, rule)


def test_counting_is_exact_when_one_value_is_more_frequent_than_float32_can_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pixels = np.full((4200, 4100), 7, dtype=np.uint8)  # more than 2^24 of them
    assert input_spec._histogram(pixels)[7] == pixels.size
    monkeypatch.setattr(input_spec, "_EXACT_COUNT", 50)  # many parts, the last one shorter
    rng = np.random.default_rng(2)
    small = rng.integers(-500, 500, (33, 21), dtype=np.int16)
    counts = input_spec._histogram(small)
    assert counts.sum() == small.size
    assert all(counts[value + 32768] == (small == value).sum() for value in range(-500, 500))


def test_a_view_into_a_larger_array_and_the_model_input_are_the_same_either_way() -> None:
    spec = InputSpec(height=32, width=32, intensity=Percentile(1.0, 99.0))
    whole = np.random.default_rng(3).integers(0, 4096, (200, 300), dtype=np.uint16)
    part = whole[10:150:2, 20:220]
    meaning = PixelMeaning(1.5, -10.0, inverted=True)
    assert np.array_equal(to_model_input(part, meaning, spec), to_model_input(part.astype(np.float32), meaning, spec))
