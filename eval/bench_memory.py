"""How fast the memory backend is: the allocator from Python, and chunks moved on the host against copies."""

import gc
import os
import statistics
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np

from hbmgym.memory_backend.avmp import Avmp, Handles
from hbmgym.memory_backend.oplog import KV, SSM
from hbmgym.memory_backend.split import CHUNK_BYTES, Layout
from hbmgym.memory_backend.vmm import Vmm, VmmRefused, open_vmm
from hbmgym.memory_backend.vmm.ownership import top_moves

# The AVMP prototype's blocks: one layer's page of 16 tokens and one layer's state (jamba_1_5_mini), 4 GiB in halves.
_PAGE, _SLOT = 65_536, 262_144
_BUDGET = 4 * 2**30
_PAGES_PER_CALL, _SLOTS_PER_CALL = 8, 28
_MOVED = (1, 16, 128)
_MIGRATIONS = 100_000
Figures = dict[str, float]


def measure_memory() -> Figures:
    """One operation is one call from Python with its handles returned."""
    figures = {
        "memory_page_ops_per_s": _call_rate(1),
        "memory_blocks_per_s": 256 * _call_rate(256),
        "memory_calls_per_s_64_live": _steady_rate(64),
        "memory_calls_per_s_256_live": _steady_rate(256),
        "memory_calls_per_s_pressure": _pressure_rate(256),
    }
    try:
        return figures | _host_figures()
    except VmmRefused as refusal:
        print(f"moves on the host were not measured: {refusal}")
        return figures


def _open(budget_bytes: int = _BUDGET, kv_share: float = 0.5) -> Avmp:
    layout = Layout(budget_bytes, CHUNK_BYTES, _PAGE, _SLOT, min_slots=1, min_pages=1)
    return Avmp.of_layout(layout, kv_share=kv_share, backend="accounting")


def _rate(step: Callable[[], object], steps: int) -> float:
    """Steps per CPU-second, once warm; without the garbage collector, as timeit does."""
    for _ in range(steps // 10):
        step()
    gc.collect()
    gc.disable()
    started = time.process_time()
    for _ in range(steps):
        step()
    spent_s = time.process_time() - started
    gc.enable()
    return steps / spent_s


def _call_rate(blocks: int) -> float:
    """Calls per second: allocate `blocks` pages, free them."""
    with _open() as memory:
        return 2 * _rate(lambda: memory.free(memory.allocate("kv", blocks)), 200_000 // blocks + 2_000)


def _steady_rate(live: int) -> float:
    """Calls per second while `live` requests hold pages and slots: the oldest ends, a new one begins."""
    with _open() as memory:
        requests: deque[tuple[Handles, Handles]] = deque()

        def begin() -> None:
            requests.append((memory.allocate("kv", _PAGES_PER_CALL), memory.allocate("ssm", _SLOTS_PER_CALL)))

        def step() -> None:
            pages, slots = requests.popleft()
            memory.free(pages)
            memory.free(slots)
            begin()

        for _ in range(live):
            begin()
        return 4 * _rate(step, 50_000)


def _pressure_rate(live: int) -> float:
    """Calls per second when every allocation evicts: ended requests stay cached, and the pools hold little more."""
    kv_chunks, ssm_chunks = (
        -(-(live + 8) * blocks * size // CHUNK_BYTES)
        for blocks, size in ((_PAGES_PER_CALL, _PAGE), (_SLOTS_PER_CALL, _SLOT))
    )
    chunks = kv_chunks + ssm_chunks
    with _open(chunks * CHUNK_BYTES, kv_chunks / chunks) as memory:
        requests: deque[tuple[Handles, Handles]] = deque()

        def step() -> None:
            requests.append((memory.allocate("kv", _PAGES_PER_CALL), memory.allocate("ssm", _SLOTS_PER_CALL)))
            if len(requests) > live:
                pages, slots = requests.popleft()
                memory.unpin(pages)
                memory.unpin(slots)

        rate = 4 * _rate(step, 50_000)
        assert min(memory.stats().kv.evictions, memory.stats().ssm.evictions) > 100_000, "hardly a call evicted"
        return rate


def _host_figures() -> Figures:
    chunks = 512
    layout = Layout(chunks * CHUNK_BYTES, CHUNK_BYTES, _PAGE, _SLOT, min_slots=1, min_pages=1)
    before = _shared_bytes()
    with open_vmm("host", layout, chunks // 2) as vmm:
        figures: Figures = {}
        for count in _MOVED:
            move_us, copy_us = _move_us(vmm, count), _copy_us(vmm, count)
            figures[f"memory_move_us_{count}"] = move_us
            figures[f"memory_copy_us_{count}"] = copy_us
        figures["memory_move_speedup_128"] = figures["memory_copy_us_128"] / figures["memory_move_us_128"]
        mappings = _chunk_mappings()
        _go_there_and_back(vmm, _MIGRATIONS)
        figures["memory_mappings_grown"] = _chunk_mappings() - mappings
        _wander(vmm, _MIGRATIONS)
        figures["memory_mappings_per_chunk"] = _chunk_mappings() / chunks
        figures["memory_resident_over_budget"] = (_shared_bytes() - before) / layout.budget_bytes
        figures["memory_memfd_over_budget"] = _memfd_bytes() / layout.budget_bytes
        vmm.check()
        return figures


def _move_us(vmm: Vmm, count: int) -> float:
    """Median microseconds of moving `count` chunks and touching every page of them where they are now."""
    spent = []
    for i in range(40):
        pool = (KV, SSM)[i % 2]
        ops = top_moves(vmm, pool, count)
        started = time.perf_counter()
        vmm.execute(ops)
        top = (len(vmm.chunk_at(1 - pool)) - count) * CHUNK_BYTES
        vmm.view(1 - pool, top, count * CHUNK_BYTES)[::4096].sum()
        spent.append(time.perf_counter() - started)
    return 1e6 * statistics.median(spent)


def _copy_us(vmm: Vmm, count: int) -> float:
    """Median microseconds of copying as many bytes from one pool to the other, and touching them."""
    size = count * CHUNK_BYTES
    source, target = vmm.view(KV, 0, size), vmm.view(SSM, 0, size)
    spent = []
    for _ in range(20):
        started = time.perf_counter()
        target[:] = source
        target[::4096].sum()
        spent.append(time.perf_counter() - started)
    return 1e6 * statistics.median(spent)


def _go_there_and_back(vmm: Vmm, migrations: int) -> None:
    """Moves of random lengths, each taken back by the next: the split ends where it began."""
    rng = np.random.default_rng(0)
    for _ in range(migrations // 2):
        pool, count = int(rng.integers(2)), int(rng.integers(1, 129))
        vmm.execute(top_moves(vmm, pool, count))
        vmm.execute(top_moves(vmm, 1 - pool, count))


def _wander(vmm: Vmm, migrations: int) -> None:
    """Moves of random lengths in random directions: in the end hardly a chunk has its old neighbour."""
    rng = np.random.default_rng(0)
    for _ in range(migrations):
        pool = int(rng.integers(2))
        held = len(vmm.chunk_at(pool))
        if held > 1:
            vmm.execute(top_moves(vmm, pool, int(rng.integers(1, min(held, 8)))))


def _chunk_mappings() -> int:
    """Mappings of chunks: one where neighbours follow each other in the memfd too, at most one per chunk."""
    return Path("/proc/self/maps").read_text().count("hbmgym-chunks")


def _shared_bytes() -> int:
    """Resident shared memory of this process."""
    rows = Path("/proc/self/status").read_text().splitlines()
    return next(int(row.split()[1]) * 1024 for row in rows if row.startswith("RssShmem"))


def _memfd_bytes() -> int:
    """Bytes that the kernel has allotted to our chunks."""
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            if "hbmgym-chunks" in os.readlink(f"/proc/self/fd/{descriptor}"):
                return os.fstat(int(descriptor)).st_blocks * 512
        except FileNotFoundError:
            continue  # the listing's own descriptor
    raise AssertionError("the host driver has no memfd")
