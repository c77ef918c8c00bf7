"""What an Avmp says about itself."""

from dataclasses import dataclass


@dataclass
class Moves:
    """What became of requests to move chunks."""

    accepted: int = 0
    """Runs of chunks that moved."""
    rejected: int = 0
    """Failed allocations that might have moved chunks and were not allowed to (`MigrateOnFailure`)."""
    rolled_back: int = 0
    """Runs that the backend could not make and that were undone."""
    deferred: int = 0
    """Requests of which a part had to wait for live blocks or for a batch."""


@dataclass(frozen=True)
class PoolStats:
    """One pool, in blocks."""

    block_bytes: int
    chunks: int
    """Mapped."""
    capacity: int
    """Blocks that the mapped chunks hold."""
    live: int
    cached: int
    free: int
    """Blocks that can be had without eviction; fewer than capacity - live - cached while the pool shrinks."""
    evictions: int


@dataclass(frozen=True)
class Stats:
    """The allocator at one moment."""

    budget_bytes: int
    chunk_bytes: int
    kv: PoolStats
    ssm: PoolStats
    kv_share: float
    """KV chunks / all chunks, as mapped."""
    kv_share_requested: float
    operations: int
    """Calls of allocate and free that succeeded, and migrations on failure."""
    moves: Moves
    moved_chunks: int
    relocated_bytes: int
    backend: str
    """One line: which backend, and why."""
