"""What room costs in seconds of work: what the victims of an eviction are worth, and which chunks could move instead.

Re-implemented from HiMA's abstract (OpenReview KEf0qZPF95) and public notes on development forks; what differs may be
ours. The loss of a victim is the hits to be expected within a horizon x the seconds to recover what it holds:

- hits: an order that counts them (lpb, flop_aware) has those of two epochs. They and one more are divided by the time
  they were counted over and multiplied by the horizon. Without the one more, what is new would cost nothing, and nobody
  would look for another way. lru counts none: every victim is taken to be hit once, as in the forks.
- seconds: for a page the attention of its own tokens, for a snapshot the rest of the prefill of its prefix; a page
  takes its snapshot along. The forks charge every page with the attention of its whole prefix, so that a chain of n
  pages costs n / 3 times what it takes to recover it. Here the pages of a chain add up to just that.
"""

from dataclasses import dataclass

from hbmgym.memory_backend.eviction import LRU, look_away, look_further, set_ends_in_state
from hbmgym.memory_backend.jit import subkernel
from hbmgym.memory_backend.oplog import SSM
from hbmgym.memory_backend.pools import NONE
from hbmgym.memory_backend.resize import most_slots_beside, ssm_chunks_of

PRICE_MODES = ("shadow", "none")


@dataclass(frozen=True)
class PricedAdmission:
    """What HiMA's Admitter weighs; seconds of work where nothing else is said."""

    price_mode: str = "shadow"
    """shadow: a controller's prices count, and free bytes that move away cost horizon_s x curvature / 2 x bytes^2.
    none: what a controller publishes reaches nobody, so that free bytes cost nothing, as in the forks, and deferring
    what is said here."""
    horizon_s: float = 60.0
    """Seconds for which a loss counts: the forks' window of LPB."""
    deferral_weight: float | None = None
    """Cost of deferring, per request in the queue, until a controller names its own. None: what a deferral lasts, the
    busy seconds per request that has finished so far."""
    max_deferrals: int = 0
    """After so many a request is deferred only if there is no other way. 0, since four gain nothing: over ten cases of
    six training episodes each they cost .9 % more."""

    def __post_init__(self) -> None:
        if self.price_mode not in PRICE_MODES:
            raise ValueError(f"price_mode is {self.price_mode!r}, expected one of: {', '.join(PRICE_MODES)}")
        if not 0.0 < self.horizon_s < float("inf"):
            raise ValueError(f"horizon_s is {self.horizon_s}, expected a finite number > 0")
        weight = self.deferral_weight
        if weight is not None and not (isinstance(weight, int | float) and 0.0 <= weight < float("inf")):
            raise ValueError(f"deferral_weight is {weight!r}, expected a finite number >= 0, or None")
        if self.max_deferrals < 0:
            raise ValueError(f"max_deferrals is {self.max_deferrals}, expected an integer >= 0")


ADMITTER = PricedAdmission()


@subkernel
def shortfall(pool, taken, limit):
    """Cached blocks that have to go before `taken` more are taken and no more than `limit` are in use."""
    return max(pool.meta.live + pool.meta.cached + taken - limit, 0)


@subkernel
def losses_s(memory, states, pages, refs, first, reuse, horizon_over_window):
    """(Seconds lost with the next `states` snapshots to go, with the next `pages` pages after them); all stays cached.

    Spared are the first `reuse` pages of a row, whose ids begin at `refs[first]`, and the snapshot at their end unless
    there is no other. Hits count for `horizon_over_window` each, under lru every block for one.
    """
    own = memory.ids[refs[first + reuse - 1]].snapshot if reuse > 0 else NONE
    states_s = _states_loss_s(memory, states, own, horizon_over_window)
    pages_s = _pages_loss_s(memory, pages, refs, first, reuse, horizon_over_window)
    look_away(memory.kv)
    _set_looked_at_states(memory, own, False)
    look_away(memory.ssm)
    return states_s, pages_s


@subkernel
def _states_loss_s(memory, states, own, horizon_over_window):
    """Look at the states that go. Until `losses_s` is done, their pages do not end in one."""
    seconds = 0.0
    while states > 0:
        entry = look_further(memory.ssm)
        if entry == NONE:
            seconds += _state_loss_s(memory, own, horizon_over_window)  # the request goes on in its slot
            break
        if entry != own:
            seconds += _state_loss_s(memory, entry, horizon_over_window)
            states -= 1
    _set_looked_at_states(memory, own, True)
    return seconds


@subkernel
def _set_looked_at_states(memory, own, gone):
    """Let the pages under the states that were looked at end in none, or in them again."""
    ssm = memory.ssm
    entry = ssm.meta.looked_at if ssm.meta.order == LRU else ssm.meta.chain
    while entry != NONE:
        key = ssm.entries[entry].key
        if entry != own:
            memory.ids[key].snapshot = NONE if gone else entry
            if ssm.meta.order != LRU:
                set_ends_in_state(memory.kv, memory.ids[key].page, 0 if gone else 1)
        entry = ssm.entries[entry].prev if ssm.meta.order == LRU else ssm.entries[entry].next


@subkernel
def _pages_loss_s(memory, pages, refs, first, reuse, horizon_over_window):
    kv = memory.kv
    seconds = 0.0
    while pages > 0:
        entry = look_further(kv)
        key = kv.entries[entry].key
        pages -= 1
        page_id = memory.ids[key]
        depth = page_id.depth
        if depth <= reuse and refs[first + depth - 1] == key:
            pages += 1  # of the request itself
            continue
        hits = _expected_hits(kv, entry, horizon_over_window)
        seconds += hits * (kv.meta.own_s_per_page + kv.meta.own_s_per_page2 * (2.0 * depth - 1.0))
        if page_id.snapshot != NONE:
            seconds += _state_loss_s(memory, page_id.snapshot, horizon_over_window)
    return seconds


@subkernel
def _state_loss_s(memory, entry, horizon_over_window):
    ssm = memory.ssm
    depth = memory.ids[ssm.entries[entry].key].depth
    return _expected_hits(ssm, entry, horizon_over_window) * depth * ssm.meta.own_s_per_page


@subkernel
def _expected_hits(pool, entry, horizon_over_window):
    if pool.meta.order == LRU:
        return 1.0
    return (pool.ranks[entry].hits + pool.ranks[entry].hits_before + 1.0) * horizon_over_window


@subkernel
def slots_after_cross(memory, failing, slots, pages, taken_pages):
    """Slots of the split in which pool `failing` has free what it lacks, or as much of it as the other pool can give
    when all that it caches goes; NONE where that is nothing, or not enough for so many slots and pages more to be live.

    `taken_pages` of the pages are not cached yet; of the slots none is.
    """
    kv, ssm = memory.kv.meta, memory.ssm.meta
    least = max(ssm.live + slots, memory.split.min_slots)
    most = most_slots_beside(memory, kv.live + pages)
    if least > most:
        return NONE
    if failing == SSM:
        found = max(min(ssm.live + ssm.cached + slots, most), least)
        return found if ssm_chunks_of(memory, found) > ssm.chunks else NONE
    found = max(most_slots_beside(memory, kv.live + kv.cached + taken_pages), least)
    return found if ssm_chunks_of(memory, found) < ssm.chunks else NONE


@subkernel
def limits_of_split(memory, slots):
    """(Slots, pages) that the split with `slots` slots holds."""
    kv, ssm = memory.kv.meta, memory.ssm.meta
    ssm_chunks = ssm_chunks_of(memory, slots)
    kv_chunks = memory.split.chunks - ssm_chunks
    return ssm_chunks * ssm.chunk_bytes // ssm.block_bytes, kv_chunks * kv.chunk_bytes // kv.block_bytes
