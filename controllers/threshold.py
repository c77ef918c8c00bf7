"""ThresholdController: AVMP's rule, taken once per window.

Source: Asymmetric Virtual Memory Paging (AVMP, arXiv 2605.22416): when an allocation fails, the pool that is short gets
a batch of pages, provided that its headroom is below threshold_low and the other's above threshold_high. Here the test
is made at the end of a window instead of inside the failing allocation, so there is no count of operations between two
moves; headroom counts evictable blocks, because this engine's pools fill up with cached ones.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hbmgym.controllers.base import HOLD, Decision, Setup


@dataclass(frozen=True)
class ThresholdParameters:
    """The paper's defaults."""

    threshold_low: float = 0.05
    """A pool is short while (free + evictable) / capacity is below."""
    threshold_high: float = 0.30
    """A pool may give down to this headroom."""
    migration_batch_pages: int = 128
    """Least that moves, in KV pages whichever pool gives: the paper counts units of the giving pool."""

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold_low < self.threshold_high < 1.0:
            raise ValueError(
                f"threshold: threshold_low is {self.threshold_low} and threshold_high {self.threshold_high}, "
                "expected 0 < low < high < 1"
            )
        if self.migration_batch_pages < 1:
            raise ValueError(f"threshold: migration_batch_pages is {self.migration_batch_pages}, expected at least 1")


class _Pool(NamedTuple):
    """Bytes of one pool."""

    capacity: float
    headroom: float
    """Free and evictable."""
    demand: float
    """What the waiting requests need, at the recent mean."""

    @property
    def headroom_share(self) -> float:
        return self.headroom / self.capacity if self.capacity else 0.0


class ThresholdController:
    """Moves bytes towards the pool that is short, at most until the giver's headroom is threshold_high."""

    name = "threshold"
    fixed_share: float | None = None

    def __init__(self, parameters: ThresholdParameters | None = None) -> None:
        self.parameters = parameters or ThresholdParameters()

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
        """Bytes that should move from `donor` to `recipient`; 0 unless the thresholds say so."""
        low, high = self.parameters.threshold_low, self.parameters.threshold_high
        if recipient.headroom_share >= low or donor.headroom_share <= high:
            return 0.0
        layout = self._setup.layout
        batch = self.parameters.migration_batch_pages * layout.page_bytes
        wanted = max(batch, recipient.demand - recipient.headroom, layout.slot_bytes)
        spare = donor.headroom - high * donor.capacity
        return min(wanted, spare) if spare >= layout.slot_bytes else 0.0

    def _kv(self, telemetry: np.record) -> _Pool:
        page = self._setup.layout.page_bytes
        tokens = telemetry["waiting"] * telemetry["tokens_per_request_100s"]
        headroom = telemetry["kv_free"] + telemetry["kv_cached"]
        return _Pool(telemetry["kv_capacity"] * page, headroom * page, tokens * self._setup.kv_token_bytes)

    def _ssm(self, telemetry: np.record) -> _Pool:
        slot = self._setup.layout.slot_bytes
        slots = telemetry["waiting"] * self._setup.slots_per_request
        headroom = telemetry["ssm_free"] + telemetry["ssm_cached"]
        return _Pool(telemetry["ssm_capacity"] * slot, headroom * slot, slots * slot)
