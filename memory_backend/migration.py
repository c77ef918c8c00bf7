"""When a failed allocation may take chunks from the other pool, and how many."""

from dataclasses import dataclass

from hbmgym.memory_backend.oplog import KV
from hbmgym.memory_backend.pools import Pool
from hbmgym.memory_backend.split import Layout


@dataclass(frozen=True)
class MigrateOnFailure:
    """The AVMP paper's thresholds and throttle.

    Source: "Asymmetric Virtual Memory Paging" (arXiv 2605.22416), section 3.2. Cached blocks count as free.
    """

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

    def slots(self, layout: Layout, failing: Pool, other: Pool, blocks: int) -> int | None:
        """The slot count of a split in which `failing` has room for `blocks` more.

        None where thresholds forbid it or `other` cannot spare enough without losing live blocks.
        """
        if not self._allows(failing, other):
            return None
        spare = int(other.meta.chunks) - _chunks_of(other, int(other.meta.live))
        wanted = int(failing.meta.chunks) + min(self.chunks, spare)
        chunks = max(wanted, _chunks_of(failing, int(failing.meta.live) + blocks))
        ssm_chunks = layout.chunks - chunks if failing.meta.pool == KV else chunks
        slots = ssm_chunks * layout.chunk_bytes // layout.slot_bytes
        slots = min(max(slots, layout.min_slots), layout.max_slots)
        room = (layout.pages(slots), slots)
        fits = room[failing.meta.pool] >= failing.meta.live + blocks and room[other.meta.pool] >= other.meta.live
        return slots if fits else None

    def _allows(self, failing: Pool, other: Pool) -> bool:
        starved = _free(failing) == 0 or _free(failing) < self.low * failing.meta.capacity
        return bool(starved and _free(other) > self.high * other.meta.capacity)


PAPERS_RULE = MigrateOnFailure()


def _free(pool: Pool) -> int:
    return int(pool.meta.limit - pool.meta.live)


def _chunks_of(pool: Pool, blocks: int) -> int:
    return -(-blocks * int(pool.meta.block_bytes) // int(pool.meta.chunk_bytes))
