"""The laws that every driver keeps."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbmgym.memory_backend.oplog import CHECK, COPY, EVERYTHING, KV, MOVE, SSM, STAMP, make_op_log, record_op
from hbmgym.memory_backend.split import Layout
from hbmgym.memory_backend.vmm import BACKENDS, VmmError, open_vmm
from hbmgym.memory_backend.vmm.stamps import WORD_BYTES, word_offsets
from tests.memory_backend.vmm.logs import (
    CHUNK,
    CHUNKS,
    CUDA,
    DRIVERS,
    DRIVERS_WITH_BYTES,
    KV_CHUNKS,
    LAYOUT,
    SMALL,
    check,
    copy,
    log,
    moves,
    open_or_skip,
    owners,
    random_bytes,
    read_bytes,
    stamp,
    write_bytes,
    zero,
)


@pytest.fixture(params=DRIVERS)
def vmm(request: pytest.FixtureRequest) -> Iterator[Any]:
    with open_or_skip(request.param) as driver:
        yield driver


@pytest.fixture(params=DRIVERS_WITH_BYTES)
def memory(request: pytest.FixtureRequest) -> Iterator[Any]:
    with open_or_skip(request.param) as driver:
        yield driver


def test_every_driver_is_held_to_these_laws() -> None:
    assert {*BACKENDS} == {"auto", "accounting", "host", "host-huge", "cuda"}


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
        vmm.execute(log(check(KV, 0, 12), check(KV, 0, 11), stamp(KV, 1, 13)))
    vmm.execute(log(check(KV, 0, 12)))
    assert vmm.stamps_checked == 2


def test_of_several_stale_stamps_the_first_of_the_log_is_named(vmm: Any) -> None:
    vmm.execute(log(stamp(KV, 5, 1), stamp(KV, 2, 2)))
    with pytest.raises(VmmError, match=r"kv block 5.*expected stamp 3"):
        vmm.execute(log(check(KV, 2, 2), check(KV, 5, 3), check(KV, 2, 4), check(KV, 0, 5)))
    assert vmm.stamps_checked == 1


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


def test_a_moved_chunk_keeps_its_bytes(memory: Any) -> None:
    data = random_bytes(3 * CHUNK, seed=1)
    write_bytes(memory, KV, (KV_CHUNKS - 3) * CHUNK, data)
    memory.execute(log(*moves(memory, KV, 3)))
    top = len(memory.chunk_at(SSM)) * CHUNK
    np.testing.assert_array_equal(read_bytes(memory, SSM, top - 3 * CHUNK), data)


def test_copy_and_zero_reach_every_byte_of_a_block_and_no_other(memory: Any) -> None:
    size = LAYOUT.slot_bytes
    expected = random_bytes((CHUNKS - KV_CHUNKS) * CHUNK, seed=2)
    write_bytes(memory, SSM, 0, expected)
    memory.execute(log(copy(SSM, 3, 1), zero(SSM, 2)))
    expected[size : 2 * size] = expected[3 * size : 4 * size]
    expected[2 * size : 3 * size] = 0
    np.testing.assert_array_equal(read_bytes(memory, SSM), expected)


def test_check_finds_any_overwritten_chunk_of_a_block(memory: Any) -> None:
    start, size = LAYOUT.slot_bytes, LAYOUT.slot_bytes
    edges = [start, *range(-(-start // CHUNK) * CHUNK, start + size, CHUNK), start + size]
    for low, high in pairwise(edges):
        memory.execute(log(stamp(SSM, 1, 6), check(SSM, 1, 6)))
        write_bytes(memory, SSM, low, np.zeros(high - low, np.uint8))
        with pytest.raises(VmmError, match=r"ssm block 1, byte \d+: expected stamp 6, found"):
            memory.execute(log(check(SSM, 1, 6)))


@pytest.mark.parametrize("backend", DRIVERS_WITH_BYTES)
def test_check_finds_chunks_that_changed_places_inside_a_block(backend: str) -> None:
    layout = Layout(8 * CHUNK, CHUNK, CHUNK, 4 * CHUNK, 1, 1)
    with open_or_skip(backend, layout, 4) as memory:
        memory.execute(log(stamp(SSM, 0, 6)))
        write_bytes(memory, SSM, 0, np.roll(read_bytes(memory, SSM, 0, 2 * CHUNK), CHUNK))
        with pytest.raises(VmmError, match="ssm block 0, byte 0: expected stamp 6"):
            memory.execute(log(check(SSM, 0, 6)))


def test_addresses_stay_and_follow_the_pool_not_the_chunk(memory: Any) -> None:
    bases = [memory.base(pool) for pool in (KV, SSM)]
    memory.execute(log(*moves(memory, KV, 7), *moves(memory, KV, 0)))
    memory.execute(log(*moves(memory, SSM, 2)))
    assert [memory.base(pool) for pool in (KV, SSM)] == bases
    assert abs(bases[KV] - bases[SSM]) >= LAYOUT.budget_bytes


def test_a_view_ends_where_the_pool_does(memory: Any) -> None:
    top = KV_CHUNKS * CHUNK
    assert len(memory.view(KV, top - CHUNK, CHUNK)) == CHUNK
    with pytest.raises(VmmError, match=f"bytes {top} to {top + 1} of kv are not mapped: it has {top}"):
        memory.view(KV, top, 1)
    memory.execute(log(*moves(memory, KV, 1)))
    with pytest.raises(VmmError, match="not mapped"):
        memory.view(KV, top - CHUNK, CHUNK)


def test_the_closed_driver_refuses_everything(vmm: Any) -> None:
    vmm.close()
    vmm.close()
    for use in (lambda: vmm.execute(log()), lambda: vmm.chunk_at(KV), vmm.check):
        with pytest.raises(VmmError, match="closed"):
            use()


# 2 MiB is the least chunk that a GPU can map; its blocks are small, so that a few chunks hold many.
ON_GPU = Layout(16 * CHUNK, CHUNK, 300_000, 1_000_003, min_slots=1, min_pages=1)


@pytest.mark.parametrize(
    ("backend", "layout"),
    [("host", SMALL), pytest.param("cuda", ON_GPU, marks=pytest.mark.gpu)],
)
@settings(max_examples=25, deadline=None)
@given(steps=st.lists(st.tuples(st.sampled_from((KV, SSM)), st.integers(1, 9), st.integers(0, 99)), max_size=25))
def test_drivers_agree_on_any_legal_log(backend: str, layout: Layout, steps: list[tuple[int, int, int]]) -> None:
    kv_chunks = layout.chunks // 2
    with open_vmm("accounting", layout, kv_chunks) as plain, open_or_skip(backend, layout, kv_chunks) as real:
        for tag, (pool, count, pick) in enumerate(steps, start=1):
            entries = moves(plain, pool, min(count, len(plain.chunk_at(pool))))
            blocks = len(plain.chunk_at(1 - pool)) * layout.chunk_bytes
            blocks = (blocks + len(entries) * layout.chunk_bytes) // (layout.page_bytes, layout.slot_bytes)[1 - pool]
            if blocks:
                source, target = pick % blocks, (pick * 7 + 3) % blocks
                entries += [stamp(1 - pool, source, tag), copy(1 - pool, source, target), check(1 - pool, target, tag)]
            for driver in (plain, real):
                driver.execute(log(*entries))
                driver.check()
            assert owners(plain) == owners(real)
        assert plain.stamps_checked == real.stamps_checked


@pytest.mark.parametrize("backend", [CUDA])
def test_the_stamps_of_all_drivers_are_the_same_bytes(backend: str) -> None:
    entries = log(*(stamp(pool, block, 2**62 + block) for pool in (KV, SSM) for block in range(4)), copy(SSM, 1, 0))
    with open_or_skip("host") as host, open_or_skip(backend) as other:
        for driver in (host, other):
            for pool in (KV, SSM):
                write_bytes(driver, pool, 0, np.zeros(len(driver.chunk_at(pool)) * CHUNK, np.uint8))
            driver.execute(entries)
        for pool in (KV, SSM):
            np.testing.assert_array_equal(read_bytes(host, pool), read_bytes(other, pool))


@given(block=st.integers(16, 300), chunk=st.integers(8, 80), start=st.integers(0, 200))
def test_every_chunk_a_block_touches_holds_a_part_of_its_stamp(block: int, chunk: int, start: int) -> None:
    offsets = word_offsets(block, chunk)
    stamped = {(start + int(offset) + byte) // chunk for offset in offsets for byte in range(WORD_BYTES)}
    assert stamped == set(range(start // chunk, (start + block - 1) // chunk + 1))
    assert (np.diff(offsets) >= WORD_BYTES).all()
