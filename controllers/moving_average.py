"""MovingAverageController: TensorRT-LLM's pool rebalancing.

Source: TensorRT-LLM, KVCacheManagerV2 with enable_kv_pool_rebalance (#14578, #17391); the parameters have the names and
values with which #19077 makes them settings. The length of every request enters a moving average of squares, because a
long request also lives longer but is sampled once. Its root is what the pools are divided for: so many pages, rounded
up, to one state. Every 100 requests that target is computed anew, and it is asked for where either pool is off by 1.25.

What differs: TensorRT-LLM samples a request's capacity, outputs included, when it ends; here the prompts of a window's
arrivals are sampled at their mean, which is all that Telemetry tells. It looks every 10 iterations
(kv_pool_rebalance_check_interval) whether to move; a controller is asked once per window, which has more. That every
request is suspended while it moves is up to the engine: `ServingConfig.transfers`.
"""

import math
from dataclasses import dataclass

import numpy as np

from hbmgym.controllers.actions import decide_share
from hbmgym.controllers.arrivals import ArrivalCounter
from hbmgym.controllers.base import HOLD, Decision, Setup
from hbmgym.controllers.demand import balanced_share

STATES_PER_REQUEST = 1
"""What its target reckons with, however many slots a request holds here."""


@dataclass(frozen=True)
class MovingAverageParameters:
    """TensorRT-LLM's defaults."""

    moving_average_decay: float = 0.9999
    """Weight of the past, per request."""
    min_sampled_kv_caches: int = 2000
    """No move before so many."""
    target_ratio_update_interval: int = 100
    """The wanted split is computed after every so many."""
    cooldown_secs: float = 120.0
    """Between two moves, and before the first."""
    ratio_threshold: float = 1.25
    """Wanted over present bytes of either pool, or the inverse, from which on chunks move."""

    def __post_init__(self) -> None:
        if not 0.0 < self.moving_average_decay < 1.0:
            decay = self.moving_average_decay
            raise ValueError(f"moving-average: moving_average_decay is {decay}, expected a number between 0 and 1")
        if self.min_sampled_kv_caches < 0 or self.target_ratio_update_interval < 1:
            raise ValueError(
                f"moving-average: min_sampled_kv_caches {self.min_sampled_kv_caches} must be >= 0 and "
                f"target_ratio_update_interval {self.target_ratio_update_interval} >= 1"
            )
        if not 0.0 <= self.cooldown_secs < float("inf"):
            raise ValueError(f"moving-average: cooldown_secs is {self.cooldown_secs}, expected a finite number >= 0")
        if not 1.0 < self.ratio_threshold < float("inf"):
            raise ValueError(f"moving-average: ratio_threshold is {self.ratio_threshold}, expected a finite number > 1")


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
        if self._wanted is None or self._requests < parameters.min_sampled_kv_caches:
            return HOLD
        if telemetry["time_s"] - self._moved_s < parameters.cooldown_secs:
            return HOLD
        present = float(telemetry["kv_share_requested"])
        if not _mismatched(self._wanted, present, parameters.ratio_threshold):
            return HOLD
        self._moved_s = float(telemetry["time_s"])
        return decide_share(self._wanted, telemetry, self._setup)

    def _sample(self, requests: float, mean_tokens: float) -> None:
        if not requests:
            return
        # What `requests` updates weight = 1 + moving_average_decay * weight, mean += (value - mean) / weight come to.
        kept = self.parameters.moving_average_decay**requests
        added = (1.0 - kept) / (1.0 - self.parameters.moving_average_decay)
        past = kept * self._weight
        self._weight = past + added
        self._mean_square = (past * self._mean_square + added * mean_tokens**2) / self._weight
        self._requests += requests
        if self._requests - self._updated_at >= self.parameters.target_ratio_update_interval and self._mean_square:
            self._updated_at = self._requests
            self._wanted = self._split_for(math.sqrt(self._mean_square))

    def _split_for(self, length: float) -> float:
        setup = self._setup
        pages = math.ceil(length * setup.kv_token_bytes / setup.layout.page_bytes)
        share = balanced_share(pages, setup.layout.page_bytes, STATES_PER_REQUEST, setup.layout.slot_bytes)
        low, high = setup.kv_share_bounds
        return min(max(share, low), high)


def _mismatched(wanted: float, present: float, threshold: float) -> bool:
    """Is either pool's share off by `threshold` or more?"""
    pairs = ((wanted, present), (1.0 - wanted, 1.0 - present))
    return any(max(pair) >= threshold * min(pair) for pair in pairs)
