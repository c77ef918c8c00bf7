"""A pool: equal blocks over one virtual range, of which `live + cached <= limit <= capacity` are in use.

Everything above this module names a block by its *entry* in the page table, so that a relocation, which changes only
`entry.block`, is invisible. An entry is live (pins > 0), cached (resident, pins == 0, in eviction order) or free. A
request that runs holds it by one pin each; a session whose next turn is expected keeps it by SESSION pins at once.
Blocks are handed out lowest first: a pool that shrinks from the top then has little to relocate.
"""

from typing import NamedTuple

import numpy as np

from hbmgym.memory_backend.ages import AGES, age_bits, join, part
from hbmgym.memory_backend.bits import lowest_bit
from hbmgym.memory_backend.eviction import LRU, check_order, enter, leave, make_ranks
from hbmgym.memory_backend.eviction import NONE as NONE
from hbmgym.memory_backend.invariants import require
from hbmgym.memory_backend.jit import kernel, subkernel
from hbmgym.memory_backend.oplog import CHECK, COPY, STAMP, ZERO, record_op
from hbmgym.memory_backend.table import equal_records

INDEX_BITS = 0xFFFFFFFF  # of a handle
WORD = 32  # bits of a bitmap word; held in int64 so that products cannot overflow
SESSION = 1 << 16  # pins of one session; all requests together hold fewer
MOST_SESSIONS = 1 << 14  # that may keep blocks at once, so that `pins` cannot overflow

POOL_META = np.dtype(
    [
        ("pool", "i8"),  # KV or SSM, as in the op log
        ("block_bytes", "i8"),
        ("chunk_bytes", "i8"),
        ("chunks", "i8"),  # mapped
        ("target_chunks", "i8"),  # of the requested split
        ("capacity", "i8"),  # blocks that the mapped chunks hold
        ("limit", "i8"),  # blocks that may be in use: the capacity, less while the pool shrinks
        ("live", "i8"),
        ("cached", "i8"),
        ("first_free_entry", "i8"),
        ("evictions", "i8"),
        ("order", "i8"),  # in which cached entries go (eviction.py)
        ("evict_first", "i8"),  # ends of lru's list
        ("evict_last", "i8"),
        ("looked_at", "i8"),  # the last one of a look at who would go next, NONE: nobody looks
        # orders by value
        ("chain", "i8"),  # deep end of the chain of pages that a look is in, NONE: in none
        ("rival", "i8"),  # the first in the heap beside that chain
        ("heap_size", "i8"),
        ("uses", "i8"),
        ("now_s", "f8"),
        ("own_s_per_page", "f8"),  # what recovering a prefix takes for this pool's sake, by its length and its square
        ("own_s_per_page2", "f8"),
        ("state_s_per_page", "f8"),  # and for the snapshot at the end of a page
        ("flop_weight", "f8"),
        ("recency_scale", "f8"),
        ("saving_scale", "f8"),
        ("page_tokens", "i8"),  # tlru
        ("spare_tokens", "i8"),  # what the next turn may compute and be in time, less what it adds
        # ages (ages.py)
        ("joined", "i8"),  # so far; of those, `counted` are in the ages
        ("counted", "i8"),
        ("full_at", "i8"),  # the clock when the pool last evicted something to make room
        ("parted", "i8"),  # blocks that were there then and have left the order since without being evicted
        ("age_bits", "i8"),
    ],
    align=True,
)
ENTRY = np.dtype(
    [
        ("tag", "i8"),  # stamp of the block's present content
        ("block", "i4"),  # NONE: free
        ("generation", "i4"),  # counts the times this entry was freed
        ("pins", "i4"),
        ("key", "i4"),  # page id whose KV or state this is, NONE: private
        ("prev", "i4"),
        ("next", "i4"),
    ],
    align=True,
)


class Pool(NamedTuple):
    """The arrays of one pool; `entry_at[block]` inverts `entries[e].block`."""

    meta: np.record
    entries: np.recarray
    entry_at: np.ndarray
    free_bits: np.ndarray
    """int64 bitmap of the free blocks; each level above has a bit per non-zero word of the level below."""
    level_start: np.ndarray
    """int64, shape (levels + 1,): first word of each level, lowest level first."""
    ranks: np.recarray
    """RANK records of the entries, one only where the order is a list."""
    heap: np.ndarray
    """int32: the entries that may be evicted, where the order is by value."""
    ages: np.ndarray
    """int32, shape (AGES,): cached blocks by the time at which they joined the order."""
    joined_at: np.ndarray
    """int64: the clock when an entry joined the order last; an allocator may live for ever."""


def make_pool(pool: int, block_bytes: int, chunk_bytes: int, chunks: int, total_chunks: int, order: int = LRU) -> Pool:
    """A pool with `chunks` of `total_chunks` mapped and every block free."""
    blocks = max(total_chunks * chunk_bytes // block_bytes, 1)
    meta = equal_records(POOL_META, 1)[0]
    meta.pool, meta.block_bytes, meta.chunk_bytes = pool, block_bytes, chunk_bytes
    meta.chunks = meta.target_chunks = chunks
    meta.capacity = meta.limit = chunks * chunk_bytes // block_bytes
    meta.age_bits = age_bits(blocks)
    meta.order, meta.evict_first, meta.evict_last = order, NONE, NONE
    meta.looked_at = meta.chain = NONE
    entries = equal_records(ENTRY, blocks, block=NONE, key=NONE, prev=NONE)
    entries["next"] = np.arange(1, blocks + 1)
    entries["next"][-1] = NONE
    bits, starts = _full_bitmap(blocks)
    return Pool(
        meta,
        entries,
        np.full(blocks, NONE, np.int32),
        bits,
        starts,
        *make_ranks(order, blocks),
        np.zeros(AGES, np.int32),
        np.zeros(blocks, np.int64),
    )


def _full_bitmap(blocks: int) -> tuple[np.ndarray, np.ndarray]:
    levels, starts, size = [], [0], blocks
    while True:
        words = -(-size // WORD)
        level = np.full(words, (1 << WORD) - 1, np.int64)
        if size % WORD:
            level[-1] = (1 << size % WORD) - 1
        levels.append(level)
        starts.append(starts[-1] + words)
        if words == 1:
            return np.concatenate(levels), np.array(starts, np.int64)
        size = words


@kernel
def lowest_free_block(pool):
    """The lowest free block; at least one must be free."""
    index = 0
    for level in range(len(pool.level_start) - 2, -1, -1):
        word = pool.free_bits[pool.level_start[level] + index]
        index = index * WORD + lowest_bit(word)
    return index


@kernel
def _mark_taken(pool, block):
    index = np.int64(block)  # as Python code, 1 << int32(31) would overflow
    for level in range(len(pool.level_start) - 1):
        word = pool.level_start[level] + index // WORD
        pool.free_bits[word] &= ~(1 << (index % WORD))
        if pool.free_bits[word] != 0:
            return
        index //= WORD


@kernel
def _mark_free(pool, block):
    index = np.int64(block)
    for level in range(len(pool.level_start) - 1):
        word = pool.level_start[level] + index // WORD
        before = pool.free_bits[word]
        pool.free_bits[word] = before | (1 << (index % WORD))
        if before != 0:
            return
        index //= WORD


@kernel
def free_blocks(pool):
    """Blocks that may be handed out without eviction."""
    return max(pool.meta.limit - pool.meta.live - pool.meta.cached, 0)


@kernel
def take(pool, log, bound):
    """A live, private entry on the lowest free block, or NONE when `bound` blocks are in use."""
    meta = pool.meta
    if meta.live + meta.cached >= bound:
        return NONE
    entry = meta.first_free_entry
    record = pool.entries[entry]
    meta.first_free_entry = record.next
    block = lowest_free_block(pool)
    _mark_taken(pool, block)
    pool.entry_at[block] = entry
    record.block = block
    record.pins = 1
    record.key = NONE
    record.next = NONE
    record.prev = NONE
    meta.live += 1
    stamp(pool, log, entry)
    return entry


@kernel
def stamp(pool, log, entry):
    """Give the block of `entry` a content of its own."""
    record = pool.entries[entry]
    record.tag = log.head.next_tag
    log.head.next_tag += 1
    record_op(log, STAMP, pool.meta.pool, record.block, pool.meta.pool, record.block, record.tag)


@kernel
def check_stamp(pool, log, entry):
    record = pool.entries[entry]
    record_op(log, CHECK, pool.meta.pool, record.block, pool.meta.pool, record.block, record.tag)


@kernel
def zero(pool, log, entry):
    """Clear the block of a live entry, then stamp it."""
    block = pool.entries[entry].block
    record_op(log, ZERO, pool.meta.pool, block, pool.meta.pool, block, 0)
    stamp(pool, log, entry)


@kernel
def copy(pool, log, source, target):
    """Copy the content of one entry over another's."""
    origin = pool.entries[source]
    copied = pool.entries[target]
    record_op(log, COPY, pool.meta.pool, origin.block, pool.meta.pool, copied.block, 0)
    copied.tag = origin.tag
    check_stamp(pool, log, target)


@kernel
def release(pool, log, entry):
    """Free an entry that is live under one pin, or cached."""
    meta = pool.meta
    record = pool.entries[entry]
    check_stamp(pool, log, entry)
    if record.pins > 0:
        meta.live -= 1
    else:
        leave(pool, entry)
        meta.cached -= 1
    _mark_free(pool, record.block)
    pool.entry_at[record.block] = NONE
    record.block = NONE
    record.pins = 0
    record.key = NONE
    record.generation += 1
    record.prev = NONE
    record.next = meta.first_free_entry
    meta.first_free_entry = entry


@kernel
def release_and_take(pool, log, entry, bound):
    """Free a cached entry, then take a live one, or NONE when `bound` blocks are still in use."""
    meta = pool.meta
    if meta.live + meta.cached != bound or bound != meta.capacity:
        release(pool, log, entry)
        return take(pool, log, bound)
    # The pool is full, so what is freed is what is taken; the bitmap need not be searched.
    record = pool.entries[entry]
    check_stamp(pool, log, entry)
    leave(pool, entry)
    meta.cached -= 1
    meta.live += 1
    record.pins = 1
    record.key = NONE
    record.generation += 1
    record.prev = NONE
    record.next = NONE
    stamp(pool, log, entry)
    return entry


@kernel
def pin(pool, entry):
    """One more live request holds `entry`."""
    _hold(pool, entry, 1)


@kernel
def unpin(pool, entry):
    """One live request less holds `entry`; the last one leaves it cached, to be evicted last."""
    _let_go(pool, entry, 1)


@subkernel
def keep(pool, entry):
    """One more session keeps `entry`, which is then live as if a request held it."""
    _hold(pool, entry, SESSION)


@subkernel
def stop_keeping(pool, entry):
    """One session less keeps `entry`; the last pin leaves it cached, as above."""
    _let_go(pool, entry, SESSION)


@subkernel
def blocks_kept_only(pool):
    """Live blocks that no request holds."""
    count = 0
    for entry in range(len(pool.entries)):
        record = pool.entries[entry]
        if record.pins > 0 and record.pins % SESSION == 0:
            count += 1
    return count


@subkernel
def _hold(pool, entry, pins):
    record = pool.entries[entry]
    if record.pins == 0:
        part(pool, entry)
        leave(pool, entry)
        pool.meta.cached -= 1
        pool.meta.live += 1
    record.pins += pins


@subkernel
def _let_go(pool, entry, pins):
    record = pool.entries[entry]
    record.pins -= pins
    if record.pins == 0:
        pool.meta.live -= 1
        pool.meta.cached += 1
        enter(pool, entry)
        join(pool, entry)


@kernel
def touch(pool, entry):
    """Move a cached entry to the end of the eviction order."""
    part(pool, entry)
    leave(pool, entry)
    enter(pool, entry)
    join(pool, entry)


@kernel
def relocate(pool, log, entry):
    """Move an entry's content to the lowest free block; whoever names the entry does not notice."""
    new = lowest_free_block(pool)
    record_op(log, COPY, pool.meta.pool, pool.entries[entry].block, pool.meta.pool, new, 0)
    change_block(pool, entry, new)
    check_stamp(pool, log, entry)


@kernel
def change_block(pool, entry, block):
    """Let an entry lie on a free block."""
    record = pool.entries[entry]
    old = record.block
    _mark_taken(pool, block)
    record.block = block
    pool.entry_at[block] = entry
    pool.entry_at[old] = NONE
    _mark_free(pool, old)


@kernel
def make_handle(pool, entry):
    """64 bits: pool (1), generation (31), index (32)."""
    return (pool.meta.pool << 63) | (np.int64(pool.entries[entry].generation & 0x7FFFFFFF) << 32) | np.int64(entry)


@kernel
def resolve_handle(pool, handle):
    """The entry that `handle` names, or NONE when it is foreign, stale or already freed."""
    if ((handle >> 63) & 1) != pool.meta.pool:
        return NONE
    entry = handle & INDEX_BITS
    if entry >= len(pool.entries):
        return NONE
    record = pool.entries[entry]
    if record.block == NONE or (record.generation & 0x7FFFFFFF) != ((handle >> 32) & 0x7FFFFFFF):
        return NONE
    return entry


def check_pool(pool: Pool) -> None:
    """Raise AssertionError unless the page table, the counts, the bitmap and the eviction order agree."""
    meta, entries = pool.meta, pool.entries
    used = np.flatnonzero(entries["block"] != NONE)
    live, cached = used[entries["pins"][used] > 0], used[entries["pins"][used] == 0]
    require(len(live) == meta.live and len(cached) == meta.cached, (len(live), len(cached), meta))
    require(meta.capacity == meta.chunks * meta.chunk_bytes // meta.block_bytes and meta.limit <= meta.capacity, meta)
    require(meta.live + meta.cached <= meta.capacity, meta)
    require(np.all(entries["block"][used] < meta.capacity), "a block above the mapped chunks is in use")
    require(np.array_equal(pool.entry_at[entries["block"][used]], used), "entry_at does not invert the page table")
    require(np.count_nonzero(pool.entry_at != NONE) == len(used), "entry_at names a free entry")
    set_bits = pool.entry_at == NONE
    for start, stop in zip(pool.level_start, pool.level_start[1:], strict=False):
        padded = np.zeros((stop - start) * WORD, np.int64)
        padded[: len(set_bits)] = set_bits
        words = (padded.reshape(-1, WORD) << np.arange(WORD)).sum(axis=1)
        require(np.array_equal(pool.free_bits[start:stop], words), "the bitmap of free blocks is wrong")
        set_bits = words != 0
    check_order(pool, cached)
