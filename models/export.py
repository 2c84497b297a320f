"""From weights to what the edge runs: the ONNX graph in FP32, its static QDQ quantisation, and the parity of the two.

The graph is written node by node in the order of `models/hybrid.py` instead of being traced: it takes a second, needs
no tracer in the cloud, every node and initialiser carries the name of its tensor, and `parity` compares it with torch.
Input `image` float32 (N,1,224,224) in 0..1; outputs `logits` (N,K), `evidence` (N,K,14,14), `features` (N,192).
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.calibrate import TensorsData, save_tensors_data

from models.hybrid import ATTENTION_HEADS, DEPTH, GRID, SIDE, STAGES, WIDTH, Hybrid
from shared.files import atomic_write
from shared.package.input_spec import as_tensor

Images = npt.NDArray[np.uint8]
Ranges = dict[str, tuple[float, float]]  # tensor of the graph: smallest and largest value
TOKENS = GRID * GRID
OUTPUTS = ("logits", "evidence", "features")


@dataclass(frozen=True)
class Parity:
    """How far two forms of one model are apart on the same images."""

    largest: float  # |difference| of any logit
    mean: float
    agreement: float  # share of (image, head) answers that are the same class
    evidence_gap: float  # largest |mean of evidence - logit| in the second form


class _Graph:
    """Collects nodes and initialisers; every method returns the name of its output."""

    def __init__(self, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
        self.tensors = tensors
        self.nodes: list[Any] = []
        self.constants: dict[str, npt.NDArray[Any]] = {}

    def node(self, kind: str, name: str, *inputs: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, name: str, value: npt.NDArray[Any]) -> str:
        self.constants[name] = value
        return name

    def conv(self, x: str, name: str, *, stride: int = 1, clip: bool = False) -> str:
        weight = self.tensors[f"{name}.weight"]  # (C, I/groups, k, k)
        self.constant(f"{name}.weight", weight)
        self.constant(f"{name}.bias", self.tensors[f"{name}.bias"])
        kernel = weight.shape[2]
        groups = weight.shape[0] if name.endswith("depthwise") else 1
        x = self.node(
            "Conv", name, x, f"{name}.weight", f"{name}.bias",
            kernel_shape=[kernel, kernel], strides=[stride, stride], pads=[kernel // 2] * 4, group=groups,
        )  # fmt: skip
        return self.node("Clip", f"{name}.clip", x, "zero", "six") if clip else x

    def linear(self, x: str, name: str) -> str:
        self.constant(f"{name}.weight", np.ascontiguousarray(self.tensors[f"{name}.weight"].T))
        self.constant(f"{name}.bias", self.tensors[f"{name}.bias"])
        return self.node("Add", f"{name}.add", self.node("MatMul", name, x, f"{name}.weight"), f"{name}.bias")

    def norm(self, x: str, name: str) -> str:
        scale, bias = (self.constant(f"{name}.{part}", self.tensors[f"{name}.{part}"]) for part in ("weight", "bias"))
        return self.node("LayerNormalization", name, x, scale, bias, axis=-1, epsilon=1e-5)

    def reshape(self, x: str, name: str, *shape: int) -> str:
        return self.node("Reshape", name, x, self.constant(f"{name}.shape", np.array(shape, np.int64)))

    def convolutions(self, x: str) -> str:  # (N,1,224,224) -> (N,112,14,14)
        self.constant("zero", np.array(0, np.float32))
        self.constant("six", np.array(6, np.float32))
        x = self.conv(x, "stem", stride=2, clip=True)
        inside = 32
        for s, (expansion, _, stride, outside, rows) in enumerate(STAGES):
            for i in range(rows):
                name, before = f"stages.{s}.{i}", x
                if expansion > 1:
                    x = self.conv(x, f"{name}.expand", clip=True)
                x = self.conv(x, f"{name}.depthwise", stride=stride if i == 0 else 1, clip=True)
                x = self.conv(x, f"{name}.project")
                if inside == outside and (i > 0 or stride == 1):
                    x = self.node("Add", f"{name}.sum", before, x)
                inside = outside
        return x

    def block(self, x: str, name: str) -> str:  # (N,196,192) -> (N,196,192)
        depth = WIDTH // ATTENTION_HEADS
        y = self.linear(self.norm(x, f"{name}.norm_1"), f"{name}.query_key_value")  # (N,196,576)
        y = self.reshape(y, f"{name}.split", -1, TOKENS, 3, ATTENTION_HEADS, depth)
        parts = []
        for i, part in enumerate("qkv"):
            index = self.constant(f"{name}.{part}.index", np.array(i, np.int64))
            one = self.node("Gather", f"{name}.{part}.take", y, index, axis=2)  # (N,196,6,32)
            order = [0, 2, 3, 1] if part == "k" else [0, 2, 1, 3]
            parts.append(self.node("Transpose", f"{name}.{part}", one, perm=order))  # (N,6,196,32), k (N,6,32,196)
        scale = self.constant(f"{name}.scale", np.array(depth**-0.5, np.float32))
        weights = self.node("Mul", f"{name}.scaled", self.node("MatMul", f"{name}.scores", parts[0], parts[1]), scale)
        weights = self.node("Softmax", f"{name}.softmax", weights, axis=-1)  # (N,6,196,196)
        mixed = self.node("MatMul", f"{name}.mix", weights, parts[2])  # (N,6,196,32)
        mixed = self.node("Transpose", f"{name}.merge", mixed, perm=[0, 2, 1, 3])
        mixed = self.reshape(mixed, f"{name}.merged", -1, TOKENS, WIDTH)  # (N,196,192)
        x = self.node("Add", f"{name}.sum_1", x, self.linear(mixed, f"{name}.out"))
        y = self.linear(self.norm(x, f"{name}.norm_2"), f"{name}.up")  # (N,196,576)
        y = self.linear(self.node("Relu", f"{name}.relu", y), f"{name}.down")
        return self.node("Add", f"{name}.sum_2", x, y)

    def read(self, x: str) -> None:  # (N,196,192) -> the three outputs
        classes = self.tensors["head.bias"].shape[0]
        y = self.linear(x, "head")  # (N,196,K)
        tokens = self.constant("tokens.axis", np.array([1], np.int64))
        self.node("ReduceMean", "logits", y, tokens, keepdims=0)
        y = self.node("Transpose", "evidence.turn", y, perm=[0, 2, 1])  # (N,K,196)
        self.reshape(y, "evidence", -1, classes, GRID, GRID)
        self.node("ReduceMean", "features", x, tokens, keepdims=0)


def export_fp32(model: Hybrid, path: Path) -> None:
    """Writes the model's ONNX graph with FP32 weights, durably."""
    tensors = {name: t.detach().cpu().float().numpy() for name, t in model.state_dict().items()}
    graph = _Graph(tensors)
    x = graph.convolutions("image")  # (N,112,14,14)
    x = graph.reshape(x, "tokens.flat", -1, STAGES[-1][3], TOKENS)
    x = graph.linear(graph.node("Transpose", "tokens", x, perm=[0, 2, 1]), "embed")  # (N,196,192)
    x = graph.node("Add", "placed", x, graph.constant("position", tensors["position"]))
    for i in range(DEPTH):
        x = graph.block(x, f"blocks.{i}")
    graph.read(graph.norm(x, "norm"))
    classes = tensors["head.bias"].shape[0]
    shapes = {"logits": ["N", classes], "evidence": ["N", classes, GRID, GRID], "features": ["N", WIDTH]}
    built = helper.make_graph(
        graph.nodes,
        "hybrid-1",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1, SIDE, SIDE])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes[name]) for name in OUTPUTS],
        [numpy_helper.from_array(value, name) for name, value in graph.constants.items()],
    )
    whole = helper.make_model(
        built, opset_imports=[helper.make_opsetid("", 18)], ir_version=9, producer_name="radfleet"
    )
    onnx.checker.check_model(whole)
    atomic_write(path, whole.SerializeToString(deterministic=True), mode=0o644)


def activation_ranges(fp32: Path, images: Images, *, batch: int = 8) -> Ranges:
    """Returns the smallest and largest value that every tensor to be quantised takes on uint8 (N,224,224)."""
    model = onnx.load(str(fp32))
    chosen = set(_quantised(model))
    clipped = {node.input[0] for node in model.graph.node if node.op_type == "Clip"}  # the Clip's range counts
    names = ["image"]
    for node in model.graph.node:
        if node.name in chosen and node.name not in clipped:
            names += [node.output[0], *(name for name in node.input[:1] if name not in clipped)]
    outputs = []
    for name in dict.fromkeys(names):
        for kind in ("ReduceMin", "ReduceMax"):
            model.graph.node.append(helper.make_node(kind, [name], [f"{name}/{kind}"], keepdims=0))
            outputs.append(f"{name}/{kind}")
    del model.graph.output[:]
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, []) for name in outputs)
    ready = _open(model.SerializeToString(), threads=2)
    runs = [ready.run(outputs, {"image": as_tensor(images[i : i + batch])}) for i in range(0, len(images), batch)]
    seen = np.array(runs, dtype=np.float64)  # (batches, 2 x tensors)
    low, high = seen[:, 0::2].min(0), seen[:, 1::2].max(0)
    return {name: (float(a), float(b)) for name, a, b in zip(dict.fromkeys(names), low, high, strict=True)}


def widest(first: Ranges, second: Ranges) -> Ranges:
    """Returns for every tensor of `first` the range that covers both."""
    both = {name: (first[name], second.get(name, first[name])) for name in first}
    return {name: (min(a[0], b[0]), max(a[1], b[1])) for name, (a, b) in both.items()}


def quantise(fp32: Path, out: Path, ranges: Ranges) -> None:
    """Writes the static U8S8 QDQ form of `fp32`: per-channel weights, activations as `activation_ranges` saw them.

    Every convolution is quantised together with the Clip that follows it: its output range is then 0..6, where
    quantising the convolution alone would spend the eight bits on values that the Clip throws away. The linear layers
    of the blocks are quantised; LayerNorm, attention and the head stay float, so evidence still averages to the logit.
    """
    model = onnx.load(str(fp32))
    whole = ranges | {n.input[0]: ranges[n.name] for n in model.graph.node if n.op_type == "Clip"}  # asked for, unused
    data = {name: (np.float32(low), np.float32(high)) for name, (low, high) in whole.items()}
    quiet = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)  # it advises pre-processing that this graph has no use for
    try:
        with tempfile.TemporaryDirectory() as folder:
            cache, made = Path(folder) / "ranges.json", Path(folder) / "u8s8.onnx"
            save_tensors_data(TensorsData(CalibrationMethod.MinMax, data), cache)
            quantize_static(
                fp32,
                made,
                None,
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                per_channel=True,
                nodes_to_quantize=_quantised(model),
                op_types_to_quantize=["Conv", "Clip", "Add", "MatMul"],
                calibration_cache_path=cache,
            )
            atomic_write(out, made.read_bytes(), mode=0o644)
    finally:
        logging.getLogger().setLevel(quiet)


def _quantised(model: onnx.ModelProto) -> list[str]:
    linear = [f"blocks.{i}.{part}" for i in range(DEPTH) for part in ("query_key_value", "out", "up", "down")]
    return [n.name for n in model.graph.node if n.name.startswith(("stem", "stages."))] + ["embed", *linear]


def session(path: Path, *, threads: int = 2) -> onnxruntime.InferenceSession:
    """Returns a CPU session of the graph in `path`."""
    return _open(str(path), threads=threads)


def _open(graph: str | bytes, *, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def run(
    session: onnxruntime.InferenceSession, images: Images, *, batch: int = 16
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Returns logits (N,K), evidence (N,K,14,14), features (N,192) of uint8 (N,224,224)."""
    parts = [
        session.run(list(OUTPUTS), {"image": as_tensor(images[i : i + batch])}) for i in range(0, len(images), batch)
    ]
    logits, evidence, features = (np.concatenate(column) for column in zip(*parts, strict=True))
    return logits, evidence, features


def parity(
    first: onnxruntime.InferenceSession, second: onnxruntime.InferenceSession, images: Images, spans: list[slice]
) -> Parity:
    """Returns how far `second` is from `first` on uint8 (N,224,224); `spans` are the heads' columns."""
    one, (two, evidence, _) = run(first, images)[0], run(second, images)
    same = [one[:, span].argmax(1) == two[:, span].argmax(1) for span in spans]
    gap = np.abs(one - two)
    return Parity(
        float(gap.max()), float(gap.mean()), float(np.mean(same)), float(np.abs(evidence.mean((2, 3)) - two).max())
    )
