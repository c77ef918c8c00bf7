"""The splits of one budget that can be realised in whole chunks without wasting capacity."""

import math
from dataclasses import dataclass

from hbmgym.memory_backend.jit import kernel

CHUNK_BYTES = 2 * 2**20
"""The default: what CUDA maps at least on today's GPUs, and a huge page of the host."""


class BudgetTooSmall(ValueError):
    """No split of the budget is realisable."""

    def __init__(self, message: str, needed_bytes: int) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes


@dataclass(frozen=True)
class Layout:
    """One budget of equal chunks shared by a pool of KV pages and a pool of slots, the records of sequences.

    A split is named by its slot count k: k slots take ceil(k * slot_bytes / chunk_bytes) chunks, KV takes the rest.
    Rounding never destroys capacity: between two slot counts there is no split.

    Raises ValueError when `min_slots` slots and `min_pages` pages do not fit together.
    """

    budget_bytes: int
    """Bytes of both pools; a whole number of chunks."""
    chunk_bytes: int
    page_bytes: int
    slot_bytes: int
    min_slots: int
    """Fewest slots the SSM pool may keep: those of one request."""
    min_pages: int
    """Fewest pages the KV pool may keep: one prefill chunk and a page."""

    def __post_init__(self) -> None:
        if min(self.chunk_bytes, self.page_bytes, self.slot_bytes) < 1:
            raise ValueError(
                f"chunk_bytes {self.chunk_bytes}, page_bytes {self.page_bytes} and slot_bytes {self.slot_bytes} "
                "must be at least 1"
            )
        if self.budget_bytes % self.chunk_bytes:
            raise ValueError(f"budget_bytes {self.budget_bytes} is not a multiple of chunk_bytes {self.chunk_bytes}")
        if self.max_slots < self.min_slots:
            needed = (self._ssm_chunks(self.min_slots) + self._chunks_of(self.min_pages)) * self.chunk_bytes
            raise BudgetTooSmall(
                f"a budget of {self.budget_bytes} bytes cannot hold {self.min_slots} slots of {self.slot_bytes} bytes "
                f"and {self.min_pages} pages of {self.page_bytes} bytes: give at least {needed} bytes",
                needed,
            )

    @property
    def chunks(self) -> int:
        return self.budget_bytes // self.chunk_bytes

    def slots_beside(self, pages: int) -> int:
        """Most slots of a split that has room for `pages` pages; below 0 where the budget has none for so many."""
        return (self.chunks - self._chunks_of(pages)) * self.chunk_bytes // self.slot_bytes

    def _chunks_of(self, pages: int) -> int:
        return -(-pages * self.page_bytes // self.chunk_bytes)

    def _ssm_chunks(self, slots: int) -> int:
        return -(-slots * self.slot_bytes // self.chunk_bytes)

    @property
    def max_slots(self) -> int:
        return self.slots_beside(self.min_pages)

    @property
    def share_bounds(self) -> tuple[float, float]:
        """(smallest, largest) realisable kv_share."""
        return self.share(self.max_slots), self.share(self.min_slots)

    @property
    def share_step(self) -> float:
        """kv_share of one slot."""
        return self.slot_bytes / self.budget_bytes

    def kv_chunks(self, slots: int) -> int:
        """KV chunks of the split with `slots` slots."""
        return self.chunks - self._ssm_chunks(slots)

    def pages(self, slots: int) -> int:
        """KV pages of the split with `slots` slots."""
        return self.kv_chunks(slots) * self.chunk_bytes // self.page_bytes

    def share(self, slots: int) -> float:
        """kv_share = KV chunks / all chunks of the split with `slots` slots."""
        return self.kv_chunks(slots) / self.chunks

    def slots(self, kv_share: float) -> int:
        """The slot count whose share is nearest to `kv_share`, within the bounds; the fewer slots on a tie."""
        sizes = self.chunks, self.chunk_bytes, self.slot_bytes, self.min_slots, self.max_slots
        return nearest_slots(*sizes, float(kv_share))


@kernel
def nearest_slots(chunks, chunk_bytes, slot_bytes, min_slots, max_slots, kv_share):
    """`Layout.slots` for kernels."""
    # The two realisable splits around the share: with a slot more, the SSM pool needs more chunks than it asks for.
    below = math.floor((1.0 - kv_share) * chunks) * chunk_bytes // slot_bytes
    fewer = min(max(below, min_slots), max_slots)
    more = min(max(below + 1, min_slots), max_slots)
    fewer_share = (chunks - -(-fewer * slot_bytes // chunk_bytes)) / chunks
    more_share = (chunks - -(-more * slot_bytes // chunk_bytes)) / chunks
    return more if abs(more_share - kv_share) < abs(fewer_share - kv_share) else fewer
