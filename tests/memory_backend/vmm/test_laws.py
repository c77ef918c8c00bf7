"""The laws that every driver keeps."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbmgym.memory_backend.oplog import CHECK, COPY, EVERYTHING, KV, MOVE, SSM, STAMP, make_op_log, record_op
from hbmgym.memory_backend.vmm import BACKENDS, VmmError, open_vmm
from hbmgym.memory_backend.vmm.stamps import WORD_BYTES, word_offsets
from tests.memory_backend.vmm.logs import (
    CHUNK,
    CHUNKS,
    KV_CHUNKS,
    LAYOUT,
    SMALL,
    check,
    copy,
    log,
    moves,
    open_or_skip,
    owners,
    stamp,
    zero,
)


@pytest.fixture(params=[name for name in BACKENDS if name != "auto"])
def vmm(request: pytest.FixtureRequest) -> Iterator[Any]:
    with open_or_skip(request.param) as driver:
        yield driver


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
