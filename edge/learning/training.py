"""One hospital's part of a round: train the named tensors on its confirmed cases and return how they moved.

What the frozen part of the network makes of a case never changes, so it is computed once a case and kept for
the life of the process. The same weights, cases and task give the same numbers on the same machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from edge.learning.cases import Cases
from models import hybrid
from shared.errors import TrustError
from shared.package.input_spec import as_tensor
from shared.package.manifest import Head
from shared.update.layout import Vector, clip
from shared.wire.records import TrainTask

PREFIX_BATCH = 8


@dataclass
class PrefixCache:
    """Frozen activations (80, 14, 14) by digest of the image, for one set of frozen weights."""

    frozen: str = ""
    known: dict[str, npt.NDArray[np.float16]] = field(default_factory=dict)


@dataclass(frozen=True)
class Trained:
    """How the trainable tensors moved, L2 norm at most the task's; losses are means over the cases."""

    delta: dict[str, Vector]
    loss_before: float
    loss_after: float


def train(
    weights: Mapping[str, Vector], cases: Cases, heads: Sequence[Head], task: TrainTask, cache: PrefixCache
) -> Trained:
    """Returns what training the task's tensors from `weights` on `cases` changed.

    Args:
        weights: every tensor of the model, float32.
        cases: at least one, none held out.
        heads: the package's.
        task: which tensors, and how.
        cache: frozen activations of earlier rounds; filled.

    Raises:
        TrustError: the weights are not this architecture's, the task names a tensor that is not trainable, or
            training diverged.
    """
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(mode=True)
    torch.manual_seed(task.seed)
    model = hybrid.from_tensors({name: torch.from_numpy(np.array(value)) for name, value in weights.items()})
    chosen = _choose(model, task.trainable)
    activations = _prefix(model, cases, cache)  # (N,80,14,14)
    losses = _Losses(cases, heads)
    before = losses.mean(model, activations)
    optimiser = torch.optim.AdamW(chosen.values(), lr=task.learning_rate, weight_decay=0.0)
    steps = task.epochs * -(-len(cases) // task.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, task.learning_rate, total_steps=max(steps, 2))
    rng = np.random.default_rng(task.seed)
    for _ in range(task.epochs):
        order = rng.permutation(len(cases))
        for start in range(0, len(order), task.batch):
            rows = torch.from_numpy(order[start : start + task.batch])
            loss = losses.of(model.suffix(activations[rows]).logits, rows)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(chosen.values(), 1.0)
            optimiser.step()
            schedule.step()
    after = losses.mean(model, activations)
    delta = {name: np.asarray(p.detach().numpy() - weights[name], np.float32) for name, p in chosen.items()}
    if not np.isfinite(after) or not all(np.isfinite(value).all() for value in delta.values()):
        raise TrustError("Training diverged.", cure="Lower the campaign's learning rate.")
    return Trained(clip(delta, task.max_norm), before, after)


def _choose(model: hybrid.Hybrid, names: Sequence[str]) -> dict[str, Tensor]:
    """Freezes everything but the tensors named, which must be after the frozen prefix."""
    allowed = set(model.trainable())
    if not names or not set(names) <= allowed:
        raise TrustError(f"The task names tensors that may not be trained: {sorted(set(names) - allowed)}.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in set(names))
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _prefix(model: hybrid.Hybrid, cases: Cases, cache: PrefixCache) -> Tensor:
    trainable = set(model.trainable())
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if name not in trainable:
            digest.update(value.numpy().tobytes())
    if cache.frozen != digest.hexdigest():
        cache.frozen = digest.hexdigest()
        cache.known.clear()
    keys = [hashlib.sha256(image.tobytes()).hexdigest() for image in cases.images]
    wanted = [i for i, key in enumerate(keys) if key not in cache.known]
    with torch.inference_mode():
        for start in range(0, len(wanted), PREFIX_BATCH):
            rows = wanted[start : start + PREFIX_BATCH]
            x = torch.from_numpy(as_tensor(cases.images[rows]))  # (n,1,224,224)
            for i, one in zip(rows, model.prefix(x).half().numpy(), strict=True):
                cache.known[keys[i]] = one  # (80,14,14)
    return torch.from_numpy(np.stack([cache.known[key] for key in keys])).float()  # (N,80,14,14)


class _Losses:
    """Cross-entropy of each case against its own head's columns, rare classes weighing more."""

    def __init__(self, cases: Cases, heads: Sequence[Head]) -> None:
        self._labels = torch.from_numpy(cases.labels)
        self._heads = torch.from_numpy(cases.heads)
        self._spans = [slice(head.offset, head.offset + len(head.classes)) for head in heads]
        self._weights = torch.ones(len(cases))  # (N,)
        for index, head in enumerate(heads):
            mine = cases.heads == index
            counts = np.bincount(cases.labels[mine], minlength=len(head.classes))
            share = 1 / np.sqrt(np.maximum(counts, 1))  # (C,) inverse square root of the class's share
            weights = share[cases.labels[mine]]
            if mine.any():
                self._weights[torch.from_numpy(mine)] = torch.from_numpy(weights / weights.mean()).float()

    def of(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Returns the weighted mean loss of logits (n,K) of the cases `rows` (n,)."""
        each = torch.zeros(len(rows))
        for index, span in enumerate(self._spans):
            mine = self._heads[rows] == index
            if mine.any():
                each = each.masked_scatter(
                    mine,
                    functional.cross_entropy(logits[mine, span], self._labels[rows][mine], reduction="none"),
                )
        return (each * self._weights[rows]).mean()

    def mean(self, model: hybrid.Hybrid, activations: Tensor) -> float:
        """Returns the loss over all cases."""
        total = 0.0
        with torch.inference_mode():
            for start in range(0, len(activations), 32):
                rows = torch.arange(start, min(start + 32, len(activations)))
                total += float(self.of(model.suffix(activations[rows]).logits, rows)) * len(rows)
        return total / len(activations)
