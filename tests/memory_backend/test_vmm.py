"""Every driver keeps the same laws; the host driver also keeps bytes, and takes failing system calls."""

import errno
import gc
import os
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbmgym.memory_backend.oplog import CHECK, COPY, EVERYTHING, KV, MOVE, OP, SSM, STAMP, ZERO, make_op_log, record_op
from hbmgym.memory_backend.split import Layout
from hbmgym.memory_backend.vmm import BACKENDS, Vmm, VmmError, VmmRefused, open_vmm
from hbmgym.memory_backend.vmm.stamps import WORD_BYTES, word_offsets

CHUNK = 2**21
CHUNKS, KV_CHUNKS = 32, 20
# Neither size divides the chunk, and the slot is not a multiple of 8: blocks straddle chunks at odd addresses.
LAYOUT = Layout(CHUNKS * CHUNK, CHUNK, 1_500_008, 5_000_003, min_slots=1, min_pages=1)
SMALL = Layout(CHUNKS * 4096, 4096, 3_000, 10_000, min_slots=1, min_pages=1)


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


def owners(vmm: Vmm) -> list[list[int]]:
    return [vmm.chunk_at(pool).tolist() for pool in (KV, SSM)]


def open_or_skip(backend: str, layout: Layout = LAYOUT, kv_chunks: int = KV_CHUNKS) -> Any:
    try:
        return open_vmm(backend, layout, kv_chunks)
    except VmmRefused as refusal:
        pytest.skip(str(refusal))


@pytest.fixture(params=[name for name in BACKENDS if name != "auto"])
def vmm(request: pytest.FixtureRequest) -> Iterator[Any]:
    with open_or_skip(request.param) as driver:
        yield driver


@pytest.fixture
def host() -> Iterator[Any]:
    with open_or_skip("host") as driver:
        yield driver


# The laws of every driver.


def test_starts_with_the_first_chunks_in_kv_and_the_rest_in_ssm(vmm: Any) -> None:
    assert owners(vmm) == [list(range(KV_CHUNKS)), list(range(KV_CHUNKS, CHUNKS))]
    vmm.check()


def test_a_stamp_reads_back_until_the_block_is_zeroed(vmm: Any) -> None:
    vmm.execute(log(stamp(KV, 3, 7), stamp(SSM, 1, 8), check(KV, 3, 7), check(SSM, 1, 8)))
    assert vmm.stamps_checked == 2
    vmm.execute(log(zero(SSM, 1), check(KV, 3, 7)))
    with pytest.raises(VmmError, match=r"ssm block 1.*expected stamp 8, found (none|zeros)"):
        vmm.execute(log(check(SSM, 1, 8)))


def test_a_copy_carries_the_stamp_and_leaves_the_source(vmm: Any) -> None:
    vmm.execute(log(stamp(SSM, 3, 5), copy(SSM, 3, 0), copy(SSM, 0, 1), check(SSM, 1, 5), check(SSM, 3, 5)))


def test_a_stale_stamp_is_named(vmm: Any) -> None:
    vmm.execute(log(stamp(KV, 0, 11), stamp(KV, 0, 12)))
    with pytest.raises(VmmError, match=r"kv block 0.*expected stamp 11, found 12"):
        vmm.execute(log(check(KV, 0, 12), check(KV, 0, 11), zero(KV, 0)))
    vmm.execute(log(check(KV, 0, 12)))  # entries after the failure were not executed
    assert vmm.stamps_checked == 2


def test_blocks_may_change_between_moves_of_one_log(vmm: Any) -> None:
    out = moves(vmm, KV, 3)
    back = [(MOVE, SSM, target, KV, source, chunk) for _, _, source, _, target, chunk in out]
    slot = 14 * CHUNK // LAYOUT.slot_bytes - 1
    entries = [stamp(KV, 0, 1), *out, stamp(SSM, slot, 2), check(SSM, slot, 2), *back, check(KV, 0, 1)]
    vmm.execute(log(*entries))
    assert owners(vmm) == [list(range(KV_CHUNKS)), list(range(KV_CHUNKS, CHUNKS))]
    vmm.check()


def test_accepts_the_records_of_an_op_log(vmm: Any) -> None:
    op_log = make_op_log(4, EVERYTHING)
    record_op(op_log, STAMP, KV, 0, KV, 0, 9)
    record_op(op_log, CHECK, KV, 0, KV, 0, 9)
    vmm.execute(op_log.ops[: op_log.head.count])
    vmm.execute(op_log.ops[:0])
    assert vmm.stamps_checked == 1


def test_bytes_survive_two_hundred_random_moves(vmm: Any) -> None:
    rng = np.random.default_rng(0)
    kept = [(KV, block, 100 + block) for block in range(4)] + [(SSM, 0, 200)]
    vmm.execute(log(*(stamp(*entry) for entry in kept)))
    while vmm.chunks_moved < 200:
        pool = int(rng.integers(2))
        count = min(int(rng.integers(1, 9)), len(vmm.chunk_at(pool)) - 3)
        vmm.execute(log(*moves(vmm, pool, count), *(check(*entry) for entry in kept)))
        vmm.check()
    assert sorted(chunk for pool in owners(vmm) for chunk in pool) == list(range(CHUNKS))
    assert vmm.measured_move_s > 0


def test_a_pool_can_be_emptied_and_filled_again(vmm: Any) -> None:
    vmm.execute(log(*moves(vmm, KV, KV_CHUNKS)))
    assert owners(vmm)[KV] == []
    vmm.check()
    vmm.execute(log(*moves(vmm, SSM, CHUNKS)))
    assert owners(vmm)[SSM] == []
    vmm.check()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ((MOVE, KV, 19, SSM, 12, 18), "instead of chunk 18, chunk 19 lies there"),
        ((MOVE, KV, 18, SSM, 12, 18), "not the top of kv, which has 20 chunks"),
        ((MOVE, KV, 19, SSM, 13, 19), "would leave a hole, the free one is 12"),
        ((MOVE, KV, 19, SSM, 11, 19), "is occupied, the free one is 12"),
        ((MOVE, KV, 19, KV, 20, 19), "both pools are the same"),
        ((MOVE, KV, 19, 2, 12, 19), "unknown pool"),
        ((9, KV, 0, KV, 0, 0), "unknown kind 9"),
        (stamp(KV, KV_CHUNKS * CHUNK // LAYOUT.page_bytes, 1), "kv block 27 is not mapped"),
        (zero(SSM, -1), "ssm block -1 is not mapped"),
        (copy(SSM, 0, 5), "ssm block 5 is not mapped"),
        ((COPY, SSM, 0, KV, 0, 0), "a block stays in its pool"),
        (stamp(KV, 0, 0), "0 is not a stamp"),
    ],
)
def test_an_illegal_entry_is_refused_with_its_reason(vmm: Any, entry: tuple[int, ...], message: str) -> None:
    before = owners(vmm)
    with pytest.raises(VmmError, match=message):
        vmm.execute(log(entry))
    assert owners(vmm) == before
    vmm.check()


def test_a_run_with_an_illegal_move_makes_none_of_its_moves(vmm: Any) -> None:
    before = owners(vmm)
    legal = moves(vmm, SSM, 2)
    with pytest.raises(VmmError, match="not the top"):
        vmm.execute(log(*legal, legal[0]))
    assert owners(vmm) == before
    assert vmm.chunks_moved == 0


def test_a_block_that_lost_a_chunk_does_not_read_back(vmm: Any) -> None:
    last = KV_CHUNKS * CHUNK // LAYOUT.page_bytes - 1
    vmm.execute(log(stamp(KV, last, 3), *moves(vmm, KV, 5)))
    vmm.execute(log(zero(SSM, 5), zero(SSM, 6), *moves(vmm, SSM, 5)))  # slots 5 and 6 lie on the five chunks
    with pytest.raises(VmmError, match=f"kv block {last}.*expected stamp 3"):
        vmm.execute(log(check(KV, last, 3)))


def test_the_closed_driver_refuses_everything(vmm: Any) -> None:
    vmm.close()
    vmm.close()
    for use in (lambda: vmm.execute(log()), lambda: vmm.chunk_at(KV), vmm.check):
        with pytest.raises(VmmError, match="closed"):
            use()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from((KV, SSM)), st.integers(1, 9), st.integers(0, 99)), max_size=25))
def test_both_drivers_agree_on_any_legal_log(steps: list[tuple[int, int, int]]) -> None:
    with open_vmm("accounting", SMALL, KV_CHUNKS) as plain, open_or_skip("host", SMALL) as host:
        for tag, (pool, count, pick) in enumerate(steps, start=1):
            entries = moves(plain, pool, min(count, len(plain.chunk_at(pool))))
            blocks = len(plain.chunk_at(1 - pool)) * SMALL.chunk_bytes
            blocks = (blocks + len(entries) * SMALL.chunk_bytes) // (SMALL.page_bytes, SMALL.slot_bytes)[1 - pool]
            if blocks:
                source, target = pick % blocks, (pick * 7 + 3) % blocks
                entries += [stamp(1 - pool, source, tag), copy(1 - pool, source, target), check(1 - pool, target, tag)]
            for driver in (plain, host):
                driver.execute(log(*entries))
                driver.check()
            assert owners(plain) == owners(host)


@given(block=st.integers(16, 300), chunk=st.integers(8, 80), start=st.integers(0, 200))
def test_every_chunk_a_block_touches_holds_a_part_of_its_stamp(block: int, chunk: int, start: int) -> None:
    offsets = word_offsets(block, chunk)
    stamped = {(start + int(offset) + byte) // chunk for offset in offsets for byte in range(WORD_BYTES)}
    assert stamped == set(range(start // chunk, (start + block - 1) // chunk + 1))
    assert (np.diff(offsets) >= WORD_BYTES).all()


# Choosing a driver.


def test_auto_is_host_or_says_why_not() -> None:
    with open_vmm("auto", LAYOUT, KV_CHUNKS) as chosen:
        assert chosen.why.startswith(f"{chosen.name}: auto") and "\n" not in chosen.why
    with open_vmm("accounting", LAYOUT, KV_CHUNKS) as chosen:
        assert chosen.why == "accounting: asked for by name"


def test_other_systems_fall_back_to_accounting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(VmmRefused, match="need Linux, this is darwin"):
        open_vmm("host", LAYOUT, KV_CHUNKS)
    with open_vmm("auto", LAYOUT, KV_CHUNKS) as chosen:
        assert chosen.name == "accounting" and "darwin" in chosen.why


def test_an_unknown_backend_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'gpu', expected one of accounting, host, auto"):
        open_vmm("gpu", LAYOUT, KV_CHUNKS)


def test_more_kv_chunks_than_the_budget_are_refused() -> None:
    with pytest.raises(VmmError, match="kv_chunks is 33, expected 0 to 32"):
        open_vmm("accounting", LAYOUT, CHUNKS + 1)


@pytest.mark.skipif(sys.platform != "linux", reason="host memory needs Linux")
@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(2**50, 2**40, 2**40, 2**40, 1, 1), rf"{2**50} bytes is above half of the free memory \(\d+ bytes"),
        (Layout(10**6, 1000, 100, 100, 1, 1), "chunk_bytes 1000 is not a multiple of"),
        (Layout(2**22, 2**21, 8, 100, 1, 1), "blocks of 8 bytes cannot be stamped"),
    ],
)
def test_a_layout_that_host_cannot_hold_is_refused(layout: Layout, message: str) -> None:
    with pytest.raises(VmmRefused, match=message):
        open_vmm("host", layout, 1)
    assert "host is refused" in open_vmm("auto", layout, 1).why


@pytest.mark.skipif(sys.platform != "linux", reason="host memory needs Linux")
def test_too_many_chunks_for_the_mapping_limit_are_refused() -> None:
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    if limit > 200_000:
        pytest.skip(f"vm.max_map_count {limit} would take a large budget to reach")
    page = os.sysconf("SC_PAGE_SIZE")
    with pytest.raises(VmmRefused, match=f"above vm.max_map_count {limit}"):
        open_vmm("host", Layout((limit // 2) * page, page, page, page, 1, 1), 1)


# Host: real bytes.


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


def scatter(vmm: Any, pool: int) -> None:
    """Put five chunks on top of `pool` of which no two neighbours are one mapping; counts as no move."""
    for _ in range(5):
        vmm.execute(log(*moves(vmm, 1 - pool, 1)))
    vmm.chunks_moved = 0


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
