"""ThresholdController: AVMP's rule, taken once per window.

Source: Asymmetric Virtual Memory Paging (AVMP, arXiv 2605.22416): when an allocation fails, the pool that is short gets
a batch of pages, provided that its headroom is below threshold_low and the other's above threshold_high. Here the test
is made at the end of a window instead of inside the failing allocation, so there is no count of operations between two
moves. AVMP caches nothing; this engine's pools fill up with cached blocks, so its rule has to be read anew:

| reading   | a pool is short when                                     | a pool may give while                 |
|-----------|----------------------------------------------------------|---------------------------------------|
| evictable | headroom < low; every cached block is headroom           | headroom > high                       |
| claimed   | its requests waited, or lost cached blocks that they     | headroom > high                       |
|           | came back for, and headroom < low; cached blocks that    |                                       |
|           | will be evicted within claim_s are no headroom           |                                       |
| code      | its requests waited, and longer than for the other pool  | it has blocks that are free or cached |

`evictable` is the text by the letter, and sees live blocks only. `claimed` is what the text is for where memory is
never free: a pool that has to evict what is still wanted is short, one whose cached blocks lie untouched can give.
`code` is the published prototype, whose rebalancing path tests neither thresholds nor interval (docs/avmp_paper.md).
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np

from hbmgym.controllers.base import HOLD, Decision, Setup

Reading = Literal["evictable", "claimed", "code"]


@dataclass(frozen=True)
class ThresholdParameters:
    """The paper's defaults."""

    threshold_low: float = 0.05
    """A pool is short while headroom / capacity is below."""
    threshold_high: float = 0.30
    """A pool may give down to this headroom."""
    migration_batch_pages: int = 128
    """Least that moves, in KV pages whichever pool gives: the paper counts units of the giving pool."""
    reading: Reading = "evictable"
    """What short and headroom mean, see above."""
    claim_s: float = 30.0
    """Seconds, ours: `claimed` takes the blocks that will be evicted in so long, at the rate of the last 10 s."""

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold_low < self.threshold_high < 1.0:
            raise ValueError(
                f"threshold: threshold_low is {self.threshold_low} and threshold_high {self.threshold_high}, "
                "expected 0 < low < high < 1"
            )
        if self.migration_batch_pages < 1:
            raise ValueError(f"threshold: migration_batch_pages is {self.migration_batch_pages}, expected at least 1")
        if self.reading not in get_args(Reading):
            raise ValueError(f"threshold: reading is {self.reading!r}, expected one of: {', '.join(get_args(Reading))}")
        if not 0.0 <= self.claim_s < float("inf"):
            raise ValueError(f"threshold: claim_s is {self.claim_s}, expected a finite number of at least 0")


class _Pool(NamedTuple):
    """Bytes of one pool, and what it did to requests."""

    capacity: float
    headroom: float
    """Free and evictable, less what is claimed."""
    demand: float
    """What the waiting requests need, at the recent mean."""
    blocked: float
    """Share of the window in which the queue's head waited for this pool."""
    lost: float
    """Tokens per second recomputed because this pool had evicted what was wanted."""

    @property
    def headroom_share(self) -> float:
        return self.headroom / self.capacity if self.capacity else 0.0


class ThresholdController:
    """Moves bytes towards the pool that is short, at most until the giver's headroom is threshold_high."""

    fixed_share: float | None = None

    def __init__(self, parameters: ThresholdParameters | None = None, name: str = "threshold") -> None:
        self.parameters = parameters or ThresholdParameters()
        self.name = name

    @classmethod
    def avmp(cls, batch: int, reading: Reading = "claimed") -> "ThresholdController":
        """The paper's arm b<batch> under a reading that acts where memory is full of cached blocks."""
        code = "code-" if reading == "code" else ""
        return cls(ThresholdParameters(migration_batch_pages=batch, reading=reading), f"threshold-{code}b{batch}")

    def reset(self, setup: Setup) -> None:
        self._setup = setup

    def act(self, telemetry: np.record) -> Decision:
        if telemetry["moving_chunks"]:
            return HOLD  # As in the paper, one migration ends before the next is considered.
        kv, ssm = self._kv(telemetry), self._ssm(telemetry)
        grown_bytes = self._transfer_bytes(kv, ssm) - self._transfer_bytes(ssm, kv)
        if not grown_bytes:
            return HOLD
        share = telemetry["kv_share_requested"] + grown_bytes / self._setup.layout.budget_bytes
        low, high = self._setup.kv_share_bounds
        return Decision(float(min(max(share, low), high)))

    def _transfer_bytes(self, recipient: _Pool, donor: _Pool) -> float:
        """Bytes that should move from `donor` to `recipient`; 0 unless the rule says so."""
        if not self._is_short(recipient, donor):
            return 0.0
        layout = self._setup.layout
        batch = self.parameters.migration_batch_pages * layout.page_bytes
        wanted = max(batch, recipient.demand - recipient.headroom, layout.slot_bytes)
        kept = 0.0 if self.parameters.reading == "code" else self.parameters.threshold_high
        spare = donor.headroom - kept * donor.capacity
        return min(wanted, spare) if spare >= layout.slot_bytes else 0.0

    def _is_short(self, pool: _Pool, other: _Pool) -> bool:
        if self.parameters.reading == "code":
            return pool.blocked > other.blocked
        if self.parameters.reading == "claimed" and not (pool.blocked or pool.lost):
            return False
        return pool.headroom_share < self.parameters.threshold_low

    def _kv(self, telemetry: np.record) -> _Pool:
        tokens = telemetry["waiting"] * telemetry["tokens_per_request_100s"]
        demand = tokens * self._setup.kv_token_bytes
        return self._pool("kv", telemetry, self._setup.layout.page_bytes, demand)

    def _ssm(self, telemetry: np.record) -> _Pool:
        slot = self._setup.layout.slot_bytes
        return self._pool("ssm", telemetry, slot, telemetry["waiting"] * self._setup.slots_per_request * slot)

    def _pool(self, pool: str, telemetry: np.record, block_bytes: int, demand: float) -> _Pool:
        cached = telemetry[f"{pool}_cached"]
        if self.parameters.reading == "claimed":
            cached = max(cached - self.parameters.claim_s * telemetry[f"{pool}_evictions_per_s"], 0.0)
        return _Pool(
            telemetry[f"{pool}_capacity"] * block_bytes,
            (telemetry[f"{pool}_free"] + cached) * block_bytes,
            demand,
            telemetry[f"blocked_{pool}_fraction"],
            telemetry[f"{pool}_loss_tokens_per_s"],
        )
