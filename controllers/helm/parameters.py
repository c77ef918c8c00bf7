"""HelmParameters: every number of the runtime above the base policy, with its unit."""

import dataclasses
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class HelmParameters:
    """All ours unless a source is named; HELM's own are not public. The policy says what an action is in kv_share.

    Raises ValueError in one line.
    """

    # The base policy.
    most_outside: float = 0.25
    """Part of the inputs that may lie outside the range seen in training; above it the base's action counts as none."""

    strange_inputs: float = 2.0
    """With so many inputs outside that range a window is strange; one alone may be a budget smaller than any other."""
    least_strange: float = 0.5
    """Part of strange windows from which on adapter and bursts act; 0: always."""
    strange_average_s: float = 100.0
    """Time constant, in seconds, of that part."""

    # The residual adapter.
    most_residual: float = 0.1
    """Largest residual, in actions; 0 turns the adapter off."""
    learn_per_s: float = 0.2
    """Growth of the residual, in actions per second and s/s of price gap."""
    most_gap: float = 0.2
    """The price gap counts up to here, in s/s: bounds how fast the residual moves."""
    leak_s: float = 20.0
    """Time constant, in seconds, with which the residual is forgotten."""
    price_average_s: float = 20.0
    """Time constant, in seconds, of the pools' prices."""
    interval_windows: int = 8
    """Windows over which a cost is measured, for the trim and for the gate."""
    trim_probe: float = 0.2
    """By so much the trim (logarithm of the weight of KV's price) is moved up and down to see what that costs."""
    trim_step: float = 0.5
    """Change of the trim per relative difference of the two costs."""
    most_trim: float = 1.0
    """The trim stays within this."""
    gate_start: float = 1.0
    """Gate at start, 0 to 1."""
    gate_growth: float = 0.02
    """Growth of the gate per interval in which nothing speaks against it."""
    forced_part: float = 0.05
    """Part of the intervals in which the base decides alone, for comparison (HELM-style revert, rl.md)."""
    harm_errors: float = 2.0
    """The residual harms when its mean extra cost exceeds so many standard errors..."""
    harm_times: int = 2
    """... at so many comparisons in a row; then gate and residual halve."""
    seed: int = 1
    """Of the draws that choose forced intervals and directions, 1 to 2^31 - 2."""

    # Bursts.
    bursts: bool = True
    """Is there a burst layer?"""
    freeze_in_burst: bool = False
    """Does the adapter stop to learn while a burst lasts?"""
    cusum_slack: float = 0.5
    """k: standard deviations above normal that are still normal."""
    cusum_alarm: float = 8.0
    """h: sum of the excess at which a burst is declared."""
    most_z: float = 4.0
    """A single window counts up to so many standard deviations."""
    dispersion: float = 1.0
    """Variance of a window's arrivals / their mean, in normal traffic; 1 is Poisson."""
    settle_s: float = 60.0
    """Seconds of traffic before the first alarm: until then nobody knows what is normal."""
    hold_s: float = 20.0
    """A burst is over when arrivals have been normal for so many seconds."""
    longest_s: float = 180.0
    """What lasts longer, in seconds, is no burst but the new normal."""
    cooldown_s: float = 60.0
    """Seconds of recovery, in which the split moves slowly and no new burst is declared."""
    burst_gain: float = 1.0
    """Actions per s/s of price gap, within a burst."""
    most_burst: float = 0.5
    """Largest action that a burst adds."""
    refill_part: float = 0.02
    """Part of the worker's rate at which chunks may move in recovery."""

    # The cap on concurrency.
    caps: bool = True
    """Does the split only cap how many run at once, where nothing is reused?"""
    no_reuse: float = 0.005
    """It does when less than this part of the prompt tokens was reused, or would have been without evictions..."""
    reuse_again: float = 0.01
    """... and until it is more than this."""
    reuse_average_requests: float = 200.0
    """Requests over which that part is averaged; a plain mean before."""
    reuse_least_requests: float = 20.0
    """Requests to be seen before the first cap: fewer may be the first turns of all their sessions."""
    reuse_least_s: float = 150.0
    """Seconds to be seen before the first cap: the second turns come that late."""
    cap_balance: float = 0.75
    """Ratio of mean TTFT / SLO to mean TPOT / SLO that the cap seeks."""
    cap_down_per_s: float = 0.004
    """The cap falls by at most this part per second: by half in three minutes, so that it outlasts the calm between
    two bursts."""
    cap_up_per_s: float = 0.02
    """The cap grows by at most this part per second."""
    cap_running: float = 2.0
    """The cap is at least so many times what runs on average over 100 s: where decoding needs its batch, slots that are
    nearly all in use make a queue grow."""
    cap_queue: float = 2.0
    """A queue is long when it exceeds the cap so many times..."""
    cap_wait: float = 0.6
    """... and its mean wait / SLO exceeds mean TPOT / SLO so many times."""
    cap_opening: float = 0.3
    """Part of a long queue that is let in at once; all of it would cost the others their TPOT."""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            low, high = _RANGES.get(name, (0.0, math.inf))
            if not (low <= value <= high and math.isfinite(value)):
                raise ValueError(f"helm: {name} is {value}, expected a finite number from {low:g} to {high:g}")
        for name in _ABOVE_ZERO:
            if getattr(self, name) == 0:
                raise ValueError(f"helm: {name} is 0, expected a number above 0")


_PART = (0.0, 1.0)
_RANGES = {
    **dict.fromkeys(("most_outside", "most_residual", "most_burst", "gate_start", "gate_growth", "refill_part"), _PART),
    **dict.fromkeys(("no_reuse", "reuse_again", "cap_down_per_s", "cap_up_per_s", "cap_opening"), _PART),
    "forced_part": (0.0, 0.5),
    "least_strange": (0.0, 1.0),
    "interval_windows": (1, 1000),
    "harm_times": (1, 1000),
    "seed": (1, 2**31 - 2),
}
_ABOVE_ZERO = (
    "strange_average_s",
    "leak_s",
    "price_average_s",
    "cusum_alarm",
    "most_z",
    "dispersion",
    "refill_part",
    "reuse_average_requests",
    "cap_balance",
)
