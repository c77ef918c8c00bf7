"""StaticController: one split for ever, which is what serving engines offer today."""

import numpy as np

from hbmgym.controllers.base import HOLD, Decision, Setup

SGLANG_RATIO = 0.9
"""SGLang's default mamba_full_memory_ratio."""


def static_name(kv_share: float) -> str:
    """The name of a static split, which the registry reads back as the very split: six digits, without zeros behind the
    third; half a chunk of 2 MiB is more than what they round away in any budget below a terabyte."""
    digits = f"{kv_share:.6f}"
    return f"static-{digits[:-3]}{digits[-3:].rstrip('0')}"


class StaticController:
    """Holds the share at which its episodes start.

    It asks for nothing, so that chunks which a shortage moved (on_shortage=migrate) stay where they are.
    """

    def __init__(self, kv_share: float, name: str | None = None) -> None:
        if not 0.0 <= kv_share <= 1.0:
            raise ValueError(f"static: kv_share is {kv_share}, expected a number from 0 to 1")
        self.name = name or static_name(kv_share)
        self.fixed_share: float | None = kv_share

    @classmethod
    def from_sglang_ratio(cls, ratio: float) -> "StaticController":
        """SGLang's mamba_full_memory_ratio r = state bytes / KV bytes: kv_share = 1 / (1 + r)."""
        if not 0.0 <= ratio < float("inf"):
            raise ValueError(f"sglang: mamba_full_memory_ratio is {ratio}, expected a finite number of at least 0")
        return cls(1.0 / (1.0 + ratio), f"sglang-{ratio:g}")

    def reset(self, setup: Setup) -> None:
        pass

    def act(self, telemetry: np.record) -> Decision:
        return HOLD
