"""The few CUDA driver calls of the CUDA driver; all raise CudaFailure. Addresses and lengths are bytes."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cuda.bindings import driver

from hbmgym.memory_backend.vmm.protocol import VmmError, VmmRefused

_LEGACY_STREAM = driver.CU_STREAM_LEGACY
_ACCESS_TRIES, _ACCESS_PAUSE_S = 50, 0.001
_NAME_BYTES = 256


class CudaFailure(VmmError):
    """A call of the CUDA driver failed; the message has the call, its arguments and the result's name."""

    def __init__(self, call: str, arguments: tuple[Any, ...], result: str):
        super().__init__(f"{call}({', '.join(map(_shown, arguments))}) says {result}")
        self.result = result


def _shown(argument: Any) -> str:
    if not isinstance(argument, int):
        return type(argument).__name__
    return hex(argument) if argument >= 2**32 else str(argument)


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """The outputs of a driver function: None, one value or a tuple."""
    try:
        result, *outputs = function(*arguments)
    except RuntimeError as error:  # the library, or this function in it, does not exist
        raise CudaFailure(function.__name__, arguments, type(error).__name__) from error
    if result != driver.CUresult.CUDA_SUCCESS:
        raise CudaFailure(function.__name__, arguments, result.name)
    return outputs[0] if len(outputs) == 1 else tuple(outputs) or None


def _is_ready(function: Callable[..., Any], handle: int) -> bool:
    try:
        call(function, handle)
    except CudaFailure as failure:
        if failure.result != "CUDA_ERROR_NOT_READY":
            raise
        return False
    return True


_initialised_in: int | None = None


def initialise() -> None:
    """Load libcuda and initialise it; harmless when that has been done, refused when it was done before a fork."""
    global _initialised_in
    if _initialised_in not in (None, os.getpid()):
        raise VmmRefused("cuda memory: CUDA was initialised before this process was forked: start it with spawn")
    call(driver.cuInit, 0)
    _initialised_in = os.getpid()


def device(ordinal: int) -> int:
    """The device that is number `ordinal` among the visible ones."""
    return int(call(driver.cuDeviceGet, ordinal))


def device_name(device: int) -> str:
    """As the vendor calls it."""
    return call(driver.cuDeviceGetName, _NAME_BYTES, device).split(b"\0")[0].decode()


def supports_virtual_memory(device: int) -> bool:
    """Does the device have cuMemMap and its family?"""
    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
    return bool(call(driver.cuDeviceGetAttribute, attribute, device))


def retain_context(device: int) -> int:
    """The device's primary context, which other libraries of the process use too."""
    return int(call(driver.cuDevicePrimaryCtxRetain, device))


def release_context(device: int) -> None:
    """Undo one `retain_context`."""
    call(driver.cuDevicePrimaryCtxRelease, device)


@contextmanager
def current(context: int) -> Iterator[None]:
    """Make `context` the calling thread's; afterwards the thread has the one it had, or none."""
    call(driver.cuCtxPushCurrent, context)
    try:
        yield
    finally:
        # Unchecked: what was done inside is done, and a thread with one context too many does not undo it.
        driver.cuCtxPopCurrent()


def free_memory() -> int:
    """Bytes of the current device that are free."""
    free, _ = call(driver.cuMemGetInfo)
    return int(free)


def granularity(device: int) -> int:
    """Sizes and addresses of mappings are multiples of this."""
    least = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
    return int(call(driver.cuMemGetAllocationGranularity, properties(device), least))


def reserve(length: int) -> int:
    """Address of a new range with nothing mapped."""
    return int(call(driver.cuMemAddressReserve, length, 0, 0, 0))


def free_range(address: int, length: int) -> None:
    """Give a reserved range back; nothing may be mapped in it."""
    call(driver.cuMemAddressFree, address, length)


def create(length: int, device: int) -> int:
    """Handle of new physical memory."""
    return int(call(driver.cuMemCreate, length, properties(device), 0))


def release(handle: int) -> None:
    """Give physical memory back, once nothing maps it."""
    call(driver.cuMemRelease, handle)


def map_handle(address: int, length: int, handle: int) -> None:
    """Map all of `handle` at a free place of a reserved range; nothing can touch it before `allow_access`."""
    call(driver.cuMemMap, address, length, 0, handle, 0)


def unmap(address: int, length: int) -> None:
    """Undo exactly one `map_handle`."""
    call(driver.cuMemUnmap, address, length)


def allow_access(address: int, length: int, device: int) -> None:
    """Let `device` read and write a range that is mapped without a hole."""
    access = driver.CUmemAccessDesc()
    access.location = properties(device).location
    access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    for attempt in range(_ACCESS_TRIES):
        try:
            return call(driver.cuMemSetAccess, address, length, [access], 1)
        except CudaFailure as failure:
            # Seen when several processes change mappings at once: it passes.
            if failure.result != "CUDA_ERROR_NOT_READY" or attempt == _ACCESS_TRIES - 1:
                raise
            time.sleep(_ACCESS_PAUSE_S)


def handle_at(address: int) -> int | None:
    """The handle that is mapped at an address, None where nothing is."""
    try:
        handle = int(call(driver.cuMemRetainAllocationHandle, address))
    except CudaFailure as failure:
        if failure.result != "CUDA_ERROR_INVALID_VALUE":
            raise
        return None
    release(handle)
    return handle


def make_stream() -> int:
    """A stream that waits for no other."""
    return int(call(driver.cuStreamCreate, driver.CUstream_flags.CU_STREAM_NON_BLOCKING))


def destroy_stream(stream: int) -> None:
    """Destroy a stream."""
    call(driver.cuStreamDestroy, stream)


def stream_is_idle(stream: int) -> bool:
    """Has all work on `stream` ended?"""
    return _is_ready(driver.cuStreamQuery, stream)


def make_event() -> int:
    """An event without a time."""
    return int(call(driver.cuEventCreate, driver.CUevent_flags.CU_EVENT_DISABLE_TIMING))


def destroy_event(event: int) -> None:
    """Destroy an event."""
    call(driver.cuEventDestroy, event)


def record_event(event: int, stream: int | None) -> None:
    """Let `event` stand for the work launched so far on `stream`; None is the legacy default stream."""
    call(driver.cuEventRecord, event, stream or _LEGACY_STREAM)


def event_has_passed(event: int) -> bool:
    """Has the work that `event` stands for ended?"""
    return _is_ready(driver.cuEventQuery, event)


def load_module(ptx: bytes) -> int:
    """Compile and load device code; `ptx` ends with a NUL."""
    return int(call(driver.cuModuleLoadData, ptx))


def unload_module(module: int) -> None:
    """Unload device code."""
    call(driver.cuModuleUnload, module)


def function(module: int, name: str) -> int:
    """A kernel of a module."""
    return int(call(driver.cuModuleGetFunction, module, name.encode()))


def launch(function: int, blocks: int, threads: int, stream: int, arguments: tuple[int, ...], types: Any) -> None:
    """Launch a kernel with a one-dimensional grid; `types` are the ctypes types of the arguments."""
    call(driver.cuLaunchKernel, function, blocks, 1, 1, threads, 1, 1, 0, stream, (arguments, types), 0)


def allocate(length: int) -> int:
    """Device memory outside the budget."""
    return int(call(driver.cuMemAlloc, length))


def free(address: int) -> None:
    """Undo one `allocate`."""
    call(driver.cuMemFree, address)


def allocate_host(length: int) -> int:
    """Page-locked host memory, which copies on a stream may use while the host goes on."""
    return int(call(driver.cuMemHostAlloc, length, 0))


def free_host(address: int) -> None:
    """Undo one `allocate_host`."""
    call(driver.cuMemFreeHost, address)


def copy_to_device(target: int, source: int, length: int, stream: int) -> None:
    """From page-locked memory, on `stream`."""
    call(driver.cuMemcpyHtoDAsync, target, source, length, stream)


def copy_to_host(target: int, source: int, length: int, stream: int) -> None:
    """To page-locked memory, on `stream`."""
    call(driver.cuMemcpyDtoHAsync, target, source, length, stream)


def copy(target: int, source: int, length: int, stream: int) -> None:
    """From device memory to device memory, on `stream`; the two may not overlap."""
    call(driver.cuMemcpyDtoDAsync, target, source, length, stream)


def clear(address: int, length: int, stream: int) -> None:
    """Zero device memory, on `stream`."""
    call(driver.cuMemsetD8Async, address, 0, length, stream)


def properties(device: int) -> Any:
    """Physical memory that lies on `device`."""
    properties = driver.CUmemAllocationProp()
    properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = device
    return properties
