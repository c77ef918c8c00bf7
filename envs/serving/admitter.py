"""HiMA's Admitter: whether the queue's head gets in now, and what makes room for it, by price in seconds of work.

| action | feasible when | cost |
|---|---|---|
| own-free | so many slots and pages are free | 0 |
| cross-free | chunks of the other pool are free | move |
| own-evict | both pools have enough that is free or cached | loss of the victims in both pools |
| cross-evict | something has to be evicted beside the move | move + loss of the victims in both pools |
| defer | a request runs or chunks move; `max_deferrals` times per request | seconds it lasts x requests in the queue |
| no choice | nothing of the above, so that the head waits | |

The least cost is taken, of equal ones the upper row. A move is one of chunks to the pool that lacks room, failing that
to the one whose own victims are dearer; it costs chunks x chunk_move_s + horizon x curvature / 2 x (free bytes that
move away)^2. When both pools lack room there is no choice. What a loss is says `memory_backend/pricing.py`.

Re-implemented from HiMA's abstract (OpenReview KEf0qZPF95) and public notes on development forks; what differs may be
ours. That the price of moved bytes is of second order, since both pools are worth the same at the Budgeter's split, is
our reading.
"""

import math

from hbmgym.envs.serving.shortage import split_is_under_way
from hbmgym.envs.serving.state import (
    AS_LONG_AS_IT_LASTS,
    CROSS_EVICT,
    CROSS_FREE,
    DEFER,
    NO_CHOICE,
    OWN_EVICT,
    OWN_FREE,
    RATIOS,
)
from hbmgym.memory_backend.jit import subkernel
from hbmgym.memory_backend.oplog import KV, SSM
from hbmgym.memory_backend.pools import NONE
from hbmgym.memory_backend.prefix_cache import evict_page, evict_snapshot
from hbmgym.memory_backend.pricing import limits_of_split, losses_s, shortfall, slots_after_cross
from hbmgym.memory_backend.resize import ssm_chunks_of


@subkernel
def pool_to_wait_for(state, row, reuse, pages):
    """NONE when the queue's head gets in: `engine` then holds what has to go first. Else the pool that it waits for.

    The head reuses `reuse` pages and needs `pages` more to be live, cached ones of those that it reuses among them.
    """
    engine, memory = state.engine, state.memory
    kv, ssm = memory.kv.meta, memory.ssm.meta
    slots, taken = engine.slots_per_request, -(-state.requests[row].goal // engine.page_tokens) - reuse
    states_out = shortfall(memory.ssm, slots, ssm.limit)
    pages_out = shortfall(memory.kv, taken, kv.limit)
    if states_out == 0 and pages_out == 0:
        return _choose(state, OWN_FREE, states_out, pages_out, NONE)

    lacks_slots, lacks_pages = ssm.live + slots > ssm.limit, kv.live + pages > kv.limit
    short = SSM if lacks_slots else KV
    own_s = defer_s = math.inf
    if not lacks_slots and not lacks_pages:
        states_s, pages_s = _losses_s(state, row, reuse, states_out, pages_out)
        own_s = states_s + pages_s
        short = SSM if states_s > pages_s else KV
    found = NONE
    # A move costs something, so victims that nobody will miss are cheaper.
    if own_s > 0.0 and not (lacks_slots and lacks_pages) and not split_is_under_way(state):
        found = slots_after_cross(memory, short, slots, pages, taken)
    cross_s, states_away, pages_away = _price_of_cross(state, row, reuse, taken, short, found)
    crosses_free = states_away == 0 and pages_away == 0
    may_defer = engine.prefilling + engine.decoding > 0 or split_is_under_way(state)
    if min(own_s, cross_s) < math.inf and may_defer and state.requests[row].deferrals < engine.max_deferrals:
        defer_s = _deferral_s(engine)

    action = _cheapest(own_s, cross_s, crosses_free, defer_s)
    if action in (CROSS_FREE, CROSS_EVICT) and engine.migrated_now != 0:
        return short  # chunks move once at an edge: the next one looks again
    _note_ratio(state, own_s, cross_s, defer_s)
    if action in (CROSS_FREE, CROSS_EVICT):
        return _choose(state, action, states_away, pages_away, found)
    if action == OWN_EVICT:
        return _choose(state, action, states_out, pages_out, NONE)
    state.actions[action] += 1
    state.requests[row].deferrals += action == DEFER
    return short


@subkernel
def _deferral_s(engine):
    """What all who wait lose with a deferral, which ends, as a rule, when the next request does."""
    if engine.deferral_weight == AS_LONG_AS_IT_LASTS:
        return engine.waiting * engine.busy_s / max(engine.finished, 1)
    return engine.deferral_weight * engine.waiting


@subkernel
def _price_of_cross(state, row, reuse, taken, short, found):
    """(Cost, states and pages that have to go) of moving to the split with `found` slots; NONE cannot be had."""
    memory, slots = state.memory, state.engine.slots_per_request
    if found == NONE:
        return math.inf, 0, 0
    slot_limit, page_limit = limits_of_split(memory, found)
    states, pages = shortfall(memory.ssm, slots, slot_limit), shortfall(memory.kv, taken, page_limit)
    states_s, pages_s = _losses_s(state, row, reuse, states, pages)
    return states_s + pages_s + _move_s(state, short, slots, taken, found), states, pages


@subkernel
def _cheapest(own_s, cross_s, crosses_free, defer_s):
    action, least_s = NO_CHOICE, math.inf
    if crosses_free and cross_s < least_s:
        action, least_s = CROSS_FREE, cross_s
    if own_s < least_s:
        action, least_s = OWN_EVICT, own_s
    if cross_s < least_s:
        action, least_s = CROSS_EVICT, cross_s
    return DEFER if defer_s < least_s else action


@subkernel
def _choose(state, action, states_out, pages_out, split):
    """The head gets in, after so many states and pages have gone and the split has `split` slots, NONE: as it is."""
    engine = state.engine
    state.actions[action] += 1
    engine.states_out, engine.pages_out, engine.split_to_take = states_out, pages_out, split
    return NONE


@subkernel
def evict_as_chosen(state):
    """The head's own pages and snapshot are live now: evict what was priced."""
    engine, memory = state.engine, state.memory
    while engine.states_out > 0 and memory.ssm.meta.cached > 0:
        evict_snapshot(memory)
        engine.states_out -= 1
    while engine.pages_out > 0:
        evict_page(memory)
        engine.pages_out -= 1
    engine.states_out = 0


@subkernel
def _losses_s(state, row, reuse, states, pages):
    engine = state.engine
    window_s = 2.0 * engine.epoch_s - (engine.epoch_end_s - engine.now_s)  # over which hits were counted
    first = state.rows[row].ref_off
    return losses_s(state.memory, states, pages, state.refs, first, reuse, engine.horizon_s / window_s)


@subkernel
def _move_s(state, to_pool, slots, taken, found):
    """Moving to the split with `found` slots: the transfer, and what the free bytes that go with it are worth."""
    kv, ssm = state.memory.kv.meta, state.memory.ssm.meta
    if to_pool == SSM:
        free_bytes = max(kv.limit - kv.live - kv.cached - taken, 0) * kv.block_bytes
    else:
        free_bytes = max(ssm.limit - ssm.live - ssm.cached - slots, 0) * ssm.block_bytes
    chunks = abs(ssm_chunks_of(state.memory, found) - ssm.chunks)
    free_moved = float(min(chunks * ssm.chunk_bytes, free_bytes))
    worth_s = state.engine.horizon_s * state.engine.curvature * 0.5 * free_moved * free_moved
    return chunks * state.cost.chunk_move_s + worth_s


@subkernel
def _note_ratio(state, own_s, cross_s, defer_s):
    """Count, by its power of two, how many times dearer the second cheapest is, if there are two."""
    first_s = min(own_s, cross_s, defer_s)
    second_s = max(min(own_s, cross_s), min(max(own_s, cross_s), defer_s))
    if second_s == math.inf:
        return
    place = 0
    while place < RATIOS - 1 and 2.0 * first_s <= second_s:
        first_s *= 2.0
        place += 1
    state.ratios[place] += 1
