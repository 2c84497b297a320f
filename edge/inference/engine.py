"""ONNX Runtime behind one small seam: verified bytes in, logits, evidence and features out of one pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from msgspec import Struct

from shared.errors import StateError, TrustError
from shared.files import read_limited, sha256_hex
from shared.log import get_logger
from shared.package.input_spec import as_tensor
from shared.package.manifest import Manifest, Variant

OUTPUTS = ["logits", "evidence", "features"]
_MEASURED_RUNS = 12
_MUST_GAIN = 0.85  # a later variant replaces the manifest's order only when it takes less than this share


class Outputs(Struct, frozen=True):
    """What one pass gives for N images, all float32: K logits of all heads, their evidence, D features.

    `logits` (N, K); `evidence` (N, K, h, w), whose mean over h and w is the logit; `features` (N, D).
    """

    logits: npt.NDArray[np.float32]
    evidence: npt.NDArray[np.float32]
    features: npt.NDArray[np.float32]


class Engine(Protocol):
    """One loaded variant of one package."""

    @property
    def variant(self) -> str: ...
    @property
    def provider(self) -> str:
        """The execution provider that really runs it."""

    @property
    def digest(self) -> str:
        """SHA-256 of the ONNX bytes that this session was made from."""

    @property
    def degraded(self) -> str:
        """Why a better provider of the variant is not in use; empty when none is missing."""

    def run(self, images: npt.NDArray[np.uint8]) -> Outputs:
        """Runs uint8 images (N, H, W), 0..255. Raises StateError when the runtime fails."""


class OnnxEngine:
    """An ONNX Runtime session over bytes in memory: the file is never read a second time."""

    def __init__(self, data: bytes, variant: Variant, *, threads: int) -> None:
        self.variant = variant.name
        self.digest = sha256_hex(data)
        self.degraded = ""
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 3
        # Spinning threads would take the cores that the DICOM door needs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        wanted = [name for name in variant.providers if name in ort.get_available_providers()]
        if not wanted:
            raise StateError(f"No provider of the variant {variant.name} is on this machine.")
        self._session = self._open(data, options, wanted)
        self.provider = str(self._session.get_providers()[0])
        outputs = [output.name for output in self._session.get_outputs()]
        if sorted(outputs) != sorted(OUTPUTS):
            raise TrustError(f"The model has the outputs {outputs}, not {OUTPUTS}.")
        self._input = self._session.get_inputs()[0].name

    def _open(self, data: bytes, options: ort.SessionOptions, wanted: Sequence[str]) -> ort.InferenceSession:
        """Tries the providers best first, each falling back to the rest of the list."""
        for index, name in enumerate(wanted):
            try:
                session = ort.InferenceSession(data, options, providers=list(wanted[index:]))
            except Exception as exc:  # onnxruntime's errors share no family
                if index + 1 == len(wanted):
                    raise StateError(f"ONNX Runtime cannot load the model: {str(exc)[:300]}") from exc
                self.degraded = f"{name} cannot load the model"
                get_logger().warning("inference.degraded", provider=name, error=str(exc)[:300])
                continue
            if session.get_providers()[0] != name:
                self.degraded = f"{name} is not usable"
            return session
        raise StateError("No provider was tried.")

    def run(self, images: npt.NDArray[np.uint8]) -> Outputs:
        """See Engine.run."""
        try:
            logits, evidence, features = self._session.run(OUTPUTS, {self._input: as_tensor(images)})
        except Exception as exc:  # as above
            raise StateError(f"ONNX Runtime failed: {str(exc)[:300]}") from exc
        return Outputs(
            np.asarray(logits, dtype=np.float32),
            np.asarray(evidence, dtype=np.float32),
            np.asarray(features, dtype=np.float32),
        )


def load_engine(
    package_folder: Path,
    manifest: Manifest,
    *,
    threads: int,
    variant: str | None = None,
    timer: Callable[[], float] = time.perf_counter,
) -> OnnxEngine:
    """Returns the package's engine: the named variant, or the one that is fastest on this machine.

    The bytes are read once, checked against the manifest and loaded from memory.

    Raises:
        TrustError: a model file is not the one the manifest names, or has other outputs.
        StateError: no variant can run here.
    """
    able: list[OnnxEngine] = []
    reasons: list[str] = []
    for candidate in manifest.variants:
        if variant is not None and candidate.name != variant:
            continue
        try:
            able.append(_load(package_folder, manifest, candidate, threads))
        except StateError as exc:
            reasons.append(exc.message)
    if not able:
        raise StateError(
            f"No variant of {manifest.name} runs on this machine: {' '.join(reasons)}",
            cure="Install the runtime that the package needs (extra cpu or gpu).",
        )
    if len(able) == 1:
        return able[0]
    size = (1, manifest.heads[0].input.height, manifest.heads[0].input.width)
    best, *rest = able
    took = _measure(able, size, timer)
    for engine in rest:
        if took[engine.variant] < took[best.variant] * _MUST_GAIN:
            best = engine
    get_logger().info("inference.chosen", variant=best.variant, provider=best.provider, ms=took[best.variant] * 1e3)
    return best


def _load(folder: Path, manifest: Manifest, variant: Variant, threads: int) -> OnnxEngine:
    entry = manifest.file(variant.file)
    data = read_limited(folder / variant.file, entry.length)
    if sha256_hex(data) != entry.sha256:
        raise TrustError(f"{variant.file} is not the file that the manifest names.")
    return OnnxEngine(data, variant, threads=threads)


def _measure(engines: Sequence[Engine], size: tuple[int, int, int], timer: Callable[[], float]) -> dict[str, float]:
    """Returns each variant's best seconds for one image; they take turns, so that what else runs here hits all."""
    image = np.zeros(size, dtype=np.uint8)
    best = dict.fromkeys((engine.variant for engine in engines), float("inf"))
    for engine in engines:
        engine.run(image)  # the first run allocates
    for _ in range(_MEASURED_RUNS):
        for engine in engines:
            start = timer()
            engine.run(image)
            best[engine.variant] = min(best[engine.variant], timer() - start)
    return best
