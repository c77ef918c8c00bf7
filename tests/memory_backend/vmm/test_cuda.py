"""The driver on a GPU: order of calls, calls that fail, work in flight, threads and forks, and what is left."""

import gc
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbmgym.memory_backend.oplog import KV, SSM
from hbmgym.memory_backend.split import Layout
from hbmgym.memory_backend.vmm import VmmError, VmmRefused, open_vmm
from tests.memory_backend.vmm import device
from tests.memory_backend.vmm.cuda_double.controls import FOREVER, Double
from tests.memory_backend.vmm.device import NON_BLOCKING, call, chunk_properties, d
from tests.memory_backend.vmm.logs import (
    CHUNK,
    SMALL,
    check,
    copy,
    log,
    moves,
    open_or_skip,
    owners,
    random_bytes,
    read_bytes,
    scatter,
    stamp,
    write_bytes,
    zero,
)

pytestmark = pytest.mark.gpu

CHUNKS, KV_CHUNKS = 12, 7
LAYOUT = Layout(CHUNKS * CHUNK, CHUNK, 300_000, 1_000_003, min_slots=1, min_pages=1)
OUT_OF_MEMORY, NOT_READY = 2, 600
WORKS_ON = log(stamp(KV, 0, 1), copy(KV, 0, 1), check(KV, 1, 1), zero(SSM, 0))


@pytest.fixture
def cuda() -> Iterator[Any]:
    with open_or_skip("cuda", LAYOUT, KV_CHUNKS) as driver:
        yield driver


def contents(cuda: Any) -> list[bytes]:
    return [read_bytes(cuda, pool).tobytes() for pool in (KV, SSM)]


def fill(cuda: Any) -> None:
    for pool in (KV, SSM):
        write_bytes(cuda, pool, 0, random_bytes(len(cuda.chunk_at(pool)) * CHUNK, seed=pool))


def calls_of(double: Double, action: Callable[[], Any]) -> list[str]:
    """The functions that `action` calls, in order."""
    before = len(double.log)
    action()
    return double.log[before:]


# ---- what a move consists of ----


def test_a_move_maps_then_gives_access_then_waits_then_unmaps(cuda: Any, double: Double) -> None:
    made = calls_of(double, lambda: cuda.execute(log(*moves(cuda, KV, 3))))
    kept = [name for name in made if name.startswith(("cuMem", "cuStreamQuery"))]
    assert kept == [*["cuMemMap"] * 3, "cuMemSetAccess", "cuStreamQuery", *["cuMemUnmap"] * 3]


def test_access_is_set_once_per_run_of_chunks_however_scattered(cuda: Any, double: Double) -> None:
    scatter(cuda, KV)
    for pool in (KV, SSM):
        assert Counter(calls_of(double, lambda p=pool: cuda.execute(log(*moves(cuda, p, 5)))))["cuMemSetAccess"] == 1


def test_physical_memory_is_made_once_and_reused(cuda: Any, double: Double) -> None:
    rng = np.random.default_rng(0)
    while cuda.chunks_moved < 200:
        pool = int(rng.integers(2))
        cuda.execute(log(*moves(cuda, pool, min(int(rng.integers(1, 5)), len(cuda.chunk_at(pool))))))
    assert double.calls("cuMemCreate") == CHUNKS and double.calls("cuMemRelease") == 0
    assert double.live["mappings"] == CHUNKS and double.live["handles"] == CHUNKS


def test_nothing_is_released_while_it_is_mapped(double: Double) -> None:
    with open_or_skip("cuda", LAYOUT, KV_CHUNKS) as cuda:
        cuda.execute(log(*moves(cuda, KV, 2)))
    assert double.calls("cuMemRelease") == CHUNKS and double.early_releases == 0


def test_check_compares_owners_with_what_the_gpu_maps(cuda: Any) -> None:
    address = cuda.base(KV)
    with device.current_context():
        handle = call(d.cuMemRetainAllocationHandle, address)
        call(d.cuMemUnmap, address, CHUNK)
    with pytest.raises(VmmError, match="kv position 0: expected chunk 0, mapped is nothing"):
        cuda.check()
    foreign_address = cuda.base(SSM) + (CHUNKS - 1) * CHUNK
    with device.current_context():
        call(d.cuMemMap, address, CHUNK, 0, handle, 0)
        call(d.cuMemSetAccess, address, CHUNK, [device.full_access()], 1)
        foreign = call(d.cuMemCreate, CHUNK, chunk_properties(), 0)
        call(d.cuMemMap, foreign_address, CHUNK, 0, foreign, 0)
    with pytest.raises(VmmError, match="ssm position 11: expected nothing, mapped is foreign memory"):
        cuda.check()
    with device.current_context():
        call(d.cuMemUnmap, foreign_address, CHUNK)
        for extra in (foreign, handle):
            call(d.cuMemRelease, extra)
    cuda.check()


# ---- block entries ----

BLOCKS = Layout(4 * CHUNK, CHUNK, 500_001, 1_000_003, min_slots=1, min_pages=1)
BLOCK = st.integers(0, 2)
ENTRY = st.one_of(
    st.builds(stamp, st.sampled_from((KV, SSM)), BLOCK, st.integers(1, 2**62)),
    st.builds(copy, st.sampled_from((KV, SSM)), BLOCK, BLOCK),
    st.builds(zero, st.sampled_from((KV, SSM)), BLOCK),
)


@settings(max_examples=25, deadline=None)
@given(entries=st.lists(ENTRY, max_size=40))
def test_entries_that_name_the_same_blocks_leave_the_bytes_that_host_leaves(entries: list[tuple[int, ...]]) -> None:
    with open_or_skip("host", BLOCKS, 2) as host, open_or_skip("cuda", BLOCKS, 2) as cuda:
        for driver in (host, cuda):
            fill(driver)
            driver.execute(log(*entries))
        assert contents(host) == contents(cuda)


def test_a_log_of_many_batches_stops_at_the_first_stale_stamp(cuda: Any) -> None:
    entries = [stamp(KV, 0, 5), *[check(KV, 0, 5)] * 9000, check(KV, 0, 6), *[check(KV, 0, 5)] * 2000]
    with pytest.raises(VmmError, match="kv block 0, byte 0: expected stamp 6, found 5"):
        cuda.execute(log(*entries))
    assert cuda.stamps_checked == 9000


def test_a_failing_call_of_a_block_entry_is_one_line_and_no_end(cuda: Any, double: Double) -> None:
    made = calls_of(double, lambda: cuda.execute(WORKS_ON))
    assert {"cuMemcpyHtoDAsync_v2", "cuLaunchKernel", "cuMemcpyDtoDAsync_v2", "cuMemsetD8Async"} <= {*made}
    for function, number in each_call(made):
        double.fail(function, number, OUT_OF_MEMORY)
        with pytest.raises(VmmError, match=r"^[^\n]*CUDA_ERROR_OUT_OF_MEMORY[^\n]*$"):
            cuda.execute(WORKS_ON)
        double.heal()
        cuda.execute(WORKS_ON)
        cuda.check()


# ---- calls that fail in a move ----


def each_call(made: list[str]) -> list[tuple[str, int]]:
    """(function, its calls before) for every call; leaving the thread's context does not fail once entering did not."""
    return [(name, made[:i].count(name)) for i, name in enumerate(made) if name not in ("cuCtxPopCurrent_v2", "cuInit")]


@pytest.mark.parametrize("pool", [KV, SSM])
def test_any_failing_call_of_a_move_undoes_the_move(cuda: Any, double: Double, pool: int) -> None:
    scatter(cuda, pool)
    fill(cuda)
    cuda.end_batch()
    made = calls_of(double, lambda: cuda.execute(log(*moves(cuda, pool, 5))))
    cuda.execute(log(*moves(cuda, 1 - pool, 5)))
    assert Counter(made)["cuMemMap"] == Counter(made)["cuMemUnmap"] == 5
    before, bytes_before, moved_before = owners(cuda), contents(cuda), cuda.chunks_moved
    for function, number in each_call(made):
        cuda.end_batch()
        double.fail(function, number, OUT_OF_MEMORY)
        with pytest.raises(VmmError, match=r"^[^\n]*CUDA_ERROR_OUT_OF_MEMORY[^\n]*$"):
            cuda.execute(log(*moves(cuda, pool, 5)))
        double.heal()
        cuda.check()
        assert owners(cuda) == before and contents(cuda) == bytes_before and cuda.chunks_moved == moved_before
    cuda.execute(log(*moves(cuda, pool, 5)))
    cuda.check()


@pytest.mark.parametrize(
    ("function", "number", "roll_back"),
    [
        ("cuMemMap", 3, "cuMemUnmap"),
        ("cuMemSetAccess", 0, "cuMemUnmap"),
        ("cuMemUnmap", 2, "cuMemMap"),
        ("cuMemUnmap", 2, "cuMemSetAccess"),
    ],
)
def test_a_failing_roll_back_refuses_everything_from_then_on(
    cuda: Any, double: Double, function: str, number: int, roll_back: str
) -> None:
    made = calls_of(double, lambda: cuda.execute(log(*moves(cuda, KV, 4))))
    cuda.execute(log(*moves(cuda, SSM, 4)))
    double.fail(function, number, OUT_OF_MEMORY)
    double.fail(roll_back, made.count(roll_back) if roll_back != function and roll_back != "cuMemUnmap" else 0, 1)
    with pytest.raises(VmmError, match="and so did its roll-back"):
        cuda.execute(log(*moves(cuda, KV, 4)))
    for use in (lambda: cuda.execute(log(stamp(KV, 0, 1))), lambda: cuda.view(KV, 0, 1), cuda.check, cuda.end_batch):
        with pytest.raises(VmmError, match="refuses every operation: a move failed"):
            use()


def test_access_that_is_not_ready_is_asked_for_again(cuda: Any, double: Double) -> None:
    double.fail("cuMemSetAccess", 0, NOT_READY, times=3)
    made = calls_of(double, lambda: cuda.execute(log(*moves(cuda, KV, 2))))
    assert made.count("cuMemSetAccess") == 4
    cuda.check()


def test_access_that_stays_not_ready_undoes_the_move(cuda: Any, double: Double) -> None:
    before = owners(cuda)
    double.fail("cuMemSetAccess", 0, NOT_READY, times=10_000)
    with pytest.raises(VmmError, match="CUDA_ERROR_NOT_READY; all of them were undone"):
        cuda.execute(log(*moves(cuda, KV, 2)))
    double.heal()
    assert owners(cuda) == before
    cuda.check()


# ---- work in flight ----


@pytest.fixture
def stream() -> Iterator[int]:
    with device.current_context():
        stream = call(d.cuStreamCreate, NON_BLOCKING)
        yield int(stream)
        call(d.cuStreamDestroy, stream)


@pytest.mark.parametrize("own_stream", [True, False])
def test_a_chunk_is_not_unmapped_while_work_of_the_batch_names_it(cuda: Any, stream: int, own_stream: bool) -> None:
    chosen = stream if own_stream else None
    top = cuda.base(KV) + (KV_CHUNKS - 1) * CHUNK
    data = random_bytes(CHUNK, seed=3)
    write_bytes(cuda, KV, (KV_CHUNKS - 1) * CHUNK, data)
    target = call(d.cuMemAlloc, CHUNK)
    with device.device_code("spin") as spin:
        spin(20_000_000, stream=chosen or 0)
        call(d.cuMemcpyDtoDAsync, target, top, CHUNK, chosen or 0)
        cuda.end_batch(chosen)
        cuda.execute(log(*moves(cuda, KV, 3)))
        np.testing.assert_array_equal(device.read(int(target), CHUNK), data)
    call(d.cuMemFree, target)


@pytest.mark.parametrize("entry", [zero(KV, 0), copy(KV, 1, 0), stamp(KV, 0, 1)])
def test_a_block_is_not_changed_while_work_of_the_batch_reads_it(
    cuda: Any, stream: int, entry: tuple[int, ...]
) -> None:
    data = random_bytes(LAYOUT.page_bytes, seed=4)
    write_bytes(cuda, KV, 0, data)
    target = call(d.cuMemAlloc, data.size)
    with device.device_code("spin") as spin:
        spin(20_000_000, stream=stream)
        call(d.cuMemcpyDtoDAsync, target, cuda.base(KV), data.size, stream)
        cuda.end_batch(stream)
        cuda.execute(log(entry))
        np.testing.assert_array_equal(device.read(int(target), data.size), data)
    call(d.cuMemFree, target)


def test_every_batch_is_waited_for_not_only_the_last(cuda: Any, stream: int) -> None:
    data = random_bytes(CHUNK, seed=5)
    write_bytes(cuda, KV, (KV_CHUNKS - 1) * CHUNK, data)
    target, other = call(d.cuMemAlloc, CHUNK), call(d.cuStreamCreate, NON_BLOCKING)
    with device.device_code("spin") as spin:
        spin(20_000_000, stream=stream)
        call(d.cuMemcpyDtoDAsync, target, cuda.base(KV) + (KV_CHUNKS - 1) * CHUNK, CHUNK, stream)
        cuda.end_batch(stream)
        cuda.end_batch(other)
        cuda.execute(log(*moves(cuda, KV, 1)))
        np.testing.assert_array_equal(device.read(int(target), CHUNK), data)
    call(d.cuMemFree, target)
    call(d.cuStreamDestroy, other)


def test_work_that_no_batch_told_of_loses_the_context_and_then_everything_is_refused(double: Double) -> None:
    with pytest.warns(ResourceWarning, match="dropped and not given back: .*CUDA_ERROR_ILLEGAL_ADDRESS"):
        lose_the_context(double)
        gc.collect()


def lose_the_context(double: Double) -> None:
    cuda = open_or_skip("cuda", LAYOUT, KV_CHUNKS)
    with device.current_context():
        stream = call(d.cuStreamCreate, NON_BLOCKING)
        call(d.cuMemsetD8Async, cuda.base(KV) + (KV_CHUNKS - 1) * CHUNK, 0, CHUNK, stream)
    with pytest.raises(VmmError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        cuda.execute(log(*moves(cuda, KV, 2)))
        cuda.check()
    assert double.is_poisoned
    for use in (lambda: cuda.execute(WORKS_ON), cuda.check, cuda.close):
        with pytest.raises(VmmError, match=r"^[^\n]*CUDA_ERROR_ILLEGAL_ADDRESS[^\n]*$"):
            use()


def test_what_the_driver_has_executed_has_happened_when_it_returns(cuda: Any, double: Double) -> None:
    double.hold(50)
    cuda.execute(WORKS_ON)
    assert double.in_flight == 0


@pytest.mark.parametrize("entries", ["moves", "blocks"])
def test_work_that_does_not_end_is_given_up_and_nothing_has_changed(
    cuda: Any, double: Double, stream: int, entries: str
) -> None:
    fill(cuda)
    before, bytes_before = owners(cuda), contents(cuda)
    ops = log(*moves(cuda, KV, 2)) if entries == "moves" else WORKS_ON
    cuda.fence_timeout_s = 0.02
    double.hold(FOREVER)
    call(d.cuMemsetD8Async, cuda.base(SSM), 0, 0, stream)
    cuda.end_batch(stream)
    for _ in range(2):
        with pytest.raises(VmmError, match=r"work launched so far within 0\.02 s"):
            cuda.execute(ops)
    assert owners(cuda) == before
    double.hold(0)
    double.finish()
    cuda.check()
    assert contents(cuda) == bytes_before
    cuda.execute(ops)


def test_entries_that_are_not_seen_to_end_leave_a_driver_that_refuses(cuda: Any, double: Double) -> None:
    cuda.fence_timeout_s = 0.02
    double.hold(FOREVER)
    with pytest.raises(VmmError, match=r"within 0\.02 s"):
        cuda.execute(WORKS_ON)
    double.hold(0)
    double.finish()
    with pytest.raises(VmmError, match="refuses every operation: block entries were not seen to end"):
        cuda.execute(WORKS_ON)


def test_close_waits_and_can_be_called_again(cuda: Any, double: Double, stream: int) -> None:
    cuda.fence_timeout_s = 0.02
    double.hold(FOREVER)
    call(d.cuMemsetD8Async, cuda.base(SSM), 0, CHUNK, stream)
    cuda.end_batch(stream)
    with pytest.raises(VmmError, match="work launched so far"):
        cuda.close()
    assert double.live["mappings"] == CHUNKS
    double.finish()
    cuda.close()
    assert "mappings" not in double.live


def test_many_batches_need_few_events(cuda: Any, double: Double) -> None:
    for _ in range(100):
        cuda.end_batch()
        cuda.execute(log(*moves(cuda, KV, 1)))
        cuda.end_batch()
        cuda.execute(log(*moves(cuda, SSM, 1)))
    assert double.calls("cuEventRecord") == 200 and double.live["events"] <= 2


# ---- threads and processes ----


def run_in_thread(work: Callable[[], Any]) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0]


def test_a_thread_without_a_context_can_use_the_driver_and_has_none_afterwards(cuda: Any) -> None:
    def work() -> int:
        cuda.execute(log(stamp(KV, 0, 9), *moves(cuda, KV, 2), check(KV, 0, 9)))
        cuda.end_batch()
        cuda.check()
        return int(call(d.cuCtxGetCurrent))

    assert run_in_thread(work) == 0
    cuda.execute(log(check(KV, 0, 9), *moves(cuda, SSM, 2)))


def test_a_driver_can_be_closed_by_another_thread(cuda: Any) -> None:
    cuda.execute(log(stamp(KV, 0, 9)))
    assert run_in_thread(lambda: cuda.close() or int(call(d.cuCtxGetCurrent))) == 0


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # other threads of the test run do not matter here
def test_a_forked_child_is_refused_and_the_parent_goes_on(cuda: Any) -> None:
    cuda.execute(log(stamp(KV, 0, 3)))
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        os.close(told)
        try:
            os.write(tell, json.dumps(seen_by_child(cuda)).encode())
        finally:
            os._exit(0)
    os.close(tell)
    with open(told) as pipe:
        seen = json.loads(pipe.read())
    os.waitpid(child, 0)
    assert len(seen) == 6
    for refusal in seen:
        assert "\n" not in refusal and f"process {os.getpid()}, this is process {child}: " in refusal
        assert "start processes with spawn" in refusal
    cuda.execute(log(check(KV, 0, 3), *moves(cuda, KV, 2)))
    cuda.check()


def seen_by_child(cuda: Any) -> list[str]:
    uses: tuple[Callable[[], Any], ...] = (
        lambda: cuda.execute(log(check(KV, 0, 3))),
        lambda: cuda.chunk_at(KV),
        lambda: cuda.base(KV),
        lambda: cuda.view(KV, 0, 8),
        cuda.end_batch,
        cuda.check,
    )
    refusals = []
    for use in uses:
        try:
            refusals.append(f"not refused: {use()}")
        except VmmError as error:
            refusals.append(str(error))
    cuda.close()
    return refusals


# ---- what cannot be had, and what is left ----


def test_any_failing_call_of_the_constructor_leaves_nothing(double: Double) -> None:
    opened: list[Any] = []
    made = calls_of(double, lambda: opened.append(open_vmm("cuda", LAYOUT, KV_CHUNKS)))
    opened.pop().close()
    assert Counter(made)["cuMemCreate"] == Counter(made)["cuMemMap"] == CHUNKS
    for function, number in each_call(made):
        double.fail(function, number, OUT_OF_MEMORY)
        with pytest.raises(VmmRefused, match=r"^cuda memory: [^\n]*CUDA_ERROR_OUT_OF_MEMORY[^\n]*: take backend host"):
            open_vmm("cuda", LAYOUT, KV_CHUNKS)
        double.heal()
        assert double.live == {}


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (SMALL, "chunk_bytes 4096 is not a multiple of 2097152, the granularity of .*: give a multiple"),
        (Layout(2**50, 2**40, 2**40, 2**40, 1, 1), f"budget of {2**50} bytes is above the free memory of .*: give a s"),
        (Layout(2 * CHUNK, CHUNK, 8, 100, 1, 1), "blocks of 8 bytes cannot be stamped, give 16 or more"),
    ],
)
def test_a_layout_that_the_gpu_cannot_hold_is_refused(layout: Layout, message: str) -> None:
    with pytest.raises(VmmRefused, match=f"^cuda memory: {message}"):
        open_vmm("cuda", layout, 1)


@pytest.mark.parametrize("end", ["close", "drop"])
def test_all_memory_is_given_back(end: str) -> None:
    with device.current_context():
        before, _ = call(d.cuMemGetInfo)
        cuda = open_or_skip("cuda", LAYOUT, KV_CHUNKS)
        cuda.execute(log(stamp(KV, 0, 1), *moves(cuda, KV, 5)))
        during, _ = call(d.cuMemGetInfo)
        assert before - during >= LAYOUT.budget_bytes
        if end == "close":
            cuda.close()
        else:
            del cuda
            gc.collect()
        after, _ = call(d.cuMemGetInfo)
        assert before - after < LAYOUT.budget_bytes  # device code and the like may stay with the context


def test_two_drivers_do_not_disturb_each_other(cuda: Any) -> None:
    with open_or_skip("cuda", LAYOUT, KV_CHUNKS) as other:
        cuda.execute(log(stamp(KV, 0, 1), *moves(cuda, KV, 2)))
        other.execute(log(stamp(KV, 0, 2), *moves(other, SSM, 2)))
        cuda.execute(log(check(KV, 0, 1)))
        other.execute(log(check(KV, 0, 2)))
    cuda.check()
    cuda.execute(log(check(KV, 0, 1), *moves(cuda, SSM, 2)))


# ---- views ----


def test_a_view_says_on_which_device_its_bytes_lie(cuda: Any) -> None:
    view = cuda.view(SSM, 5, 100)
    assert len(view) == 100 and tuple(view.__dlpack_device__()) == (2, 0)


def test_torch_reads_and_writes_a_view_without_a_copy(cuda: Any, fresh_device: Double | None) -> None:
    if fresh_device is not None:
        pytest.skip("torch needs more of libcuda than its double has")
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch was built without CUDA")
    data = random_bytes(3 * CHUNK, seed=6)
    write_bytes(cuda, KV, CHUNK, data)
    tensor = torch.from_dlpack(cuda.view(KV, CHUNK, data.size))
    np.testing.assert_array_equal(tensor.cpu().numpy(), data)
    tensor.fill_(7)
    torch.cuda.synchronize()
    assert np.unique(read_bytes(cuda, KV, CHUNK, CHUNK + data.size)).tolist() == [7]
