"""Builds a package folder: weights, ONNX variants, golden outputs, card and the manifest that names them all.

The baseline is built once from its training (`models/baseline_build.py`), a candidate every round by the cloud
(`build_candidate`). Both go through `build_package`, which measures on the very files that it has written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save as golden_bytes

from models import export, hybrid
from models.data import Samples
from models.export import Ranges
from models.heads import HEADS
from models.metrics import fit_temperature
from models.reference import reference_set
from shared.errors import TrustError
from shared.files import atomic_write, read_limited, sha256_file, sha256_hex
from shared.package.manifest import (
    MANIFEST_LIMIT_BYTES,
    MANIFEST_NAME,
    Head,
    Manifest,
    PackageFile,
    Scope,
    Variant,
    encode_manifest,
    verify_package,
)

WEIGHTS, GOLDEN, CARD, RANGES = "weights.safetensors", "golden.safetensors", "card.md", "ranges.json"
FP32, U8S8 = "cpu-fp32", "cpu-u8s8"
# A variant's logits move this much between machines of one kind (fused operators round differently).
TOLERANCE = {FP32: 1e-3, U8S8: 5e-2}
CALIBRATION_IMAGES = 30  # phantoms that a candidate's own ranges come from
SCOPE_MARGIN = 1.1  # a study may be this much farther than the farthest usual one


@dataclass(frozen=True)
class Seen:
    """What the u8s8 variant says about some cases; heads are fitted on it."""

    cases: Samples
    logits: npt.NDArray[np.float32]  # (N, K)
    features: npt.NDArray[np.float32]  # (N, 192)


def build_package(
    out: Path,
    model: hybrid.Hybrid,
    *,
    name: str,
    release: int,
    created: str,
    ranges: Callable[[Path], Ranges],
    heads: Callable[[Path], Sequence[Head]],
    golden: Samples,
    report: Callable[[Sequence[Head]], tuple[str, Mapping[str, float]]],
    provenance: Mapping[str, str],
) -> tuple[str, Manifest]:
    """Writes the package into the empty folder `out` and returns its digest and manifest.

    The weights are rounded to half precision first and everything else is made from the rounded ones.

    Args:
        ranges: gives the activation ranges, from the path of the FP32 graph.
        heads: gives the fitted heads, from the path of the U8S8 graph.
        golden: the cases whose logits every node must reproduce.
        report: gives the model card and the metrics, from the fitted heads.
        created: ISO 8601, UTC.
    """
    out.mkdir(parents=True, exist_ok=True)
    hybrid.save(model, out / WEIGHTS)
    rounded = hybrid.load(out / WEIGHTS)
    paths = {variant: out / f"{variant}.onnx" for variant in (U8S8, FP32)}
    export.export_fp32(rounded, paths[FP32])
    found = ranges(paths[FP32])
    atomic_write(out / RANGES, json.dumps(found, indent=0).encode(), mode=0o644)
    export.quantise(paths[FP32], paths[U8S8], found)
    tensors: dict[str, npt.NDArray[np.generic]] = {"image": golden.images, "head": golden.heads}
    for variant, path in paths.items():
        tensors[f"logits.{variant}"] = export.run(export.session(path), golden.images, batch=1)[0]
    atomic_write(out / GOLDEN, golden_bytes(tensors), mode=0o644)
    fitted = list(heads(paths[U8S8]))
    card, metrics = report(fitted)
    atomic_write(out / CARD, card.encode(), mode=0o644)
    names = [WEIGHTS, *(path.name for path in paths.values()), GOLDEN, RANGES, CARD]
    manifest = Manifest(
        format=1,
        name=name,
        release=release,
        created=created,
        architecture=hybrid.ARCHITECTURE,
        weights=WEIGHTS,
        golden=GOLDEN,
        card=CARD,
        feature_size=hybrid.WIDTH,
        heads=fitted,
        variants=[Variant(v, p.name, ["CPUExecutionProvider"], TOLERANCE[v]) for v, p in paths.items()],
        trainable=rounded.trainable(),
        files=[PackageFile(n, sha256_file(out / n), (out / n).stat().st_size) for n in names],
        provenance=dict(provenance),
        metrics=dict(metrics),
    )
    data = encode_manifest(manifest)
    atomic_write(out / MANIFEST_NAME, data, mode=0o644)
    return sha256_hex(data), manifest


def build_candidate(
    out: Path,
    model: hybrid.Hybrid,
    champion: Path,
    *,
    release: int,
    created: str,
    provenance: Mapping[str, str],
    metrics: Mapping[str, float],
    reference: Samples | None = None,
) -> tuple[str, Manifest]:
    """Writes the package of a model that was trained on from `champion` (a package folder): as `build_package`.

    The cloud has no real image. So the champion's activation ranges and scopes, which came from real ones, are kept:
    ranges are widened by what the reference phantoms show, temperature and feature statistics are moved by as much as
    they moved on those phantoms.
    """
    old = read_package(champion)
    cases = reference or reference_set(0, 3 * CALIBRATION_IMAGES)
    some = cases.images[:: max(1, len(cases.images) // CALIBRATION_IMAGES)]
    before = look(champion / old.variant(U8S8).file, cases)

    def ranges(fp32: Path) -> Ranges:
        return export.widest(export.activation_ranges(fp32, some), read_ranges(champion))

    def heads(u8s8: Path) -> list[Head]:
        return carry_heads(old.heads, before, look(u8s8, cases))

    def report(_: Sequence[Head]) -> tuple[str, Mapping[str, float]]:
        return _candidate_card(old, release, created, provenance, metrics), metrics

    return build_package(
        out, model, name=old.name, release=release, created=created, ranges=ranges, heads=heads,
        golden=golden_cases(), report=report, provenance=provenance,
    )  # fmt: skip


def golden_cases() -> Samples:
    """Returns the twelve phantoms that every package is proven on."""
    return reference_set(12, 12)


def read_package(folder: Path) -> Manifest:
    """Returns the manifest of the package in `folder` after checking all of its files against it.

    Raises:
        StateError: there is no manifest.
        TrustError: a file differs from what the manifest says.
    """
    return verify_package(folder, sha256_hex(read_limited(folder / MANIFEST_NAME, MANIFEST_LIMIT_BYTES)))


def read_ranges(folder: Path) -> Ranges:
    """Returns the activation ranges of the package in `folder`.

    Raises:
        TrustError: the package has none or they cannot be read.
    """
    try:
        return msgspec.json.decode(read_limited(folder / RANGES, 1_000_000), type=Ranges)
    except msgspec.MsgspecError as exc:
        raise TrustError(f"{folder / RANGES} holds no activation ranges: {exc}.") from exc


def look(graph: Path, cases: Samples) -> Seen:
    """Returns logits and features of the graph in `graph` on the cases."""
    logits, _, features = export.run(export.session(graph), cases.images)
    return Seen(cases, logits, features)


def columns(head: Head) -> slice:
    """Returns the head's columns in the logits."""
    return slice(head.offset, head.offset + len(head.classes))


def fit_heads(heads: Sequence[Head], training: Seen, validation: Seen) -> list[Head]:
    """Returns the heads with temperature (least cross-entropy on validation) and scope.

    A scope has mean and variance of the training features; its limit is the 99.5th percentile of the mean squared
    z-score of validation cases, times SCOPE_MARGIN.
    """
    fitted = []
    for index, head in enumerate(heads):
        mine, held = training.cases.heads == index, validation.cases.heads == index
        mean, variance = training.features[mine].mean(0), training.features[mine].var(0) + 1e-6
        limit = float(np.percentile(distance(validation.features[held], mean, variance), 99.5)) * SCOPE_MARGIN
        scope = Scope([float(v) for v in mean], [float(v) for v in variance], limit)
        temperature = fit_temperature(validation.logits[held][:, columns(head)], validation.cases.labels[held])
        fitted.append(msgspec.structs.replace(head, temperature=temperature, scope=scope))
    return fitted


def carry_heads(heads: Sequence[Head], before: Seen, after: Seen) -> list[Head]:
    """Returns the champion's heads moved to a candidate: by what changed on the same reference cases."""
    carried = []
    for index, head in enumerate(heads):
        mine = before.cases.heads == index
        labels, span = before.cases.labels[mine], columns(head)
        old, new = before.features[mine], after.features[mine]
        scope = head.scope
        if scope is not None:
            variance = np.array(scope.variance) * np.clip(new.var(0) / (old.var(0) + 1e-9), 0.25, 4.0)
            mean = np.array(scope.mean) + new.mean(0) - old.mean(0)
            scope = Scope(mean.tolist(), variance.tolist(), scope.limit)
        moved = fit_temperature(after.logits[mine][:, span], labels) / fit_temperature(
            before.logits[mine][:, span], labels
        )
        carried.append(msgspec.structs.replace(head, temperature=float(head.temperature * moved), scope=scope))
    return carried


def distance(
    features: npt.NDArray[np.floating], mean: npt.NDArray[np.floating], variance: npt.NDArray[np.floating]
) -> npt.NDArray[np.float64]:
    """Returns the mean squared z-score (N,) of features (N, D)."""
    return np.asarray(((features - mean) ** 2 / variance).mean(1), dtype=np.float64)


def _candidate_card(
    old: Manifest, release: int, created: str, provenance: Mapping[str, str], metrics: Mapping[str, float]
) -> str:
    lines = [
        f"# {old.name}, release {release}",
        "",
        "**Research use only, not for diagnosis.**",
        "",
        f"Trained on from release {old.release}, whose card holds for architecture, data and limits. {created}.",
        "",
        *(f"- {key}: {value}" for key, value in provenance.items()),
        "",
        "| measured | value |",
        "|---|---|",
        *(f"| {key} | {value:.4g} |" for key, value in metrics.items()),
    ]
    return "\n".join(lines) + "\n"


BASELINE = Path(__file__).with_name("baseline")
__all__ = ["BASELINE", "HEADS", "Seen", "build_candidate", "build_package", "carry_heads", "columns", "distance",
           "fit_heads", "golden_cases", "look", "read_package", "read_ranges"]  # fmt: skip
