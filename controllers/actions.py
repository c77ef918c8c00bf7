"""What an action in [-1, 1] asks for: one rule for the environment and for every controller that moves in steps."""

import math

import numpy as np

from hbmgym.controllers.base import HOLD, Decision, Setup
from hbmgym.memory_backend.jit import kernel, subkernel
from hbmgym.memory_backend.split import Layout

ACTION_KINDS = ("incremental", "absolute")
DEFAULT_MAX_STEP_PER_S = 0.02
"""Largest change of kv_share per second; a tenth in a window of 5 s."""

# Bounds of kv_share; width within which a request holds; largest change in one window and kind of the actions; what all
# actions so far add up to; what was last asked for. Any record that has these fields can be moved.
RULE_FIELDS = ("low", "high", "hold", "step", "absolute", "wanted", "asked")
RULE = np.dtype((np.record, [(name, "f8") for name in RULE_FIELDS]))


@subkernel
def move(rule, action, most_change):
    """The kv_share to ask for after `action`, or nan; the wanted share changes by at most `most_change`."""
    action = min(max(action, -1.0), 1.0)
    if rule.absolute > 0.0:
        wanted = rule.low + 0.5 * (action + 1.0) * (rule.high - rule.low)
    else:
        wanted = rule.wanted + rule.step * action
    wanted = min(max(wanted, rule.wanted - most_change), rule.wanted + most_change)
    rule.wanted = min(max(wanted, rule.low), rule.high)
    share = _at_an_end(rule)
    if abs(share - rule.asked) < rule.hold:
        return math.nan
    rule.asked = share
    return share


@subkernel
def _at_an_end(rule):
    """The wanted share, or the bound that it has all but reached: else the last slot could never be asked for."""
    if rule.high - rule.wanted < rule.hold:
        return rule.high
    return rule.low if rule.wanted - rule.low < rule.hold else rule.wanted


@kernel
def _next_share(values, action):
    return move(values.view(RULE)[0], action, math.inf)


def check_max_step_per_s(value: float, owner: str = "") -> None:
    """ValueError in one line unless a wanted share may change by so much per second."""
    if not 0.0 < value <= 1.0:
        raise ValueError(f"{owner}max_step_per_s is {value}, expected a share per second above 0 and at most 1")


def prepare(
    rule: np.record, kind: str, max_step_per_s: float, window_s: float, layout: Layout, bounds: tuple[float, float]
) -> None:
    """Fill in RULE_FIELDS but for the share to start at."""
    rule["absolute"], rule["step"] = float(kind == "absolute"), max_step_per_s * window_s
    rule["low"], rule["high"] = bounds
    # Up to this width two shares may round to the same split, because slots end within chunks.
    rule["hold"] = layout.share_step + 1.0 / layout.chunks


class ShareAction:
    """Turns actions into requested shares; `reset` first.

    incremental: wanted share += max_step_per_s * window_s * action. absolute: -1 is the smallest share, 1 the largest.
    The wanted share is kept as a float, so that small actions add up; while it differs from what was last asked for by
    less than a slot and a chunk, the action is a hold, and so near to a bound it counts as the bound. A share that is
    asked for therefore always changes the split.
    """

    def __init__(self, kind: str = "incremental", max_step_per_s: float = DEFAULT_MAX_STEP_PER_S) -> None:
        if kind not in ACTION_KINDS:
            raise ValueError(f"action kind is {kind!r}, expected one of: {', '.join(ACTION_KINDS)}")
        check_max_step_per_s(max_step_per_s)
        self.kind = kind
        self.max_step_per_s = max_step_per_s
        self.values = np.zeros(len(RULE_FIELDS))

    def reset(self, share: float, layout: Layout, window_s: float, bounds: tuple[float, float] | None = None) -> None:
        """Start at the realised `share`, with an action every `window_s`; `bounds` are the shares that may be asked
        for, by default the layout's."""
        rule = self.values.view(RULE)[0]
        prepare(rule, self.kind, self.max_step_per_s, window_s, layout, bounds or layout.share_bounds)
        rule["wanted"] = rule["asked"] = share

    @property
    def wanted(self) -> float:
        """The share all actions so far add up to, within the bounds."""
        return float(self.values.view(RULE)[0]["wanted"])

    def next_share(self, action: float) -> float | None:
        """The kv_share to ask for after `action` (clipped to [-1, 1]); None holds what was last asked for."""
        share = _next_share(self.values, float(action))
        return share if share == share else None


class Steps:
    """A controller's own ShareAction, which begins at the split that the first record shows; `reset` first."""

    def __init__(self, kind: str = "incremental", max_step_per_s: float = DEFAULT_MAX_STEP_PER_S) -> None:
        self._rule = ShareAction(kind, max_step_per_s)

    def reset(self, setup: Setup) -> None:
        self._setup = setup
        self._started = False

    def decide(self, action: float, telemetry: np.record) -> Decision:
        """What to ask for after `action`, see ShareAction."""
        if not self._started:
            # Setup does not tell the split at start.
            start = float(telemetry["kv_share_requested"])
            setup = self._setup
            self._rule.reset(start, setup.layout, setup.window_s, setup.kv_share_bounds)
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
