"""PpoController: the policy that PPO trained, without its noise."""

from hbmgym.controllers.helm.controller import HelmController
from hbmgym.controllers.helm.parameters import HelmParameters
from hbmgym.controllers.helm.policy import Policy


class PpoController(HelmController):
    """Sees and moves as the policy did in training, inputs clipped to what it saw there: the base of HelmController
    alone."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy, HelmParameters(most_residual=0.0, bursts=False, caps=False), "ppo")
