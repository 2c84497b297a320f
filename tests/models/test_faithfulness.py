"""The checks of evidence maps can tell a true map from a false one."""

from __future__ import annotations

import copy

import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional

from models import faithfulness, hybrid
from models.data import Samples, phantoms
from models.heads import SIDE
from models.package import BASELINE

GRID = 14


def brightness_of_a_corner(images: faithfulness.Picture) -> np.ndarray:
    """A model that looks at the left upper quarter and at nothing else: logits (N, 2)."""
    seen = images[:, : SIDE // 2, : SIDE // 2].mean((1, 2)).astype(np.float32) / 32
    return np.stack([4 - seen, seen - 4], 1)


def bright_corner() -> faithfulness.Picture:
    picture = np.full((SIDE, SIDE), 20, np.uint8)
    picture[: SIDE // 2, : SIDE // 2] = 250
    return picture


def test_a_true_map_is_better_than_its_opposite() -> None:
    true = np.zeros((GRID, GRID))
    true[: GRID // 2, : GRID // 2] = 1
    picture = bright_corner()
    areas = {
        (insert, name): faithfulness.area(
            faithfulness.curve(brightness_of_a_corner, picture, ranking, 1, insert=insert)
        )
        for insert in (False, True)
        for name, ranking in (("true", true), ("false", -true))
    }
    assert areas[False, "true"] < areas[False, "false"]
    assert areas[True, "true"] > areas[True, "false"]


def test_a_curve_begins_and_ends_at_the_whole_picture_or_at_none() -> None:
    ranking, picture = np.zeros((GRID, GRID)), bright_corner()
    gone, come = (
        faithfulness.curve(brightness_of_a_corner, picture, ranking, 1, insert=insert) for insert in (False, True)
    )
    assert gone[0] == pytest.approx(come[-1])
    assert gone[-1] == pytest.approx(come[0])
    assert gone[0] > gone[-1]


def test_what_all_classes_have_in_common_is_no_evidence_for_one() -> None:
    evidence = np.random.default_rng(0).random((3, GRID, GRID))
    shifted = evidence + np.random.default_rng(1).random((GRID, GRID))
    np.testing.assert_allclose(faithfulness.contrast(evidence, 1), faithfulness.contrast(shifted, 1))


def test_the_body_is_found_and_a_marker_beside_it_is_not_the_body() -> None:
    picture = cv2.ellipse(np.zeros((SIDE, SIDE), np.uint8), (112, 120), (70, 90), 0, 0, 360, 150, -1)
    body = picture > 0
    picture[4:24, 4:24] = 255
    mask = faithfulness.body_mask(picture)
    assert not mask[4:24, 4:24].any()
    assert (mask & body).sum() / body.sum() > 0.98
    assert faithfulness.body_mask(np.zeros((SIDE, SIDE), np.uint8)).all()
    evidence = np.zeros((GRID, GRID))
    evidence[0, 0] = 1
    assert faithfulness.share_inside(evidence, mask) < 0.1
    assert faithfulness.share_inside(np.roll(evidence, (7, 7), (0, 1)), mask) > 0.9


def test_the_map_depends_on_the_weights() -> None:
    """Adebayo et al.: a map that stays when the weights are drawn anew explains the picture, not the answer."""
    model = hybrid.load(BASELINE / "weights.safetensors")
    images = tensor(phantoms(5, "chest-xray", 6, slices=1, keep=1).images)
    with torch.inference_mode():
        before = model(images).evidence.numpy()
        name, last = list(faithfulness.randomised(model))[-1]
        after = last.eval()(images).evidence.numpy()
    assert name == "stage 0"
    alike = [
        abs(faithfulness.rank_correlation(faithfulness.contrast(a[:3], 1), faithfulness.contrast(b[:3], 1)))
        for a, b in zip(before, after, strict=True)
    ]
    assert faithfulness.rank_correlation(before[0, 0], before[0, 0]) == pytest.approx(1)
    assert np.mean(alike) < 0.6


def test_attack_a_corner_marker_that_was_learnt_instead_of_the_disease_is_caught() -> None:
    """The map's share inside the body does not tell (attention spreads the shortcut); what the answer rests on does."""
    learnt = phantoms(77, "chest-xray", 96, slices=1, keep=1)
    labels = np.random.default_rng(0).integers(0, 2, len(learnt.labels))  # the marker is all that tells
    honest = hybrid.load(BASELINE / "weights.safetensors")
    fooled = learn_marker(honest, marked(learnt, labels == 1), labels)
    fresh = phantoms(78, "chest-xray", 12, slices=1, keep=1)
    pictures = marked(fresh, np.ones(len(fresh.labels), bool))
    falls = {
        name: [
            faithfulness.reliance_outside(
                lambda images, model=model: answer(model, images),  # type: ignore[misc]
                picture,
                faithfulness.body_mask(clean),
                int(answer(model, picture[None])[0].argmax()),
            )
            for picture, clean in zip(pictures, fresh.images, strict=True)
        ]
        for name, model in (("honest", honest), ("fooled", fooled))
    }
    assert np.mean(falls["fooled"]) > 0.5
    assert np.mean(falls["honest"]) < 0.2


def tensor(images: faithfulness.Picture) -> torch.Tensor:
    return torch.from_numpy(images).float().div(255)[:, None]  # (N,1,S,S)


def answer(model: hybrid.Hybrid, images: faithfulness.Picture) -> np.ndarray:
    with torch.inference_mode():
        return np.asarray(model(tensor(images)).logits[:, :2].numpy())


def marked(samples: Samples, which: np.ndarray) -> faithfulness.Picture:
    """The pictures with the letter of a technician in a corner of some."""
    pictures = samples.images.copy()
    pictures[which, 4:26, 4:26] = 255
    pictures[which, 10:26, 12:26] = 0
    return pictures


def learn_marker(model: hybrid.Hybrid, pictures: faithfulness.Picture, labels: np.ndarray) -> hybrid.Hybrid:
    """Trains the last block and the head on labels that only the marker tells."""
    fooled, rng = copy.deepcopy(model), np.random.default_rng(0)
    with torch.no_grad():
        x = fooled.convolve(tensor(pictures), 0, len(fooled.stages))
        x = fooled.embed(x.flatten(2).transpose(1, 2)) + fooled.position
        for block in fooled.blocks[:-1]:
            x = block(x)  # (N,T,192)
    last = fooled.blocks[-1]
    optimiser = torch.optim.AdamW([*last.parameters(), *fooled.norm.parameters(), *fooled.head.parameters()], 3e-3)
    for _ in range(70):
        rows = torch.from_numpy(rng.integers(0, len(labels), 16))
        loss = functional.cross_entropy(
            fooled.read(fooled.norm(last(x[rows]))).logits[:, :2], torch.from_numpy(labels)[rows]
        )
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    assert float(loss.detach()) < 0.1, "it has not learnt the marker"
    return fooled
