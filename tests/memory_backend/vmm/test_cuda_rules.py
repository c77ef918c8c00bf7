"""What the CUDA driver is taken to do, said with raw calls: on a GPU these tests judge the double, too.

Where the result's name is not documented, only the failure is asserted.
"""

import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from tests.memory_backend.vmm import device
from tests.memory_backend.vmm.device import (
    NO_TIMING,
    NON_BLOCKING,
    PTX,
    ROOT,
    CallFailed,
    call,
    chunk_properties,
    d,
    full_access,
)
from tests.memory_backend.vmm.logs import CHUNK, random_bytes

pytestmark = pytest.mark.gpu


class Range:
    """Four chunks of reserved addresses, and two physical chunks; the tests map what they need."""

    def __init__(self) -> None:
        self.start = int(call(d.cuMemAddressReserve, 4 * CHUNK, 0, 0, 0))
        self.handles = [call(d.cuMemCreate, CHUNK, chunk_properties(), 0) for _ in range(2)]
        self.mapped: set[int] = set()

    def at(self, place: int) -> int:
        return self.start + place * CHUNK

    def map(self, place: int, handle: int = 0, *, accessible: bool = True) -> int:
        call(d.cuMemMap, self.at(place), CHUNK, 0, self.handles[handle], 0)
        self.mapped.add(place)
        if accessible:
            call(d.cuMemSetAccess, self.at(place), CHUNK, [full_access()], 1)
        return self.at(place)

    def unmap(self, place: int) -> None:
        call(d.cuMemUnmap, self.at(place), CHUNK)
        self.mapped.remove(place)

    def close(self) -> None:
        for place in list(self.mapped):
            self.unmap(place)
        for handle in self.handles:
            call(d.cuMemRelease, handle)
        call(d.cuMemAddressFree, self.start, 4 * CHUNK)


@pytest.fixture
def context() -> Iterator[None]:
    with device.current_context():
        yield


@pytest.fixture
def space(context: None) -> Iterator[Range]:
    space = Range()
    yield space
    space.close()


def fails(function: Callable[..., Any], *arguments: Any) -> None:
    with pytest.raises(CallFailed):
        call(function, *arguments)


def fails_with(name: str, function: Callable[..., Any], *arguments: Any) -> None:
    with pytest.raises(CallFailed, match=name):
        call(function, *arguments)


# ---- sizes and addresses ----


def test_the_granularity_divides_a_chunk(context: None) -> None:
    least = d.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
    assert CHUNK % call(d.cuMemGetAllocationGranularity, chunk_properties(), least) == 0


def test_sizes_and_addresses_are_multiples_of_the_granularity(space: Range) -> None:
    fails(d.cuMemCreate, CHUNK + 4096, chunk_properties(), 0)
    fails(d.cuMemCreate, 0, chunk_properties(), 0)
    fails(d.cuMemMap, space.at(0) + 4096, CHUNK, 0, space.handles[0], 0)
    fails(d.cuMemMap, space.at(0), CHUNK - 4096, 0, space.handles[0], 0)


def test_more_memory_than_there_is_cannot_be_created(context: None) -> None:
    _, total = call(d.cuMemGetInfo)
    size = (total // CHUNK + 1) * CHUNK
    fails_with("CUDA_ERROR_OUT_OF_MEMORY", d.cuMemCreate, size, chunk_properties(), 0)


def test_what_is_created_is_missing_from_the_free_memory_until_it_is_released(context: None) -> None:
    before, _ = call(d.cuMemGetInfo)
    handle = call(d.cuMemCreate, 64 * CHUNK, chunk_properties(), 0)
    during, _ = call(d.cuMemGetInfo)
    call(d.cuMemRelease, handle)
    after, _ = call(d.cuMemGetInfo)
    assert before - during >= 64 * CHUNK and after - during >= 64 * CHUNK


# ---- mapping ----


def test_a_mapping_over_a_mapping_is_an_error(space: Range) -> None:
    space.map(0, 0)
    fails(d.cuMemMap, space.at(0), CHUNK, 0, space.handles[1], 0)


def test_a_mapping_outside_a_reservation_is_an_error(space: Range) -> None:
    fails(d.cuMemMap, space.at(4), CHUNK, 0, space.handles[0], 0)
    fails(d.cuMemMap, space.at(3), 2 * CHUNK, 0, space.handles[0], 0)


def test_a_mapping_longer_than_its_memory_or_off_its_start_is_an_error(space: Range) -> None:
    fails(d.cuMemMap, space.at(0), 2 * CHUNK, 0, space.handles[0], 0)
    fails(d.cuMemMap, space.at(0), CHUNK, CHUNK, space.handles[0], 0)


def test_an_unmap_of_nothing_or_of_a_part_of_a_mapping_is_an_error(context: None) -> None:
    space = int(call(d.cuMemAddressReserve, 4 * CHUNK, 0, 0, 0))
    handle = call(d.cuMemCreate, 2 * CHUNK, chunk_properties(), 0)
    fails(d.cuMemUnmap, space, CHUNK)
    call(d.cuMemMap, space, 2 * CHUNK, 0, handle, 0)
    for start, length in ((0, CHUNK), (CHUNK, CHUNK), (CHUNK, 2 * CHUNK)):
        fails(d.cuMemUnmap, space + start, length)
    call(d.cuMemUnmap, space, 2 * CHUNK)
    call(d.cuMemRelease, handle)
    call(d.cuMemAddressFree, space, 4 * CHUNK)


def test_two_mappings_of_one_chunk_show_the_same_bytes(space: Range) -> None:
    data = random_bytes(CHUNK, seed=1)
    device.write(space.map(0), data)
    np.testing.assert_array_equal(device.read(space.map(2), CHUNK), data)


def test_bytes_stay_with_the_chunk_when_it_is_mapped_elsewhere(space: Range) -> None:
    data = random_bytes(CHUNK, seed=2)
    device.write(space.map(1), data)
    space.unmap(1)
    np.testing.assert_array_equal(device.read(space.map(3), CHUNK), data)


def test_a_copy_may_span_neighbouring_mappings(space: Range) -> None:
    data = random_bytes(2 * CHUNK, seed=3)
    space.map(0, 0)
    space.map(1, 1)
    device.write(space.at(0), data)
    np.testing.assert_array_equal(device.read(space.at(1), CHUNK), data[CHUNK:])


# ---- access ----


def test_a_new_mapping_has_no_access_even_where_the_last_one_had_it(space: Range) -> None:
    for _ in range(2):
        space.map(0, accessible=False)
        assert call(d.cuMemGetAccess, full_access().location, space.at(0)) == 0
        call(d.cuMemSetAccess, space.at(0), CHUNK, [full_access()], 1)
        assert call(d.cuMemGetAccess, full_access().location, space.at(0)) == 3
        space.unmap(0)


def test_access_is_set_for_whole_mappings_without_a_hole(space: Range) -> None:
    fails(d.cuMemSetAccess, space.at(0), CHUNK, [full_access()], 1)
    space.map(0, 0, accessible=False)
    fails(d.cuMemSetAccess, space.at(0), 2 * CHUNK, [full_access()], 1)
    fails(d.cuMemSetAccess, space.at(0), CHUNK // 2, [full_access()], 1)
    space.map(1, 1, accessible=False)
    call(d.cuMemSetAccess, space.at(0), 2 * CHUNK, [full_access()], 1)


# ---- handles and reservations ----


def test_a_handle_is_released_once(context: None) -> None:
    handle = call(d.cuMemCreate, CHUNK, chunk_properties(), 0)
    call(d.cuMemRelease, handle)
    fails(d.cuMemRelease, handle)


def test_memory_outlives_its_handle_while_it_is_mapped(space: Range) -> None:
    data = random_bytes(CHUNK, seed=4)
    device.write(space.map(0), data)
    call(d.cuMemRelease, space.handles.pop(0))
    np.testing.assert_array_equal(device.read(space.at(0), CHUNK), data)


def test_the_handle_of_an_address_is_the_one_that_was_mapped_and_counts_as_another_reference(space: Range) -> None:
    fails(d.cuMemRetainAllocationHandle, space.at(1))
    space.map(1, 1)
    handle = call(d.cuMemRetainAllocationHandle, space.at(1))
    assert int(handle) == int(space.handles[1])
    call(d.cuMemRelease, handle)
    space.unmap(1)
    space.map(0, 1)


def test_a_reservation_is_freed_whole_and_with_nothing_mapped(space: Range) -> None:
    space.map(0)
    fails(d.cuMemAddressFree, space.start, 4 * CHUNK)
    space.unmap(0)
    fails(d.cuMemAddressFree, space.start, 2 * CHUNK)
    fails(d.cuMemAddressFree, space.at(1), 3 * CHUNK)


# ---- contexts and processes ----


def test_a_fresh_thread_has_no_context(context: None) -> None:
    seen: list[Any] = []

    def look() -> None:
        seen.append(int(call(d.cuCtxGetCurrent)))
        seen.extend(
            function(*arguments)[0].name
            for function, *arguments in ((d.cuMemAlloc, 64), (d.cuStreamCreate, NON_BLOCKING))
        )

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [0, "CUDA_ERROR_INVALID_CONTEXT", "CUDA_ERROR_INVALID_CONTEXT"]


def test_popping_brings_the_context_before_back(context: None) -> None:
    before = int(call(d.cuCtxGetCurrent))
    call(d.cuCtxPushCurrent, before)
    assert int(call(d.cuCtxPopCurrent)) == before == int(call(d.cuCtxGetCurrent))


def alone(function: Callable[[], None]) -> None:
    """Call `function` in a process of its own: what it does may cost that process its context."""
    command = f"from {__name__} import {function.__name__} as run; run()"
    ended = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_the_context_ends_with_its_last_reference(context: None) -> None:
    alone(use_a_context_too_long)


def use_a_context_too_long() -> None:
    call(d.cuInit, 0)
    context = call(d.cuDevicePrimaryCtxRetain, 0)
    assert int(call(d.cuDevicePrimaryCtxRetain, 0)) == int(context)
    call(d.cuCtxPushCurrent, context)
    call(d.cuDevicePrimaryCtxRelease, 0)
    call(d.cuMemFree, call(d.cuMemAlloc, 64))
    call(d.cuDevicePrimaryCtxRelease, 0)
    fails(d.cuMemAlloc, 64)


def test_a_forked_child_has_no_driver(context: None) -> None:
    alone(fork_and_call)


def fork_and_call() -> None:
    with device.current_context():
        child = os.fork()
        if not child:
            os._exit(d.cuMemGetInfo()[0] == 0 or d.cuInit(0)[0] == 0)
        assert os.waitpid(child, 0)[1] == 0
        call(d.cuMemGetInfo)


@pytest.mark.parametrize("accessible", [False, True])
def test_bytes_without_a_mapping_or_without_access_cannot_be_copied(context: None, accessible: bool) -> None:
    alone(copy_where_nothing_is_mapped if accessible else copy_without_access)


def copy_where_nothing_is_mapped() -> None:
    with device.current_context():
        space = Range()
        space.map(0)
        host = np.zeros(CHUNK, np.uint8)
        fails(d.cuMemcpyHtoD, space.at(1), host.ctypes.data, CHUNK)
        os._exit(0)  # the context may have been lost


def copy_without_access() -> None:
    with device.current_context():
        space = Range()
        space.map(0, accessible=False)
        host = np.zeros(CHUNK, np.uint8)
        fails(d.cuMemcpyHtoD, space.at(0), host.ctypes.data, CHUNK)
        os._exit(0)


def test_after_a_kernel_touched_unmapped_memory_every_call_fails(context: None) -> None:
    alone(touch_unmapped_memory)


def touch_unmapped_memory() -> None:
    with device.current_context():
        space, entry = Range(), int(call(d.cuMemAlloc, 48))
        stamp_at_unmapped = np.array([space.at(0), 64, 1, 0, 0, 0], np.int64)
        call(d.cuMemcpyHtoD, entry, stamp_at_unmapped.ctypes.data, stamp_at_unmapped.nbytes)
        with device.device_code("run_stamps") as run_stamps:
            run_stamps(entry, 1, CHUNK)
            fails_with("CUDA_ERROR_ILLEGAL_ADDRESS", d.cuCtxSynchronize)
            fails_with("CUDA_ERROR_ILLEGAL_ADDRESS", d.cuMemAlloc, 64)
            os._exit(0)  # the context is lost


# ---- work in flight ----


def test_an_event_is_not_ready_until_the_work_before_it_has_ended(context: None) -> None:
    stream, event = call(d.cuStreamCreate, NON_BLOCKING), call(d.cuEventCreate, NO_TIMING)
    with device.device_code("spin") as spin:
        started = time.perf_counter()
        spin(20_000_000, stream=stream)
        call(d.cuEventRecord, event, stream)
        fails_with("CUDA_ERROR_NOT_READY", d.cuEventQuery, event)
        fails_with("CUDA_ERROR_NOT_READY", d.cuStreamQuery, stream)
        call(d.cuEventSynchronize, event)
        assert time.perf_counter() - started >= 0.02
    call(d.cuEventQuery, event)
    call(d.cuStreamQuery, stream)
    call(d.cuEventDestroy, event)
    call(d.cuStreamDestroy, stream)


def test_work_waits_for_an_event_of_another_stream(context: None) -> None:
    first, second = (call(d.cuStreamCreate, NON_BLOCKING) for _ in range(2))
    event, memory = call(d.cuEventCreate, NO_TIMING), call(d.cuMemAlloc, CHUNK)
    call(d.cuMemsetD8Async, memory, 1, CHUNK, first)
    call(d.cuEventRecord, event, first)
    call(d.cuStreamWaitEvent, second, event, 0)
    call(d.cuMemsetD8Async, memory, 2, CHUNK, second)
    call(d.cuStreamSynchronize, second)
    assert np.unique(device.read(int(memory), CHUNK)).tolist() == [2]
    call(d.cuMemFree, memory)
    call(d.cuEventDestroy, event)
    for stream in (first, second):
        call(d.cuStreamDestroy, stream)


def test_the_default_stream_keeps_order_with_blocking_streams(context: None) -> None:
    stream, memory = call(d.cuStreamCreate, 0), call(d.cuMemAlloc, CHUNK)
    call(d.cuMemsetD8Async, memory, 1, CHUNK, stream)
    call(d.cuMemsetD8Async, memory, 2, CHUNK, 0)
    call(d.cuMemsetD8Async, int(memory) + CHUNK // 2, 3, CHUNK // 2, stream)
    call(d.cuStreamSynchronize, stream)
    halves = device.read(int(memory), CHUNK).reshape(2, -1)
    assert [np.unique(half).tolist() for half in halves] == [[2], [3]]
    call(d.cuMemFree, memory)
    call(d.cuStreamDestroy, stream)


def test_only_events_with_a_time_that_were_recorded_can_be_compared(context: None) -> None:
    timed, other = call(d.cuEventCreate, 0), call(d.cuEventCreate, 0)
    untimed = call(d.cuEventCreate, NO_TIMING)
    fails(d.cuEventElapsedTime, timed, other)
    for event in (timed, other, untimed):
        call(d.cuEventRecord, event, 0)
    call(d.cuCtxSynchronize)
    assert call(d.cuEventElapsedTime, timed, other) >= 0
    fails(d.cuEventElapsedTime, timed, untimed)
    for event in (timed, other, untimed):
        call(d.cuEventDestroy, event)


# ---- device code ----


def test_device_code_is_found_by_name_and_foreign_text_is_refused(context: None) -> None:
    module = call(d.cuModuleLoadData, PTX.read_bytes() + b"\0")
    call(d.cuModuleGetFunction, module, b"run_stamps")
    fails_with("CUDA_ERROR_NOT_FOUND", d.cuModuleGetFunction, module, b"run_stamp")
    call(d.cuModuleUnload, module)
    fails(d.cuModuleLoadData, b"this is no PTX\0")


def test_a_block_of_no_or_of_too_many_threads_is_an_error(context: None) -> None:
    module = call(d.cuModuleLoadData, PTX.read_bytes() + b"\0")
    spin = call(d.cuModuleGetFunction, module, b"spin")
    for threads in (0, 2048):
        fails(d.cuLaunchKernel, spin, 1, 1, 1, threads, 1, 1, 0, 0, ((0,), (ctypes.c_uint64,)), 0)
    call(d.cuModuleUnload, module)
