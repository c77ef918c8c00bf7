"""How far a cached block is from eviction, without a word per block and without walking the order.

A pool's clock counts the blocks that joined its order of eviction. Whoever wants to ask later notes the clock when a
block joins. Of what is cached, those goes after it that joined later and have not left again; all else goes before it.
`Pool.ages` counts them by age, a stretch of the clock: stack distances by buckets (Mimir, Saemundsson et al., SoCC
2014), exact but for what left out of the block's own age.

Assumed: what is evicted joined before what is asked about, as under lru. Other orders do not go by age; there the
counts are scaled to what is cached, and the answer is the place that the block would have under lru.
"""

from typing import Any

import numpy as np

from hbmgym.memory_backend.jit import subkernel

LRU = 0  # of eviction.ORDERS

AGES = 1024  # a power of two; what joined before the oldest goes first
AGES_PER_BUDGET = 128


def age_bits(blocks: int) -> int:
    """log2 of the joins of one age, for a pool of at most `blocks` blocks: at most 1/128 of them, and at least one."""
    return max((blocks // AGES_PER_BUDGET).bit_length() - 1, 0)


@subkernel
def clock(pool):
    """Blocks that have joined the order so far, those that nobody can match left out; books them by age."""
    meta = pool.meta
    # Whatever joined is still cached, was evicted, or left.
    now = meta.cached + meta.evictions + meta.left - meta.abandoned
    while meta.joined < now:
        age = meta.joined >> meta.age_bits
        end = min((age + 1) << meta.age_bits, now)
        pool.ages[age & (AGES - 1)] += end - meta.joined
        meta.joined = end
        if end == (age + 1) << meta.age_bits:
            pool.ages[(age + 1) & (AGES - 1)] = 0
    return meta.joined


@subkernel
def lost_blocks(pool):
    """Evictions so far of what could have been matched."""
    return pool.meta.evictions - pool.meta.junk_evictions


@subkernel
def part(pool, joined, count):
    """`count` blocks that joined when the clock was `joined` are in the order no longer."""
    age = joined >> pool.meta.age_bits
    if (pool.meta.joined >> pool.meta.age_bits) - age < AGES:
        pool.ages[age & (AGES - 1)] -= count


@subkernel
def leave_order(pool, joined, count):
    """`count` blocks that joined then are about to leave the order without being evicted."""
    part(pool, joined, count)
    pool.meta.left += count


@subkernel
def joined_since(pool, joined):
    """Cached blocks that joined the order after one that joined then; `clock` must be up to date."""
    meta = pool.meta
    newest = meta.joined >> meta.age_bits
    age = joined >> meta.age_bits
    later: Any = 0
    if newest - age >= AGES:
        age = newest - AGES
    else:
        # Of the block's own age, as many as joined after it, in proportion to what has not left.
        count = np.int64(pool.ages[age & (AGES - 1)])
        if age < newest:
            later = (count * (((age + 1) << meta.age_bits) - joined)) >> meta.age_bits
        else:
            later = min(count, max(meta.joined - joined, 0))
    for a in range(age + 1, newest + 1):
        later += np.int64(pool.ages[a & (AGES - 1)])
    return later


@subkernel
def slack(pool, joined, enough):
    """Blocks that the pool could do without and still hold a cached block that joined then; any number above `enough`
    stands for more than that."""
    meta = pool.meta
    room = meta.cached + max(meta.limit - meta.live - meta.cached, 0)
    at_least = room - (clock(pool) - joined)
    if at_least >= enough:
        return at_least
    later = joined_since(pool, joined)
    if meta.order != LRU:
        counted = joined_since(pool, np.int64(0))
        if counted > meta.cached:
            later = later * meta.cached // counted
    return max(room - later, 0)
