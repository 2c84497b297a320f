"""TensorRT's engines: built aside, kept under a name that holds everything they depend on, and used only when whole.

ONNX Runtime names its cache after graph and file, not after weights: a retrained model of the same graph would silently
run the old engine. Here the folder's name is the SHA-256 of the weights' own digest and of every version that matters,
its files are sealed by their digests (a plan is code that TensorRT runs), and it appears by a rename, so a build that
was cut off is no engine. While one is built the node answers by the next provider, and says so.

NEVER RUN on a GPU: see docs/hardware.md.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec
from msgspec import Struct

from edge.inference.providers import TENSORRT, Gpu
from shared.clock import Clock
from shared.errors import RadfleetError, TrustError
from shared.files import atomic_write, fsync_folder, read_limited, sha256_file, sha256_hex
from shared.log import get_logger

BATCH = 8  # images in one run, at most
KEPT = 3  # engines: the committed model's, the candidate's, the previous one's
_SEAL = "sealed.json"
_SEAL_LIMIT_BYTES = 64 * 1024
_MODEL = "model.onnx"
_INPUT = "image"
_NICE = 10
_WORKSPACE_BYTES = 1 << 30

Options = dict[str, str]


class Bound(Struct, frozen=True):
    """Everything that an engine depends on; another value of any of them is another engine."""

    weights: str  # SHA-256 of the ONNX bytes
    height: int
    width: int
    runtime: str
    gpu: Gpu

    @property
    def key(self) -> str:
        """64 hex digits."""
        return sha256_hex(msgspec.json.encode(self))


class Job(Protocol):
    """A build that runs."""

    def done(self) -> str | None:
        """Returns None while it runs, an empty text when it ended well, else why it did not."""

    def stop(self) -> None:
        """Ends it."""


class Engines:
    """The folder of engines, and the one build that may run."""

    def __init__(self, folder: Path, clock: Clock, *, start: Callable[[Path, Options], Job] | None = None) -> None:
        """`start` begins to build the model file in a folder with these provider options; the default is a child."""
        self._folder = folder
        self._clock = clock
        self._start = start or _Child
        self._job: tuple[Bound, Job, float] | None = None
        self._failed: dict[str, str] = {}

    def options(self, bound: Bound) -> Options | None:
        """Returns the provider's options for a whole engine; None where there is none."""
        folder = self._folder / bound.key
        try:
            sealed = msgspec.json.decode(read_limited(folder / _SEAL, _SEAL_LIMIT_BYTES), type=dict[str, str])
            if not sealed or any(sha256_file(folder / name) != digest for name, digest in sealed.items()):
                raise TrustError("The engine is not the one that was built.")
        except (RadfleetError, OSError, msgspec.MsgspecError) as exc:
            if folder.exists():
                get_logger().warning("inference.engine_dropped", key=bound.key[:12], error=type(exc).__name__)
                shutil.rmtree(folder, ignore_errors=True)
            return None
        return _options(folder, bound)

    def build(self, data: bytes, bound: Bound) -> str:
        """Begins to build unless that is under way or has failed; returns what to tell people meanwhile."""
        if bound.key in self._failed:
            return self._failed[bound.key]
        if self._job and self._job[0] != bound:
            self._job[1].stop()
            self._job = None
        if self._job is None:
            folder = self._building(bound)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(mode=0o700, parents=True)
            atomic_write(folder / _MODEL, data, mode=0o600)
            self._job = bound, self._start(folder / _MODEL, _options(folder, bound)), self._clock.monotonic()
        return f"TensorRT's engine is being built since {self._clock.now():%H:%M} UTC"

    def step(self) -> Bound | None:
        """Looks after the build; returns whose engine has just become whole. Logs how far it is."""
        if self._job is None:
            return None
        bound, job, began = self._job
        folder = self._building(bound)
        why = job.done()
        took = round(self._clock.monotonic() - began, 1)
        if why is None:
            size = sum(one.stat().st_size for one in folder.glob("*") if one.name != _MODEL)
            get_logger().debug("inference.engine_building", key=bound.key[:12], seconds=took, bytes=size)
            return None
        self._job = None
        made = [one for one in folder.iterdir() if one.name != _MODEL] if not why else []
        if not any(one.suffix == ".engine" for one in made):
            self._failed[bound.key] = f"TensorRT built no engine: {why or 'it wrote none'}"
            get_logger().error("inference.engine_failed", key=bound.key[:12], seconds=took, reason=why)
            shutil.rmtree(folder, ignore_errors=True)
            return None
        self._seal(folder, bound, made)
        get_logger().info("inference.engine_built", key=bound.key[:12], seconds=took)
        return bound

    def close(self) -> None:
        """Ends a build that runs."""
        if self._job:
            self._job[1].stop()

    def _building(self, bound: Bound) -> Path:
        return self._folder / f".building-{bound.key}"

    def _seal(self, folder: Path, bound: Bound, made: list[Path]) -> None:
        (folder / _MODEL).unlink()
        for one in made:
            with one.open("rb") as file:
                os.fsync(file.fileno())
        atomic_write(folder / _SEAL, msgspec.json.encode({one.name: sha256_file(one) for one in made}), mode=0o600)
        final = self._folder / bound.key
        shutil.rmtree(final, ignore_errors=True)
        folder.rename(final)
        fsync_folder(self._folder)
        whole = sorted(self._folder.glob("[0-9a-f]" * 64), key=lambda one: one.stat().st_mtime)
        for old in whole[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)


def _options(folder: Path, bound: Bound) -> Options:
    """ONNX Runtime's options of its TensorRT provider: explicit QDQ decides the precision, shapes are bounded."""
    shape = f"{_INPUT}:{{}}x1x{bound.height}x{bound.width}"
    return {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_engine_cache_prefix": bound.key[:16],
        "trt_int8_enable": "1",
        "trt_fp16_enable": "1",
        "trt_max_workspace_size": str(_WORKSPACE_BYTES),
        "trt_profile_min_shapes": shape.format(1),
        "trt_profile_opt_shapes": shape.format(1),
        "trt_profile_max_shapes": shape.format(BATCH),
    }


class _Child:
    """Builds in a niced process of its own: a build takes minutes and may die."""

    def __init__(self, model: Path, options: Options) -> None:
        self._process = multiprocessing.get_context("spawn").Process(target=_build, args=(model, options), daemon=True)
        self._process.start()

    def done(self) -> str | None:
        """See Job."""
        code = self._process.exitcode
        return None if code is None else "" if code == 0 else f"its process ended with {code}"

    def stop(self) -> None:
        """See Job."""
        self._process.kill()
        self._process.join()


def _build(model: Path, options: Options) -> None:
    """In the child: opening the session and one run build engine and timing cache into the options' folder.

    From bytes, as the node opens it: of a file, its name would go into the name of the cache.
    """
    import numpy as np
    import onnxruntime as ort

    os.nice(_NICE)
    timing = {"trt_timing_cache_enable": "1", "trt_timing_cache_path": options["trt_engine_cache_path"]}
    session = ort.InferenceSession(model.read_bytes(), providers=[(TENSORRT, {**options, **timing})])
    if session.get_providers()[0] != TENSORRT:
        raise SystemExit(1)
    shape = session.get_inputs()[0].shape[1:]  # (1, H, W)
    session.run(None, {_INPUT: np.zeros((1, *shape), dtype=np.float32)})
