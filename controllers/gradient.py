"""GradientController: memory for the pool whose ghost list is hit, weighted by what a hit would have saved.

Source: Cliffhanger (Cidon et al., NSDI 2016): every hit in a queue's shadow queue, the list of what it has just
evicted, earns that queue a credit of memory, taken from another one; where all shadow queues are hit alike no memory
moves on balance, which is the optimum of a concave hit rate. Here the queues are the two pools, and each shadow queue
is as many bytes. Cliffhanger's second half, which splits a queue in two to climb over cliffs, is left out. Ours are:

| what                                                | why                                                         |
|-----------------------------------------------------|-------------------------------------------------------------|
| a hit counts the prefill that it would have saved   | a page and a snapshot differ in bytes and in what they save |
| seconds in which the queue's head waited for a pool | other than in a web cache, live blocks can be what is short |
| what a pool would have lost had it been smaller     | giving memory away has its price too                        |
| a pull to the split that arrivals ask for           | it comes before the ghost lists of new traffic have filled  |
| nothing moves while memory is worth nothing to both | arrivals ask for a split in an idle engine, too             |
"""

from dataclasses import dataclass

import numpy as np

from hbmgym.controllers.actions import Steps, check_max_step_per_s
from hbmgym.controllers.base import HOLD, Decision, Setup
from hbmgym.controllers.telemetry import MARGINAL_STEPS


@dataclass(frozen=True)
class GradientParameters:
    """Ours; Cliffhanger's credits are a few KiB per hit of a web cache."""

    ghost: float = 0.1
    """Bytes of a ghost list as a part of the budget: one of Telemetry's steps."""
    tail: float = 0.1
    """Bytes by which a pool might be smaller, likewise."""
    credit_per_s: float = 0.1
    """kv_share for each second that a pool's ghost list would have saved, or that it was waited for."""
    tail_weight: float = 0.2
    """What a second counts that the pool's tail has saved, beside one that its ghost list would have saved."""
    demand_per_s: float = 0.01
    """Part of the way to the split that arrivals ask for, taken per second."""
    max_step_per_s: float = 0.01
    """Largest change of kv_share per second."""

    def __post_init__(self) -> None:
        for name in ("ghost", "tail"):
            if getattr(self, name) not in MARGINAL_STEPS:
                steps = ", ".join(map(str, MARGINAL_STEPS))
                raise ValueError(f"gradient: {name} is {getattr(self, name)}, expected one of: {steps}")
        if not 0.0 < self.credit_per_s < float("inf"):
            raise ValueError(f"gradient: credit_per_s is {self.credit_per_s}, expected a finite number > 0")
        for name in ("tail_weight", "demand_per_s"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"gradient: {name} is {getattr(self, name)}, expected a finite number of at least 0")
        check_max_step_per_s(self.max_step_per_s, "gradient: ")


class GradientController:
    """d kv_share / dt = credit_per_s (worth of memory to KV - to slots) + demand_per_s (demand of KV - kv_share)."""

    name = "gradient"
    fixed_share: float | None = None

    def __init__(self, parameters: GradientParameters | None = None) -> None:
        self.parameters = p = parameters or GradientParameters()
        self._steps = Steps(max_step_per_s=p.max_step_per_s)
        self._gain, self._cost = f"gain_{round(100 * p.ghost)}pct", f"cost_{round(100 * p.tail)}pct"

    def reset(self, setup: Setup) -> None:
        self._steps.reset(setup)

    def act(self, telemetry: np.record) -> Decision:
        kv, ssm = self._worth(telemetry, "kv"), self._worth(telemetry, "ssm")
        if telemetry["moving_chunks"] or kv == ssm == 0.0:
            return HOLD
        p, share = self.parameters, telemetry["kv_share_effective"]
        # Before the first arrival there is no demand, which must not look like a demand for slots only.
        gap = (telemetry["kv_demand_10s"] or share) - share
        change_per_s = p.credit_per_s * (kv - ssm) + p.demand_per_s * gap
        return self._steps.decide(float(change_per_s / p.max_step_per_s), telemetry)

    def _worth(self, telemetry: np.record, pool: str) -> float:
        """Seconds per second that a larger pool would have saved and a smaller one lost."""
        gain, cost = telemetry[f"{pool}_{self._gain}"], telemetry[f"{pool}_{self._cost}"]
        return float(telemetry[f"blocked_{pool}_fraction"] + gain + self.parameters.tail_weight * cost)
