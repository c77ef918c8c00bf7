"""Blocks by handle: kernels that allocate, free, pin and unpin many blocks at once, all of them or none.

They take the address of a Memory's Table, which is 0 once the memory is closed, and say what is left to do.
"""

import numpy as np

from hbmgym.memory_backend.jit import kernel, subkernel
from hbmgym.memory_backend.migration import slots_after_migration, thresholds_allow
from hbmgym.memory_backend.oplog import KV
from hbmgym.memory_backend.pools import INDEX_BITS, NONE, make_handle, pin, release, resolve_handle, unpin, zero
from hbmgym.memory_backend.prefix_cache import NEVER, memory_at, take_page, take_slot
from hbmgym.memory_backend.resize import go_on_shrinking, request_split, run_arrives, undo_run, withdraw_request

DONE = 0
TO_DO = 1
"""Done; the op log has entries, or chunks can be moved."""
REFUSED = 2
"""Too few blocks or a handle that names none; nothing was changed."""
CLOSED = 3


@subkernel
def _pool_of(memory, handle):
    """The pool that `handle` says it belongs to."""
    return memory.kv if np.int64(handle) >= 0 else memory.ssm


@subkernel
def _entry_of(memory, handle):
    """The entry that `handle` names, or NONE."""
    return resolve_handle(_pool_of(memory, handle), np.int64(handle))


@subkernel
def _what_is_left(memory):
    return TO_DO if memory.log.head.count > 0 or memory.split.tick_s < NEVER else DONE


@subkernel
def _go_on(memory):
    """After blocks became free or evictable: go on with a split that waits for them."""
    if memory.kv.meta.chunks != memory.kv.meta.target_chunks:
        go_on_shrinking(memory, 0.0, 0.0)
    return _what_is_left(memory)


@kernel
def allocate_blocks(table, kind, handles):
    """Fill `handles` with live blocks of pool `kind`, lowest first, evicting what is cached; new slots are zeroed."""
    if table == 0:
        return CLOSED
    memory = memory_at(table)
    pool = memory.kv if kind == KV else memory.ssm
    if pool.meta.limit - pool.meta.live < len(handles):
        return REFUSED
    for i in range(len(handles)):
        if kind == KV:
            entry = take_page(memory, pool.meta.limit)
        else:
            entry = take_slot(memory)
            zero(pool, memory.log, entry)
        handles[i] = np.uint64(make_handle(pool, entry))
    return _what_is_left(memory)


@kernel
def free_blocks_of(table, handles):
    """Free blocks that are cached, or live under one pin; a handle may not come twice."""
    if table == 0:
        return CLOSED
    memory = memory_at(table)
    for i in range(len(handles)):
        pool = _pool_of(memory, handles[i])
        entry = _entry_of(memory, handles[i])
        if entry == NONE or pool.entries[entry].pins > 1 or pool.entries[entry].pins < 0:
            _unmark(memory, handles, i)
            return REFUSED
        pool.entries[entry].pins = _marked(pool.entries[entry].pins)
    for handle in handles:
        pool = _pool_of(memory, handle)
        entry = np.int64(handle) & INDEX_BITS
        pool.entries[entry].pins = _marked(pool.entries[entry].pins)
        release(pool, memory.log, entry)
    return _go_on(memory)


@subkernel
def _marked(pins):
    """Pins of an entry that a call has met already; its own inverse, and below 0 only for what is marked."""
    return -1 - pins


@subkernel
def _unmark(memory, handles, count):
    """Take the marks off the entries of the first `count` handles."""
    for i in range(count):
        pool = _pool_of(memory, handles[i])
        record = pool.entries[_entry_of(memory, handles[i])]
        record.pins = _marked(record.pins)


@kernel
def pin_blocks(table, handles):
    """One more holder for each: cached blocks are live again."""
    if table == 0:
        return CLOSED
    memory = memory_at(table)
    for handle in handles:
        if _entry_of(memory, handle) == NONE:
            return REFUSED
    for handle in handles:
        pin(_pool_of(memory, handle), _entry_of(memory, handle))
    return DONE


@kernel
def unpin_blocks(table, handles):
    """One holder less for each: what nobody holds is cached, to be evicted in the order in which it was given up."""
    if table == 0:
        return CLOSED
    memory = memory_at(table)
    for i in range(len(handles)):
        pool = _pool_of(memory, handles[i])
        entry = _entry_of(memory, handles[i])
        if entry == NONE or pool.entries[entry].pins == 0:
            _add_pins(memory, handles, i)
            return REFUSED
        pool.entries[entry].pins -= 1
    _add_pins(memory, handles, len(handles))
    for handle in handles:
        unpin(_pool_of(memory, handle), _entry_of(memory, handle))
    return _go_on(memory)


@subkernel
def _add_pins(memory, handles, count):
    for i in range(count):
        pool = _pool_of(memory, handles[i])
        pool.entries[_entry_of(memory, handles[i])].pins += 1


@kernel
def entry_of(table, handle):
    """The entry that `handle` names, or NONE."""
    return _entry_of(memory_at(table), handle)


@kernel
def blocks_of(table, handles, blocks):
    """Write the present physical block of each handle; the index of the first that names none, or NONE."""
    memory = memory_at(table)
    for i in range(len(handles)):
        pool = _pool_of(memory, handles[i])
        entry = _entry_of(memory, handles[i])
        if entry == NONE:
            return i
        blocks[i] = pool.entries[entry].block
    return NONE


@kernel
def ask_for_split(table, slots, ssm_chunks):
    """Ask for a split, evicting what is in its way."""
    memory = memory_at(table)
    request_split(memory, slots, ssm_chunks, 0.0, 0.0)
    return _what_is_left(memory)


@kernel
def slots_after_failure(table, kind, count, low, high, batch_chunks):
    """Slots of the split that AVMP's rule takes after pool `kind` had no room for `count` blocks; NONE: no other."""
    memory = memory_at(table)
    if not thresholds_allow(memory, kind, low, high):
        return NONE
    pages, slots = (count, 0) if kind == KV else (0, count)
    return slots_after_migration(memory, kind, slots, pages, batch_chunks)


@kernel
def make_run(table):
    """Move all chunks that can move now."""
    memory = memory_at(table)
    memory.split.run_chunks = memory.split.run_limit  # more may have become free since the run was planned
    run_arrives(memory, 0.0, 0.0)


@kernel
def withdraw(table):
    """Undo the run in the op log, if there is one, and withdraw the pending request."""
    memory = memory_at(table)
    undo_run(memory)
    withdraw_request(memory)
