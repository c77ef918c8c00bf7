"""What an action in [-1, 1] asks for: one rule for the environment and for every controller that moves in steps."""

import numpy as np

from hbmgym.controllers.base import HOLD, Decision, Setup
from hbmgym.memory_backend.split import Layout

ACTION_KINDS = ("incremental", "absolute")
DEFAULT_MAX_STEP = 0.1


class ShareAction:
    """Turns actions into requested shares; `reset` first.

    incremental: wanted share += max_step * action. absolute: -1 is the smallest share, 1 the largest.
    The wanted share is kept as a float, so that small actions add up; while it differs from what was last asked for by
    less than a slot and a chunk, the action is a hold. A share that is asked for therefore always changes the split.
    """

    def __init__(self, kind: str = "incremental", max_step: float = DEFAULT_MAX_STEP) -> None:
        if kind not in ACTION_KINDS:
            raise ValueError(f"action kind is {kind!r}, expected one of: {', '.join(ACTION_KINDS)}")
        if not 0.0 < max_step <= 1.0:
            raise ValueError(f"max_step is {max_step}, expected a share above 0 and at most 1")
        self.kind = kind
        self.max_step = max_step

    def reset(self, share: float, layout: Layout, bounds: tuple[float, float] | None = None) -> None:
        """Start at the realised `share`; `bounds` are the shares that may be asked for, by default the layout's."""
        self._low, self._high = bounds or layout.share_bounds
        # Up to this width two shares may round to the same split, because slots end within chunks.
        self._hold = layout.share_step + 1.0 / layout.chunks
        self._wanted = self._asked = share

    @property
    def wanted(self) -> float:
        """The share all actions so far add up to, within the bounds."""
        return self._wanted

    def next_share(self, action: float) -> float | None:
        """The kv_share to ask for after `action` (clipped to [-1, 1]); None holds what was last asked for."""
        action = min(max(action, -1.0), 1.0)
        if self.kind == "incremental":
            wanted = self._wanted + self.max_step * action
        else:
            wanted = self._low + 0.5 * (action + 1.0) * (self._high - self._low)
        self._wanted = min(max(wanted, self._low), self._high)
        if abs(self._wanted - self._asked) < self._hold:
            return None
        self._asked = self._wanted
        return self._asked


class Steps:
    """A controller's own ShareAction, which begins at the split that the first record shows; `reset` first."""

    def __init__(self, kind: str = "incremental", max_step: float = DEFAULT_MAX_STEP) -> None:
        self._rule = ShareAction(kind, max_step)

    def reset(self, setup: Setup) -> None:
        self._setup = setup
        self._started = False

    def decide(self, action: float, telemetry: np.record) -> Decision:
        """What to ask for after `action`, see ShareAction."""
        if not self._started:
            # Setup does not tell the split at start.
            start = float(telemetry["kv_share_requested"])
            self._rule.reset(start, self._setup.layout, self._setup.kv_share_bounds)
            self._started = True
        share = self._rule.next_share(action)
        return HOLD if share is None else Decision(share)


def decide_share(share: float, telemetry: np.record, setup: Setup) -> Decision:
    """Ask for `share`, clipped to the bounds; hold where that is less than a slot away from what was last asked for."""
    low, high = setup.kv_share_bounds
    share = min(max(share, low), high)
    if abs(share - telemetry["kv_share_requested"]) < setup.layout.share_step:
        return HOLD
    return Decision(share)
