"""BalanceController: the ratio that SGLang's own guide would have an operator set, from the traffic so far.

Source: SGLang #32763 (its compute-mamba-ratio skill): r = S * slot_bytes / (L * kv_token_bytes), at which neither pool
is full before the other; L is the average length of the workload's requests, S the slots of a running one. SGLang
splits once, at start, so L is taken over everything seen, and r is set anew only where a restart would be worth it.
"""

from dataclasses import dataclass

import numpy as np

from hbmgym.controllers.actions import decide_share
from hbmgym.controllers.arrivals import ArrivalCounter
from hbmgym.controllers.base import HOLD, Decision, Setup
from hbmgym.controllers.demand import balanced_share


@dataclass(frozen=True)
class BalanceParameters:
    """When an operator would act; ours, the guide names none."""

    measured_requests: int = 200
    """So many are seen before L is trusted."""
    ratio_change: float = 1.25
    """The wanted ratio over the one in force, or its inverse, from which on it is set anew."""

    def __post_init__(self) -> None:
        if self.measured_requests < 1:
            raise ValueError(f"sglang-balance: measured_requests is {self.measured_requests}, expected at least 1")
        if not 1.0 <= self.ratio_change < float("inf"):
            raise ValueError(f"sglang-balance: ratio_change is {self.ratio_change}, expected a finite number >= 1")


class BalanceController:
    """Keeps SGLang's balance for the mean prompt of all requests so far.

    Prompts only, where the guide adds what is generated: no engine knows that at arrival.
    """

    name = "sglang-balance"
    fixed_share: float | None = None

    def __init__(self, parameters: BalanceParameters | None = None) -> None:
        self.parameters = parameters or BalanceParameters()
        self._arrivals = ArrivalCounter()

    def reset(self, setup: Setup) -> None:
        self._setup = setup
        self._arrivals.reset()
        self._requests = self._tokens = 0.0

    def act(self, telemetry: np.record) -> Decision:
        requests, mean_tokens = self._arrivals.count(telemetry)
        self._requests += requests
        self._tokens += requests * mean_tokens
        if self._requests < self.parameters.measured_requests or not self._tokens:
            return HOLD
        setup = self._setup
        length = self._tokens / self._requests
        share = balanced_share(length, setup.kv_token_bytes, setup.slots_per_request, setup.layout.slot_bytes)
        low, high = setup.kv_share_bounds
        wanted, current = _ratio(min(max(share, low), high)), _ratio(float(telemetry["kv_share_requested"]))
        if max(wanted, current) <= self.parameters.ratio_change * min(wanted, current):
            return HOLD
        return decide_share(share, telemetry, setup)


def _ratio(kv_share: float) -> float:
    """SGLang's mamba_full_memory_ratio, state bytes / KV bytes."""
    return (1.0 - kv_share) / kv_share
