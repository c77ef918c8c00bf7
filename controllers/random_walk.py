"""RandomController: the environment's random actions, as the floor that every other controller should beat."""

import random
from dataclasses import dataclass

import numpy as np

from hbmgym.controllers.actions import DEFAULT_MAX_STEP, Steps
from hbmgym.controllers.base import Decision, Setup


@dataclass(frozen=True)
class RandomParameters:
    """Of a walk that no one has tuned."""

    seed: int = 0
    """Every episode walks alike."""
    max_step: float = DEFAULT_MAX_STEP
    """Largest change of kv_share in one window; the environment's."""

    def __post_init__(self) -> None:
        if not 0.0 < self.max_step <= 1.0:
            raise ValueError(f"random: max_step is {self.max_step}, expected a share above 0 and at most 1")


class RandomController:
    """Wants max_step times a uniform draw from [-1, 1] more each window, within the bounds."""

    name = "random"
    fixed_share: float | None = None

    def __init__(self, parameters: RandomParameters | None = None) -> None:
        self.parameters = parameters or RandomParameters()
        self._steps = Steps(max_step=self.parameters.max_step)

    def reset(self, setup: Setup) -> None:
        self._steps.reset(setup)
        self._draws = random.Random(self.parameters.seed)

    def act(self, telemetry: np.record) -> Decision:
        return self._steps.decide(self._draws.uniform(-1.0, 1.0), telemetry)
