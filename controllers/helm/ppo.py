"""PpoController: the policy that PPO trained, without its noise."""

import numpy as np

from hbmgym.controllers.actions import ShareAction
from hbmgym.controllers.base import HOLD, Decision, Setup
from hbmgym.controllers.helm.policy import Policy
from hbmgym.controllers.observation import OBSERVATION_SIZE, observe_into


class PpoController:
    """Sees and moves exactly as the policy did in training."""

    name = "ppo"
    fixed_share: float | None = None

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._rule = ShareAction(policy.header.action_kind, policy.header.max_step)
        self._observation = np.zeros(OBSERVATION_SIZE, np.float32)

    def reset(self, setup: Setup) -> None:
        self._setup = setup
        self._started = False

    def act(self, telemetry: np.record) -> Decision:
        if not self._started:
            # Setup does not tell the split at start.
            start = float(telemetry["kv_share_requested"])
            self._rule.reset(start, self._setup.layout, self._setup.kv_share_bounds)
            self._started = True
        observe_into(telemetry, self._observation)
        share = self._rule.next_share(self.policy.action(self._observation))
        return HOLD if share is None else Decision(share)
