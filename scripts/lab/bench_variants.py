"""INT8 beside FP32: speed on this CPU, and AUC on the real test splits that training never saw."""

from __future__ import annotations

import time

import numpy as np

from models import export
from models.data import data_folder, pictures
from models.heads import HEADS
from models.metrics import auc_difference, macro_auc
from models.package import BASELINE, FP32, U8S8, columns, look
from scripts.lab.table import Row

RUNS = 200


def measure() -> list[Row]:
    """Returns milliseconds an image for each variant, and AUC a head and site where real data is at hand."""
    rows = speed()
    folder = data_folder()
    if folder is None:
        return rows
    for head in HEADS:
        cases = pictures(folder, head, "test")
        eight, full = (look(BASELINE / f"{v}.onnx", cases).logits[:, columns(head)] for v in (U8S8, FP32))
        for site in np.unique(cases.sites):
            mine = cases.sites == site
            if len(np.unique(cases.labels[mine])) < 2:
                continue
            labels = cases.labels[mine]
            lost = auc_difference(eight[mine], full[mine], labels)
            what = f"{head.name}, {site}, n {mine.sum()}: macro AUC of cpu-u8s8"
            rows.append(Row(what, macro_auc(eight[mine], labels), "AUC", "cpu-fp32", macro_auc(full[mine], labels)))
            rows.append(Row(f"{head.name}, {site}: AUC change by INT8, lower 95 % bound", lost.low, "AUC"))
    return rows


def speed() -> list[Row]:
    """Returns milliseconds an image for each variant."""
    times = _milliseconds()
    return [
        Row(f"one image, two threads, p{percent}", float(np.percentile(times[U8S8], percent)), "ms", "cpu-fp32",
            float(np.percentile(times[FP32], percent)))
        for percent in (50, 99)
    ]  # fmt: skip


def _milliseconds() -> dict[str, list[float]]:
    """Returns the times of both variants, taking turns so that noise hits both."""
    sessions = {name: export.session(BASELINE / f"{name}.onnx") for name in (FP32, U8S8)}
    image = np.random.default_rng(0).integers(0, 256, (1, 224, 224), dtype=np.uint8)
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(RUNS):
        for name, session in sessions.items():
            began = time.perf_counter()
            export.run(session, image)
            times[name].append((time.perf_counter() - began) * 1000)
    return {name: values[20:] for name, values in times.items()}
