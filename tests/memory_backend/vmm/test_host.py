"""The host driver: real bytes, and system calls that fail."""

import errno
import gc
import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbmgym.memory_backend.oplog import KV, SSM
from hbmgym.memory_backend.split import Layout
from hbmgym.memory_backend.vmm import VmmError, VmmRefused, open_vmm
from tests.memory_backend.vmm.logs import (
    CHUNK,
    KV_CHUNKS,
    LAYOUT,
    check,
    copy,
    log,
    moves,
    open_or_skip,
    owners,
    pool_bytes,
    scatter,
    stamp,
    zero,
)


@pytest.fixture
def host() -> Iterator[Any]:
    with open_or_skip("host") as driver:
        yield driver


def test_a_moved_chunk_keeps_its_bytes(host: Any) -> None:
    rng = np.random.default_rng(1)
    top = pool_bytes(host, KV)[-3 * CHUNK :]
    top[:] = rng.integers(0, 256, top.size, dtype=np.uint8)
    chunks = top.reshape(3, CHUNK).copy()
    host.execute(log(*moves(host, KV, 3)))
    np.testing.assert_array_equal(pool_bytes(host, SSM)[-3 * CHUNK :].reshape(3, CHUNK), chunks)


def test_copy_and_zero_reach_every_byte_of_a_block_and_no_other(host: Any) -> None:
    size = LAYOUT.slot_bytes
    data = pool_bytes(host, SSM)
    data[:] = np.random.default_rng(2).integers(0, 256, data.size, dtype=np.uint8)
    expected = data.copy()
    host.execute(log(copy(SSM, 3, 1), zero(SSM, 2)))
    expected[size : 2 * size] = expected[3 * size : 4 * size]
    expected[2 * size : 3 * size] = 0
    np.testing.assert_array_equal(data, expected)


def test_check_finds_any_overwritten_chunk_of_a_block(host: Any) -> None:
    start, size = LAYOUT.slot_bytes, LAYOUT.slot_bytes
    edges = [start, *range(-(-start // CHUNK) * CHUNK, start + size, CHUNK), start + size]
    for low, high in pairwise(edges):
        host.execute(log(stamp(SSM, 1, 6), check(SSM, 1, 6)))
        pool_bytes(host, SSM)[low:high] = 0
        with pytest.raises(VmmError, match=r"ssm block 1, byte \d+: expected stamp 6, found"):
            host.execute(log(check(SSM, 1, 6)))


def test_check_finds_chunks_that_changed_places_inside_a_block() -> None:
    layout = Layout(8 * CHUNK, CHUNK, CHUNK, 4 * CHUNK, 1, 1)
    with open_or_skip("host", layout, 4) as host:
        host.execute(log(stamp(SSM, 0, 6)))
        data = pool_bytes(host, SSM)
        data[: 2 * CHUNK] = np.roll(data[: 2 * CHUNK], CHUNK)
        with pytest.raises(VmmError, match="ssm block 0, byte 0: expected stamp 6"):
            host.execute(log(check(SSM, 0, 6)))


def test_check_compares_owners_with_what_the_kernel_maps(host: Any) -> None:
    kv, ssm = (pool_bytes(host, pool).ctypes.data for pool in (KV, SSM))
    host.remap(kv, CHUNK, ssm)
    with pytest.raises(VmmError, match=r"expected byte .* of the chunks, mapped is"):
        host.check()


def failing(call: Callable[..., None], failures: set[int]) -> Callable[..., None]:
    """`call`, but the calls numbered in `failures` (from 0) raise ENOMEM."""
    made = iter(range(10**6))

    def attempt(*arguments: int) -> None:
        if next(made) in failures:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        call(*arguments)

    return attempt


@pytest.mark.parametrize("pool", [KV, SSM])
@pytest.mark.parametrize(("call", "number"), [*(("remap", n) for n in range(5)), ("reserve", 0)])
def test_any_failing_call_of_a_run_undoes_the_run(host: Any, pool: int, call: str, number: int) -> None:
    scatter(host, pool)
    for data in (pool_bytes(host, KV), pool_bytes(host, SSM)):
        data[::4096] = np.arange(data.size // 4096) % 251
    before, contents = owners(host), [pool_bytes(host, p)[::4096].copy() for p in (KV, SSM)]
    works = getattr(host, call)
    setattr(host, call, failing(works, {number}))
    with pytest.raises(VmmError, match="Cannot allocate memory; all of them were undone"):
        host.execute(log(*moves(host, pool, 5)))
    setattr(host, call, works)
    host.check()
    assert owners(host) == before and host.chunks_moved == 0
    for p in (KV, SSM):
        np.testing.assert_array_equal(pool_bytes(host, p)[::4096], contents[p])
    host.execute(log(*moves(host, pool, 5)))
    host.check()


@pytest.mark.parametrize(("remaps", "reserves"), [({2, 3}, set()), ({2, 4}, set()), ({2}, {0})])
def test_a_failing_roll_back_refuses_everything_from_then_on(host: Any, remaps: set[int], reserves: set[int]) -> None:
    scatter(host, KV)
    host.remap, host.reserve = failing(host.remap, remaps), failing(host.reserve, reserves)
    with pytest.raises(VmmError, match="and so did its roll-back"):
        host.execute(log(*moves(host, KV, 4)))
    for use in (lambda: host.execute(log(stamp(KV, 0, 1))), lambda: pool_bytes(host, KV), host.check):
        with pytest.raises(VmmError, match="refuses every operation: a move failed"):
            use()


def test_an_interrupt_between_moves_refuses_everything_from_then_on(host: Any) -> None:
    def interrupted(*arguments: int) -> None:
        raise KeyboardInterrupt

    host.remap = interrupted
    with pytest.raises(KeyboardInterrupt):
        host.execute(log(*moves(host, KV, 1)))
    with pytest.raises(VmmError, match="interrupted"):
        host.check()


def test_a_vacated_position_stays_reserved(host: Any) -> None:
    vacated = pool_bytes(host, KV).ctypes.data + (KV_CHUNKS - 1) * CHUNK
    host.execute(log(*moves(host, KV, 1)))
    rows = (line.split() for line in Path("/proc/self/maps").read_text().splitlines())
    ranges = [([int(edge, 16) for edge in row[0].split("-")], row[1]) for row in rows]
    assert [rights for (low, high), rights in ranges if low <= vacated < high] == ["---p"]


def test_the_chunks_cannot_grow_or_shrink(host: Any) -> None:
    links = {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if int(fd) > 2 and alive(fd)}
    (descriptor,) = (int(fd) for fd, link in links.items() if "hbmgym-chunks" in link)
    for size in (LAYOUT.budget_bytes + CHUNK, LAYOUT.budget_bytes - CHUNK):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, size)


def alive(descriptor: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{descriptor}")


def footprint() -> tuple[int, int]:
    """(open descriptors of chunks, mappings of chunks)."""
    links = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if alive(fd)]
    return sum("hbmgym-chunks" in link for link in links), Path("/proc/self/maps").read_text().count("hbmgym-chunks")


@pytest.mark.parametrize("end", ["close", "drop"])
def test_nothing_of_a_driver_is_left(end: str) -> None:
    host = open_or_skip("host")
    host.execute(log(*moves(host, KV, 5)))
    bases = [pool_bytes(host, pool).ctypes.data for pool in (KV, SSM)]
    assert footprint() == (1, footprint()[1]) and footprint()[1] > 2
    if end == "close":
        host.close()
    else:
        del host
        gc.collect()
    assert footprint() == (0, 0)
    reserved = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.split()[1] == "---p"]
    starts = [[int(edge, 16) for edge in line.split()[0].split("-")] for line in reserved]
    assert not any(high - low >= LAYOUT.budget_bytes and low <= base < high for low, high in starts for base in bases)


def test_a_refused_driver_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    linux = pytest.importorskip("hbmgym.memory_backend.vmm.linux", exc_type=ImportError)
    open_or_skip("host").close()
    monkeypatch.setattr(linux, "remap", failing(linux.remap, {0}))
    with pytest.raises(VmmRefused, match=r"Linux 5.13 or later is needed"):
        open_vmm("host", LAYOUT, KV_CHUNKS)
    assert footprint() == (0, 0)
