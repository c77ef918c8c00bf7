"""MovingAverageController: TensorRT-LLM's pool rebalancing.

Source: TensorRT-LLM, KVCacheManagerV2 with enable_kv_pool_rebalance (#14578, #17391; the parameters are those that
#19077 makes settings). The length of every request enters a moving average of squares, whose root is what the pools are
divided for; every 100 requests the wanted split is computed anew, and it is asked for when either pool is off by 1.25.

What differs: TensorRT-LLM samples a request's capacity when it ends and suspends every request while it moves; here the
prompts of a window's arrivals are sampled at their mean, which is all that Telemetry tells, and nothing is suspended.
"""

import math
from dataclasses import dataclass

import numpy as np

from hbmgym.controllers.actions import decide_share
from hbmgym.controllers.arrivals import ArrivalCounter
from hbmgym.controllers.base import HOLD, Decision, Setup
from hbmgym.controllers.demand import balanced_share


@dataclass(frozen=True)
class MovingAverageParameters:
    """TensorRT-LLM's defaults."""

    decay: float = 0.9999
    """Weight of the past, per request."""
    least_requests: int = 2000
    """No move before so many."""
    update_requests: int = 100
    """The wanted split is computed after every so many."""
    cooldown_s: float = 120.0
    """Between two moves, and before the first."""
    mismatch: float = 1.25
    """Wanted over present bytes of either pool, or the inverse, from which on chunks move."""

    def __post_init__(self) -> None:
        if not 0.0 < self.decay < 1.0:
            raise ValueError(f"moving-average: decay is {self.decay}, expected a number between 0 and 1")
        if self.least_requests < 0 or self.update_requests < 1:
            raise ValueError(
                f"moving-average: least_requests {self.least_requests} must be >= 0 and update_requests "
                f"{self.update_requests} >= 1"
            )
        if not 0.0 <= self.cooldown_s < float("inf"):
            raise ValueError(f"moving-average: cooldown_s is {self.cooldown_s}, expected a finite number >= 0")
        if not 1.0 < self.mismatch < float("inf"):
            raise ValueError(f"moving-average: mismatch is {self.mismatch}, expected a finite number > 1")


class MovingAverageController:
    """Divides the memory for requests of root-mean-square length, seldom and only when it is well off."""

    name = "moving-average"
    fixed_share: float | None = None

    def __init__(self, parameters: MovingAverageParameters | None = None) -> None:
        self.parameters = parameters or MovingAverageParameters()
        self._arrivals = ArrivalCounter()

    def reset(self, setup: Setup) -> None:
        self._setup = setup
        self._arrivals.reset()
        self._mean_square = self._weight = 0.0
        self._requests = self._updated_at = 0.0
        self._moved_s = 0.0
        self._wanted: float | None = None

    def act(self, telemetry: np.record) -> Decision:
        self._sample(*self._arrivals.count(telemetry))
        parameters = self.parameters
        if self._wanted is None or self._requests < parameters.least_requests:
            return HOLD
        if telemetry["time_s"] - self._moved_s < parameters.cooldown_s:
            return HOLD
        present = float(telemetry["kv_share_requested"])
        if not _mismatched(self._wanted, present, parameters.mismatch):
            return HOLD
        self._moved_s = float(telemetry["time_s"])
        return decide_share(self._wanted, telemetry, self._setup)

    def _sample(self, requests: float, mean_tokens: float) -> None:
        if not requests:
            return
        # What `requests` updates weight = 1 + decay * weight, mean += (value - mean) / weight come to.
        kept = self.parameters.decay**requests
        added = (1.0 - kept) / (1.0 - self.parameters.decay)
        past = kept * self._weight
        self._weight = past + added
        self._mean_square = (past * self._mean_square + added * mean_tokens**2) / self._weight
        self._requests += requests
        if self._requests - self._updated_at >= self.parameters.update_requests and self._mean_square:
            self._updated_at = self._requests
            self._wanted = self._split_for(math.sqrt(self._mean_square))

    def _split_for(self, length: float) -> float:
        setup = self._setup
        share = balanced_share(length, setup.kv_token_bytes, setup.slots_per_request, setup.layout.slot_bytes)
        low, high = setup.kv_share_bounds
        return min(max(share, low), high)


def _mismatched(wanted: float, present: float, threshold: float) -> bool:
    """Is either pool's share off by `threshold` or more?"""
    pairs = ((wanted, present), (1.0 - wanted, 1.0 - present))
    return any(max(pair) >= threshold * min(pair) for pair in pairs)
