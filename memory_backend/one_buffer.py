"""Pages and slots in one buffer, one from each end: what is free belongs to both, and whoever needs it takes it.

Source: SGLang's unified memory (0.5.23, `--enable-unified-memory`, #29678): on a shortage it compacts, then evicts KV,
then states, one by one until the need is met. Here the free room between the two ends lies with one of the pools, and
changes hands in the chunks of a realisable split. There is no cap, no reserve and no hysteresis.

Who makes way: cached pages before snapshots, as in SGLang (#36713), or whoever was used least recently, as in vLLM,
whose pages and states lie in one queue.
"""

from hbmgym.memory_backend.eviction import NONE, first_victim
from hbmgym.memory_backend.jit import subkernel
from hbmgym.memory_backend.pools import free_blocks
from hbmgym.memory_backend.prefix_cache import evict_page, evict_snapshot
from hbmgym.memory_backend.resize import change_split_now, most_slots_beside, ssm_chunks_of


@subkernel
def can_be_live(memory, slots, pages):
    """Is there room for so many more live blocks once all that is cached has gone?"""
    live_slots = max(memory.ssm.meta.live + slots, memory.split.min_slots)
    return live_slots <= most_slots_beside(memory, memory.kv.meta.live + pages)


@subkernel
def have_free(memory, slots, pages, by_use):
    """Have so many slots and pages free, if they can be had; returns the bytes copied.

    Free room of either pool pays first; then, `by_use`, what was used least recently, else cached pages, as far as that
    helps, before cached slots.
    """
    kv, ssm = memory.kv.meta, memory.ssm.meta
    has_enough = free_blocks(memory.ssm) >= slots and free_blocks(memory.kv) >= pages
    if has_enough or not can_be_live(memory, slots, pages):
        return 0
    while True:
        least = max(ssm.live + ssm.cached + slots, memory.split.min_slots)
        most = most_slots_beside(memory, kv.live + kv.cached + pages)
        if least <= most:
            return change_split_now(memory, min(max(ssm.capacity, least), most))[1]
        if by_use:
            page_goes = page_was_used_first(memory)
        else:
            page_goes = kv.cached > 0 and (pages > 0 or least <= most_slots_beside(memory, kv.live))
        if page_goes:
            evict_page(memory)
        else:
            evict_snapshot(memory)


@subkernel
def page_was_used_first(memory):
    """Of the next page and the next snapshot to go, was the page used first? What nobody can match always was; of two
    that were used at the same time the page goes, since a request gives its pages back first."""
    kv, ssm = memory.kv, memory.ssm
    if kv.meta.cached == 0 or ssm.meta.cached == 0:
        return kv.meta.cached > 0
    page, slot = first_victim(kv), first_victim(ssm)
    if kv.entries[page].key == NONE or ssm.entries[slot].key == NONE:
        return kv.entries[page].key == NONE
    return kv.ranks[page].used_s <= ssm.ranks[slot].used_s


@subkernel
def free_slots_can_pay(memory):
    """Would KV gain chunks if no slot were free?"""
    ssm = memory.ssm.meta
    return ssm_chunks_of(memory, max(ssm.live + ssm.cached, memory.split.min_slots)) < ssm.chunks
