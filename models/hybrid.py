"""The CNN-transformer that reads every modality: EfficientNet-Lite0's convolutions, then three transformer blocks.

    image (N,1,224,224) -> stem, stages 0..4 (convolutions, ReLU6) -> (N,112,14,14) -> 196 tokens of 192
    -> 3 pre-norm blocks -> tokens (N,196,192) -> one linear head on every token

The head is linear and runs on tokens, so three outputs come from one pass and belong together exactly:
    evidence (N,K,14,14) = head(tokens)       logits (N,K) = mean of evidence over tokens
    features (N,192)     = mean of tokens     logits = head.weight · features + head.bias

BatchNorm exists only inside `load_imagenet`: it is folded into the convolutions before the first training step, so
what is trained, federated, exported and saved is one and the same form, without running statistics.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from shared.errors import TrustError
from shared.files import atomic_write

ARCHITECTURE = "hybrid-1"
SIDE = 224  # pixels
GRID = 14  # tokens a side
WIDTH = 192  # features of a token
DEPTH = 3
ATTENTION_HEADS = 6
# (expansion, kernel, first stride, channels out, blocks) of EfficientNet-Lite0 up to stride 16
STAGES = ((1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3))
FROZEN_STAGES = 4  # the stem and stages 0..3 are `prefix`: what a hospital never trains and computes once a case


class Outputs(NamedTuple):
    """What one pass gives (shapes in the module's docstring, all float32)."""

    logits: Tensor
    evidence: Tensor
    features: Tensor


class InvertedResidual(nn.Module):
    """MBConv without squeeze-excite: expand 1x1, depthwise kxk, project 1x1; a sum where the shapes allow it."""

    def __init__(self, inside: int, outside: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        wide = inside * expansion
        self.expand = nn.Conv2d(inside, wide, 1) if expansion > 1 else None
        self.depthwise = nn.Conv2d(wide, wide, kernel, stride, kernel // 2, groups=wide)
        self.project = nn.Conv2d(wide, outside, 1)
        self.residual = stride == 1 and inside == outside
        self.active = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:  # (N,inside,H,W) -> (N,outside,H/stride,W/stride)
        y = x if self.expand is None else self.active(self.expand(x))  # (N,wide,H,W)
        y = self.active(self.depthwise(y))  # (N,wide,H/stride,W/stride)
        y = torch.as_tensor(self.project(y))  # (N,outside,H/stride,W/stride)
        return x + y if self.residual else y


class Block(nn.Module):
    """Pre-norm transformer block of plain nn.Linear, so that per-sample gradients (Opacus) are well defined."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(WIDTH)
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.norm_2 = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 3 * WIDTH)
        self.down = nn.Linear(3 * WIDTH, WIDTH)
        self.active = nn.ReLU()  # quantises better than GELU: one-sided, no tail

    def forward(self, x: Tensor) -> Tensor:  # (N,T,192) -> (N,T,192), T = 196
        depth = WIDTH // ATTENTION_HEADS
        qkv = self.query_key_value(self.norm_1(x))  # (N,T,576)
        q, k, v = qkv.reshape(-1, GRID * GRID, 3, ATTENTION_HEADS, depth).permute(2, 0, 3, 1, 4)  # (N,6,T,32) x 3
        weights = torch.softmax(q @ k.transpose(-2, -1) * depth**-0.5, dim=-1)  # (N,6,T,T)
        mixed = (weights @ v).transpose(1, 2).reshape(-1, GRID * GRID, WIDTH)  # (N,T,192)
        x = x + self.out(mixed)  # (N,T,192)
        return torch.as_tensor(x + self.down(self.active(self.up(self.norm_2(x)))))  # (N,T,192)


class Hybrid(nn.Module):
    """See the module's docstring. `classes` is K, the sum over heads."""

    def __init__(self, classes: int, *, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem = nn.Conv2d(1, 32, 3, 2, 1)
            self.active = nn.ReLU6()
            stages, inside = [], 32
            for expansion, kernel, stride, outside, blocks in STAGES:
                rows = [
                    InvertedResidual(inside if i == 0 else outside, outside, expansion, kernel, stride if i == 0 else 1)
                    for i in range(blocks)
                ]
                stages.append(nn.Sequential(*rows))
                inside = outside
            self.stages = nn.ModuleList(stages)
            self.embed = nn.Linear(inside, WIDTH)
            self.position = nn.Parameter(torch.randn(1, GRID * GRID, WIDTH) * 0.02)
            self.blocks = nn.ModuleList([Block() for _ in range(DEPTH)])
            self.norm = nn.LayerNorm(WIDTH)
            self.head = nn.Linear(WIDTH, classes)

    def convolve(self, x: Tensor, first: int, last: int) -> Tensor:
        """Returns `x` after stages first..last-1; with first 0 the stem runs before them on images (N,1,224,224)."""
        if first == 0:
            x = self.active(self.stem(x))  # (N,32,112,112)
        for stage in self.stages[first:last]:
            x = stage(x)  # (N,16,112,112), (N,24,56,56), (N,40,28,28), (N,80,14,14), (N,112,14,14)
        return x

    def prefix(self, images: Tensor) -> Tensor:
        """Returns the frozen activations (N,80,14,14) of images (N,1,224,224) in 0..1: computed once a case."""
        return self.convolve(images, 0, FROZEN_STAGES)

    def tokens(self, x: Tensor) -> Tensor:
        """Returns tokens (N,196,192) of stage 4's output (N,112,14,14)."""
        x = self.embed(x.flatten(2).transpose(1, 2)) + self.position  # (N,196,192)
        for block in self.blocks:
            x = block(x)  # (N,196,192)
        return torch.as_tensor(self.norm(x))  # (N,196,192)

    def read(self, tokens: Tensor) -> Outputs:
        """Returns the three outputs of tokens (N,196,192)."""
        evidence = self.head(tokens).transpose(1, 2)  # (N,K,196)
        return Outputs(
            evidence.mean(2),  # (N,K)
            evidence.reshape(-1, evidence.shape[1], GRID, GRID),  # (N,K,14,14)
            tokens.mean(1),  # (N,192)
        )

    def suffix(self, activations: Tensor) -> Outputs:
        """Returns the outputs of `prefix`'s activations (N,80,14,14): the part that hospitals train."""
        return self.read(self.tokens(self.convolve(activations, FROZEN_STAGES, len(STAGES))))

    def forward(self, images: Tensor) -> Outputs:
        """Returns the outputs of images float32 (N,1,224,224) in 0..1."""
        return self.suffix(self.prefix(images))

    def trainable(self) -> list[str]:
        """Returns the names of the tensors that `suffix` uses, in the weights file's order."""
        frozen = ("stem.", *(f"stages.{i}." for i in range(FROZEN_STAGES)))
        return [name for name in self.state_dict() if not name.startswith(frozen)]


def save(model: Hybrid, path: Path) -> None:
    """Writes the weights as safetensors in half precision, durably. `load` gives the rounded model back."""
    tensors = {name: t.detach().to("cpu", torch.float16).contiguous() for name, t in model.state_dict().items()}
    atomic_write(path, to_bytes(tensors, metadata={"architecture": ARCHITECTURE}), mode=0o644)


def load(path: Path) -> Hybrid:
    """Returns the float32 model whose half-precision weights are in `path`, in eval mode.

    Raises:
        TrustError: not safetensors, or not the tensors of this architecture.
    """
    try:
        return from_tensors(load_file(path))
    except (SafetensorError, OSError) as exc:
        raise TrustError(f"{path} holds no weights that can be read: {exc}.") from exc


def from_tensors(tensors: dict[str, Tensor]) -> Hybrid:
    """Returns the model of named tensors, in eval mode.

    Raises:
        TrustError: a tensor is missing, unknown, of another shape, or holds a value that is not finite.
    """
    head = tensors.get("head.bias")
    if head is None or head.ndim != 1 or not 0 < head.shape[0] <= 10_000:
        raise TrustError(f"These are not the weights of {ARCHITECTURE}: there is no head.")
    model = Hybrid(head.shape[0])
    wanted = {name: t.shape for name, t in model.state_dict().items()}
    if wanted != {name: t.shape for name, t in tensors.items()}:
        raise TrustError(f"These are not the weights of {ARCHITECTURE}: names or shapes differ.")
    if not all(torch.isfinite(t).all() for t in tensors.values()):
        raise TrustError("A weight is not a finite number.")
    model.load_state_dict({name: t.float() for name, t in tensors.items()})
    return model.eval()


def fold(weight: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the (weight, bias) of the convolution that equals convolution without bias, then BatchNorm (eps 1e-3)."""
    scale = gamma / torch.sqrt(variance + 1e-3)  # (C,)
    return weight * scale.reshape(-1, 1, 1, 1), beta - mean * scale  # (C,I,k,k), (C,)


def load_imagenet(model: Hybrid, path: Path) -> None:
    """Fills the convolutions from the EfficientNet-Lite0 checkpoint in `path`, BatchNorm folded.

    The three colour filters are summed and the checkpoint's input scaling, (x - 127/255) / (128/255), is folded into
    the stem, so that a gray image in 0..1 gives what its RGB copy gave (the outermost pixel aside: padding is black).
    """
    source = torch.load(path, map_location="cpu", weights_only=True)

    def folded(conv: str, norm: str) -> tuple[Tensor, Tensor]:
        parts = (source[f"{norm}.{name}"] for name in ("weight", "bias", "running_mean", "running_var"))
        return fold(source[f"{conv}.weight"], *parts)

    def fill(target: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
        with torch.no_grad():
            target.weight.copy_(weight)
            if target.bias is not None:
                target.bias.copy_(bias)

    weight, bias = folded("_conv_stem", "_bn0")
    gray = weight.sum(1, keepdim=True) * (255 / 128)  # (32,1,3,3)
    fill(model.stem, gray, bias - gray.sum((1, 2, 3)) * (127 / 255))
    for i, row in enumerate(m for m in model.stages.modules() if isinstance(m, InvertedResidual)):
        if row.expand is not None:
            fill(row.expand, *folded(f"_blocks.{i}._expand_conv", f"_blocks.{i}._bn0"))
        fill(row.depthwise, *folded(f"_blocks.{i}._depthwise_conv", f"_blocks.{i}._bn1"))
        fill(row.project, *folded(f"_blocks.{i}._project_conv", f"_blocks.{i}._bn2"))
