"""The first GPU as the checks see it: a context, chunks under reservations, a kernel in flight, times of calls."""

import ctypes
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from cuda.bindings import driver

from hbmgym.memory_backend.split import CHUNK_BYTES
from hbmgym.memory_backend.vmm import cuda_calls as cuda
from hbmgym.memory_backend.vmm.build_device import PTX
from hbmgym.memory_backend.vmm.cuda_calls import CudaFailure, call

FAKE = "FAKE"
"""What the name of the tests' double of libcuda begins with."""
SUCCESS = "CUDA_SUCCESS"
LONGEST_WAIT_S = 30.0
_ORDINAL = 0


class NoGpu(RuntimeError):
    """There is no GPU to check; the message says what to do."""


def result_code(function: Callable[..., Any], *arguments: Any) -> str:
    """Name of what the driver answers to the one call in `function`."""
    try:
        function(*arguments)
    except CudaFailure as failure:
        return failure.result
    return SUCCESS


class Device:
    """Device 0, its primary context current in this thread; for a process of its own, which gives all back by ending.

    Sizes and addresses are bytes. Raises NoGpu where there is none that can map memory.
    """

    def __init__(self) -> None:
        try:
            cuda.initialise()
            self._device = cuda.device(_ORDINAL)
            call(driver.cuCtxPushCurrent, cuda.retain_context(self._device))
        except CudaFailure as failure:
            reason = " ".join(str(failure).split())
            raise NoGpu(f"no GPU can be used here ({reason}): run this where `nvidia-smi` lists one") from failure
        self.name: str = cuda.device_name(self._device)
        if not cuda.supports_virtual_memory(self._device):
            raise NoGpu(f"{self.name} has no virtual memory management: run this on a GPU that can map memory")
        self.stream = cuda.make_stream()

    @property
    def fake(self) -> bool:
        """Is this the double that tests run on?"""
        return self.name.startswith(FAKE)

    @property
    def total_bytes(self) -> int:
        return int(call(driver.cuDeviceTotalMem, self._device))

    @property
    def free_bytes(self) -> int:
        return cuda.free_memory()

    @property
    def compute_capability(self) -> str:
        kinds = driver.CUdevice_attribute
        names = ("MAJOR", "MINOR")
        attributes = (getattr(kinds, f"CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{name}") for name in names)
        return ".".join(str(call(driver.cuDeviceGetAttribute, attribute, self._device)) for attribute in attributes)

    @property
    def granularity(self) -> int:
        return cuda.granularity(self._device)

    @property
    def recommended_granularity(self) -> int:
        kind = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        return int(call(driver.cuMemGetAllocationGranularity, cuda.properties(self._device), kind))

    def create(self, size: int = CHUNK_BYTES) -> int:
        """Handle of new physical memory."""
        return cuda.create(size, self._device)

    def map(self, address: int, handle: int, size: int = CHUNK_BYTES) -> None:
        """Map a handle from its first byte on."""
        cuda.map_handle(address, size, handle)

    def set_access(self, address: int, size: int = CHUNK_BYTES) -> None:
        """Let the device read and write."""
        cuda.allow_access(address, size, self._device)

    def mapped(self, chunks: int) -> int:
        """Address of new memory ready for use, one handle per chunk."""
        base = cuda.reserve(chunks * CHUNK_BYTES)
        for i in range(chunks):
            self.map(base + i * CHUNK_BYTES, self.create())
        self.set_access(base, chunks * CHUNK_BYTES)
        return base

    def fill(self, address: int, value: int) -> None:
        """Set every byte of a chunk."""
        call(driver.cuMemsetD8Async, address, value, CHUNK_BYTES, self.stream)
        self._finish()

    def read(self, address: int) -> np.ndarray:
        """uint8[CHUNK_BYTES]: a copy of what lies there."""
        data = np.empty(CHUNK_BYTES, np.uint8)
        cuda.copy_to_host(data.ctypes.data, address, CHUNK_BYTES, self.stream)
        self._finish()
        return data

    def copy_s(self, target: int, source: int, size: int) -> float:
        """Seconds that the device takes for one copy inside its memory, between two events."""
        started, ended = (int(call(driver.cuEventCreate, 0)) for _ in range(2))
        cuda.record_event(started, self.stream)
        cuda.copy(target, source, size, self.stream)
        cuda.record_event(ended, self.stream)
        _wait_for(cuda.event_has_passed, ended)
        seconds = 1e-3 * float(call(driver.cuEventElapsedTime, started, ended))
        for event in (started, ended):
            cuda.destroy_event(event)
        return seconds

    def _finish(self) -> None:
        _wait_for(cuda.stream_is_idle, self.stream)


class Spinner:
    """Keeps the device busy with a kernel that touches no memory, on a stream of its own."""

    def __init__(self, seconds: float) -> None:
        self._kernel = cuda.function(cuda.load_module(PTX.read_bytes() + b"\0"), "spin")
        self._stream, self._event = cuda.make_stream(), cuda.make_event()
        self._nanoseconds = round(1e9 * seconds)

    @contextmanager
    def spinning(self) -> Iterator[None]:
        """The kernel is launched when the context begins and has ended when it ends."""
        cuda.launch(self._kernel, 1, 1, self._stream, (self._nanoseconds,), (ctypes.c_uint64,))
        cuda.record_event(self._event, self._stream)
        time.sleep(0.001)  # a launch reaches the device within microseconds
        yield
        _wait_for(cuda.event_has_passed, self._event)

    @property
    def in_flight(self) -> bool:
        """Has the kernel not ended yet?"""
        return not cuda.event_has_passed(self._event)


class Stopwatch:
    """Wall time of calls by name, seen from Python; the garbage collector stays off from the first one on."""

    def __init__(self) -> None:
        gc.disable()
        self.seconds: dict[str, list[float]] = {}

    def time(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """What `function` returns; its time is noted under `name`."""
        started = time.perf_counter_ns()
        result = function(*arguments)
        spent_ns = time.perf_counter_ns() - started
        self.seconds.setdefault(name, []).append(1e-9 * spent_ns)
        return result

    def figures(self) -> dict[str, dict[str, float]]:
        """`figures` of every name."""
        return {name: figures(seconds) for name, seconds in self.seconds.items()}


def figures(seconds: list[float]) -> dict[str, float]:
    """{p50_us, p99_us, count}."""
    p50, p99 = np.percentile(seconds, (50, 99))
    return {"p50_us": 1e6 * float(p50), "p99_us": 1e6 * float(p99), "count": len(seconds)}


def driver_version() -> int:
    """The CUDA version that the driver is made for, for example 13000."""
    return int(call(driver.cuDriverGetVersion))


def _wait_for(is_done: Callable[[int], bool], handle: int) -> None:
    limit = time.monotonic() + LONGEST_WAIT_S
    while not is_done(handle):
        if time.monotonic() > limit:
            raise TimeoutError(f"the GPU has not ended its work within {LONGEST_WAIT_S:g} s")
