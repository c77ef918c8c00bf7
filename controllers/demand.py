"""DemandController: bytes in proportion to what an average request asks of each pool."""

import math
from dataclasses import dataclass

import numpy as np

from hbmgym.controllers.actions import decide_share
from hbmgym.controllers.base import HOLD, Decision, Setup
from hbmgym.controllers.telemetry import SLOW_S


def balanced_share(tokens: float, kv_token_bytes: float, slots: float, slot_bytes: float) -> float:
    """The kv_share under which requests of `tokens` tokens and `slots` slots run both pools full at once.

    Sessions that fit are min(C_kv / L, C_ssm / S), most where C_kv : C_ssm = L : S (HiMA's public forks: KV tokens to
    slots as mean length : 1; the same balance as SGLang #32763, r = S * slot_bytes / (L * kv_token_bytes)).
    """
    kv_bytes = tokens * kv_token_bytes
    return kv_bytes / (kv_bytes + slots * slot_bytes)


@dataclass(frozen=True)
class DemandParameters:
    """Ours; the forks name no dead zone."""

    standard_errors: float = 2.0
    """It holds while the share that it wants is nearer than so many of its standard errors."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.standard_errors < math.inf:
            raise ValueError(f"demand: standard_errors is {self.standard_errors}, expected a finite number >= 0")


class DemandController:
    """Keeps the balanced share for the prompt tokens per request of the last 100 s; holds below one slot of change, and
    where the difference may be chance, as it mostly is while few requests arrive.

    Prompts only: what requests will generate is not known when they arrive.
    """

    name = "demand"
    fixed_share: float | None = None

    def __init__(self, parameters: DemandParameters | None = None) -> None:
        self.parameters = parameters or DemandParameters()

    def reset(self, setup: Setup) -> None:
        self._setup = setup

    def act(self, telemetry: np.record) -> Decision:
        setup, tokens = self._setup, float(telemetry["tokens_per_request_100s"])
        if not tokens:
            return HOLD
        share = balanced_share(tokens, setup.kv_token_bytes, setup.slots_per_request, setup.layout.slot_bytes)
        requests = SLOW_S * float(telemetry["arrivals_per_s_100s"])
        # d share / share = (1 - share) d tokens / tokens; lengths are taken to spread as much as their mean.
        error = share * (1.0 - share) / math.sqrt(requests) if requests > 0.0 else math.inf
        if abs(share - telemetry["kv_share_requested"]) < self.parameters.standard_errors * error:
            return HOLD
        return decide_share(share, telemetry, setup)
