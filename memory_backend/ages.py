"""How far a cached block is from eviction, without walking the order.

A pool's clock counts the blocks that joined its order of eviction, and every block remembers when it joined
(`Pool.joined_at`). Of what is cached, those goes after it that joined later and have not left again; all else goes
before it. `Pool.ages` counts them by age, a stretch of the clock: stack distances by buckets (Mimir, Saemundsson et
al., SoCC 2014), exact but for what left out of the block's own age.

Under lru what is evicted joined before all that may be asked about, so nothing is noted for it. Other orders do not go
by age; there the answer is the place that the block would have under lru.
"""

from typing import Any

import numpy as np

from hbmgym.memory_backend.jit import rare_subkernel, subkernel

LRU = 0  # of eviction.ORDERS

AGES = 1024  # a power of two; what joined before the oldest goes first
AGES_PER_BUDGET = 128


def age_bits(blocks: int) -> int:
    """log2 of the joins of one age, for a pool of at most `blocks` blocks: at most 1/128 of them, and at least one."""
    return max((blocks // AGES_PER_BUDGET).bit_length() - 1, 0)


@subkernel
def note_eviction(pool, entry):
    """A cached block goes for want of room."""
    meta = pool.meta
    meta.evictions += 1
    if meta.order != LRU:
        part(pool, entry)
    meta.full_at = meta.joined
    meta.parted &= 0


@subkernel
def join(pool, entry):
    """A block joins the order as the one used last."""
    pool.joined_at[entry] = pool.meta.joined
    pool.meta.joined += 1


@subkernel
def part(pool, entry):
    """A block leaves the order, but not as the first of it."""
    joined = np.int64(pool.joined_at[entry])
    if joined < pool.meta.full_at:
        pool.meta.parted += 1
    if joined >= pool.meta.counted:
        _count(pool)
    age = joined >> pool.meta.age_bits
    if (pool.meta.counted >> pool.meta.age_bits) - age < AGES:
        pool.ages[age & (AGES - 1)] -= 1


@rare_subkernel
def _count(pool):
    """Count by age what has joined since the last count."""
    meta = pool.meta
    while meta.counted < meta.joined:
        age = meta.counted >> meta.age_bits
        begin, end = age << meta.age_bits, (age + 1) << meta.age_bits
        if meta.counted == begin:
            pool.ages[age & (AGES - 1)] = 0
        end = min(end, meta.joined)
        pool.ages[age & (AGES - 1)] += end - meta.counted
        meta.counted = end


@subkernel
def joined_since(pool, joined):
    """Cached blocks that joined the order after the one that joined then."""
    meta = pool.meta
    _count(pool)
    newest = (meta.joined - 1) >> meta.age_bits
    age = joined >> meta.age_bits
    later: Any = 0
    if newest - age >= AGES:
        age = newest - AGES
    else:
        # Of the block's own age, as many as joined after it, in proportion to what has not left.
        count = np.int64(pool.ages[age & (AGES - 1)])
        end = min((age + 1) << meta.age_bits, meta.joined)
        later = count * (end - joined - 1) // max(end - (age << meta.age_bits), 1)
    for a in range(age + 1, newest + 1):
        later += np.int64(pool.ages[a & (AGES - 1)])
    return later


@subkernel
def slack(pool, entry, enough):
    """Blocks that the pool could do without and still hold the cached block `entry`; any number above `enough` stands
    for more than that."""
    meta = pool.meta
    joined = np.int64(pool.joined_at[entry])
    spare = max(meta.limit - meta.live - meta.cached, 0)
    # When the pool was full last, what is spare now was needed, but for what went after the block and goes before it.
    room = meta.cached - 1 + (spare if joined >= meta.full_at else min(spare, meta.parted))
    at_least = room - (meta.joined - 1 - joined)
    if at_least >= enough:
        return at_least
    return max(room - joined_since(pool, joined), 0)
