"""Packages: built, verified, reproduced; one changed byte is refused; the shipped baseline is what it says."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from models import export, hybrid
from models.data import data_folder, pictures
from models.heads import BY_NAME, HEADS
from models.metrics import macro_auc
from models.package import (
    BASELINE,
    U8S8,
    WEIGHTS,
    Seen,
    build_candidate,
    carry_heads,
    columns,
    golden_cases,
    look,
    read_package,
)
from models.reference import reference_set
from shared.errors import StateError, TrustError
from shared.package.manifest import MANIFEST_NAME, Manifest, verify_package

LIMIT_BYTES = 20_000_000  # one package; the whole checkout stays under 50 MB


@pytest.fixture(scope="module")
def candidate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Manifest]:
    folder = tmp_path_factory.mktemp("candidate")
    model = hybrid.load(BASELINE / WEIGHTS)
    with torch.no_grad():
        model.head.bias += 0.25
    digest, manifest = build_candidate(
        folder,
        model,
        BASELINE,
        release=2,
        created="2026-01-01T00:00:00+00:00",
        provenance={"round": "test"},
        metrics={"auc": 0.9},
        reference=reference_set(0, 30),
    )
    return folder, digest, manifest


def proven(folder: Path, manifest: Manifest) -> dict[str, float]:
    golden = load_file(folder / manifest.golden)
    found = {}
    for variant in manifest.variants:
        logits = export.run(export.session(folder / variant.file), golden["image"], batch=1)[0]
        found[variant.name] = float(np.abs(logits - golden[f"logits.{variant.name}"]).max())
    return found


def test_the_shipped_baseline_verifies_and_reproduces_its_golden_outputs() -> None:
    manifest = read_package(BASELINE)
    assert [head.name for head in manifest.heads] == [head.name for head in HEADS]
    for variant in manifest.variants:
        assert proven(BASELINE, manifest)[variant.name] <= variant.golden_tolerance
    golden = load_file(BASELINE / manifest.golden)
    assert np.array_equal(golden["image"], golden_cases().images)
    assert sum(entry.length for entry in manifest.files) < LIMIT_BYTES
    assert "not for diagnosis" in (BASELINE / manifest.card).read_text()
    assert set(manifest.trainable) == set(hybrid.load(BASELINE / manifest.weights).trainable())


def test_the_shipped_baseline_reads_phantoms_well_and_hospital_c_badly() -> None:
    metrics = read_package(BASELINE).metrics
    for head in ("chest-xray", "chest-ct", "brain-mri"):
        assert metrics[f"{head}.phantom.auc.{U8S8}"] > 0.9
    badly = metrics[f"chest-xray.phantom, hospital C.auc.{U8S8}"]
    assert badly < metrics[f"chest-xray.phantom, hospital A.auc.{U8S8}"] - 0.15


def test_the_shipped_baseline_reads_real_pictures() -> None:
    folder = data_folder()
    if folder is None:
        pytest.skip("real data is absent: set RADFLEET_DATA")
    head = BY_NAME["chest-ct"]
    test = pictures(folder, head, "test")
    seen = look(BASELINE / f"{U8S8}.onnx", test)
    said = read_package(BASELINE).metrics[f"chest-ct.iqothnccd-iq.auc.{U8S8}"]
    assert macro_auc(seen.logits[:, columns(head)], test.labels) == pytest.approx(said, abs=0.01)
    assert said > 0.75


def test_a_candidate_verifies_under_its_own_digest_and_reproduces(candidate: tuple[Path, str, Manifest]) -> None:
    folder, digest, manifest = candidate
    assert verify_package(folder, digest) == manifest
    assert manifest.release == 2
    assert max(proven(folder, manifest).values()) == 0


def test_the_same_inputs_give_the_same_digest(candidate: tuple[Path, str, Manifest], tmp_path: Path) -> None:
    folder, digest, manifest = candidate
    again, _ = build_candidate(
        tmp_path,
        hybrid.load(folder / WEIGHTS),
        BASELINE,
        release=2,
        created=manifest.created,
        provenance=manifest.provenance,
        metrics=manifest.metrics,
        reference=reference_set(0, 30),
    )
    assert again == digest


def test_attack_one_changed_byte_anywhere_is_refused(candidate: tuple[Path, str, Manifest], tmp_path: Path) -> None:
    folder, digest, manifest = candidate
    for name in [MANIFEST_NAME, *(entry.name for entry in manifest.files)]:
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
        with pytest.raises(TrustError):
            verify_package(copy, digest)


def test_attack_one_changed_weight_under_the_same_graph_breaks_the_golden_proof(tmp_path: Path) -> None:
    manifest = read_package(BASELINE)
    model = hybrid.load(BASELINE / WEIGHTS)
    with torch.no_grad():
        model.head.weight[0] *= 1.2
    shutil.copy(BASELINE / manifest.golden, tmp_path)
    fp32 = manifest.variant("cpu-fp32")
    export.export_fp32(model, tmp_path / fp32.file)
    alone = msgspec.structs.replace(manifest, variants=[fp32])
    assert proven(tmp_path, alone)["cpu-fp32"] > fp32.golden_tolerance


def test_a_candidate_keeps_the_scopes_and_ranges_that_real_images_gave(
    candidate: tuple[Path, str, Manifest],
) -> None:
    _, _, manifest = candidate
    baseline = read_package(BASELINE)
    for old, new in zip(baseline.heads, manifest.heads, strict=True):
        assert old.scope is not None
        assert new.scope is not None
        assert new.scope.limit == old.scope.limit
        np.testing.assert_allclose(new.scope.mean, old.scope.mean, atol=0.1)  # only the head's bias was changed
        assert new.temperature == pytest.approx(old.temperature, rel=0.3)


def test_scopes_move_with_the_features() -> None:
    cases = reference_set(1, 12)
    rng = np.random.default_rng(0)
    features = rng.normal(size=(12, hybrid.WIDTH)).astype(np.float32)
    logits = rng.normal(size=(12, 10)).astype(np.float32)
    heads = read_package(BASELINE).heads
    moved = carry_heads(heads, Seen(cases, logits, features), Seen(cases, logits * 2, features + 3))
    for old, new in zip(heads, moved, strict=True):
        assert old.scope is not None
        assert new.scope is not None
        np.testing.assert_allclose(np.array(new.scope.mean) - np.array(old.scope.mean), 3, atol=1e-4)


def test_a_package_folder_without_its_manifest_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=MANIFEST_NAME):
        read_package(tmp_path)
