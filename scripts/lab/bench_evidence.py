"""Whether the shipped model's evidence tells the truth (models/faithfulness.py), head by head, on test pictures.

Every check has its control in the same run: a random order of cells, the map before the weights were drawn anew, the
area of the body mask. Real pictures where they are, phantoms otherwise; the name of each row says which.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from models import faithfulness, hybrid
from models.data import Samples, data_folder, phantoms, pictures
from models.export import run, session
from models.heads import HEADS
from models.package import BASELINE, columns
from scripts.lab.table import Row
from shared.package.manifest import Head

CASES = 40  # a head; each costs some hundred passes
RANDOM_ORDERS = 3

Chosen = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]


def measure() -> list[Row]:
    """Returns the figures of every head."""
    rows = []
    quantised, exact = session(BASELINE / "cpu-u8s8.onnx"), session(BASELINE / "cpu-fp32.onnx")
    model = hybrid.load(BASELINE / "weights.safetensors")
    for head in HEADS:
        where, cases = _cases(head)
        for name, graph in (("fp32", exact), ("u8s8", quantised)):
            logits, evidence, _ = run(graph, cases.images)
            gap = float(np.abs(evidence.mean((2, 3)) - logits).max())
            rows.append(Row(f"{head.name}, {name}: largest |mean of map - logit|", gap, "logit", "limit", 1e-4))
        mine = columns(head)
        logits, evidence, _ = run(quantised, cases.images)
        chosen = logits[:, mine].argmax(1)
        maps = [faithfulness.contrast(one[mine], c) for one, c in zip(evidence, chosen, strict=True)]

        def answer(images: faithfulness.Picture, mine: slice = mine) -> Logits:
            return run(quantised, images)[0][:, mine]

        rows += _curves(f"{head.name}, {where}", answer, cases, chosen, maps)
        rows += _body(f"{head.name}, {where}", answer, cases, chosen, maps)
        rows += _randomised(f"{head.name}, {where}", model, mine, cases, chosen)
    return rows


def _cases(head: Head) -> tuple[str, Samples]:
    folder, rng = data_folder(), np.random.default_rng(0)
    cases = pictures(folder, head, "test") if folder else phantoms(3, head.name, CASES, slices=1, keep=1)
    chosen = rng.permutation(len(cases.images))[:CASES]
    mask = np.zeros(len(cases.images), bool)
    mask[chosen] = True
    return "real test pictures" if folder else "phantoms", cases.where(mask)


def _curves(
    what: str, answer: faithfulness.Answer, cases: Samples, chosen: Chosen, maps: Sequence[faithfulness.Floats]
) -> list[Row]:
    rows, rng = [], np.random.default_rng(0)
    for name, insert in (("deletion", False), ("insertion", True)):
        ours, control = [], []
        for picture, c, ranking in zip(cases.images, chosen, maps, strict=True):
            ours.append(faithfulness.area(faithfulness.curve(answer, picture, ranking, c, insert=insert)))
            for _ in range(RANDOM_ORDERS):
                order = rng.random(ranking.shape)
                control.append(faithfulness.area(faithfulness.curve(answer, picture, order, c, insert=insert)))
        better = "lower" if name == "deletion" else "higher"
        rows.append(
            Row(
                f"{what}: area under {name} ({better} is better)",
                float(np.mean(ours)),
                "probability",
                "random order",
                float(np.mean(control)),
            )
        )
    return rows


def _body(
    what: str, answer: faithfulness.Answer, cases: Samples, chosen: Chosen, maps: Sequence[faithfulness.Floats]
) -> list[Row]:
    masks = [faithfulness.body_mask(picture) for picture in cases.images]
    share = np.mean([faithfulness.share_inside(one, mask) for one, mask in zip(maps, masks, strict=True)])
    fall = [
        faithfulness.reliance_outside(answer, picture, mask, c)
        for picture, mask, c in zip(cases.images, masks, chosen, strict=True)
    ]
    return [
        Row(
            f"{what}: share of evidence inside the body",
            float(share),
            "",
            "body's area",
            float(np.mean([m.mean() for m in masks])),
        ),
        Row(f"{what}: fall of the probability when the rest is made even", float(np.mean(fall)), "probability"),
    ]


def _randomised(what: str, model: hybrid.Hybrid, mine: slice, cases: Samples, chosen: Chosen) -> list[Row]:
    """The head alone drawn anew, and everything."""
    images = torch.from_numpy(cases.images).float().div(255)[:, None]  # (N,1,S,S)

    def maps(one: hybrid.Hybrid) -> list[faithfulness.Floats]:
        with torch.inference_mode():
            evidence = one.eval()(images).evidence.numpy()[:, mine]  # (N,C,G,G)
        return [faithfulness.contrast(each, c) for each, c in zip(evidence, chosen, strict=True)]

    def row(name: str, broken: hybrid.Hybrid) -> Row:
        alike = [abs(faithfulness.rank_correlation(a, b)) for a, b in zip(before, maps(broken), strict=True)]
        return Row(f"{what}: |rank correlation| with weights drawn anew down to {name}", float(np.mean(alike)), "")

    before, drawn = maps(model), faithfulness.randomised(model)
    first = row(*next(drawn))
    return [first, *(row(*last) for last in deque(drawn, maxlen=1))]
