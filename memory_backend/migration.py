"""AVMP's rule: when a failed allocation takes chunks from the other pool, and how many.

Source: "Asymmetric Virtual Memory Paging" (arXiv 2605.22416), section 3.2. Cached blocks count as free.
"""

from dataclasses import dataclass

from hbmgym.memory_backend.jit import subkernel
from hbmgym.memory_backend.oplog import KV, SSM
from hbmgym.memory_backend.pools import NONE
from hbmgym.memory_backend.resize import most_slots_beside


@dataclass(frozen=True)
class MigrateOnFailure:
    """Thresholds and throttle, by default the paper's; how many chunks move is ours."""

    low: float = 0.05
    """The failing pool must have less than this share of its blocks free."""
    high: float = 0.30
    """The other pool must have more than this share of its blocks free."""
    interval_ops: int = 1000
    """Successful operations that must lie between two such migrations."""
    chunks: int = 16
    """Chunks to move: more if the allocation needs more, fewer if the other pool has fewer to spare."""

    def __post_init__(self) -> None:
        if not 0.0 < self.low < self.high < 1.0:
            raise ValueError(f"low {self.low} and high {self.high}: expected 0 < low < high < 1")
        if self.interval_ops < 0 or self.chunks < 1:
            raise ValueError(f"interval_ops {self.interval_ops} must be >= 0 and chunks {self.chunks} >= 1")


PAPERS_RULE = MigrateOnFailure()


@subkernel
def thresholds_allow(memory, failing, low, high):
    """Is less than `low` of pool `failing` free or cached, and more than `high` of the other one?"""
    short, other = memory.kv.meta, memory.ssm.meta
    if failing == SSM:
        short, other = other, short
    return (short.limit - short.live) / short.capacity < low and (other.limit - other.live) / other.capacity > high


@subkernel
def slots_after_migration(memory, failing, slots, pages, batch_chunks):
    """Slots of the split in which so many slots and pages more can be live, after pool `failing` was short of them.

    `batch_chunks` chunks move, more where the shortfall or one slot takes more, fewer where the other pool cannot spare
    as many. NONE where no split holds all of it beside what is live.
    """
    ssm = memory.ssm.meta
    least = ssm.live + slots
    most = most_slots_beside(memory, memory.kv.meta.live + pages)
    wanted_chunks = ssm.chunks - batch_chunks if failing == KV else ssm.chunks + batch_chunks
    wanted = max(wanted_chunks * ssm.chunk_bytes // ssm.block_bytes, least)
    found = max(min(wanted, most), memory.split.min_slots)
    return found if least <= found <= most else NONE
