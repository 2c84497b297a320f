"""ONNX Runtime behind one small seam: verified bytes in, logits, evidence and features out of one pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from msgspec import Struct

from edge.inference.providers import CPU, CUDA, TENSORRT, Gpu, chains
from edge.inference.tensorrt import BATCH, Bound, Engines, Options
from shared.errors import RadfleetError, StateError, TrustError
from shared.files import read_limited, sha256_hex
from shared.log import get_logger
from shared.package.input_spec import as_tensor
from shared.package.manifest import Manifest, Variant

OUTPUTS = ["logits", "evidence", "features"]
_MEASURED_RUNS = 12
_BATCH_RUNS = 3
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

    @property
    def batch(self) -> int:
        """How many images in one run pay: 1 where more only make the first one wait."""

    def run(self, images: npt.NDArray[np.uint8]) -> Outputs:
        """Runs uint8 images (N, H, W), 0..255. Raises StateError when the runtime fails."""


class OnnxEngine:
    """An ONNX Runtime session over bytes in memory: the file is never read a second time."""

    def __init__(
        self,
        data: bytes,
        variant: Variant,
        *,
        threads: int,
        chain: Sequence[str] = (),
        options: Mapping[str, Options] | None = None,
    ) -> None:
        """Opens the bytes with the first provider of `chain` that can; empty: the variant's own.

        Raises:
            StateError: none can.
            TrustError: the model has other outputs.
        """
        self.variant = variant.name
        self.digest = sha256_hex(data)
        self.degraded = ""
        self.batch = 1
        own = chains(variant.providers, ort.get_available_providers())
        if not own:
            raise StateError(f"No provider of the variant {variant.name} is on this machine.")
        self.threads = threads
        self.chain = list(chain or own[0])
        self._session = self._open(data, _session_options(threads), self.chain, options or {})
        self.provider = str(self._session.get_providers()[0])
        outputs = [output.name for output in self._session.get_outputs()]
        if sorted(outputs) != sorted(OUTPUTS):
            raise TrustError(f"The model has the outputs {outputs}, not {OUTPUTS}.")
        self._input = self._session.get_inputs()[0].name

    def _open(
        self, data: bytes, settings: ort.SessionOptions, wanted: Sequence[str], options: Mapping[str, Options]
    ) -> ort.InferenceSession:
        """Tries the providers best first, each falling back to the rest of the list."""
        for index, name in enumerate(wanted):
            try:
                rest = [(one, dict(options.get(one, {}))) for one in wanted[index:]]
                session = ort.InferenceSession(data, settings, providers=rest)
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


class Accelerator(Struct, frozen=True):
    """The machine's GPU, and where TensorRT's engines for it are."""

    gpu: Gpu
    engines: Engines


def load_engine(
    package_folder: Path,
    manifest: Manifest,
    *,
    threads: int,
    accelerator: Accelerator | None = None,
    variant: str | None = None,
    accept: Callable[[OnnxEngine], object] | None = None,
    timer: Callable[[], float] = time.perf_counter,
) -> OnnxEngine:
    """Returns the package's engine: the named variant, or the one that is fastest on this machine.

    The bytes are read once, checked against the manifest and loaded from memory.

    Args:
        package_folder: the verified package.
        manifest: its manifest.
        threads: of one pass on the CPU, at most: one is taken where more gain little, it leaves the cores to others.
        accelerator: the machine's GPU; None without one.
        variant: this one and no other, unmeasured.
        accept: raises TrustError when an engine does not compute what the package promises; the next one is taken.
        timer: seconds.

    Raises:
        TrustError: a model file is not the one the manifest names, has other outputs, or `accept` takes none.
        StateError: no variant can run here.
    """
    able: list[OnnxEngine] = []
    missed: list[RadfleetError] = []
    for candidate in manifest.variants:
        if variant is None or candidate.name == variant:
            for chain in chains(candidate.providers, ort.get_available_providers()) or [()]:
                made = _try(package_folder, manifest, candidate, threads, accelerator, chain, accept)
                if isinstance(made, OnnxEngine):
                    able.append(made)
                else:
                    missed.append(made)
    reasons = " ".join(one.message for one in missed)
    if not able:
        refused = next((one for one in missed if isinstance(one, TrustError)), None)
        raise refused or StateError(
            f"No variant of {manifest.name} runs on this machine: {reasons}",
            cure="Install the runtime that the package needs (extra cpu or gpu).",
        )
    best = able[0]
    if variant is None:
        size = (manifest.heads[0].input.height, manifest.heads[0].input.width)
        if len(able) > 1:
            best = _fastest(able, size, timer)
        if threads > 1 and best.provider == CPU:
            made = _try(
                package_folder, manifest, manifest.variant(best.variant), 1, accelerator, tuple(best.chain), accept
            )
            best = _fastest([made, best], size, timer) if isinstance(made, OnnxEngine) else best
        best.batch = _batch(best, size, timer)
    if accelerator and best.provider not in (TENSORRT, CUDA):
        best.degraded = best.degraded or reasons or "the package has no variant for this machine's GPU"
    get_logger().info(
        "inference.chosen", variant=best.variant, provider=best.provider, batch=best.batch, threads=best.threads
    )
    return best


def _try(
    folder: Path,
    manifest: Manifest,
    variant: Variant,
    threads: int,
    accelerator: Accelerator | None,
    chain: tuple[str, ...],
    accept: Callable[[OnnxEngine], object] | None,
) -> OnnxEngine | RadfleetError:
    """One way to run one variant, or why not; a damaged file is raised."""
    try:
        engine = _load(folder, manifest, variant, threads, accelerator, chain)
    except StateError as exc:
        return exc
    try:
        if accept:
            accept(engine)
    except RadfleetError as exc:
        get_logger().warning("inference.not_accepted", variant=variant.name, chain=chain, reason=exc.message)
        return exc
    return engine


def _load(
    folder: Path,
    manifest: Manifest,
    variant: Variant,
    threads: int,
    accelerator: Accelerator | None,
    chain: tuple[str, ...],
) -> OnnxEngine:
    entry = manifest.file(variant.file)
    data = read_limited(folder / variant.file, entry.length)
    if sha256_hex(data) != entry.sha256:
        raise TrustError(f"{variant.file} is not the file that the manifest names.")
    if TENSORRT not in chain:
        return OnnxEngine(data, variant, threads=threads, chain=chain)
    options, why = _tensorrt(data, manifest, accelerator)
    if options:
        return OnnxEngine(data, variant, threads=threads, chain=chain, options={TENSORRT: options})
    rest = tuple(name for name in chain if name != TENSORRT)
    if not rest:
        raise StateError(f"{why}.")
    engine = OnnxEngine(data, variant, threads=threads, chain=rest)
    engine.degraded = f"{why}; {engine.degraded}" if engine.degraded else why
    return engine


def _tensorrt(data: bytes, manifest: Manifest, accelerator: Accelerator | None) -> tuple[Options | None, str]:
    """The options for an engine that is there, or why it is not; one that is missing is begun."""
    if not (accelerator and accelerator.gpu.tensorrt):
        return None, "TensorRT is not installed"
    spec = manifest.heads[0].input
    bound = Bound(sha256_hex(data), spec.height, spec.width, str(ort.__version__), accelerator.gpu)
    options = accelerator.engines.options(bound)
    return options, "" if options else accelerator.engines.build(data, bound)


def _session_options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    # Spinning threads would take the cores that the DICOM door needs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _fastest(able: Sequence[OnnxEngine], size: tuple[int, int], timer: Callable[[], float]) -> OnnxEngine:
    """The first, unless a later one takes much less time for one image."""
    took = _measure(able, [np.zeros((1, *size), dtype=np.uint8)] * len(able), timer)
    best = 0
    for index in range(1, len(able)):
        if took[index] < took[best] * _MUST_GAIN:
            best = index
    get_logger().info("inference.measured", ms=[round(one * 1e3, 2) for one in took])
    return able[best]


def _batch(engine: OnnxEngine, size: tuple[int, int], timer: Callable[[], float]) -> int:
    """How many images in one run pay here: BATCH where an image among them takes much less time than alone."""
    images = [np.zeros((count, *size), dtype=np.uint8) for count in (1, BATCH)]
    try:
        one, many = _measure([engine, engine], images, timer, runs=_BATCH_RUNS)
    except StateError:  # a graph of one image a run, or no memory for more
        return 1
    return BATCH if many / BATCH < one * _MUST_GAIN else 1


def _measure(
    engines: Sequence[Engine],
    images: Sequence[npt.NDArray[np.uint8]],
    timer: Callable[[], float],
    runs: int = _MEASURED_RUNS,
) -> list[float]:
    """Returns each engine's best seconds for its images; they take turns, so that what else runs here hits all."""
    best = [float("inf")] * len(engines)
    for engine, image in zip(engines, images, strict=True):
        engine.run(image)  # the first run allocates
    for _ in range(runs):
        for index, (engine, image) in enumerate(zip(engines, images, strict=True)):
            start = timer()
            engine.run(image)
            best[index] = min(best[index], timer() - start)
    return best
