from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models import hybrid
from models.data import Samples
from models.export import activation_ranges, export_fp32, quantise
from models.package import BASELINE, WEIGHTS
from models.reference import reference_set


@pytest.fixture(scope="session")
def model() -> hybrid.Hybrid:
    """The shipped weights: parity of random weights would say little about quantisation."""
    return hybrid.load(BASELINE / WEIGHTS)


@pytest.fixture(scope="session")
def cases() -> Samples:
    return reference_set(5, 24)


@pytest.fixture(scope="session")
def graphs(model: hybrid.Hybrid, cases: Samples, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """FP32, U8S8 calibrated on phantoms, and U8S8 calibrated on black images only."""
    folder = tmp_path_factory.mktemp("graphs")
    paths = {name: folder / f"{name}.onnx" for name in ("fp32", "u8s8", "black")}
    export_fp32(model, paths["fp32"])
    quantise(paths["fp32"], paths["u8s8"], activation_ranges(paths["fp32"], cases.images))
    quantise(paths["fp32"], paths["black"], activation_ranges(paths["fp32"], np.zeros_like(cases.images[:4])))
    return paths
