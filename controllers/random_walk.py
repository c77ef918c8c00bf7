"""RandomController: the environment's random actions, as the floor that every other controller should beat."""

import random
from dataclasses import dataclass

import numpy as np

from hbmgym.controllers.actions import DEFAULT_MAX_STEP_PER_S, Steps, check_max_step_per_s
from hbmgym.controllers.base import Decision, Setup


@dataclass(frozen=True)
class RandomParameters:
    """Of a walk that no one has tuned."""

    seed: int = 0
    """Every episode walks alike."""
    max_step_per_s: float = DEFAULT_MAX_STEP_PER_S
    """Largest change of kv_share per second; the environment's."""

    def __post_init__(self) -> None:
        check_max_step_per_s(self.max_step_per_s, "random: ")


class RandomController:
    """Wants a window's largest change times a uniform draw from [-1, 1] more each window, within the bounds."""

    name = "random"
    fixed_share: float | None = None

    def __init__(self, parameters: RandomParameters | None = None) -> None:
        self.parameters = parameters or RandomParameters()
        self._steps = Steps(max_step_per_s=self.parameters.max_step_per_s)

    def reset(self, setup: Setup) -> None:
        self._steps.reset(setup)
        self._draws = random.Random(self.parameters.seed)

    def act(self, telemetry: np.record) -> Decision:
        return self._steps.decide(self._draws.uniform(-1.0, 1.0), telemetry)
