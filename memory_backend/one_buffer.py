"""Pages and slots in one buffer, one from each end: what is free belongs to both, and whoever needs it takes it.

Source: SGLang's unified memory (0.5.23, `--enable-unified-memory`, #29678): on a shortage it compacts, then evicts KV,
then states, one by one until the need is met. Here the free room between the two ends lies with one of the pools, and
changes hands in the chunks of a realisable split. There is no cap, no reserve and no hysteresis.
"""

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
def have_slot_free(memory, now_s):
    """Have a free slot if free room or cached pages can pay for it, else leave that to the cached slots; returns the
    bytes copied."""
    kv, ssm = memory.kv.meta, memory.ssm.meta
    if free_blocks(memory.ssm) > 0 or ssm.capacity >= most_slots_beside(memory, kv.live):
        return 0
    while ssm.capacity >= most_slots_beside(memory, kv.live + kv.cached):
        evict_page(memory)
        if free_blocks(memory.ssm) > 0:  # the snapshot at the page's end went with it
            return 0
    return change_split_now(memory, ssm.capacity + 1, now_s)[1]


@subkernel
def slots_can_pay(memory):
    """Would KV gain chunks if no slot were free?"""
    ssm = memory.ssm.meta
    return ssm_chunks_of(memory, max(ssm.live + ssm.cached, memory.split.min_slots)) < ssm.chunks


@subkernel
def have_pages_free(memory, count, now_s):
    """Have `count` free pages: free slots pay first, then cached pages, then snapshots; returns the bytes copied.

    Nothing is evicted where that many pages cannot be had.
    """
    kv, ssm = memory.kv.meta, memory.ssm.meta
    copied = 0
    if free_blocks(memory.kv) >= count or not can_be_live(memory, 0, count):
        return copied
    while free_blocks(memory.kv) < count:
        if slots_can_pay(memory):
            wanted = most_slots_beside(memory, kv.live + kv.cached + count)
            copied += change_split_now(memory, max(wanted, ssm.live + ssm.cached, memory.split.min_slots), now_s)[1]
        elif kv.cached > 0:
            evict_page(memory)
        else:
            evict_snapshot(memory)
    return copied
