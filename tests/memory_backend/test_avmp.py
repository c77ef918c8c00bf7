"""The allocator on its own: handles, eviction, changing splits, migration on failure, failures of the backend."""

import copy
import errno
import gc
import os
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbmgym.memory_backend.avmp import Avmp, BadHandle, OutOfBlocks
from hbmgym.memory_backend.avmp_stats import PoolStats
from hbmgym.memory_backend.jit import kernel
from hbmgym.memory_backend.migration import MigrateOnFailure
from hbmgym.memory_backend.oplog import EVERYTHING, KV, OP
from hbmgym.memory_backend.pools import INDEX_BITS, pin, release, unpin, zero
from hbmgym.memory_backend.prefix_cache import NEVER, make_memory, take_page, take_slot
from hbmgym.memory_backend.resize import go_on_shrinking, request_split, run_arrives
from hbmgym.memory_backend.split import Layout
from hbmgym.memory_backend.vmm import VmmError, VmmRefused
from hbmgym.memory_backend.vmm.accounting import AccountingVmm

ROOT = Path(__file__).resolve().parents[2]
CHUNK = 2**21
# At half: 33 chunks of 44 pages and 31 chunks of 13 slots.
HALF = 33 / 64
LAYOUT = Layout(64 * CHUNK, CHUNK, 1_572_864, 5_000_000, min_slots=1, min_pages=1)


def open_avmp(backend: str = "accounting", **options: Any) -> Avmp:
    try:
        return Avmp.of_layout(LAYOUT, backend=backend, **{"migrate": None, **options})
    except VmmRefused as refusal:
        pytest.skip(str(refusal))


@pytest.fixture
def plain() -> Iterator[Avmp]:
    with open_avmp() as avmp:
        yield avmp


@pytest.fixture
def host() -> Iterator[Avmp]:
    with open_avmp("host") as avmp:
        yield avmp


# Handles.


def test_blocks_come_lowest_first_and_are_found_by_their_handles(plain: Avmp) -> None:
    pages = plain.allocate("kv", 5)
    assert plain.resolve(pages).tolist() == [0, 1, 2, 3, 4]
    plain.free(pages[[3, 1]])
    assert plain.resolve(plain.allocate("kv", 3)).tolist() == [1, 3, 5]
    assert plain.resolve(plain.allocate("ssm")).tolist() == [0]
    plain.check()


@pytest.mark.parametrize("use", ["free", "pin", "unpin", "resolve"])
def test_stale_and_made_up_handles_are_refused(plain: Avmp, use: str) -> None:
    (page,) = plain.allocate("kv")
    plain.free([page])
    plain.allocate("kv")  # the same block again
    for handle in (page, 0, 2**64 - 1, 12345):
        with pytest.raises(BadHandle, match=f"cannot {use} handle {int(handle):#x}: it names no (kv|ssm) block in use"):
            getattr(plain, use)([handle])
    assert plain.stats().kv.live == 1


def test_handles_of_another_allocator_are_refused(plain: Avmp) -> None:
    mine = plain.allocate("kv", 3)
    with open_avmp() as other:
        theirs = other.allocate("kv", 3)
        for avmp, handles in ((plain, theirs), (other, mine)):
            with pytest.raises(BadHandle, match="foreign"):
                avmp.free(handles)


def test_a_call_with_one_bad_handle_changes_nothing(plain: Avmp) -> None:
    pages = plain.allocate("kv", 4)
    plain.free(pages[3:])
    before = plain.stats()
    for use in (plain.free, plain.pin, plain.unpin):
        with pytest.raises(BadHandle):
            use(pages)
    with pytest.raises(BadHandle, match="is named twice in one call"):
        plain.free([pages[0], pages[1], pages[0]])
    with pytest.raises(BadHandle, match="named more often than its block is pinned"):
        plain.unpin([pages[0], pages[0]])
    assert plain.stats() == before
    plain.free(pages[:3])
    plain.check()


def test_a_block_with_two_holders_cannot_be_freed(plain: Avmp) -> None:
    pages = plain.allocate("kv", 2)
    plain.pin(pages)
    with pytest.raises(BadHandle, match="the block is pinned 2 times, unpin it first"):
        plain.free(pages)
    plain.unpin(pages)
    plain.free(pages)
    assert plain.stats().kv.live == 0


def test_kinds_may_be_mixed_in_a_call(plain: Avmp) -> None:
    both = np.concatenate([plain.allocate("kv", 2), plain.allocate("ssm", 2)])
    plain.unpin(both[::2])  # not contiguous
    plain.pin(list(both[::2]))
    plain.free(both)
    assert plain.stats().kv.live == plain.stats().ssm.live == 0


# Cached blocks.


def test_cached_blocks_are_evicted_in_the_order_in_which_they_were_given_up(plain: Avmp) -> None:
    pages = plain.allocate("kv", plain.stats().kv.capacity)
    plain.unpin(pages[[7, 2, 9]])
    assert plain.stats().kv.cached == 3
    plain.allocate("kv", 2)
    for gone in pages[[7, 2]]:
        with pytest.raises(BadHandle, match="evicted"):
            plain.pin([gone])
    plain.pin(pages[[9]])
    assert plain.stats().kv.evictions == 2
    with pytest.raises(BadHandle, match="nobody holds it"):
        plain.unpin([*pages[[9]], *pages[[9]]][:1])
        plain.unpin(pages[[9]])


def test_a_cached_block_can_be_freed(plain: Avmp) -> None:
    slots = plain.allocate("ssm", 2)
    plain.unpin(slots)
    plain.free(slots)
    assert plain.stats().ssm == PoolStats(5_000_000, 31, capacity=13, live=0, cached=0, free=13, evictions=0)


def test_too_large_a_request_takes_nothing(plain: Avmp) -> None:
    capacity = plain.stats().kv.capacity
    with pytest.raises(OutOfBlocks, match=f"kv: {capacity + 1} blocks asked for, {capacity} free or cached"):
        plain.allocate("kv", capacity + 1)
    assert len(plain.allocate("kv", capacity)) == capacity
    assert len(plain.allocate("kv", 0)) == 0
    with pytest.raises(OutOfBlocks):
        plain.allocate("ssm", np.int64(2**62))
    assert len(plain.allocate("ssm", np.int64(3))) == 3


# Changing the split.


def test_relocation_moves_bytes_and_keeps_handles(host: Avmp) -> None:
    pages = host.allocate("kv", host.stats().kv.capacity)
    kept = pages[-5:]
    for value, page in enumerate(kept, start=1):
        host.view(page)[:] = value
    host.free(pages[:-5])
    host.request_split(0.2)
    assert host.resolve(kept).tolist() == [0, 1, 2, 3, 4]
    for value, page in enumerate(kept, start=1):
        assert np.all(host.view(page) == value)
    stats = host.stats()
    assert stats.relocated_bytes == 5 * LAYOUT.page_bytes and stats.moved_chunks > 0 and stats.moves.accepted == 1
    assert stats.kv_share == stats.kv_share_requested == pytest.approx(0.2, abs=0.05)
    host.check()


def test_a_slot_on_chunks_that_held_pages_is_zero(host: Avmp) -> None:
    pages = host.allocate("kv", host.stats().kv.capacity)
    for page in pages:
        host.view(page)[:] = 255
    host.free(pages)
    host.request_split(0.1)
    for slot in host.allocate("ssm", host.stats().ssm.capacity):
        assert not host.view(slot).any()


def test_chunks_under_live_blocks_follow_when_those_are_freed(plain: Avmp) -> None:
    slots = plain.allocate("ssm", 13)
    share = plain.request_split(0.9)
    stats = plain.stats()
    assert stats.moves.deferred == 1 and share == stats.kv_share < stats.kv_share_requested
    with pytest.raises(OutOfBlocks):
        plain.allocate("ssm")
    plain.free(slots[:6])
    halfway = plain.kv_share
    assert share < halfway < stats.kv_share_requested
    plain.unpin(slots[6:12])  # cached ones make way
    assert plain.kv_share == stats.kv_share_requested
    assert plain.resolve(slots[12:]) < plain.stats().ssm.capacity < 6
    plain.check()


def test_a_newer_request_replaces_the_pending_one(plain: Avmp) -> None:
    plain.allocate("ssm", 13)
    plain.request_split(0.9)
    plain.request_split(0.5)
    stats = plain.stats()
    assert stats.kv_share == stats.kv_share_requested == HALF


def test_nothing_moves_while_a_batch_is_open(plain: Avmp) -> None:
    pages = plain.allocate("kv", 42)
    plain.free(pages[:41])
    with plain.batch():
        assert plain.request_split(0.2) == HALF
        with plain.batch():
            plain.free(plain.allocate("kv"))
        assert plain.kv_share == HALF and plain.resolve(pages[41:]).tolist() == [41]
    assert plain.kv_share < 0.3 and plain.resolve(pages[41:]).tolist() == [0]
    assert plain.stats().moves.deferred == 1


def test_what_becomes_free_while_a_batch_is_open_moves_at_its_end(plain: Avmp) -> None:
    slots = plain.allocate("ssm", 13)
    with plain.batch():
        plain.request_split(0.6)
        plain.free(slots[:4])
        plain.request_split(0.9)
        plain.free(slots[4:])
    stats = plain.stats()
    assert stats.kv_share == stats.kv_share_requested > 0.85
    assert stats.moves.accepted == 1


def test_free_pages_move_although_live_ones_do_not_fit(plain: Avmp) -> None:
    plain.allocate("kv", 30)
    plain.request_split(0.05)
    stats = plain.stats()
    assert stats.kv.chunks == -(-30 * LAYOUT.page_bytes // CHUNK) > stats.kv_share_requested * LAYOUT.chunks
    assert stats.moves.deferred == 1


def test_views_and_addresses_agree(host: Avmp) -> None:
    pages = host.allocate("kv", 3)
    for page, block in zip(pages, host.resolve(pages), strict=True):
        assert host.view(page).ctypes.data == host.base("kv") + block * LAYOUT.page_bytes
        assert len(host.view(page)) == LAYOUT.page_bytes
    base = host.base("kv")
    host.request_split(0.9)
    assert host.base("kv") == base


def test_one_handle_needs_no_list(host: Avmp) -> None:
    page, slot = host.allocate("kv"), host.allocate("ssm")
    assert host.resolve(page[0]).tolist() == [0] and host.resolve(int(slot[0])).tolist() == [0]
    assert len(host.view(page)) == len(host.view(page[0])) == LAYOUT.page_bytes
    host.free(int(slot[0]))
    with pytest.raises(BadHandle, match="2 handles given, expected one"):
        host.view(host.allocate("kv", 2))


def test_it_says_what_it_is_and_cannot_be_copied(plain: Avmp) -> None:
    plain.allocate("kv", 3)
    assert repr(plain) == (
        f"<Avmp on accounting, {LAYOUT.budget_bytes} bytes, kv_share 0.516, live: 3 of 44 pages, 0 of 13 slots>"
    )
    for take_away in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or sent to another process"):
            take_away(plain)
    plain.close()
    assert repr(plain) == "<Avmp: it is closed>"


def test_accounting_has_no_bytes_to_look_at(plain: Avmp) -> None:
    (page,) = plain.allocate("kv")
    for look in (lambda: plain.view(page), lambda: plain.base("kv")):
        with pytest.raises(VmmError, match="no bytes to look at: open it with backend host or cuda"):
            look()


# A backend that fails.


def fail_after(calls: int) -> Callable[..., Any]:
    made = iter(range(10**9))

    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        def attempt(*arguments: Any) -> Any:
            if next(made) >= calls:
                raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
            return call(*arguments)

        return attempt

    return wrap


@pytest.mark.parametrize("kv_share", [0.2, 0.8])
@pytest.mark.parametrize("check", [False, True])
def test_a_failed_run_is_undone(monkeypatch: pytest.MonkeyPatch, kv_share: float, check: bool) -> None:
    with open_avmp("host", check=check) as host:
        blocks = np.concatenate([host.allocate("kv", 42), host.allocate("ssm", 13)])
        kept = blocks[[0, 40, 41, 42, 53, 54]]
        host.free([block for block in blocks if block not in kept])
        if not check:
            for value, handle in enumerate(kept, start=1):
                host.view(handle)[:] = value
        before, at = host.stats(), host.resolve(kept).tolist()
        driver = host._vmm  # the failing system call lies below every public method
        works = driver.remap
        failing = iter((True,))  # the first call fails, the roll-back works

        def remap(*arguments: int) -> None:
            if next(failing, False):
                raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
            works(*arguments)

        monkeypatch.setattr(driver, "remap", remap)
        with pytest.raises(VmmError, match="all of them were undone"):
            host.request_split(kv_share)
        stats = host.stats()
        assert stats.moves.rolled_back == 1 and stats.moves.accepted == 0
        assert stats.kv_share_requested == stats.kv_share == before.kv_share and stats.relocated_bytes == 0
        assert (stats.kv, stats.ssm) == (before.kv, before.ssm) and host.resolve(kept).tolist() == at
        host.check()
        host.request_split(kv_share)  # it works again
        assert host.kv_share == host.stats().kv_share_requested != before.kv_share
        if not check:
            for value, handle in enumerate(kept, start=1):
                assert np.all(host.view(handle) == value)
        host.check()
        host.free(kept)


def test_a_backend_in_an_unknown_state_stops_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_avmp("host") as host:
        page = host.allocate("kv")
        monkeypatch.setattr(host._vmm, "reserve", fail_after(0)(lambda *_: None))
        with pytest.raises(VmmError, match="and so did its roll-back"):
            host.request_split(0.2)
        for use in (lambda: host.allocate("kv"), lambda: host.free(page), host.stats, host.check):
            with pytest.raises(VmmError, match=r"refuses every operation: .*roll-back"):
                use()


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("call", ["execute", "remap", "_copy_or_zero"])
def test_an_interrupt_in_the_middle_of_a_change_stops_the_allocator(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    with open_avmp("host") as host:
        pages = host.allocate("kv", 44)
        host.free(pages[:40])
        monkeypatch.setattr(host._vmm, call, interrupt)
        with pytest.raises(KeyboardInterrupt):
            host.request_split(0.2)
        for use in (lambda: host.allocate("kv"), lambda: host.view(pages[41]), host.check, lambda: host.kv_share):
            with pytest.raises(VmmError, match="interrupted, or is under way"):
                use()


def test_a_finaliser_cannot_allocate_within_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_avmp("host") as host:
        pages = host.allocate("kv", 44)
        for value, page in enumerate(pages[40:], start=1):
            host.view(page)[:] = value
        host.free(pages[:40])
        copies, refused = host._vmm._copy_or_zero, []

        def copy_and_allocate(op: Any) -> None:
            try:
                host.allocate("kv")
            except VmmError as error:
                refused.append(str(error))
            copies(op)

        monkeypatch.setattr(host._vmm, "_copy_or_zero", copy_and_allocate)
        host.request_split(0.2)
        assert len(refused) == 4 and "under way" in refused[0]
        assert [int(host.view(page)[0]) for page in pages[40:]] == [1, 2, 3, 4]
        assert host.stats().kv.live == 4


def test_a_batch_whose_end_cannot_be_noted_stops_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_avmp("host") as host:

        def refuse(*_: Any) -> None:
            raise VmmError("no event")

        monkeypatch.setattr(host._vmm, "end_batch", refuse)
        with pytest.raises(VmmError, match="no event"), host.batch():
            pass
        with pytest.raises(VmmError, match="the end of a batch could not be noted"):
            host.request_split(0.2)


def test_a_view_keeps_the_memory_of_a_dropped_allocator() -> None:
    host = open_avmp("host")
    view = host.view(host.allocate("kv")[0])
    view[:] = 7
    del host
    gc.collect()
    assert np.all(view == 7)


def test_a_forked_child_is_refused(plain: Avmp) -> None:
    read_end, write_end = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other threads: the child leaves them alone
        child = os.fork()
    if child == 0:
        try:
            plain.allocate("kv")
        except VmmError as error:
            os.write(write_end, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert b"opened in the parent process; open a new one" in os.read(read_end, 1000)
    os.close(read_end)
    os.close(write_end)
    assert len(plain.allocate("kv")) == 1


def test_check_reads_every_stamp_back() -> None:
    with open_avmp("host", check=True) as host:
        host.allocate("kv", 3)
        slot = host.allocate("ssm", 2)[1]
        host.check()
        host.view(slot)[:] = 0
        with pytest.raises(VmmError, match=r"ssm block 1.*found zeros"):
            host.check()


def test_slots_that_cannot_be_zeroed_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_avmp("host") as host:

        def refuse(*_: Any) -> None:
            raise VmmError("no")

        with monkeypatch.context() as patch:
            patch.setattr(host._vmm, "execute", refuse)
            with pytest.raises(VmmError, match="no"):
                host.allocate("ssm", 2)
        assert host.stats().ssm.live == 0
        host.allocate("ssm", 2)
        host.check()


# Migration on failure.


def starve(avmp: Avmp) -> None:
    avmp.allocate("kv", avmp.stats().kv.capacity)


def test_a_failed_allocation_takes_chunks_from_a_pool_with_room() -> None:
    with open_avmp(migrate=MigrateOnFailure(chunks=4)) as avmp:
        starve(avmp)
        assert len(avmp.allocate("kv", 3)) == 3
        stats = avmp.stats()
        assert stats.moves.accepted == 1 and stats.moved_chunks >= 4
        avmp.check()


def test_it_takes_at_least_what_the_allocation_needs() -> None:
    with open_avmp(migrate=MigrateOnFailure(chunks=1)) as avmp:
        starve(avmp)
        assert len(avmp.allocate("kv", 20)) == 20
        assert avmp.stats().moved_chunks >= 15


def test_slots_are_won_from_pages_too() -> None:
    with open_avmp(migrate=MigrateOnFailure(chunks=1)) as avmp:
        avmp.allocate("ssm", avmp.stats().ssm.capacity)
        assert len(avmp.allocate("ssm", 2)) == 2


@pytest.mark.parametrize(
    ("rule", "free_kv", "live_ssm"),
    [
        (MigrateOnFailure(low=0.05), 4, 0),  # the failing pool has 4 of 44 free
        (MigrateOnFailure(high=0.3), 0, 10),  # the other has 3 of 13 free
    ],
)
def test_thresholds_forbid_it(rule: MigrateOnFailure, free_kv: int, live_ssm: int) -> None:
    with open_avmp(migrate=rule) as avmp:
        avmp.allocate("kv", avmp.stats().kv.capacity - free_kv)
        avmp.allocate("ssm", live_ssm)
        with pytest.raises(OutOfBlocks):
            avmp.allocate("kv", free_kv + 1)
        assert avmp.stats().moves.rejected == 1 and avmp.stats().moved_chunks == 0


def test_the_throttle_counts_operations() -> None:
    with open_avmp(migrate=MigrateOnFailure(chunks=1, interval_ops=50)) as avmp:
        starve(avmp)
        avmp.allocate("kv")  # moves chunks
        starve_again = avmp.stats().kv.free
        avmp.allocate("kv", starve_again)
        with pytest.raises(OutOfBlocks):
            avmp.allocate("kv")
        assert avmp.stats().moves.rejected == 1
        for _ in range(25):
            avmp.free(avmp.allocate("ssm"))
        assert len(avmp.allocate("kv")) == 1
        assert avmp.stats().moves.accepted == 2


def test_an_allocation_that_can_never_fit_costs_the_other_pool_nothing() -> None:
    with open_avmp(migrate=MigrateOnFailure()) as avmp:
        starve(avmp)
        avmp.unpin(avmp.allocate("ssm", 13))
        for blocks in (500, 10**6, 2**62):
            with pytest.raises(OutOfBlocks):
                avmp.allocate("kv", blocks)
        assert avmp.stats().ssm.cached == 13 and avmp.stats().moved_chunks == 0


def test_a_migration_that_fails_leaves_an_allocation_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_avmp("host", migrate=MigrateOnFailure()) as host:
        starve(host)
        works, failing = host._vmm.remap, iter((True,))

        def remap(*arguments: int) -> None:
            if next(failing, False):
                raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
            works(*arguments)

        monkeypatch.setattr(host._vmm, "remap", remap)
        with pytest.raises(OutOfBlocks):
            host.allocate("kv")
        assert host.stats().moves.rolled_back == 1
        assert len(host.allocate("kv")) == 1  # the throttle counts migrations that came about


@pytest.mark.parametrize("kind", ["kv", "ssm"])
@given(held=st.integers(0, 13), blocks=st.integers(1, 60), chunks=st.integers(1, 64))
@settings(max_examples=60, deadline=None)
def test_what_migrates_is_enough_and_takes_no_live_block(kind: str, held: int, blocks: int, chunks: int) -> None:
    with open_avmp(migrate=MigrateOnFailure(low=0.5, high=0.51, interval_ops=0, chunks=chunks)) as avmp:
        other = "ssm" if kind == "kv" else "kv"
        avmp.allocate(kind, getattr(avmp.stats(), kind).capacity)
        avmp.allocate(other, held)
        try:
            avmp.allocate(kind, blocks)
        except OutOfBlocks:
            assert avmp.stats().moved_chunks == 0
        assert getattr(avmp.stats(), other).live == held
        avmp.check()


def test_it_leaves_a_pending_request_alone() -> None:
    with open_avmp(migrate=MigrateOnFailure()) as avmp:
        slots = avmp.allocate("ssm", 13)
        avmp.request_split(0.9)
        avmp.free(slots[:4])
        with pytest.raises(OutOfBlocks):
            avmp.allocate("ssm", 9)
        assert avmp.stats().moves.rejected == 1
        assert avmp.stats().kv_share_requested > 0.8


@pytest.mark.parametrize("values", [{"low": 0.0}, {"low": 0.4}, {"high": 1.0}, {"chunks": 0}, {"interval_ops": -1}])
def test_thresholds_out_of_order_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected 0 < low < high < 1|must be >= 0 and chunks"):
        MigrateOnFailure(**values)


# One allocator, two users.


def test_it_writes_the_op_log_that_the_engines_kernels_write(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[np.ndarray] = []
    execute = AccountingVmm.execute

    def recording(self: AccountingVmm, ops: np.ndarray) -> None:
        written.append(np.array(ops))
        execute(self, ops)

    monkeypatch.setattr(AccountingVmm, "execute", recording)
    script = make_script(600)
    with open_avmp(check=True) as avmp:
        follow_with_handles(avmp, script)
        ops = np.concatenate(written)
        avmp.check()
    assert np.all(np.bincount(ops["kind"], minlength=5) > 0), "the script leaves out a kind of entry"
    assert ops.tolist() == follow_with_kernels(script).tolist()


def make_script(steps: int) -> list[tuple[str, int, float]]:
    """(operation, pool, a number in [0, 1) that picks the block or the share)."""
    rng = np.random.default_rng(3)
    operations = rng.choice(["take", "take", "free", "pin", "unpin", "unpin", "split"], steps)
    return [(str(name), int(rng.integers(2)), float(rng.random())) for name in operations]


def follow_with_handles(avmp: Avmp, script: list[tuple[str, int, float]]) -> None:
    known: tuple[list[Any], list[Any]] = ([], [])
    for operation, pool, pick in script:
        if operation == "take":
            try:
                known[pool].append(avmp.allocate(("kv", "ssm")[pool])[0])
            except OutOfBlocks:
                continue
        elif operation == "split":
            avmp.request_split(pick)
        elif known[pool]:
            handle = known[pool][int(pick * len(known[pool]))]
            try:
                getattr(avmp, operation)([handle])
            except BadHandle:
                continue
            if operation == "free":
                known[pool].remove(handle)


@kernel
def _take(memory, pool):
    if pool == KV:
        return take_page(memory, memory.kv.meta.limit)
    entry = take_slot(memory)
    if entry >= 0:
        zero(memory.ssm, memory.log, entry)
    return entry


@kernel
def _go_on(memory):
    go_on_shrinking(memory, 0.0, 0.0)


@kernel
def _arrive(memory):
    while memory.split.tick_s < NEVER:
        run_arrives(memory, 0.0, 0.0)


def follow_with_kernels(script: list[tuple[str, int, float]]) -> np.ndarray:
    """The same on the arrays of an engine, blocks named by their entries and generations."""
    memory = make_memory(LAYOUT, LAYOUT.slots(0.5), 1, 10**5, EVERYTHING, run_limit=LAYOUT.chunks, pages_grow=False)
    pools = (memory.kv, memory.ssm)
    known: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    for operation, pool, pick in script:
        entries = pools[pool].entries
        if operation == "take":
            meta = pools[pool].meta
            if meta.limit > meta.live:
                entry = int(_take(memory, pool))
                known[pool].append((entry, int(entries[entry].generation)))
        elif operation == "split":
            slots = LAYOUT.slots(pick)
            request_split(memory, slots, LAYOUT.chunks - LAYOUT.kv_chunks(slots), 0.0, 0.0)
            _arrive(memory)
        elif known[pool]:
            entry, generation = named = known[pool][int(pick * len(known[pool]))]
            record = entries[entry]
            if record.generation != generation:
                continue
            if operation == "pin":
                pin(pools[pool], entry)
            elif operation == "free" and record.pins <= 1:
                release(pools[pool], memory.log, entry)
                known[pool].remove(named)
            elif operation == "unpin" and record.pins > 0:
                unpin(pools[pool], entry)
            else:
                continue
            if operation != "pin" and memory.kv.meta.chunks != memory.kv.meta.target_chunks:
                _go_on(memory)
                _arrive(memory)
    return np.asarray(memory.log.ops[: memory.log.head.count]).astype(OP)


def test_handles_name_entries(plain: Avmp) -> None:
    pages, slots = plain.allocate("kv", 3), plain.allocate("ssm", 2)
    assert (pages & np.uint64(INDEX_BITS)).tolist() == [0, 1, 2]
    assert (pages >> np.uint64(63)).tolist() == [0, 0, 0] and (slots >> np.uint64(63)).tolist() == [1, 1]


def test_the_kernels_run_as_plain_python_too() -> None:
    script = """
from hbmgym.memory_backend.avmp import Avmp, BadHandle
with Avmp(2**28, "qwen3-next-80b-a3b", backend="accounting") as memory:
    pages, slots = memory.allocate("kv", 3), memory.allocate("ssm")
    memory.unpin(pages[1:])
    memory.free(pages[:2])
    memory.request_split(0.1)
    print(memory.resolve([*pages[2:], *slots]).tolist(), memory.stats().moves.accepted)
    try:
        memory.free(pages[:1])
    except BadHandle:
        print("refused")
"""
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["[2, 0] 1", "refused"], done.stderr


# Mistakes.


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda avmp: avmp.allocate("mamba"), r"kind is 'mamba', expected one of kv, ssm"),
        (lambda avmp: avmp.allocate("kv", -1), r"count is -1, expected an integer >= 0"),
        (lambda avmp: avmp.allocate("kv", 1.0), r"count is 1.0, expected an integer >= 0"),
        (lambda avmp: avmp.request_split(1.5), r"kv_share is 1.5, expected a number from 0 to 1"),
        (lambda avmp: avmp.request_split(float("nan")), r"kv_share is nan"),
        (lambda avmp: avmp.free(["a"]), r"\['a'\]: expected one or several handles, integers from allocate\(\)"),
        (lambda avmp: avmp.free(7), r"cannot free handle 0x7"),
        (lambda avmp: avmp.free([-1]), r"\[-1\]: expected one or several"),
        (lambda avmp: avmp.free([1.0]), r"\[1.0\]: expected one or several"),
        (lambda avmp: avmp.free(np.array([1, 2**63])), r"expected one or several handles"),
        (lambda avmp: avmp.view(5), r"cannot resolve handle 0x5"),
        (lambda avmp: avmp.view(5.0), r"5.0: expected one or several handles"),
        (lambda avmp: avmp.batch(object()).__enter__(), r"stream \(a CUDA stream's handle\) is <object"),
        (lambda avmp: avmp.base("gpu"), r"kind is 'gpu', expected one of kv, ssm"),
    ],
)
def test_a_mistake_is_one_clear_line(plain: Avmp, mistake: Callable[[Avmp], Any], message: str) -> None:
    before = plain.stats()
    with pytest.raises(ValueError, match=message) as raised:
        mistake(plain)
    assert "\n" not in str(raised.value)
    assert plain.stats() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget_bytes": 2**26}, r"give at least \d+ bytes"),
        ({"model": "qwen3-nxt"}, r"unknown model 'qwen3-nxt'"),
        ({"backend": "gpu"}, r"backend is 'gpu', expected one of"),
        ({"budget_bytes": 1e9}, r"budget_bytes is 1000000000.0, expected an integer >= 1"),
        ({"budget_bytes": "1GiB"}, r"budget_bytes is '1GiB'"),
        ({"budget_bytes": 2**20}, r"budget_bytes 1048576, in chunks of 2097152: .* give at least"),
        ({"model": None}, r"unknown model 'None'"),
        ({"migrate": True}, r"migrate is True, expected a MigrateOnFailure or None"),
        ({"kv_share": "0.3"}, r"kv_share is '0.3', expected a number from 0 to 1"),
        ({"kv_share": -0.1}, r"kv_share is -0.1"),
        ({"kv_dtype": "int3"}, r"unknown dtype 'int3'"),
        ({"chunk_bytes": 0}, r"chunk_bytes is 0, expected an integer >= 1"),
        (
            {"chunk_bytes": 1_000_000, "backend": "host"},
            r"chunk_bytes 1000000 is not a multiple of the \d+ bytes of a page: give \d+",
        ),
        ({"budget_bytes": 2**50, "chunk_bytes": 2**40, "backend": "host"}, r"above half of the free memory"),
    ],
)
def test_an_allocator_that_cannot_be_had_says_why(options: dict[str, Any], message: str) -> None:
    wanted = {"budget_bytes": 2**28, "model": "qwen3-next-80b-a3b", "backend": "accounting", **options}
    with pytest.raises((ValueError, VmmRefused), match=message) as raised:
        Avmp(**wanted)
    assert "\n" not in str(raised.value)


def test_a_closed_allocator_refuses_everything(host: Avmp) -> None:
    page = host.allocate("kv")
    host.close()
    host.close()
    uses: list[Callable[[], Any]] = [
        lambda: host.allocate("kv"),
        lambda: host.free(page),
        lambda: host.pin(page),
        lambda: host.unpin(page),
        lambda: host.resolve(page),
        lambda: host.view(page[0]),
        lambda: host.base("kv"),
        lambda: host.request_split(0.3),
        lambda: host.batch().__enter__(),
        host.stats,
        host.check,
    ]
    for use in uses:
        with pytest.raises(VmmError, match="it is closed; open a new one"):
            use()


def test_close_gives_the_memory_back() -> None:
    def chunks_mapped() -> int:
        return Path("/proc/self/maps").read_text().count("hbmgym-chunks")

    before = chunks_mapped()
    with open_avmp("host"):
        assert chunks_mapped() > before
    assert chunks_mapped() == before


def test_the_documentations_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "avmp.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(example.splitlines()) == 15
    exec(compile(example.replace('"auto"', '"host"'), "docs/avmp.md", "exec"), {})
    (printed,) = re.findall(r"It prints:\n\n```\n(.*?)```", page, re.DOTALL)
    assert capsys.readouterr().out == printed
