"""The GPU as tests reach it beside the driver: raw calls of cuda.bindings, and bytes."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

d = pytest.importorskip("cuda.bindings.driver", exc_type=ImportError)  # skips the test file that imports this one

ROOT = Path(__file__).parents[3]
PTX = ROOT / "memory_backend" / "vmm" / "device.ptx"
NON_BLOCKING, NO_TIMING = 1, 2
_TYPES = {"run_stamps": (ctypes.c_uint64, ctypes.c_int32, ctypes.c_int64), "spin": (ctypes.c_uint64,)}


class CallFailed(Exception):
    """A raw call did not say CUDA_SUCCESS; `result` is what it said."""

    def __init__(self, function: Callable[..., Any], result: Any):
        super().__init__(f"{function.__name__} says {result.name}")
        self.result = result


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """The output of a function of cuda.bindings.driver, or CallFailed."""
    result, *outputs = function(*arguments)
    if result != d.CUresult.CUDA_SUCCESS:
        raise CallFailed(function, result)
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


@contextmanager
def current_context() -> Iterator[None]:
    """The primary context is current in this thread."""
    call(d.cuInit, 0)
    call(d.cuCtxPushCurrent, call(d.cuDevicePrimaryCtxRetain, 0))
    try:
        yield
    finally:
        call(d.cuCtxPopCurrent)
        call(d.cuDevicePrimaryCtxRelease, 0)


def read(address: int, length: int) -> np.ndarray:
    """uint8[length] from device memory, once all work has ended."""
    data = np.empty(length, np.uint8)
    with current_context():
        call(d.cuCtxSynchronize)
        call(d.cuMemcpyDtoH, data.ctypes.data, address, length)
    return data


def write(address: int, data: np.ndarray) -> None:
    """Put bytes into device memory, once all work has ended."""
    data = np.ascontiguousarray(data, np.uint8)
    with current_context():
        call(d.cuCtxSynchronize)
        call(d.cuMemcpyHtoD, address, data.ctypes.data, data.size)
        call(d.cuCtxSynchronize)


def chunk_properties() -> Any:
    """Physical memory on device 0."""
    properties = d.CUmemAllocationProp()
    properties.type = d.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = d.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = 0
    return properties


def full_access() -> Any:
    """Device 0 may read and write."""
    description = d.CUmemAccessDesc()
    description.location = chunk_properties().location
    description.flags = d.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    return description


@contextmanager
def device_code(name: str) -> Iterator[Callable[..., None]]:
    """Launches one thread of a kernel of device.cu: `launch(*arguments, stream=...)`."""
    module = call(d.cuModuleLoadData, PTX.read_bytes() + b"\0")
    kernel = call(d.cuModuleGetFunction, module, name.encode())

    def launch(*arguments: int, stream: Any = 0) -> None:
        call(d.cuLaunchKernel, kernel, 1, 1, 1, 1, 1, 1, 0, stream, (arguments, _TYPES[name]), 0)

    try:
        yield launch
    finally:
        call(d.cuModuleUnload, module)
