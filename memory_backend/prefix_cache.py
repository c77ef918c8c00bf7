"""What is cached and what a request can reuse.

Pages and snapshots hang on dense page ids: `ids[i].page` is the resident page of id i, `ids[i].snapshot` the record
(recurrent state, window tail or both) at the end of that page. Residency is prefix-closed: a request releases its pages
deepest first, and whoever uses a page uses everything before it, so the eviction order never takes a page that a
resident page continues. A snapshot is live only while a request copies it, and for as long as a session keeps it with
all pages under it.
"""

from typing import NamedTuple

import numpy as np

from hbmgym.memory_backend.ages import note_eviction, part
from hbmgym.memory_backend.eviction import LRU, NONE, begin_rank, end_rank, first_victim, hit, set_ends_in_state
from hbmgym.memory_backend.invariants import require
from hbmgym.memory_backend.jit import kernel, subkernel
from hbmgym.memory_backend.oplog import KV, NOTHING, SSM, OpLog, make_op_log
from hbmgym.memory_backend.pools import (
    SESSION,
    Pool,
    check_pool,
    check_stamp,
    copy,
    keep,
    make_pool,
    pin,
    release,
    release_and_take,
    stamp,
    stop_keeping,
    take,
    touch,
    unpin,
)
from hbmgym.memory_backend.split import Layout
from hbmgym.memory_backend.table import equal_records, table_reader
from hbmgym.memory_backend.vmm.protocol import Vmm

SEVERAL = -2  # of `child`
NEVER = 1e300  # a time that does not come; finite, so that differences stay finite
PAGE_ID = np.dtype(
    [
        ("page", "i4"),
        ("snapshot", "i4"),
        ("depth", "i4"),  # pages of the prefix that ends with it, 0: it was never resident
        # Since the page came: 0, or its snapshot was lost, and 1 + what the pool that is the cause had lost before;
        # positive: the SSM pool evicted it, negative: the KV pool evicted its page.
        ("state_lost", "i4"),
        ("child", "i4"),  # the page id that continued it first since it came, NONE: none has, SEVERAL: others have too
    ],
    align=True,
)
SPLIT = np.dtype(
    [
        ("chunks", "i8"),  # of the budget
        ("min_slots", "i8"),  # of the layout, as are the most
        ("max_slots", "i8"),
        ("requested_slots", "i8"),
        ("tick_s", "f8"),  # when the next run of chunks arrives; NEVER: none is on its way
        ("run_limit", "i8"),  # most chunks of a run
        ("pages_grow", "i8"),  # 1: live KV pages may outgrow a lowered limit, and their chunks wait for them
        ("run_chunks", "i8"),  # of that run
        ("run_from_kv", "i8"),  # 1 when that run leaves the KV pool
        ("worker_free_s", "f8"),  # when the copies of earlier runs are done
        ("moved_chunks", "i8"),
        ("relocated_bytes", "i8"),
    ],
    align=True,
)


class Memory(NamedTuple):
    """Both pools, the prefix index, the split and the op log."""

    kv: Pool
    ssm: Pool
    ids: np.recarray
    split: np.record
    chunk_at: np.ndarray
    """int32, shape (2, chunks): physical chunk at each position of each pool, NONE above the mapped ones."""
    log: OpLog


def make_memory(
    layout: Layout,
    slots: int,
    id_count: int,
    log_capacity: int,
    log_level: int,
    run_limit: int,
    pages_grow: bool,
    order: int = LRU,
) -> Memory:
    """Empty pools at the split with `slots` slots, whose cached blocks go in `order`."""
    kv_chunks = layout.kv_chunks(slots)
    ids = equal_records(PAGE_ID, id_count, page=NONE, snapshot=NONE, child=NONE)
    split = equal_records(SPLIT, 1)[0]
    split.chunks, split.requested_slots, split.tick_s = layout.chunks, slots, NEVER
    split.min_slots, split.max_slots = layout.min_slots, layout.max_slots
    split.run_limit, split.pages_grow = run_limit, int(pages_grow)
    chunk_at = np.full((2, layout.chunks), NONE, np.int32)
    chunk_at[KV, :kv_chunks] = np.arange(kv_chunks)
    chunk_at[SSM, : layout.chunks - kv_chunks] = np.arange(kv_chunks, layout.chunks)
    ssm = make_pool(SSM, layout.slot_bytes, layout.chunk_bytes, layout.chunks - kv_chunks, layout.chunks, order)
    return Memory(
        make_pool(KV, layout.page_bytes, layout.chunk_bytes, kv_chunks, layout.chunks, order),
        ssm,
        ids,
        split,
        chunk_at,
        make_op_log(log_capacity, log_level),
    )


EXAMPLE_MEMORY = make_memory(Layout(2, 1, 1, 1, 1, 1), 1, 1, 1, NOTHING, 1, False)
memory_at = table_reader(EXAMPLE_MEMORY)


@subkernel
def resident_depth(memory, refs, first, depth):
    """How many of the leading `depth` ids have their page resident (binary search: residency is prefix-closed)."""
    low, high = 0, depth
    while low < high:
        middle = (low + high) // 2
        if memory.ids[refs[first + middle]].page != NONE:
            low = middle + 1
        else:
            high = middle
    return low


@subkernel
def seen_depth(memory, refs, first, depth):
    """How many of the leading `depth` ids were ever resident: what an unbounded cache would hold."""
    low, high = 0, depth
    while low < high:
        middle = (low + high) // 2
        if memory.ids[refs[first + middle]].depth != 0:
            low = middle + 1
        else:
            high = middle
    return low


@subkernel
def live_depth(memory, refs, first, depth):
    """How many of the leading `depth` resident pages are pinned (pins are prefix-closed too)."""
    low, high = 0, depth
    while low < high:
        middle = (low + high) // 2
        if memory.kv.entries[memory.ids[refs[first + middle]].page].pins > 0:
            low = middle + 1
        else:
            high = middle
    return low


@subkernel
def snapshot_depth(memory, refs, first, depth):
    """The deepest of the leading `depth` ids that ends in a snapshot, counted from 1; 0 if none does."""
    for j in range(depth, 0, -1):
        if memory.ids[refs[first + j - 1]].snapshot != NONE:
            return j
    return 0


@subkernel
def evict_snapshot(memory):
    """Drop the first snapshot of the eviction order; its pages stay."""
    release(memory.ssm, memory.log, _forget_first_snapshot(memory))


@subkernel
def _forget_first_snapshot(memory):
    """The first slot of the eviction order, which nobody can match any more."""
    entry = first_victim(memory.ssm)
    if memory.ssm.entries[entry].key != NONE:  # blocks of an Avmp have no ids
        forget_snapshot(memory, entry)
    note_eviction(memory.ssm, entry)
    return entry


@subkernel
def forget_snapshot(memory, entry):
    """A slot is no snapshot any longer."""
    page_id = memory.ids[memory.ssm.entries[entry].key]
    memory.ssm.entries[entry].key = NONE
    page_id.snapshot = NONE
    page_id.state_lost = memory.ssm.meta.evictions + 1
    if memory.kv.meta.order != LRU:
        set_ends_in_state(memory.kv, page_id.page, 0)


@subkernel
def drop_snapshot(memory, page_id):
    """Free a cached snapshot that is no longer wanted: no pool was too small for it."""
    entry = memory.ids[page_id].snapshot
    part(memory.ssm, entry)
    forget_snapshot(memory, entry)
    memory.ids[page_id].state_lost = 0
    release(memory.ssm, memory.log, entry)


@subkernel
def _forget_page(memory, page_id):
    if page_id.snapshot != NONE:
        part(memory.ssm, page_id.snapshot)
        release(memory.ssm, memory.log, page_id.snapshot)
        memory.ssm.meta.evictions += 1
        page_id.snapshot = NONE
        page_id.state_lost = -(memory.kv.meta.evictions + 1)
    page_id.page = NONE
    page_id.child = NONE


@subkernel
def evict_page(memory):
    """Drop the first page of the eviction order and the snapshot at its end."""
    release(memory.kv, memory.log, _forget_first_page(memory))


@subkernel
def _forget_first_page(memory):
    """The first page of the eviction order, which nobody can match any more; the snapshot at its end is dropped."""
    entry = first_victim(memory.kv)
    key = memory.kv.entries[entry].key
    if key != NONE:
        _forget_page(memory, memory.ids[key])
    if memory.kv.meta.order != LRU:
        end_rank(memory.kv, entry)
    note_eviction(memory.kv, entry)
    return entry


@subkernel
def take_page(memory, bound):
    """A live private page, evicting if need be; NONE when `bound` pages are live."""
    entry = take(memory.kv, memory.log, bound)
    while entry == NONE and memory.kv.meta.cached > 0:
        entry = release_and_take(memory.kv, memory.log, _forget_first_page(memory), bound)
    return entry


@subkernel
def take_slot(memory):
    """A live private slot, evicting if need be; NONE when every slot is live."""
    limit = memory.ssm.meta.limit
    entry = take(memory.ssm, memory.log, limit)
    while entry == NONE and memory.ssm.meta.cached > 0:
        entry = release_and_take(memory.ssm, memory.log, _forget_first_snapshot(memory), limit)
    return entry


@subkernel
def publish_page(memory, entry, refs, first, depth):
    """Make a live private page the resident page of id `depth` of a row, whose pages before it are resident; if another
    one is, use that and free this one."""
    page_id = refs[first + depth]
    resident = memory.ids[page_id].page
    if resident != NONE:
        release(memory.kv, memory.log, entry)
        pin(memory.kv, resident)
        return
    memory.kv.entries[entry].key = page_id
    memory.ids[page_id].page = entry
    memory.ids[page_id].depth = depth + 1
    memory.ids[page_id].state_lost = 0
    if depth > 0:
        _note_child(memory.ids[refs[first + depth - 1]], page_id)
    if memory.kv.meta.order != LRU:
        parent = memory.ids[refs[first + depth - 1]].page if depth > 0 else np.int32(NONE)
        begin_rank(memory.kv, entry, parent, depth + 1)


@subkernel
def _note_child(parent, page_id):
    if parent.child == NONE:
        parent.child = page_id
    elif parent.child != page_id:
        parent.child = SEVERAL


@subkernel
def may_be_dropped(memory, page_id):
    """Is there a snapshot that nobody holds, at the end of a page that no two different pages have continued?"""
    record = memory.ids[page_id]
    return record.snapshot != NONE and record.child != SEVERAL and memory.ssm.entries[record.snapshot].pins == 0


@subkernel
def reuse_page(memory, page_id):
    """A request reuses a resident page: it is live from now on."""
    entry = memory.ids[page_id].page
    if memory.kv.meta.order != LRU:
        hit(memory.kv, entry)
    pin(memory.kv, entry)


@subkernel
def reuse_snapshot(memory, entry):
    """A request is about to copy a snapshot, which is live until `unpin`."""
    if memory.ssm.meta.order != LRU:
        hit(memory.ssm, entry)
    pin(memory.ssm, entry)


@subkernel
def refresh_snapshot(memory, entry):
    """A snapshot was met again: it goes last, unless a session keeps it anyway."""
    if memory.ssm.entries[entry].pins == 0:
        touch(memory.ssm, entry)


@subkernel
def keep_prefix(memory, refs, first, depth):
    """A session keeps the resident pages of its leading `depth` ids and the snapshot at their end."""
    for j in range(depth):
        keep(memory.kv, memory.ids[refs[first + j]].page)
    keep(memory.ssm, memory.ids[refs[first + depth - 1]].snapshot)


@subkernel
def stop_keeping_prefix(memory, refs, first, depth):
    """Take `keep_prefix` back, pages deepest first."""
    stop_keeping(memory.ssm, memory.ids[refs[first + depth - 1]].snapshot)
    for j in range(depth - 1, -1, -1):
        stop_keeping(memory.kv, memory.ids[refs[first + j]].page)


@subkernel
def publish_snapshot(memory, entry, page_id):
    """Make a live private slot the snapshot at the end of `page_id`'s page, cached; free it if there is one."""
    if memory.ids[page_id].snapshot != NONE:
        refresh_snapshot(memory, memory.ids[page_id].snapshot)
        release(memory.ssm, memory.log, entry)
        return
    memory.ssm.entries[entry].key = page_id
    memory.ids[page_id].snapshot = entry
    if memory.ssm.meta.order != LRU:
        page = memory.ids[page_id].page
        begin_rank(memory.ssm, entry, NONE, memory.kv.ranks[page].depth)
        set_ends_in_state(memory.kv, page, 1)
    unpin(memory.ssm, entry)


@subkernel
def save_snapshot(memory, working, page_id):
    """Copy the working record to a free or evictable slot as `page_id`'s snapshot; False if there is no such slot."""
    entry = take_slot(memory)
    if entry == NONE:
        return False
    copy(memory.ssm, memory.log, working, entry)
    stamp(memory.ssm, memory.log, working)  # the state goes on
    publish_snapshot(memory, entry, page_id)
    return True


@kernel
def check_stamps(memory):
    """Log a CHECK of every block in use."""
    for pool in (memory.kv, memory.ssm):
        for block in range(pool.meta.capacity):
            if pool.entry_at[block] != NONE:
                check_stamp(pool, memory.log, pool.entry_at[block])


def check_chunks(memory: Memory, vmm: Vmm) -> None:
    """Raise AssertionError unless the backend has the chunks of both pools where the memory has them."""
    for pool in (memory.kv, memory.ssm):
        chunks = memory.chunk_at[pool.meta.pool, : pool.meta.chunks]
        require(np.array_equal(vmm.chunk_at(pool.meta.pool), chunks), "the backend has mapped other chunks")


def check_memory(memory: Memory) -> None:
    """Raise AssertionError unless pools, prefix index and chunk ownership agree."""
    check_pool(memory.kv)
    check_pool(memory.ssm)
    for pool, column in ((memory.kv, "page"), (memory.ssm, "snapshot")):
        held = np.flatnonzero(memory.ids[column] != NONE)
        require(np.array_equal(pool.entries["key"][memory.ids[column][held]], held), f"a {column} has another id")
        keyed = np.flatnonzero(pool.entries["key"] != NONE)
        require(len(keyed) == len(held), f"a {column} is keyed but not in the index")
    by_requests = memory.ssm.entries["pins"] % SESSION > 0
    require(np.all(memory.ssm.entries["key"][by_requests] == NONE), "a request holds a slot that has an id")
    with_snapshot = memory.ids["snapshot"] != NONE
    require(np.all(memory.ids["page"][with_snapshot] != NONE), "a snapshot outlived its page")
    if memory.kv.meta.order != LRU:
        _check_ranks(memory)
    owned = np.concatenate([memory.chunk_at[p, : pool.meta.chunks] for p, pool in enumerate((memory.kv, memory.ssm))])
    require(np.array_equal(np.sort(owned), np.arange(memory.split.chunks)), "a chunk is lost or owned twice")


def _check_ranks(memory: Memory) -> None:
    """Raise AssertionError unless every page knows how many resident ones continue it, and whether a state ends it."""
    ranks, keys = memory.kv.ranks, memory.kv.entries["key"]
    parents = ranks["parent"][keys != NONE]
    continued = np.bincount(parents[parents != NONE], minlength=len(ranks))
    require(np.array_equal(ranks["continued"], continued), "the pages that continue a page are miscounted")
    pages = np.flatnonzero(keys != NONE)
    ends_in_state = memory.ids["snapshot"][keys[pages]] != NONE
    require(np.array_equal(ranks["ends_in_state"][pages] == 1, ends_in_state), "a page is wrong about its snapshot")
