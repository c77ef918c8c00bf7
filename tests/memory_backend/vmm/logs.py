"""Op logs written by hand, small layouts, and the bytes of any driver."""

from typing import Any

import numpy as np
import pytest

from hbmgym.memory_backend.oplog import CHECK, COPY, KV, MOVE, OP, SSM, STAMP, ZERO
from hbmgym.memory_backend.split import Layout
from hbmgym.memory_backend.vmm import Vmm, VmmRefused, open_vmm

CHUNK = 2**21
CHUNKS, KV_CHUNKS = 32, 20
# Neither size divides the chunk, and the slot is not a multiple of 8: blocks straddle chunks at odd addresses.
LAYOUT = Layout(CHUNKS * CHUNK, CHUNK, 1_500_008, 5_000_003, min_slots=1, min_pages=1)
SMALL = Layout(CHUNKS * 4096, 4096, 3_000, 10_000, min_slots=1, min_pages=1)

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
DRIVERS_WITH_BYTES = ["host", "host-huge", CUDA]
DRIVERS = ["accounting", *DRIVERS_WITH_BYTES]


def zero(pool: int, block: int) -> tuple[int, ...]:
    return (ZERO, pool, block, pool, 0, 0)


def stamp(pool: int, block: int, tag: int) -> tuple[int, ...]:
    return (STAMP, pool, block, pool, 0, tag)


def check(pool: int, block: int, tag: int) -> tuple[int, ...]:
    return (CHECK, pool, block, pool, 0, tag)


def copy(pool: int, source: int, target: int) -> tuple[int, ...]:
    return (COPY, pool, source, pool, target, 0)


def log(*entries: tuple[int, ...]) -> np.ndarray:
    return np.array(list(entries), dtype=OP)


def moves(vmm: Vmm, pool: int, count: int) -> list[tuple[int, ...]]:
    """The run that takes the top `count` chunks of `pool` to the other pool, in their order."""
    chunks, other = vmm.chunk_at(pool), 1 - pool
    first, free = len(chunks) - count, len(vmm.chunk_at(other))
    return [(MOVE, pool, first + i, other, free + i, int(chunks[first + i])) for i in range(count)]


def pool_bytes(vmm: Any, pool: int) -> Any:
    return vmm.view(pool, 0, len(vmm.chunk_at(pool)) * CHUNK)


def read_bytes(vmm: Any, pool: int, start: int = 0, stop: int | None = None) -> np.ndarray:
    """A copy of the bytes [start, stop) of a pool; to the top without `stop`."""
    stop = len(vmm.chunk_at(pool)) * CHUNK if stop is None else stop
    if vmm.name != "cuda":
        return vmm.view(pool, start, stop - start).copy()
    from tests.memory_backend.vmm import device  # cuda.bindings exists on Linux only

    return device.read(vmm.base(pool) + start, stop - start)


def write_bytes(vmm: Any, pool: int, start: int, data: np.ndarray) -> None:
    """Overwrite the bytes of a pool from `start` on."""
    if vmm.name != "cuda":
        vmm.view(pool, start, data.size)[:] = data
        return
    from tests.memory_backend.vmm import device

    device.write(vmm.base(pool) + start, data)


def random_bytes(length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, length, dtype=np.uint8)


def owners(vmm: Vmm) -> list[list[int]]:
    return [vmm.chunk_at(pool).tolist() for pool in (KV, SSM)]


def open_or_skip(backend: str, layout: Layout = LAYOUT, kv_chunks: int = KV_CHUNKS) -> Any:
    try:
        return open_vmm(backend, layout, kv_chunks)
    except VmmRefused as refusal:
        pytest.skip(str(refusal))


def scatter(vmm: Any, pool: int) -> None:
    """Put five chunks on top of `pool` of which no two neighbours are one mapping; counts as no move."""
    for _ in range(5):
        vmm.execute(log(*moves(vmm, 1 - pool, 1)))
    vmm.chunks_moved = 0
