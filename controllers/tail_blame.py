"""TailBlameController: memory for the pool that makes slow requests slow.

Source: RobinHood (Berger et al., OSDI 2018): every 5 s each cache gives up 1 % of its memory, and gets back what all
have given in proportion to how often it was to blame for a request around the 99th percentile. Here the caches are the
two pools, a request is slow when it misses its SLO, and blame is time: the share of the window in which the queue's
head waited for the pool's blocks, and the share in which the engine recomputed what the pool had evicted.
"""

from dataclasses import dataclass

import numpy as np

from hbmgym.controllers.actions import Steps
from hbmgym.controllers.base import HOLD, Decision, Setup


@dataclass(frozen=True)
class TailBlameParameters:
    """RobinHood's tax, and when it is raised."""

    tax_per_s: float = 0.002
    """Share of its own memory that each pool gives up per second: RobinHood's 1 % every 5 s."""
    least_blame: float = 0.01
    """Share of the window that both pools together must have cost; ours: below, the tail is not made by memory."""

    def __post_init__(self) -> None:
        if not 0.0 < self.tax_per_s <= 1.0:
            raise ValueError(
                f"tail-blame: tax_per_s is {self.tax_per_s}, expected a share per second above 0 and at most 1"
            )
        if not 0.0 <= self.least_blame < 1.0:
            raise ValueError(f"tail-blame: least_blame is {self.least_blame}, expected a share below 1")


class TailBlameController:
    """kv_share += tax_per_s window_s (KV's part of the blame - kv_share), while requests miss their SLOs."""

    fixed_share: float | None = None

    def __init__(self, parameters: TailBlameParameters | None = None, name: str = "tail-blame") -> None:
        self.parameters = parameters or TailBlameParameters()
        self.name = name
        self._steps = Steps(max_step_per_s=self.parameters.tax_per_s)

    @classmethod
    def fast(cls) -> "TailBlameController":
        """Five times RobinHood's tax, which was chosen for twenty caches; here two have to answer within minutes."""
        return cls(TailBlameParameters(tax_per_s=0.01), "tail-blame-fast")

    def reset(self, setup: Setup) -> None:
        self._steps.reset(setup)

    def act(self, telemetry: np.record) -> Decision:
        if telemetry["moving_chunks"] or not (telemetry["missed"] or telemetry["rejected"]):
            return HOLD
        kv, ssm = _blame(telemetry)
        if kv + ssm <= self.parameters.least_blame:
            return HOLD
        return self._steps.decide(kv / (kv + ssm) - float(telemetry["kv_share_requested"]), telemetry)


def _blame(telemetry: np.record) -> tuple[float, float]:
    """Shares of the window that the KV pool and the SSM pool cost."""
    computed = telemetry["prompt_tokens_per_s_10s"] * (1.0 - min(telemetry["hit_rate_10s"], 1.0))
    per_token = telemetry["busy_fraction"] / computed if computed > 0.0 else 0.0
    kv, ssm = (
        float(telemetry[f"blocked_{pool}_fraction"] + min(per_token * telemetry[f"{pool}_loss_tokens_per_s"], 1.0))
        for pool in ("kv", "ssm")
    )
    return kv, ssm
