"""The engine, its golden proof, and what an answer is made of."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from edge.inference.decide import SliceOutputs, decide, pool
from edge.inference.engine import OnnxEngine, load_engine
from edge.inference.golden import golden_proof
from shared.errors import StateError, TrustError
from shared.files import sha256_file
from shared.package.manifest import Manifest, PackageFile, verify_package
from tests.simulators.node import BASELINE, baseline
from tests.simulators.package import MODEL, build_package, change_one_weight


def tiny(tmp_path: Path, **options: object) -> tuple[Path, Manifest]:
    folder = tmp_path / "package"
    digest = build_package(folder, 1, **options)  # type: ignore[arg-type]
    return folder, verify_package(folder, digest)


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 224, 224), dtype=np.uint8)


def test_the_shipped_package_proves_itself() -> None:
    engine, manifest, _ = baseline()
    proof = golden_proof(engine, BASELINE, manifest)
    assert proof.largest_difference <= manifest.variant("cpu-u8s8").golden_tolerance
    assert len(proof.digest) == 64
    assert engine.digest == manifest.file("cpu-u8s8.onnx").sha256
    assert engine.provider == "CPUExecutionProvider"


@pytest.mark.parametrize("variant", ["cpu-u8s8", "cpu-fp32"])
def test_a_logit_is_the_mean_of_its_evidence(variant: str) -> None:
    engine = load_engine(BASELINE, baseline()[1], threads=2, variant=variant)
    outputs = engine.run(images(2))
    assert np.abs(outputs.evidence.mean(axis=(2, 3)) - outputs.logits).max() < 1e-4
    assert outputs.features.shape == (2, baseline()[1].feature_size)


def test_attack_one_changed_weight_under_the_same_name_is_caught(tmp_path: Path) -> None:
    folder, manifest = tiny(tmp_path)
    change_one_weight(folder / MODEL)
    with pytest.raises(TrustError, match="not the file"):
        load_engine(folder, manifest, threads=1)
    # A manifest that names the changed file is caught by the outputs themselves.
    entry = PackageFile(MODEL, sha256_file(folder / MODEL), (folder / MODEL).stat().st_size)
    lying = replace(manifest, files=[entry if one.name == MODEL else one for one in manifest.files])
    with pytest.raises(TrustError, match="differs from the golden outputs"):
        golden_proof(load_engine(folder, lying, threads=1), folder, lying)


def test_attack_a_session_of_other_bytes_is_no_proof(tmp_path: Path) -> None:
    folder, manifest = tiny(tmp_path)
    engine = load_engine(folder, manifest, threads=1)
    engine.digest = "0" * 64
    with pytest.raises(TrustError, match="other weights"):
        golden_proof(engine, folder, manifest)


def test_the_file_is_not_read_again_after_it_was_verified(tmp_path: Path) -> None:
    folder, manifest = tiny(tmp_path)
    engine = load_engine(folder, manifest, threads=1)
    change_one_weight(folder / MODEL)
    assert golden_proof(engine, folder, manifest).largest_difference < 1e-3


def test_a_model_that_cannot_be_loaded_is_our_error_family(tmp_path: Path) -> None:
    _, manifest = tiny(tmp_path)
    with pytest.raises(StateError, match="cannot load"):
        OnnxEngine(b"no model", manifest.variants[0], threads=1)


def test_a_run_with_a_wrong_shape_is_our_error_family() -> None:
    with pytest.raises(StateError, match="failed"):
        baseline()[0].run(np.zeros((1, 10, 10), np.uint8))


def test_a_variant_without_a_provider_here_falls_back_to_the_next(tmp_path: Path) -> None:
    folder, manifest = tiny(tmp_path, variants=("cuda-fp16", "cpu-fp32"))
    assert load_engine(folder, manifest, threads=1).variant == "cpu-fp32"
    with pytest.raises(StateError, match="No variant"):
        load_engine(folder, manifest, threads=1, variant="cuda-fp16")


def test_the_fastest_variant_is_chosen_and_a_near_tie_keeps_the_manifests_order(tmp_path: Path) -> None:
    folder, manifest = tiny(tmp_path, variants=("cpu-a", "cpu-b"))

    def timer(seconds: list[float]) -> list[float]:
        """Start and end of twelve runs a variant, in turns, and of three alone and in a batch."""
        clock, marks = 0.0, []
        for durations, runs in ((seconds, 12), ([0.010, 0.080], 3)):
            for _ in range(runs):
                for duration in durations:
                    marks += [clock, clock + duration]
                    clock += 1
        return marks

    faster, near = iter(timer([0.010, 0.005])), iter(timer([0.010, 0.0095]))
    assert load_engine(folder, manifest, threads=1, timer=lambda: next(faster)).variant == "cpu-b"
    assert load_engine(folder, manifest, threads=1, timer=lambda: next(near)).variant == "cpu-a"


def test_a_missing_variant_file_is_no_reason_to_fail_when_another_is_there(tmp_path: Path) -> None:
    folder, manifest = tmp_path / "copy", baseline()[1]
    shutil.copytree(BASELINE, folder)
    (folder / "cpu-u8s8.onnx").unlink()
    assert load_engine(folder, manifest, threads=1).variant == "cpu-fp32"


def test_probabilities_are_calibrated_and_sum_to_one() -> None:
    head = replace(baseline()[1].head("chest-xray"), temperature=2.0, scope=None)
    answer = decide(head, np.array([2.0, 0.0, -2.0], np.float32), np.zeros(3, np.float32))
    expected = np.exp([1.0, 0.0, -1.0]) / np.exp([1.0, 0.0, -1.0]).sum()
    assert np.allclose(answer.probabilities, expected)
    assert answer.chosen == 0
    assert answer.reason == ""


def test_features_far_from_training_are_not_assessed() -> None:
    head = baseline()[1].head("chest-xray")
    assert head.scope is not None
    near = np.array(head.scope.mean, np.float32)
    far = near + 10 * np.sqrt(np.array(head.scope.variance, np.float32))
    logits = np.zeros(3, np.float32)
    assert decide(head, logits, near).reason == ""
    assert "unlike the training images" in decide(head, logits, far).reason
    assert decide(head, logits, np.full_like(near, np.nan)).reason != ""


def test_pooling_is_additive_and_indifferent_to_order() -> None:
    engine = baseline()[0]
    outputs = engine.run(images(6))
    slices = [SliceOutputs(f"1.2.{n}#0", outputs.logits[n], outputs.features[n]) for n in range(6)]
    logits, features = pool(slices)
    shuffled = [slices[n] for n in (3, 0, 5, 1, 4, 2)]
    assert np.array_equal(pool(shuffled)[0], logits)
    assert np.array_equal(pool(shuffled)[1], features)
    assert np.abs(outputs.evidence.mean(axis=(0, 2, 3)) - logits).max() < 1e-4
    rough = [
        SliceOutputs(str(n), np.array([v], np.float32), np.zeros(1, np.float32)) for n, v in enumerate((1e20, 1, -1e20))
    ]
    assert pool(rough)[0] == pool([rough[0], rough[2], rough[1]])[0] == pool(rough[::-1])[0]
