"""Rounding the convolutions once: quantisation then finds nothing left to round, and means stay where they were."""

from __future__ import annotations

import torch

from models import hybrid
from models.data import Samples
from models.snap import on_grid, snap


def test_rounding_is_done_once_also_after_half_precision() -> None:
    weight = (
        torch.randn(16, 4, 3, 3, generator=torch.Generator().manual_seed(1))
        * torch.logspace(-3, 1, 16)[:, None, None, None]
    )
    once = on_grid(weight)
    assert (once - weight).abs().max() > 0
    torch.testing.assert_close(on_grid(once), once, rtol=1e-6, atol=0)
    step = once.abs().amax((1, 2, 3), keepdim=True) / 127
    torch.testing.assert_close(on_grid(once.half().float()) / step, once / step, rtol=0, atol=0.1)


def test_biases_take_up_the_shift_that_rounding_causes(cases: Samples) -> None:
    model = hybrid.Hybrid(3, seed=1)
    with torch.no_grad():
        model.stem.weight.zero_()
        model.stem.bias.fill_(3.0)  # a constant channel: rounding what reads it moves the whole next channel
    x = torch.from_numpy(cases.images[:3]).float().div(255)[:, None]
    plain = hybrid.from_tensors(dict(model.state_dict()))
    for stage in plain.stages:
        for conv in (m for m in stage.modules() if isinstance(m, torch.nn.Conv2d)):
            conv.weight.data = on_grid(conv.weight.data)
    snapped = hybrid.from_tensors(dict(model.state_dict()))
    snap(snapped, cases.images[:3])
    with torch.inference_mode():
        target, with_bias, without = (m.prefix(x).mean((0, 2, 3)) for m in (model.eval(), snapped, plain))
    assert (with_bias - target).abs().max() < 0.1 * (without - target).abs().max()
