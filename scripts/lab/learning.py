"""A federated campaign on arrays, in one process: the same training, codec, average, refit, build and gate as the
fleet's, without wire and database. `scripts/bench learning` runs its controls on it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

from cloud.rounds.aggregate import Sent, average
from cloud.rounds.machine import Plan
from cloud.rounds.strategy import FedAvg
from cloud.training.gate import ReferenceHead, Verdict
from cloud.training.gate import judge as gate
from cloud.training.refit import balanced, refit
from cloud.training.work import compare
from edge.learning.cases import Cases
from edge.learning.judging import judge, open_model
from edge.learning.training import PrefixCache, train
from models import hybrid
from models.data import Samples, phantoms
from models.package import Seen, build_candidate, columns, look, read_package
from models.reference import reference_set
from shared.package.manifest import Manifest
from shared.update.codec import encode
from shared.update.layout import Layout, Vector, clip, norm
from shared.wire.records import HeadJudgement, NamedFile, TrainTask


@dataclass
class Hospital:
    """One hospital's confirmed cases; what it keeps between rounds."""

    name: str
    training: Cases
    held_out: Cases
    cache: PrefixCache = field(default_factory=PrefixCache)
    residual: dict[str, Vector] | None = None


@dataclass(frozen=True)
class Round:
    """What one round measured."""

    number: int
    verdict: Verdict
    sites: dict[str, list[HeadJudgement]]
    reference: list[ReferenceHead]
    bytes_up: dict[str, int]
    norms: dict[str, float]
    seconds: dict[str, float]


def draw_hospital(name: str, *, training: int, held_out: int, seed: int, head: str = "chest-xray") -> Hospital:
    """Returns a hospital with phantoms of its scanner (SCANNERS[name]); classes in turn."""
    samples = phantoms(1000 + seed, head, training + held_out, scanner=name, slices=1, keep=1)
    names = np.array([f"{name}{i:05d}" for i in range(training + held_out)])
    everything = Cases(tuple(names), samples.images, samples.heads, samples.labels, np.ones(len(names), np.bool_))
    cut = np.arange(len(names)) < training
    return Hospital(name, _where(everything, cut), _where(everything, ~cut))


def permuted(hospital: Hospital, seed: int) -> Hospital:
    """Returns the hospital with its labels shuffled, training and held-out: nothing true can be learned from it."""
    rng = np.random.default_rng(seed)

    def shuffle(cases: Cases) -> Cases:
        return Cases(cases.names, cases.images, cases.heads, rng.permutation(cases.labels), cases.phantom)

    return Hospital(hospital.name, shuffle(hospital.training), shuffle(hospital.held_out))


def campaign(
    package: Path,
    hospitals: Sequence[Hospital],
    work: Path,
    plan: Plan,
    *,
    judges: Sequence[Hospital] | None = None,
    reference: Samples | None = None,
) -> list[Round]:
    """Returns the rounds of a campaign, the last of which passed or was the last allowed.

    Args:
        package: the champion's folder.
        hospitals: who trains.
        work: an empty folder for candidates.
        plan: as in the fleet.
        judges: who judges; those who train where it is None.
        reference: the cloud's reference set; drawn where it is None.
    """
    manifest = read_package(package)
    reference = reference or reference_set(0, 150)
    weights = {n: np.asarray(t, np.float32) for n, t in load_file(package / manifest.weights).items()}
    seen = look(package / manifest.variant(plan.variant).file, reference)
    if plan.lane != "slow":
        _refit(weights, package, manifest, hospitals, plan.variant, seen)
    done: list[Round] = []
    for number in range(1, 2 if plan.lane == "fast" else plan.max_rounds + 1):
        began = time.monotonic()
        sent: list[Sent] = []
        task = _task(plan, number, manifest, package.name)
        layout = Layout.of(weights, manifest.trainable)
        if plan.lane != "fast":
            sent = [_train(hospital, weights, manifest, task) for hospital in hospitals]
        trained = time.monotonic()
        if sent:
            weights, _ = average(weights, layout, sent, FedAvg(layout))
        model = hybrid.from_tensors({name: torch.from_numpy(value) for name, value in weights.items()})
        digest, built = build_candidate(
            work / str(number), model, package, release=manifest.release + 1, created="", provenance={},
            metrics={}, reference=reference,
        )  # fmt: skip
        compared = compare(seen, work / str(number), built, plan.variant)
        made = time.monotonic()
        old, new = (open_model(folder / built.variant(plan.variant).file) for folder in (package, work / str(number)))
        sites = {h.name: judge(old, new, h.held_out, manifest.heads) for h in judges or hospitals}
        verdict = gate(package.name, digest, sites, compared, plan.bars)
        seconds = {"train": trained - began, "build": made - trained, "judge": time.monotonic() - made}
        done.append(
            Round(
                number, verdict, sites, compared, {one.site: len(one.read()) for one in sent},
                {one.site: one.norm for one in sent}, seconds,
            )
        )  # fmt: skip
        if verdict.decision == "pass":
            break
    return done


def _where(cases: Cases, mask: np.ndarray) -> Cases:
    names = tuple(np.array(cases.names)[mask])
    return Cases(names, cases.images[mask], cases.heads[mask], cases.labels[mask], cases.phantom[mask])


def _task(plan: Plan, number: int, manifest: Manifest, package: str) -> TrainTask:
    return TrainTask(
        round=f"bench-{number}", number=number, package=package,
        weights=NamedFile("weights.safetensors", "0" * 64, 0), trainable=manifest.trainable, epochs=plan.epochs,
        learning_rate=plan.learning_rate, batch=plan.batch, seed=plan.seed + number, keep=plan.keep,
        max_norm=plan.max_norm, deadline="",
    )  # fmt: skip


def _train(hospital: Hospital, weights: dict[str, Vector], manifest: Manifest, task: TrainTask) -> Sent:
    trained = train(weights, hospital.training, manifest.heads, task, hospital.cache)
    total = trained.delta
    if hospital.residual is not None:
        total = {name: total[name] + hospital.residual[name] for name in total}
    coded = encode(clip(total, task.max_norm), None, task.keep, np.random.default_rng(task.seed))
    hospital.residual = coded.residual
    return Sent(hospital.name, "edge", len(hospital.training), norm(coded.sent), lambda: coded.blob)


def _refit(
    weights: dict[str, Vector],
    package: Path,
    manifest: Manifest,
    hospitals: Sequence[Hospital],
    variant: str,
    replay: Seen,
) -> None:
    graph = package / manifest.variant(variant).file
    for index, head in enumerate(manifest.heads):
        mine = [(h.name, h.training.of(index)) for h in hospitals if len(h.training.of(index))]
        if not mine:
            continue
        seen = [look(graph, Samples(c.images, c.heads, c.labels, np.full(len(c), name))) for name, c in mine]
        known = replay.cases.heads == index
        rows = balanced(
            np.concatenate([*(one.features for one in seen), replay.features[known]]),
            np.concatenate([*(one.cases.labels for one in seen), replay.cases.labels[known]]),
            [name for name, c in mine for _ in range(len(c))] + ["reference"] * int(known.sum()),
        )
        span = columns(head)
        weights["head.weight"][span], weights["head.bias"][span] = refit(
            weights["head.weight"][span], weights["head.bias"][span], rows
        )
