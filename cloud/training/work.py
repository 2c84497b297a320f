"""What the trainer does for each kind of job; all of it can be done twice."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from sqlalchemy import Engine, select, update

from cloud.objects import Objects
from cloud.rounds.aggregate import Sent, average
from cloud.rounds.machine import Built, Plan, Weights
from cloud.rounds.strategy import FedAvg
from cloud.rounds.tables import features, rounds, updates
from cloud.training.gate import ReferenceHead
from cloud.training.packages import fetch_package, store_package
from cloud.training.refit import balanced, refit
from cloud.training.weights import read_weights, write_weights
from models import hybrid
from models.data import Samples
from models.metrics import auc_difference, macro_auc
from models.package import FP32, Seen, build_candidate, columns, look
from models.reference import reference_set
from shared.clock import Clock
from shared.errors import StateError
from shared.log import get_logger
from shared.package.manifest import MANIFEST_NAME, Head, Manifest, decode_manifest
from shared.update.layout import Entry, Layout
from shared.wire.records import NamedFile

REFERENCE_CASES = 150


@dataclass
class Workshop:
    """Where jobs are done. `work` is a folder that may be lost; `next_release` numbers a candidate."""

    engine: Engine
    objects: Objects
    work: Path
    clock: Clock
    next_release: Callable[[], int]
    _reference: Samples | None = field(default=None, init=False)
    _last: tuple[tuple[str, str], Seen] | None = field(default=None, init=False)

    def do(self, kind: str, given: dict[str, Any]) -> dict[str, Any]:
        """Returns the output of one job: cloud.rounds.machine.Weights or Built.

        Raises:
            RadfleetError: the job cannot be done.
        """
        asked = msgspec.convert(given, Asked)
        output = {"refit": self.refit, "aggregate": self.aggregate, "build": self.build}[kind](asked)
        made: dict[str, Any] = msgspec.to_builtins(output)
        return made

    def refit(self, asked: Asked) -> Weights:
        """The fast lane; the champion's weights as they are where it is off or nobody sent embeddings."""
        champion, manifest = self._champion(asked.champion)
        weights = read_weights(self.objects, manifest.file(manifest.weights).sha256)
        if asked.plan.lane != "slow":
            self._refit_heads(weights, champion, manifest, asked.plan.variant)
        return self._weights(weights, manifest.trainable)

    def aggregate(self, asked: Asked) -> Weights:
        """Adds the round's average to the weights it started from."""
        before = asked.base()
        layout = Layout(tuple(Entry(name, tuple(shape)) for name, shape in before.layout))
        base = read_weights(self.objects, before.file.sha256)
        after, record = average(base, layout, self._sent(asked.round), FedAvg(layout))
        made = self._weights(after, [name for name, _ in before.layout])
        with self.engine.begin() as conn:
            values = {"weights": made.file.sha256, "average": msgspec.to_builtins(record)}
            conn.execute(update(rounds).where(rounds.c.id == asked.round).values(**values))
        get_logger().info("training.averaged", round=asked.round, parts=len(record.parts), moved=round(record.moved, 4))
        return made

    def build(self, asked: Asked) -> Built:
        """Exports, quantises and packages the weights, and compares the candidate on the reference set."""
        champion, champion_manifest = self._champion(asked.champion)
        weights = read_weights(self.objects, asked.base().file.sha256)
        model = hybrid.from_tensors({name: torch.from_numpy(value) for name, value in weights.items()})
        with tempfile.TemporaryDirectory(dir=self.work) as scratch:
            folder = Path(scratch) / "package"
            digest, manifest = build_candidate(
                folder,
                model,
                champion,
                release=self.next_release(),
                created=self.clock.now().isoformat(timespec="seconds"),
                provenance={"campaign round": asked.round, "champion": asked.champion},
                metrics={},
                reference=self.reference(),
            )
            store_package(self.objects, folder, digest)
            seen = self._seen(champion, champion_manifest, asked.plan.variant)
            compared = compare(seen, folder, manifest, asked.plan.variant)
        file = manifest.file(manifest.variant(asked.plan.variant).file)
        return Built(
            candidate=digest,
            manifest=NamedFile(MANIFEST_NAME, digest, self.objects.length(digest)),
            model=NamedFile(file.name, file.sha256, file.length),
            reference=compared,
        )

    def reference(self) -> Samples:
        """Returns the reference set, drawn once a process."""
        if self._reference is None:
            self._reference = reference_set(0, REFERENCE_CASES)
        return self._reference

    def _seen(self, champion: Path, manifest: Manifest, variant: str) -> Seen:
        """Returns what the champion says about the reference set; the last one asked for is kept."""
        key = (champion.name, variant)
        if self._last is None or self._last[0] != key:
            self._last = key, look(champion / manifest.variant(variant).file, self.reference())
        return self._last[1]

    def _champion(self, digest: str) -> tuple[Path, Manifest]:
        folder = fetch_package(self.objects, digest, self.work / "packages")
        return folder, decode_manifest((folder / MANIFEST_NAME).read_bytes())

    def _weights(self, weights: dict[str, Any], trainable: Sequence[str]) -> Weights:
        file = write_weights(self.objects, weights, set(trainable))
        layout = Layout.of(weights, trainable)
        return Weights(file, [(entry.name, list(entry.shape)) for entry in layout.entries])

    def _refit_heads(self, weights: dict[str, Any], champion: Path, manifest: Manifest, variant: str) -> None:
        replay = self._seen(champion, manifest, variant)
        for index, head in enumerate(manifest.heads):
            found = self._embeddings(head, champion.name, variant, manifest.feature_size)
            if not found:
                continue
            mine = replay.cases.heads == index
            sites = [site for site, _, _ in found] + ["reference"] * int(mine.sum())
            rows = balanced(
                np.concatenate([np.stack([row for _, _, row in found]), replay.features[mine]]),
                np.concatenate([np.array([n for _, n, _ in found]), replay.cases.labels[mine]]),
                sites,
            )
            span = columns(head)
            fitted = refit(weights["head.weight"][span], weights["head.bias"][span], rows)
            weights["head.weight"][span], weights["head.bias"][span] = fitted
            get_logger().info("training.refitted", head=head.name, rows=len(found), sites=len(set(sites)) - 1)

    def _embeddings(self, head: Head, package: str, variant: str, size: int) -> list[tuple[str, int, Any]]:
        """Returns (site, label, embedding) of confirmed studies not held out, of one package and variant."""
        chosen = select(features).where(
            features.c.package == package,
            features.c.variant == variant,
            features.c.head == head.name,
            features.c.held_out.is_(False),
            features.c.label < len(head.classes),
        )
        with self.engine.connect().execution_options(read_only=True) as conn:
            rows = conn.execute(chosen.order_by(features.c.site, features.c.case)).all()
        return [
            (row.site, row.label, np.frombuffer(row.data, "<f2").astype(np.float32))
            for row in rows
            if len(row.data) == 2 * size
        ]

    def _sent(self, round: str) -> list[Sent]:
        chosen = select(updates).where(updates.c.round == round, updates.c.late.is_(False))
        with self.engine.connect().execution_options(read_only=True) as conn:
            rows = conn.execute(chosen.order_by(updates.c.site, updates.c.node)).all()
        return [Sent(row.site, row.node, row.cases, row.norm, partial(self.objects.read, row.blob)) for row in rows]


class Asked(msgspec.Struct, frozen=True):
    """A job's input."""

    champion: str
    round: str
    plan: Plan
    weights: Weights | None = None

    def base(self) -> Weights:
        """Returns the weights that the job is about; StateError when it names none."""
        if self.weights is None:
            raise StateError("The job names no weights.")
        return self.weights


def compare(old: Seen, candidate: Path, manifest: Manifest, variant: str) -> list[ReferenceHead]:
    """Returns per head how the candidate compares with the champion, seen as `old`, and with its own FP32 form."""
    cases = old.cases
    new, full = (look(candidate / manifest.variant(v).file, cases) for v in (variant, FP32))
    compared = []
    for index, head in enumerate(manifest.heads):
        mine, span = cases.heads == index, columns(head)
        labels = cases.labels[mine]
        one, two, three = (seen.logits[mine][:, span] for seen in (old, new, full))
        compared.append(
            ReferenceHead(
                head=head.name,
                per_class=[int(n) for n in np.bincount(labels, minlength=len(head.classes))],
                auc_champion=macro_auc(one, labels),
                auc_candidate=macro_auc(two, labels),
                auc_candidate_fp32=macro_auc(three, labels),
                flipped=float((two.argmax(1) != three.argmax(1)).mean()),
                drop_low=auc_difference(three, two, labels).low,
            )
        )
    return compared
