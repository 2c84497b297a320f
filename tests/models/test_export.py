"""The ONNX graph against torch, the quantised graph against the FP32 one, and what a bad calibration does to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from models import export, hybrid
from models.data import Samples
from models.heads import HEADS
from models.package import columns

SPANS = [columns(head) for head in HEADS]


def test_onnx_gives_what_torch_gives(model: hybrid.Hybrid, graphs: dict[str, Path], cases: Samples) -> None:
    logits, evidence, features = export.run(export.session(graphs["fp32"]), cases.images[:6])
    with torch.inference_mode():
        out = model(torch.from_numpy(cases.images[:6]).float().div(255)[:, None])
    np.testing.assert_allclose(logits, out.logits.numpy(), atol=1e-3)
    np.testing.assert_allclose(evidence, out.evidence.numpy(), atol=1e-2)
    np.testing.assert_allclose(features, out.features.numpy(), atol=1e-3)


def test_the_batch_is_dynamic(graphs: dict[str, Path], cases: Samples) -> None:
    for name in ("fp32", "u8s8"):
        session = export.session(graphs[name])
        alone = export.run(session, cases.images[:3], batch=1)[0]
        together = export.run(session, cases.images[:3], batch=3)[0]
        np.testing.assert_allclose(alone, together, atol=0.05)


def test_evidence_averages_to_the_logit_in_both_forms(graphs: dict[str, Path], cases: Samples) -> None:
    for name in ("fp32", "u8s8"):
        logits, evidence, _ = export.run(export.session(graphs[name]), cases.images[:6])
        np.testing.assert_allclose(evidence.mean((2, 3)), logits, atol=1e-4)


def test_eight_bits_answer_as_fp32_does(graphs: dict[str, Path], cases: Samples) -> None:
    close = export.parity(export.session(graphs["fp32"]), export.session(graphs["u8s8"]), cases.images, SPANS)
    assert close.agreement >= 0.9
    assert close.mean < 0.15
    assert close.evidence_gap < 1e-4


def test_a_bad_calibration_set_shows_in_the_parity(graphs: dict[str, Path], cases: Samples) -> None:
    fp32 = export.session(graphs["fp32"])
    good = export.parity(fp32, export.session(graphs["u8s8"]), cases.images, SPANS)
    black = export.parity(fp32, export.session(graphs["black"]), cases.images, SPANS)
    assert black.mean > 5 * good.mean
    assert black.mean > 0.3


def test_no_convolution_is_quantised_apart_from_its_relu6(graphs: dict[str, Path]) -> None:
    import onnx

    graph = onnx.load(str(graphs["u8s8"])).graph
    kinds = [node.op_type for node in graph.node]
    assert "Clip" not in kinds  # the range 0..6 of the quantised output has taken its place
    made_by = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type == "Conv":
            assert all(made_by[name].op_type == "DequantizeLinear" for name in node.input), node.name


def test_ranges_widen_and_never_shrink() -> None:
    both = export.widest({"a": (-1.0, 2.0), "b": (0.0, 1.0)}, {"a": (-3.0, 1.0)})
    assert both == {"a": (-3.0, 2.0), "b": (0.0, 1.0)}
