"""Providers, and TensorRT's engines at their seam: no GPU is here, so what builds them is a stand-in."""

from __future__ import annotations

import ctypes
import sqlite3
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from msgspec.structs import replace

from edge.inference import engine as engine_module
from edge.inference.engine import Accelerator, OnnxEngine, load_engine
from edge.inference.providers import CPU, CUDA, OPENVINO, TENSORRT, Gpu, chains, find_gpu
from edge.inference.tensorrt import KEPT, Bound, Engines, Options
from edge.report import degraded_reason
from edge.results.store import Store
from edge.slots.swap import ServingRecord
from shared.errors import TrustError
from shared.package.manifest import Manifest, verify_package
from tests.simulators.package import build_package

GPU = Gpu("Orin", "8.7", "12040", "100300")
BOUND = Bound("a" * 64, 224, 224, "1.32.0", GPU)


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> datetime:
        return datetime(2026, 1, 2, 3, 4, tzinfo=UTC)

    def monotonic(self) -> float:
        return self.seconds


class Job:
    """A build that ends when the test says so."""

    def __init__(self, model: Path, options: Options) -> None:
        self.folder = Path(options["trt_engine_cache_path"])
        self.model = model.read_bytes()
        self.ended: str | None = None
        self.stopped = False

    def done(self) -> str | None:
        return self.ended

    def stop(self) -> None:
        self.stopped = True

    def end(self, why: str = "", *, engine: bytes | None = b"plan") -> None:
        if engine is not None:
            (self.folder / "prefix_sm87.engine").write_bytes(engine)
            (self.folder / "prefix.timing").write_bytes(b"times")
        self.ended = why


class Builds:
    def __init__(self, folder: Path) -> None:
        self.jobs: list[Job] = []
        self.engines = Engines(folder, Clock(), start=self.start)

    def start(self, model: Path, options: Options) -> Job:
        self.jobs.append(Job(model, options))
        return self.jobs[-1]

    def whole(self, bound: Bound) -> Options:
        self.engines.build(b"weights", bound)
        self.jobs[-1].end()
        assert self.engines.step() == bound
        options = self.engines.options(bound)
        assert options is not None
        return options


@pytest.fixture
def builds(tmp_path: Path) -> Builds:
    return Builds(tmp_path / "engines")


def test_only_allowed_providers_are_used_and_openvino_is_tried_where_the_cpu_is_meant() -> None:
    here = [TENSORRT, CUDA, OPENVINO, CPU, "AzureExecutionProvider"]
    assert chains([TENSORRT, CUDA], here) == [(TENSORRT, CUDA)]
    assert chains(["AzureExecutionProvider", CPU], here) == [(CPU,), (OPENVINO, CPU)]
    assert chains([CPU], [CPU]) == [(CPU,)]
    assert chains([TENSORRT, CUDA], [CPU]) == []


def test_a_machine_without_a_driver_has_no_gpu() -> None:
    def missing(name: str) -> ctypes.CDLL:
        raise OSError(name)

    assert find_gpu(missing) is None


def test_what_the_driver_says_is_read_by_its_own_interface() -> None:
    def attribute(into: ctypes.c_int, which: int, _device: ctypes.c_int) -> int:
        into._obj.value = {75: 8, 76: 7}[which]  # type: ignore[attr-defined]
        return 0

    def put(into: ctypes.c_int, value: int) -> int:
        into._obj.value = value  # type: ignore[attr-defined]
        return 0

    def name(buffer: ctypes.Array[ctypes.c_char], _size: int, _device: ctypes.c_int) -> int:
        buffer.value = b"Orin"
        return 0

    found = {
        "libcuda.so.1": SimpleNamespace(
            cuInit=lambda _flags: 0,
            cuDeviceGet=lambda into, _index: put(into, 0),
            cuDriverGetVersion=lambda into: put(into, 12040),
            cuDeviceGetName=name,
            cuDeviceGetAttribute=attribute,
        ),
        "libnvinfer.so.10": SimpleNamespace(getInferLibVersion=lambda: 100300),
    }
    assert find_gpu(found.__getitem__) == GPU  # type: ignore[arg-type]
    found["libcuda.so.1"].cuInit = lambda _flags: 100  # CUDA_ERROR_NO_DEVICE
    assert find_gpu(found.__getitem__) is None  # type: ignore[arg-type]


def test_an_engine_is_built_aside_and_used_when_whole(builds: Builds) -> None:
    assert builds.engines.options(BOUND) is None
    told = builds.engines.build(b"weights", BOUND)
    assert told == "TensorRT's engine is being built since 03:04 UTC"
    assert builds.engines.build(b"weights", BOUND) == told
    assert len(builds.jobs) == 1
    assert builds.jobs[0].model == b"weights"
    assert builds.engines.step() is None
    assert builds.engines.options(BOUND) is None  # not before it is whole
    builds.jobs[0].end()
    assert builds.engines.step() == BOUND
    options = builds.engines.options(BOUND)
    assert options is not None
    assert sorted(one.name for one in Path(options["trt_engine_cache_path"]).iterdir()) == [
        "prefix.timing",
        "prefix_sm87.engine",
        "sealed.json",
    ]


def test_other_weights_or_another_version_of_anything_is_another_engine(builds: Builds) -> None:
    builds.whole(BOUND)
    others = [
        replace(BOUND, weights="b" * 64),
        replace(BOUND, height=192),
        replace(BOUND, runtime="1.33.0"),
        *(replace(BOUND, gpu=replace(GPU, **{name: "other"})) for name in Gpu.__struct_fields__),
    ]
    assert len({one.key for one in others}) == len(others)
    assert all(builds.engines.options(one) is None for one in others)


@pytest.mark.parametrize("name", ["prefix_sm87.engine", "prefix.timing", "sealed.json"])
def test_attack_an_engine_that_was_changed_on_disk_is_not_run(builds: Builds, name: str) -> None:
    folder = Path(builds.whole(BOUND)["trt_engine_cache_path"])
    (folder / name).write_bytes(b"{}")
    assert builds.engines.options(BOUND) is None
    assert not folder.exists()


def test_a_build_that_was_cut_off_is_no_engine_and_is_begun_again(builds: Builds, tmp_path: Path) -> None:
    builds.engines.build(b"weights", BOUND)
    builds.jobs[0].end()
    again = Builds(tmp_path / "engines")  # the process died before it looked
    assert again.engines.options(BOUND) is None
    again.whole(BOUND)


@pytest.mark.parametrize(("why", "engine"), [("its process ended with -9", b"plan"), ("", None)])
def test_a_failed_build_says_why_and_is_not_tried_for_ever(builds: Builds, why: str, engine: bytes | None) -> None:
    builds.engines.build(b"weights", BOUND)
    builds.jobs[0].end(why, engine=engine)
    assert builds.engines.step() is None
    assert builds.engines.build(b"weights", BOUND) == f"TensorRT built no engine: {why or 'it wrote none'}"
    assert len(builds.jobs) == 1


def test_the_newest_model_is_built_and_old_engines_leave(builds: Builds, tmp_path: Path) -> None:
    bounds = [replace(BOUND, weights=letter * 64) for letter in "abcde"]
    for bound in bounds:
        builds.whole(bound)
    assert len(list((tmp_path / "engines").iterdir())) == KEPT
    builds.engines.build(b"one", bounds[0])
    builds.engines.build(b"two", bounds[1])
    assert builds.jobs[-2].stopped


def package(tmp_path: Path, *variants: str) -> tuple[Path, Manifest]:
    folder = tmp_path / "package"
    return folder, verify_package(folder, build_package(folder, 1, variants=variants))


def test_while_tensorrt_builds_the_next_provider_answers_and_says_so(
    builds: Builds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, manifest = package(tmp_path, "cpu-fp32")
    wanted = [replace(one, providers=[TENSORRT, CPU]) for one in manifest.variants]
    manifest = replace(manifest, variants=wanted)
    monkeypatch.setattr(engine_module.ort, "get_available_providers", lambda: [TENSORRT, CPU])
    engine = load_engine(folder, manifest, threads=1, accelerator=Accelerator(GPU, builds.engines))
    assert engine.provider == CPU
    assert engine.degraded == "TensorRT's engine is being built since 03:04 UTC"
    (job,) = builds.jobs
    assert job.model == (folder / wanted[0].file).read_bytes()


def test_a_gpu_that_is_not_used_is_told_and_a_machine_without_one_is_not_degraded(
    builds: Builds, tmp_path: Path
) -> None:
    folder, manifest = package(tmp_path, "cuda-fp16", "cpu-fp32")
    assert load_engine(folder, manifest, threads=1).degraded == ""
    used = load_engine(folder, manifest, threads=1, accelerator=Accelerator(GPU, builds.engines))
    assert used.degraded == "No provider of the variant cuda-fp16 is on this machine."


def test_what_is_degraded_reaches_the_status_also_over_a_file_of_the_version_before(tmp_path: Path) -> None:
    old = sqlite3.connect(tmp_path / "results.sqlite")
    old.executescript(
        "CREATE TABLE serving (one INTEGER PRIMARY KEY, pid INTEGER); INSERT INTO serving VALUES (1, 5);"
        "PRAGMA user_version = 2;"
    )
    old.close()
    store = Store(tmp_path / "results.sqlite", tmp_path / "intake.sqlite")
    store.record_serving(ServingRecord("p", 1, "cpu-a", CPU, "no TensorRT here", "w" * 64, "g" * 64, 7), 1.0)
    store.close()
    assert degraded_reason(tmp_path) == "no TensorRT here"


def test_a_variant_that_does_not_reproduce_the_golden_outputs_is_passed_over(tmp_path: Path) -> None:
    folder, manifest = package(tmp_path, "cpu-a", "cpu-b")

    def accept(engine: OnnxEngine) -> None:
        if engine.variant == "cpu-a":
            raise TrustError("It differs.")

    assert load_engine(folder, manifest, threads=1, accept=accept).variant == "cpu-b"
    with pytest.raises(TrustError, match="differs"):
        load_engine(folder, manifest, threads=1, accept=accept, variant="cpu-a")


def test_a_batch_is_used_where_it_pays(tmp_path: Path) -> None:
    folder, manifest = package(tmp_path, "cpu-a")
    for together, expected in ((0.020, 8), (0.078, 1)):
        marks = iter([mark for n in range(3) for mark in (n, n + 0.010, n + 0.5, n + 0.5 + together)])
        assert load_engine(folder, manifest, threads=1, timer=lambda marks=marks: next(marks)).batch == expected


@pytest.mark.parametrize(("two", "threads"), [(0.009, 1), (0.006, 2)])
def test_more_threads_are_taken_where_they_gain(tmp_path: Path, two: float, threads: int) -> None:
    folder, manifest = package(tmp_path, "cpu-a")
    lasted = [0.010, two] * 12 + [0.010, 0.080] * 3  # one thread and two, in turns; then alone and in a batch
    marks = iter([mark for n, seconds in enumerate(lasted) for mark in (n, n + seconds)])
    assert load_engine(folder, manifest, threads=2, timer=lambda: next(marks)).threads == threads
