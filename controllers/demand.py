"""DemandController: bytes in proportion to what an average request asks of each pool."""

import numpy as np

from hbmgym.controllers.actions import decide_share
from hbmgym.controllers.base import HOLD, Decision, Setup


def balanced_share(tokens: float, kv_token_bytes: float, slots: float, slot_bytes: float) -> float:
    """The kv_share under which requests of `tokens` tokens and `slots` slots run both pools full at once.

    Sessions that fit are min(C_kv / L, C_ssm / S), most where C_kv : C_ssm = L : S (HiMA's public forks: KV tokens to
    slots as mean length : 1; the same balance as SGLang #32763, r = S * slot_bytes / (L * kv_token_bytes)).
    """
    kv_bytes = tokens * kv_token_bytes
    return kv_bytes / (kv_bytes + slots * slot_bytes)


class DemandController:
    """Keeps the balanced share for the prompt tokens per request of the last 100 s; holds below one slot of change.

    Prompts only: what requests will generate is not known when they arrive.
    """

    name = "demand"
    fixed_share: float | None = None

    def reset(self, setup: Setup) -> None:
        self._setup = setup

    def act(self, telemetry: np.record) -> Decision:
        setup, tokens = self._setup, float(telemetry["tokens_per_request_100s"])
        if not tokens:
            return HOLD
        share = balanced_share(tokens, setup.kv_token_bytes, setup.slots_per_request, setup.layout.slot_bytes)
        return decide_share(share, telemetry, setup)
