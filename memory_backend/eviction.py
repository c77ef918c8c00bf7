"""The order in which cached blocks go: lru, lpb, flop_aware or tlru. The least goes first, ties the one used least
recently.

`lru` is a list. The others give every matchable block a value and keep those that may go in a heap: a page that
another resident page continues may not, so a chain of pages goes from its deep end, as it does under lru.

- lpb, loss per byte: hits x seconds / bytes. A page or a snapshot is hit by every request that reuses it; hits count in
  the present epoch and the one before it. Seconds are what it takes to recover the prefix that ends with the block: its
  attention for a page, the rest of its prefill for a snapshot, both for a page that ends in a snapshot, as the two go
  together. Source: HiMA (OpenReview KEf0qZPF95), "recovery time per evicted byte".
- flop_aware: recency + weight x seconds / bytes, each scaled to a range of 1 over the blocks cached at the last edge of
  an epoch. Source: Marconi (arXiv 2411.19379), whose FLOPs the same seconds stand for. Weight 0 is lru.
- tlru: first what a next turn can do without and still be in time. A turn that adds about q tokens is in time while it
  computes at most x, so losing x - q tokens of what it continues is safe. A state, or a page that ends in one, loses at
  most the prefix that ends with it, whatever else is cached; a page that ends in none lies past the last state, and
  loses nothing. Source: Tail-Optimized LRU (arXiv 2510.15152), in SGLang since #34012. Both go by the KV of a
  conversation that is left, which here is worth nothing without a state.
- BY_USE is lru by value: for whoever has to know when a block was used last (one_buffer.py).
"""

import math
from typing import Any

import numpy as np

from hbmgym.memory_backend.invariants import require
from hbmgym.memory_backend.jit import kernel, rare_subkernel, subkernel
from hbmgym.memory_backend.oplog import SSM
from hbmgym.memory_backend.table import equal_records

NONE = -1  # ends lists and marks "no entry" in the arrays of the kernels
LRU, LPB, FLOP_AWARE, TLRU, BY_USE = range(5)
ORDERS = {"lru": LRU, "lpb": LPB, "flop_aware": FLOP_AWARE, "tlru": TLRU}

RANK = np.dtype(
    [
        ("value", "f8"),
        ("used", "i8"),  # grows with every use
        ("used_s", "f8"),
        ("place", "i4"),  # in the heap, NONE: not there
        ("parent", "i4"),  # entry of the page before this one, NONE: first page, or a snapshot
        ("continued", "i4"),  # resident pages that continue this one
        ("depth", "i4"),  # pages of the prefix that ends with this block
        ("ends_in_state", "i4"),  # 1: a snapshot at the end of this page is lost with it
        ("hits", "i4"),  # in this epoch
        ("hits_before", "i4"),  # in the one before
    ],
    align=True,
)


def make_ranks(order: int, blocks: int) -> tuple[np.recarray, np.ndarray]:
    """RANK records and the heap of a pool; an order that is a list needs neither."""
    ranks = equal_records(RANK, 1 if order == LRU else blocks, place=NONE, parent=NONE)
    return ranks, np.zeros(len(ranks), np.int32)


@kernel
def first_victim(pool):
    """The cached entry that goes next; NONE when none is cached."""
    if pool.meta.order == LRU:
        return pool.meta.evict_first
    return np.int64(pool.heap[0]) if pool.meta.heap_size > 0 else np.int64(NONE)


@kernel
def enter(pool, entry):
    """An entry that is now cached joins the order as the one used last."""
    if pool.meta.order == LRU:
        _append(pool, entry)
    else:
        _use_now(pool, entry)
        offer(pool, entry)


@kernel
def leave(pool, entry):
    """A cached entry leaves the order."""
    if pool.meta.order == LRU:
        _unlink(pool, entry)
    elif pool.ranks[entry].place != NONE:
        _take_out(pool, entry)


@subkernel
def look_further(pool):
    """The entry that would go after all that were looked at since `look_away`; NONE when there is none.

    Nothing is evicted. By value, chains that the look has left are out of the heap until `look_away`.
    """
    meta = pool.meta
    if meta.chain != NONE:
        return _look_up_chain(pool)
    if meta.order != LRU:
        return _begin_chain(pool) if meta.heap_size > 0 else np.int64(NONE)
    entry = meta.evict_first if meta.looked_at == NONE else np.int64(pool.entries[meta.looked_at].next)
    if entry != NONE:
        meta.looked_at = entry
    return entry


@subkernel
def look_away(pool):
    """Put all that was looked at back to where it was in the order."""
    meta = pool.meta
    if meta.chain != NONE:
        first = pool.entries[meta.chain].next
        while first != NONE:
            _put_back(pool, first, pool.entries[first].prev)
            first = pool.entries[first].next
        meta.chain = NONE
    meta.looked_at = NONE


def eviction_order(pool: Any) -> list[int]:
    """The entries that may be evicted now, next one first."""
    order, entry = [], int(pool.meta.evict_first)
    while entry != NONE:
        order.append(entry)
        entry = int(pool.entries["next"][entry])
    heap = pool.heap[: pool.meta.heap_size]
    return order + heap[np.lexsort((pool.ranks["used"][heap], pool.ranks["value"][heap]))].tolist()


def check_order(pool: Any, cached: np.ndarray) -> None:
    """Raise AssertionError unless the order holds the `cached` entries, by value those that no page continues."""
    ranks, size = pool.ranks, int(pool.meta.heap_size)
    if pool.meta.order != LRU:
        cached = cached[ranks["continued"][cached] == 0]
        require(np.array_equal(ranks["place"][pool.heap[:size]], np.arange(size)), "the heap has lost a place")
        require(np.count_nonzero(ranks["place"] != NONE) == size, "an entry outside the heap has a place")
        above = pool.heap[(np.arange(1, size) - 1) // 2]
        below = pool.heap[1:size]
        require(np.all(ranks["value"][above] <= ranks["value"][below]), "the heap is out of order")
    order = eviction_order(pool)
    require(sorted(order) == sorted(cached.tolist()), "the eviction order does not hold the cached entries")


# --- lru: a list through entry.prev and entry.next


@subkernel
def _append(pool, entry):
    meta = pool.meta
    record = pool.entries[entry]
    record.next = NONE
    record.prev = meta.evict_last
    if meta.evict_last == NONE:
        meta.evict_first = entry
    else:
        pool.entries[meta.evict_last].next = entry
    meta.evict_last = entry


@subkernel
def _unlink(pool, entry):
    meta = pool.meta
    record = pool.entries[entry]
    if record.prev == NONE:
        meta.evict_first = record.next
    else:
        pool.entries[record.prev].next = record.next
    if record.next == NONE:
        meta.evict_last = record.prev
    else:
        pool.entries[record.next].prev = record.prev


# --- orders by value: a heap of those that may go


@subkernel
def begin_rank(pool, entry, parent, depth):
    """A page or snapshot becomes matchable; `parent` is the entry of the page before it, NONE for a snapshot."""
    rank = pool.ranks[entry]
    rank.parent = parent
    rank.depth = depth
    rank.ends_in_state = 0
    rank.hits = 0
    rank.hits_before = 0
    if parent != NONE:
        pool.ranks[parent].continued += 1  # it is pinned, so it is in no heap


@subkernel
def end_rank(pool, entry):
    """The first victim no longer continues the page before it, which may go next."""
    _succeed(pool, entry, pool.ranks[entry].parent)
    pool.ranks[entry].parent = NONE


@subkernel
def _succeed(pool, first, parent):
    """The chain from the first victim up to below `parent` goes: that page, if there is one, may be the next."""
    if parent == NONE:
        return
    pool.ranks[parent].continued -= 1
    if pool.ranks[parent].continued > 0 or pool.entries[parent].pins > 0:
        return
    # The parent mostly goes next, so it takes the place of the first victim.
    pool.ranks[first].place = NONE
    pool.ranks[parent].value = _value(pool, parent)
    _put(pool, 0, parent)
    _sift_down(pool, 0)


# A look goes up a chain of pages for as long as the next page goes before whoever else is in the heap, its rival. That
# leaves the heap alone: the deep end of the chain stays first. A chain that the look leaves is out of the heap; those
# are linked through entry.next of their deep ends, the last one first, and entry.prev is the last page looked at.


@subkernel
def _begin_chain(pool):
    """Look at the first of the heap."""
    meta = pool.meta
    first = np.int64(pool.heap[0])
    pool.entries[first].next = meta.chain
    meta.chain = meta.looked_at = first
    meta.rival = NONE
    if meta.heap_size > 1:
        meta.rival = pool.heap[1]
    if meta.heap_size > 2 and _goes_before(pool, pool.heap[2], pool.heap[1]):
        meta.rival = pool.heap[2]
    return first


@subkernel
def _look_up_chain(pool):
    """Look at the page before the last one, or at the rival if that goes before it; NONE if there is neither."""
    meta = pool.meta
    parent = np.int64(pool.ranks[meta.looked_at].parent)
    if parent != NONE and pool.ranks[parent].continued == 1 and pool.entries[parent].pins == 0:
        pool.ranks[parent].value = _value(pool, parent)
        if meta.rival == NONE or _goes_before(pool, parent, meta.rival):
            meta.looked_at = parent
            return parent
    elif meta.rival == NONE:
        return NONE
    pool.entries[meta.chain].prev = meta.looked_at
    _succeed(pool, meta.chain, parent)
    leave(pool, meta.chain)
    return _begin_chain(pool)


@subkernel
def _put_back(pool, first, last):
    """Undo that the look has left a chain; those that it left later are back."""
    parent = pool.ranks[last].parent
    place = np.int32(NONE)
    if parent != NONE:
        pool.ranks[parent].continued += 1
        place = pool.ranks[parent].place
    if place == NONE:
        offer(pool, first)
    else:
        pool.ranks[parent].place = NONE
        pool.ranks[first].value = _value(pool, first)
        _put(pool, place, first)
        _sift_up(pool, place)


@subkernel
def hit(pool, entry):
    """A request reuses what the block holds."""
    pool.ranks[entry].hits += 1


@subkernel
def set_ends_in_state(pool, page, flag):
    """A snapshot at the end of a page has come or gone."""
    rank = pool.ranks[page]
    rank.ends_in_state = flag
    if rank.place != NONE:
        rank.value = _value(pool, page)
        _sift_up(pool, rank.place)
        _sift_down(pool, rank.place)


@rare_subkernel
def offer(pool, entry):
    """Put a cached entry among those that may go, unless a resident page continues it."""
    meta = pool.meta
    if pool.ranks[entry].continued > 0:
        return
    pool.ranks[entry].value = _value(pool, entry)
    meta.heap_size += 1
    _put(pool, meta.heap_size - 1, entry)
    _sift_up(pool, meta.heap_size - 1)


@subkernel
def turn_epoch(pool):
    """Forget the hits of the epoch before the one that ends, and value all that may go anew."""
    if pool.meta.order == FLOP_AWARE:
        _set_scales(pool)
    for entry in range(len(pool.ranks)):
        pool.ranks[entry].hits_before = pool.ranks[entry].hits
        pool.ranks[entry].hits = 0
    for place in range(pool.meta.heap_size):
        pool.ranks[pool.heap[place]].value = _value(pool, pool.heap[place])
    for place in range(pool.meta.heap_size // 2 - 1, -1, -1):
        _sift_down(pool, place)


@subkernel
def _use_now(pool, entry):
    pool.meta.uses += 1
    pool.ranks[entry].used = pool.meta.uses
    pool.ranks[entry].used_s = pool.meta.now_s


@subkernel
def _saved_s_per_byte(pool, entry):
    """Seconds that whoever reuses the prefix up to this block need not compute, per byte of the block."""
    meta = pool.meta
    rank = pool.ranks[entry]
    depth = float(rank.depth)
    seconds = depth * (meta.own_s_per_page + depth * meta.own_s_per_page2)
    if rank.ends_in_state != 0:
        seconds += depth * meta.state_s_per_page
    return seconds / meta.block_bytes


@subkernel
def _value(pool, entry):
    meta = pool.meta
    rank = pool.ranks[entry]
    if meta.order == LPB:
        hits = rank.hits + rank.hits_before
        # Most of what goes was not hit, and dividing took a quarter of the time of a look (measured).
        return hits * _saved_s_per_byte(pool, entry) if hits > 0 else 0.0
    if meta.order == TLRU:
        has_state = meta.pool == SSM or rank.ends_in_state != 0
        lost_tokens = rank.depth * meta.page_tokens if has_state else 0
        return 0.0 if lost_tokens <= meta.spare_tokens else 1.0
    if meta.order == BY_USE:
        return 0.0
    # Recency and savings may add up to the same in two ways: what differs by the rounding of doubles alone is a tie.
    return float(np.float32(meta.recency_scale * rank.used_s + meta.saving_scale * _saved_s_per_byte(pool, entry)))


@subkernel
def _set_scales(pool):
    """Let recency and savings each span 1 over the blocks that are cached and matchable now."""
    meta = pool.meta
    first_s, last_s = math.inf, -math.inf
    least, most = math.inf, -math.inf
    for entry in range(len(pool.ranks)):
        record = pool.entries[entry]
        if record.pins == 0 and record.key != NONE:
            saved = _saved_s_per_byte(pool, entry)
            least, most = min(least, saved), max(most, saved)
            first_s = min(first_s, pool.ranks[entry].used_s)
            last_s = max(last_s, pool.ranks[entry].used_s)
    meta.recency_scale = 1.0 / (last_s - first_s) if last_s > first_s else 0.0
    meta.saving_scale = meta.flop_weight / (most - least) if most > least else 0.0


@subkernel
def _goes_before(pool, entry, other):
    rank = pool.ranks[entry]
    against = pool.ranks[other]
    return rank.value < against.value or (rank.value == against.value and rank.used < against.used)


@subkernel
def _put(pool, place, entry):
    pool.heap[place] = entry
    pool.ranks[entry].place = place


@subkernel
def _sift_up(pool, place):
    entry = pool.heap[place]
    while place > 0:
        above = (place - 1) // 2
        if not _goes_before(pool, entry, pool.heap[above]):
            break
        _put(pool, place, pool.heap[above])
        place = above
    _put(pool, place, entry)


@subkernel
def _sift_down(pool, place):
    entry = pool.heap[place]
    size = pool.meta.heap_size
    while True:
        below = 2 * place + 1
        if below >= size:
            break
        if below + 1 < size and _goes_before(pool, pool.heap[below + 1], pool.heap[below]):
            below += 1
        if not _goes_before(pool, pool.heap[below], entry):
            break
        _put(pool, place, pool.heap[below])
        place = below
    _put(pool, place, entry)


@rare_subkernel
def _take_out(pool, entry):
    meta = pool.meta
    place = pool.ranks[entry].place
    pool.ranks[entry].place = NONE
    meta.heap_size -= 1
    if place == meta.heap_size:
        return
    moved = pool.heap[meta.heap_size]
    _put(pool, place, moved)
    _sift_up(pool, place)
    _sift_down(pool, pool.ranks[moved].place)
