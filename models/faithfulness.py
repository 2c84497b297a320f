"""Whether evidence maps tell the truth: deletion and insertion, randomised weights, the share inside the body.

Sources: Petsiuk et al., "RISE", BMVC 2018 (deletion and insertion); Adebayo et al., "Sanity Checks for Saliency Maps",
NeurIPS 2018 (randomised weights); Zech et al., PLoS Medicine 2018 (a corner marker that a model learnt instead of the
disease). Maps are on the grid of tokens, (G, G); pictures are model inputs, uint8 (S, S), G divides S.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from models.hybrid import Hybrid
from models.metrics import probabilities

Floats = npt.NDArray[np.floating]
Picture = npt.NDArray[np.uint8]
Answer = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]  # uint8 (N,S,S) -> logits (N,C) of one head

STEPS = 14  # of a curve, from nothing to everything
_BODY_LEAST = 0.05  # of the picture: a smaller component is no body


def contrast(evidence: Floats, chosen: int) -> Floats:
    """Returns what speaks for a class and not for the others, (G, G), of a head's evidence (C, G, G).

    A constant added to all classes changes no answer; the mean over the others takes it away.
    """
    others = np.delete(evidence, chosen, axis=0).mean(0)  # (G,G)
    return np.asarray(evidence[chosen] - others)


def curve(answer: Answer, picture: Picture, ranking: Floats, chosen: int, *, insert: bool) -> Floats:
    """Returns the chosen class's probability (STEPS + 1,) while cells go, or come, by falling `ranking` (G, G).

    What is not there is blurred beyond recognition and keeps its brightness: a black cell would be a finding.
    """
    side, grid = picture.shape[0], ranking.shape[0]
    blurred = cv2.GaussianBlur(picture, (0, 0), side / 14)
    order = np.argsort(-ranking, axis=None)  # (G*G,)
    pictures = []
    for count in np.linspace(0, order.size, STEPS + 1).round().astype(int):
        touched = np.zeros(order.size, bool)
        touched[order[:count]] = True
        mask = np.kron(touched.reshape(grid, grid), np.ones((side // grid, side // grid), bool))  # (S,S)
        pictures.append(np.where(mask == insert, picture, blurred))
    return np.asarray(probabilities(answer(np.stack(pictures)))[:, chosen])


def area(values: Floats) -> float:
    """Returns the area under a curve over 0..1."""
    return float((values[1:] + values[:-1]).mean() / 2)


def randomised(model: Hybrid, *, seed: int = 0) -> Iterator[tuple[str, Hybrid]]:
    """Yields copies whose weights are drawn anew from the head downwards, each with all of the ones before."""
    torch.manual_seed(seed)
    broken = copy.deepcopy(model)
    parts: list[tuple[str, nn.Module]] = [("head", broken.head)]
    parts += [(f"block {i}", broken.blocks[i]) for i in reversed(range(len(broken.blocks)))]
    parts += [("embedding", broken.embed)]
    parts += [(f"stage {i}", broken.stages[i]) for i in reversed(range(len(broken.stages)))]
    for name, part in parts:
        for layer in part.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d, nn.LayerNorm)):
                layer.reset_parameters()
        yield name, broken


def rank_correlation(one: Floats, two: Floats) -> float:
    """Returns Spearman's correlation of two maps; 0 where one is flat."""
    a, b = (np.argsort(np.argsort(m, axis=None)).astype(float) for m in (one, two))
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(one) and np.ptp(two) else 0.0


def body_mask(picture: Picture) -> npt.NDArray[np.bool_]:
    """Returns where the body is, (S, S): the largest bright component with its holes filled; everything without one."""
    smooth = cv2.GaussianBlur(picture, (0, 0), 2)
    level, _ = cv2.threshold(smooth, 0, 255, cv2.THRESH_OTSU)
    bright = (smooth > level / 2).astype(np.uint8)
    outlines, _ = cv2.findContours(bright, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    if not outlines or cv2.contourArea(largest := max(outlines, key=cv2.contourArea)) < _BODY_LEAST * picture.size:
        return np.ones(picture.shape, bool)
    filled = cv2.drawContours(np.zeros(picture.shape, np.uint8), [largest], -1, 1, cv2.FILLED)
    return np.asarray(filled, bool)


def share_inside(evidence: Floats, mask: npt.NDArray[np.bool_]) -> float:
    """Returns which part of what speaks for a class, (G, G), lies where `mask` (S, S) holds; 1 when nothing speaks."""
    positive = np.maximum(evidence, 0)
    cover = cv2.resize(mask.astype(np.float32), evidence.shape, interpolation=cv2.INTER_AREA)  # (G,G)
    total = float(positive.sum())
    return float((positive * cover).sum() / total) if total else 1.0


def reliance_outside(answer: Answer, picture: Picture, mask: npt.NDArray[np.bool_], chosen: int) -> float:
    """Returns by how much the chosen class's probability falls when what lies outside the body is made even.

    Attention mixes tokens: a shortcut in a corner may colour the whole map, and its share inside the body then looks
    well (it did, on a model trained on a planted marker). What the answer rests on is asked of the answer itself.
    """
    outside = picture[~mask]
    even = np.where(mask, picture, np.uint8(np.median(outside) if outside.size else 0))  # (S,S)
    whole, without = probabilities(answer(np.stack([picture, even])))[:, chosen]
    return float(whole - without)
