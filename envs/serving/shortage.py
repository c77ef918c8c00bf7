"""What happens when blocks run short (rule 9): `answer_shortage` decides.

| on_shortage | as in | when a pool has too few blocks that are free or cached |
|---|---|---|
| evict | engines with a fixed split | whoever needs them waits, or preempts |
| migrate | AVMP | chunks of the other pool arrive at once, and the next iteration is charged for the remap |
| float | SGLang's unified memory | the other pool has given all but its live blocks, since one free room serves both |
| float-lru | vLLM's one pool | the same; whatever was used least recently makes way, and not pages before snapshots |
| priced | HiMA's Admitter | who wants in was told by `admitter.py`; who runs and needs a page gets chunks as above |
"""

from hbmgym.memory_backend.jit import subkernel
from hbmgym.memory_backend.migration import slots_after_migration, thresholds_allow
from hbmgym.memory_backend.one_buffer import can_be_live, free_slots_can_pay, have_free, page_was_used_first
from hbmgym.memory_backend.oplog import KV, SSM
from hbmgym.memory_backend.pools import NONE, free_blocks
from hbmgym.memory_backend.pricing import slots_after_cross
from hbmgym.memory_backend.resize import change_split_now, most_slots_beside

EVICT, MIGRATE, PRICED, FLOAT, FLOAT_LRU = range(5)
SHORTAGE_RULES = {"evict": EVICT, "migrate": MIGRATE, "float": FLOAT, "float-lru": FLOAT_LRU, "priced": PRICED}
ONE_BUFFER = ("float", "float-lru")
"""Rules under which there is no split to ask for."""


@subkernel
def split_is_given(state):
    """Does no shortage change the split?"""
    return state.engine.on_shortage == EVICT


@subkernel
def is_one_buffer(state):
    """Does one free room serve both pools?"""
    return state.engine.on_shortage >= FLOAT


@subkernel
def lacking_pool(state, slots, pages, request_pages):
    """The pool that has no room for so many more live blocks, the slots' first; NONE when both have.

    One buffer lacks bytes: that counts for the pool of which the request takes more bytes, with `request_pages` in all.
    """
    kv, ssm = state.memory.kv.meta, state.memory.ssm.meta
    if is_one_buffer(state):
        if can_be_live(state.memory, slots, pages):
            return NONE
        return SSM if slots * ssm.block_bytes > request_pages * kv.block_bytes else KV
    if ssm.live + slots > ssm.limit:
        return SSM
    return KV if kv.live + pages > kv.limit else NONE


@subkernel
def answer_shortage(state, lacking, slots, pages, request_pages):
    """Change the split at once, if the rule says so, for a request that needs so many slots and pages more,
    `request_pages` in all, and for which pool `lacking` has no room. True when there is room now; what is cached may
    have changed. The next iteration is charged for the move."""
    engine = state.engine
    found = NONE
    if engine.on_shortage == MIGRATE:
        found = _split_of_avmp(state, lacking, slots, pages, request_pages)
    if engine.on_shortage == PRICED and engine.migrated_now == 0 and not split_is_under_way(state):
        found = slots_after_cross(state.memory, lacking, slots, pages, pages)
    if found == NONE:
        return False
    take_split(state, found)
    return True


@subkernel
def split_is_under_way(state):
    """Has a requested split not come about yet? Then no shortage changes it."""
    return state.memory.kv.meta.chunks != state.memory.kv.meta.target_chunks


@subkernel
def take_split(state, slots):
    """Take the split with `slots` slots at once; the next iteration is charged for the move."""
    engine = state.engine
    chunks, copied = change_split_now(state.memory, slots)
    engine.debt_s += chunks * state.cost.chunk_move_s + copied * state.cost.block_copy_s_per_byte
    engine.migrated_now = 1
    engine.next_migration = engine.allocations + engine.migration_interval


@subkernel
def _split_of_avmp(state, lacking, slots, pages, request_pages):
    """Slots of the split that AVMP's rule takes, once at an iteration edge at most and never while a requested split
    is under way; NONE: it takes no other."""
    engine = state.engine
    memory = state.memory
    if engine.migrated_now != 0 or split_is_under_way(state):
        return NONE
    # Waiting cannot help a request that is larger than its pool, so neither thresholds nor throttle bind it.
    if lacking == SSM or request_pages <= memory.kv.meta.capacity:
        is_due = engine.allocations >= engine.next_migration
        if not is_due or not thresholds_allow(memory, lacking, engine.migration_low, engine.migration_high):
            return NONE
    return slots_after_migration(memory, lacking, slots, pages, engine.migration_chunks)


@subkernel
def slots_within_reach(state):
    """Slots that requests may hold at once: the SSM pool's; of one buffer, all that its live pages leave."""
    if is_one_buffer(state):
        return max(most_slots_beside(state.memory, state.memory.kv.meta.live), state.memory.ssm.meta.live)
    return state.memory.ssm.meta.limit


@subkernel
def fetch_room(state, slots, pages):
    """Before so many slots and pages are taken from one buffer: fetch the room that the other pool does not need."""
    if is_one_buffer(state):
        copied = have_free(state.memory, slots, pages, state.engine.on_shortage == FLOAT_LRU)
        state.engine.debt_s += copied * state.cost.block_copy_s_per_byte


@subkernel
def page_needs_an_edge(state):
    """Can the next page change the split? Then it can cost time, and has to be taken at an iteration edge."""
    if not is_one_buffer(state) or free_blocks(state.memory.kv) > 0:
        return False
    if state.engine.on_shortage == FLOAT_LRU and not page_was_used_first(state.memory):
        return True
    return free_slots_can_pay(state.memory) or state.memory.kv.meta.cached == 0
