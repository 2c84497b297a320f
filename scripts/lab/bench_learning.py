"""A federated campaign and its controls on the shipped model: who gains, what the gate says, bytes and seconds."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file

from cloud.rounds.machine import Lane, Plan
from models.package import BASELINE, read_package
from models.reference import reference_set
from scripts.lab.learning import Hospital, Round, campaign, draw_hospital, permuted
from scripts.lab.table import Row

# As in the demo: the shifted hospital holds enough cases that a gain can be proven.
CASES = {"A": (32, 16), "B": (32, 16), "C": (88, 44)}  # confirmed cases to train on, held out
SEED = 3


class Arm(NamedTuple):
    """One way to learn: who trains and by which lane."""

    name: str
    hospitals: Sequence[Hospital]
    lane: Lane


def measure() -> list[Row]:
    """Returns, an arm, the shifted hospital's AUC beside the champion's, and what the gate decided."""
    everybody = [draw_hospital(name, training=t, held_out=h, seed=SEED) for name, (t, h) in CASES.items()]
    arms = [
        Arm("both lanes, three hospitals", everybody, "both"),
        Arm("hospital C alone", everybody[2:], "both"),
        Arm("fast lane only", everybody, "fast"),
        Arm("slow lane only", everybody, "slow"),
        Arm("permuted labels, gate must refuse", [permuted(h, SEED) for h in everybody], "both"),
    ]
    reference = reference_set(0, 150)
    rows: list[Row] = []
    for arm in arms:
        fresh = [Hospital(h.name, h.training, h.held_out) for h in arm.hospitals]
        with tempfile.TemporaryDirectory(prefix="radfleet-bench-") as folder:
            done = campaign(BASELINE, fresh, Path(folder), Plan(lane=arm.lane), judges=fresh, reference=reference)
        rows += _rows(arm, done)
    return rows


def _rows(arm: Arm, done: Sequence[Round]) -> list[Row]:
    last = done[-1]
    passed = float(last.verdict.decision == "pass")
    rows = [Row(f"{arm.name}: gate passed (1) or refused (0), round {last.number} of 6", passed, "")]
    for site, heads in last.sites.items():
        for row in heads:
            what = f"{arm.name}: {site}, {row.head}, AUC of candidate"
            rows.append(Row(what, row.auc_candidate, "AUC", "champion", row.auc_champion))
    if last.bytes_up:
        manifest = read_package(BASELINE)
        tensors = load_file(BASELINE / manifest.weights)
        whole = 4.0 * sum(t.size for t in tensors.values())
        trained = 4.0 * sum(tensors[name].size for name in manifest.trainable)
        sent = float(np.mean(list(last.bytes_up.values())))
        rows.append(Row(f"{arm.name}: bytes of one update", sent, "bytes", "FP32 of the tensors trained", trained))
        rows.append(Row(f"{arm.name}: bytes of one update", sent, "bytes", "FP32 of the whole model", whole))
    total = sum(sum(one.seconds.values()) for one in done) / len(done)
    rows.append(Row(f"{arm.name}: seconds a round, hospitals one after another", total, "s"))
    return rows
