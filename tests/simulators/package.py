"""A real package, small enough to build in milliseconds: one convolution, one head, golden outputs that reproduce."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from shared.files import sha256_file, sha256_hex
from shared.package.input_spec import InputSpec, Percentile, as_tensor
from shared.package.manifest import (
    MANIFEST_NAME,
    Code,
    Head,
    Manifest,
    ModelClass,
    PackageFile,
    Variant,
    encode_manifest,
)

SIDE = 8
FEATURES = 3
VARIANT = "cpu-fp32"
MODEL = "model.cpu-fp32.onnx"
GRAPH_NAME = "tiny"  # the same for every release, as a retrained model's is


def build_package(folder: Path, release: int, *, seed: int = 0, variants: tuple[str, ...] = (VARIANT,)) -> str:
    """Writes a package whose weights follow from `seed` into `folder` and returns its manifest's digest."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    kernel = rng.normal(0, 1, (FEATURES, 1, 3, 3)).astype(np.float32)  # (D, 1, 3, 3)
    weight = rng.normal(0, 1, (2, FEATURES, 1, 1)).astype(np.float32)  # (K, D, 1, 1)
    images = rng.integers(0, 256, (4, SIDE, SIDE), dtype=np.uint8)  # (N, H, W)
    for name in variants:
        (folder / f"model.{name}.onnx").write_bytes(onnx_bytes(kernel, weight))
    logits = logits_of(images, kernel, weight)  # (N, K)
    golden = {"image": images, "head": np.zeros(len(images), np.int64)}
    save_file({**golden, **{f"logits.{v}": logits for v in variants}}, folder / "golden.safetensors")
    save_file(
        {"kernel": kernel.astype(np.float16), "weight": weight.astype(np.float16)},
        folder / "weights.safetensors",
    )
    (folder / "card.md").write_text("A test's model. Research use only.\n")
    manifest = _manifest(folder, release, variants)
    (folder / MANIFEST_NAME).write_bytes(encode_manifest(manifest))
    return sha256_hex(encode_manifest(manifest))


def change_one_weight(model: Path) -> None:
    """Adds 1 to one weight of an ONNX file: same graph, same names, same length."""
    graph = onnx.load(model)
    tensor = next(t for t in graph.graph.initializer if t.name == "weight")
    values = numpy_helper.to_array(tensor).copy()
    values.flat[0] += 1.0
    tensor.CopyFrom(numpy_helper.from_array(values, "weight"))
    model.write_bytes(graph.SerializeToString())


def logits_of(images: np.ndarray, kernel: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The network in numpy: an independent source for the golden outputs."""
    x = as_tensor(images)[:, 0]  # (N, H, W)
    patches = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))  # (N, h, w, 3, 3)
    features = np.einsum("nhwij,dij->ndhw", patches, kernel[:, 0])  # (N, D, h, w)
    evidence = np.einsum("ndhw,kd->nkhw", features, weight[:, :, 0, 0])  # (N, K, h, w)
    return evidence.mean(axis=(2, 3)).astype(np.float32)


def onnx_bytes(kernel: np.ndarray, weight: np.ndarray) -> bytes:
    """The same network as an ONNX graph with outputs logits, evidence, features."""
    nodes = [
        helper.make_node("Conv", ["image", "kernel"], ["tokens"]),  # (N, D, h, w)
        helper.make_node("Conv", ["tokens", "weight"], ["evidence"]),  # (N, K, h, w)
        helper.make_node("ReduceMean", ["evidence", "space"], ["logits"], keepdims=0),  # (N, K)
        helper.make_node("ReduceMean", ["tokens", "space"], ["features"], keepdims=0),  # (N, D)
    ]
    graph = helper.make_graph(
        nodes,
        GRAPH_NAME,
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 1, SIDE, SIDE])],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 2]),
            helper.make_tensor_value_info("evidence", TensorProto.FLOAT, ["n", 2, SIDE - 2, SIDE - 2]),
            helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", FEATURES]),
        ],
        [
            numpy_helper.from_array(kernel, "kernel"),
            numpy_helper.from_array(weight, "weight"),
            numpy_helper.from_array(np.array([2, 3], np.int64), "space"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return model.SerializeToString()


def _manifest(folder: Path, release: int, variants: tuple[str, ...]) -> Manifest:
    classes = [ModelClass(n, Code(n, "99RADFLEET", n)) for n in ("normal", "finding")]
    spec = InputSpec(SIDE, SIDE, Percentile(1, 99))
    head = Head("xray", "Chest X-ray", ["CR", "DX"], ["CHEST"], True, [], False, 0, classes, 0, spec, 1.0, None)
    return Manifest(
        format=1,
        name="tiny",
        release=release,
        created="2026-01-01T00:00:00+00:00",
        architecture="tiny-1",
        weights="weights.safetensors",
        golden="golden.safetensors",
        card="card.md",
        feature_size=FEATURES,
        heads=[head],
        variants=[Variant(v, f"model.{v}.onnx", [_provider(v)], 1e-3) for v in variants],
        trainable=["weight"],
        files=[PackageFile(p.name, sha256_file(p), p.stat().st_size) for p in sorted(folder.iterdir())],
        provenance={},
        metrics={},
    )


def _provider(variant: str) -> str:
    return "CPUExecutionProvider" if variant.startswith("cpu") else "CUDAExecutionProvider"
