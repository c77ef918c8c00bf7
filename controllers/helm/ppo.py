"""PpoController: the policy that PPO trained, without its noise."""

import numpy as np

from hbmgym.controllers.actions import Steps
from hbmgym.controllers.base import Decision, Setup
from hbmgym.controllers.helm.policy import Policy
from hbmgym.controllers.observation import OBSERVATION_SIZE, observe_into


class PpoController:
    """Sees and moves exactly as the policy did in training."""

    name = "ppo"
    fixed_share: float | None = None

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._steps = Steps(policy.header.action_kind, policy.header.max_step)
        self._observation = np.zeros(OBSERVATION_SIZE, np.float32)

    def reset(self, setup: Setup) -> None:
        self._steps.reset(setup)

    def act(self, telemetry: np.record) -> Decision:
        observe_into(telemetry, self._observation)
        return self._steps.decide(self.policy.action(self._observation), telemetry)
