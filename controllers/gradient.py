"""GradientController: memory for the pool whose ghost list is hit, weighted by what a hit would have saved.

Source: Cliffhanger (Cidon et al., NSDI 2016): every hit in a queue's shadow queue, the list of what it has just
evicted, earns that queue a credit of memory, taken from another one; where all shadow queues are hit alike no memory
moves on balance, which is the optimum of a concave hit rate. Here the queues are the two pools, and each shadow queue
is as many bytes. A hit counts the prefill seconds that it would have saved (Telemetry's `*_gain_*`), since a page and a
snapshot differ in bytes and in what they save; so do the seconds in which the queue's head waited for the pool, because
here, other than in a web cache, live blocks can be what is short. Cliffhanger's second half, which splits a queue in
two to climb over cliffs, is left out.
"""

from dataclasses import dataclass

import numpy as np

from hbmgym.controllers.actions import Steps
from hbmgym.controllers.base import HOLD, Decision, Setup
from hbmgym.controllers.telemetry import MARGINAL_STEPS


@dataclass(frozen=True)
class GradientParameters:
    """Ours; Cliffhanger's credits are a few KiB per hit of a web cache."""

    ghost: float = 0.1
    """Bytes of a ghost list as a part of the budget: one of Telemetry's steps."""
    credit_per_s: float = 0.1
    """kv_share for each second that a pool's ghost list would have saved, or that it was waited for."""
    max_step: float = 0.05
    """Largest change of kv_share in one window."""

    def __post_init__(self) -> None:
        if self.ghost not in MARGINAL_STEPS:
            raise ValueError(f"gradient: ghost is {self.ghost}, expected one of: {', '.join(map(str, MARGINAL_STEPS))}")
        if not 0.0 < self.credit_per_s < float("inf"):
            raise ValueError(f"gradient: credit_per_s is {self.credit_per_s}, expected a finite number > 0")
        if not 0.0 < self.max_step <= 1.0:
            raise ValueError(f"gradient: max_step is {self.max_step}, expected a share above 0 and at most 1")


class GradientController:
    """kv_share += credit_per_s (seconds that more KV would have saved - those that more slots would have)."""

    name = "gradient"
    fixed_share: float | None = None

    def __init__(self, parameters: GradientParameters | None = None) -> None:
        self.parameters = parameters or GradientParameters()
        self._steps = Steps(max_step=self.parameters.max_step)
        self._gain = f"gain_{round(100 * self.parameters.ghost)}pct"

    def reset(self, setup: Setup) -> None:
        self._steps.reset(setup)

    def act(self, telemetry: np.record) -> Decision:
        if telemetry["moving_chunks"]:
            return HOLD
        missing = self._missing_s(telemetry, "kv") - self._missing_s(telemetry, "ssm")
        return self._steps.decide(self.parameters.credit_per_s * missing / self.parameters.max_step, telemetry)

    def _missing_s(self, telemetry: np.record, pool: str) -> float:
        """Seconds of the window that a larger pool would have saved."""
        per_s = telemetry[f"{pool}_{self._gain}"] + telemetry[f"blocked_{pool}_fraction"]
        return float(per_s * telemetry["window_s"])
