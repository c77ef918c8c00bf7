"""BanditController: learns online which share costs least, in the manner of POLAR.

Source: POLAR (Li and Li, arXiv 2604.16583): a LinUCB model learns at every step, while what is held in memory changes
only between epochs, whose lengths double. There the memory holds adapters and the model routes requests; here an arm is
a kv_share, its context what arrives. Cost = 2 missed / (met + missed) + 0.1 mean wait / SLO. It is never below 0, which
is what makes exploring stop: while nothing is missed no arm can be better. Nothing is random.
"""

from dataclasses import dataclass

import numpy as np

from hbmgym.controllers.actions import decide_share
from hbmgym.controllers.base import HOLD, Decision, Setup

_MISS_WEIGHT, _WAIT_WEIGHT = 2.0, 0.1
_FEATURES = 7
# Half of (x - demand / 2)^2, less what does not depend on x: best half-way from an even split to what arrivals ask for.
_PRIOR = np.array([0.0, 0.0, 0.5, 0.0, -0.5, 0.0, 0.0])


@dataclass(frozen=True)
class BanditParameters:
    """Ours; POLAR's own belong to another problem."""

    arms: int = 11
    """Shares between the bounds, at equal distances."""
    exploration: float = 0.3
    """LinUCB's alpha: standard errors of optimism."""
    ridge: float = 1.0
    """Weight of the prior, in windows."""
    memory: float = 0.995
    """Weight of the past, per window: traffic changes, so that it must fade."""
    longest_epoch: int = 4
    """Windows; epochs last 1, 2, 4, ... up to so many."""
    context_change: float = 0.1
    """A change of kv_demand that ends an epoch early."""
    largest_cost: float = 1.0
    """Costs of a window are cut there: how bad a disaster was says little about the shares beside it."""
    least_gain: float = 0.02
    """Cost by which another arm must promise to be better."""

    def __post_init__(self) -> None:
        if self.arms < 2 or self.longest_epoch < 1:
            raise ValueError(f"bandit: arms {self.arms} must be >= 2 and longest_epoch {self.longest_epoch} >= 1")
        for name in ("exploration", "least_gain", "context_change"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"bandit: {name} is {getattr(self, name)}, expected a finite number >= 0")
        for name in ("ridge", "largest_cost"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise ValueError(f"bandit: {name} is {getattr(self, name)}, expected a finite number > 0")
        if not 0.0 < self.memory <= 1.0:
            raise ValueError(f"bandit: memory is {self.memory}, expected a number above 0 and at most 1")


class BanditController:
    """Learns from every window; picks the share of least optimistic cost at the end of an epoch."""

    name = "bandit"
    fixed_share: float | None = None

    def __init__(self, parameters: BanditParameters | None = None) -> None:
        self.parameters = parameters or BanditParameters()

    def reset(self, setup: Setup) -> None:
        self._setup = setup
        low, high = setup.kv_share_bounds
        self._arms = np.linspace(low, high, self.parameters.arms + 2)[1:-1]
        self._gram = self.parameters.ridge * np.eye(_FEATURES)
        self._prior = self.parameters.ridge * _PRIOR
        self._moment = self._prior.copy()
        self._epoch, self._left, self._spent, self._windows = 0, 1, 0.0, 0
        self._demand = 0.0

    def act(self, telemetry: np.record) -> Decision:
        judged = telemetry["met"] + telemetry["missed"]
        if judged or telemetry["waiting"]:
            self._learn(telemetry, float(judged))
        self._left -= 1
        is_new = abs(telemetry["kv_demand_10s"] - self._demand) > self.parameters.context_change
        if self._left > 0 and not is_new:
            return HOLD
        mean_cost = self._spent / self._windows if self._windows else 0.0
        self._begin_epoch(telemetry)
        if mean_cost <= self.parameters.least_gain:
            return HOLD
        return self._choose(telemetry)

    def _learn(self, telemetry: np.record, judged: float) -> None:
        cost = _MISS_WEIGHT * float(telemetry["missed"]) / max(judged, 1.0)
        cost = min(cost + _WAIT_WEIGHT * float(telemetry["mean_wait_over_slo"]), self.parameters.largest_cost)
        self._spent += cost
        self._windows += 1
        features = _features(np.array([telemetry["kv_share_effective"]]), telemetry)[0]
        memory = self.parameters.memory
        self._gram *= memory
        self._gram += np.outer(features, features)
        self._gram.flat[:: _FEATURES + 1] += (1.0 - memory) * self.parameters.ridge
        self._moment *= memory
        self._moment += (1.0 - memory) * self._prior + cost * features

    def _begin_epoch(self, telemetry: np.record) -> None:
        self._left = min(2**self._epoch, self.parameters.longest_epoch)
        self._epoch += self._left < self.parameters.longest_epoch
        self._spent, self._windows = 0.0, 0
        self._demand = float(telemetry["kv_demand_10s"])

    def _choose(self, telemetry: np.record) -> Decision:
        present = float(telemetry["kv_share_requested"])
        shares = np.append(self._arms, present)
        features = _features(shares, telemetry)
        inverse = np.linalg.inv(self._gram)
        width = np.sqrt(np.maximum(((features @ inverse) * features).sum(axis=1), 0.0))
        optimistic = np.maximum(features @ (inverse @ self._moment) - self.parameters.exploration * width, 0.0)
        # Of arms that promise the same the nearest: moves cost time.
        best = min(range(len(self._arms)), key=lambda arm: (optimistic[arm], abs(shares[arm] - present)))
        if optimistic[-1] - optimistic[best] < self.parameters.least_gain:
            return HOLD
        return decide_share(float(shares[best]), telemetry, self._setup)


def _features(shares: np.ndarray, telemetry: np.record) -> np.ndarray:
    """float64[n, _FEATURES]: a bowl over n shares that the demand for KV shifts and load deepens."""
    x = 2.0 * shares - 1.0
    demand = 2.0 * min(float(telemetry["kv_demand_10s"]), 1.0) - 1.0
    busy = min(float(telemetry["busy_fraction"]), 1.0)
    features = np.empty((len(x), _FEATURES))
    features[:] = (1.0, 0.0, 0.0, demand, 0.0, busy, 0.0)
    features[:, 1] = x
    features[:, 2] = x * x
    features[:, 4] = demand * x
    features[:, 6] = busy * x
    return features
