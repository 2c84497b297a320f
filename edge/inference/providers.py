"""Which execution providers may run a model here, and what of this machine an engine built for it depends on."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress

from msgspec import Struct

TENSORRT = "TensorrtExecutionProvider"
CUDA = "CUDAExecutionProvider"
OPENVINO = "OpenVINOExecutionProvider"
CPU = "CPUExecutionProvider"
ALLOWED = (TENSORRT, CUDA, OPENVINO, CPU)  # what a package may ask for; anything else the runtime has stays unused

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*, cuda.h
_NAME_BYTES = 100


class Gpu(Struct, frozen=True):
    """The first NVIDIA device. `tensorrt` is empty where its library is not installed."""

    name: str
    sm: str  # compute capability, as in 8.7
    driver: str  # the CUDA version that the driver speaks, as in 12040
    tensorrt: str  # as in 100300


def chains(wanted: Sequence[str], available: Collection[str]) -> list[tuple[str, ...]]:
    """Returns the provider lists that a variant may be opened with here, each best first, the variant's own one first.

    OpenVINO is no variant's own: where the runtime has it, a variant for the CPU is tried on it as well.
    """
    own = tuple(name for name in wanted if name in ALLOWED and name in available)
    if not own:
        return []
    if own[0] == CPU and OPENVINO in available:
        return [own, (OPENVINO, *own)]
    return [own]


def find_gpu(library: Callable[[str], ctypes.CDLL] = ctypes.CDLL) -> Gpu | None:
    """Returns what the driver says of the first device; None without a driver or a device."""
    with suppress(OSError, AttributeError):
        cuda = library("libcuda.so.1")
        device, driver, major, minor = (ctypes.c_int() for _ in range(4))
        name = ctypes.create_string_buffer(_NAME_BYTES)
        calls: tuple[Callable[[], int], ...] = (
            lambda: cuda.cuInit(0),
            lambda: cuda.cuDeviceGet(ctypes.byref(device), 0),
            lambda: cuda.cuDriverGetVersion(ctypes.byref(driver)),
            lambda: cuda.cuDeviceGetName(name, _NAME_BYTES, device),
            lambda: cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device),
            lambda: cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device),
        )
        if not any(call() for call in calls):  # CUDA_SUCCESS is 0
            sm = f"{major.value}.{minor.value}"
            return Gpu(name.value.decode("ascii", "replace"), sm, str(driver.value), _tensorrt(library))
    return None


def _tensorrt(library: Callable[[str], ctypes.CDLL]) -> str:
    for name in ("libnvinfer.so.10", "libnvinfer.so.11", "libnvinfer.so.8"):
        with suppress(OSError, AttributeError):
            version: int = library(name).getInferLibVersion()
            return str(version)
    return ""
