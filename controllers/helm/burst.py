"""Bursts of arrivals: a one-sided CUSUM finds them, and three states say what follows.

NORMAL -> BURST when the sum of what exceeds normal arrivals reaches the alarm; BURST -> RECOVER when arrivals have been
normal for a while, or when the burst lasts so long that it is the new normal; RECOVER -> NORMAL after the cool-down.
What is normal is the 100 s average of arrivals as it was before the window, and stays what it was while a burst lasts.
"""

import math

import numpy as np

from hbmgym.memory_backend.jit import subkernel

NORMAL, BURST, RECOVER = 0, 1, 2
STATES = ("normal", "burst", "recover")
_SLOW_S = 100.0

# Seconds seen so far; their average of arrivals per second, which equals Telemetry's where both began together but also
# outlives a restart of the engine; normal arrivals per second; the sum of Page's test; the state, for how long, and for
# how long arrivals have been normal in it; what an oracle says (nan: there is none, the CUSUM decides).
BURST_FIELDS = ("seen_s", "slow_per_s", "calm_per_s", "cusum", "mode", "mode_s", "quiet_s", "told")


@subkernel
def excess(count, expected, p):
    """How many standard deviations `count` arrivals lie above `expected` ones, on a logarithmic scale, clamped.

    The variance of log(1 + n) of n Poisson arrivals is about 1 / (1 + mean) (delta method).
    """
    z = np.log((1.0 + count) / (1.0 + expected)) / math.sqrt(p.dispersion / (1.0 + expected))
    return min(max(z, -p.most_z), p.most_z)


@subkernel
def _enter(s, mode):
    # The sum begins anew as well: what lasts beyond `longest_s` has been told once.
    s.mode, s.mode_s, s.quiet_s, s.cusum = mode, 0.0, 0.0, 0.0


@subkernel
def _learn_calm(s):
    """The average, corrected for its start at 0."""
    seen = -math.expm1(-s.seen_s / _SLOW_S)
    s.calm_per_s = s.slow_per_s / seen if seen > 0.0 else 0.0


@subkernel
def watch_arrivals(t, s):
    """Follow the arrivals of one window."""
    window_s = t.window_s if t.window_s > 0.0 else 0.0
    z = excess(t.arrivals_per_s * window_s, s.calm_per_s * window_s, s) if s.seen_s >= s.settle_s else 0.0
    z = z if z == z else 0.0
    s.cusum = min(max(s.cusum + z - s.cusum_slack, 0.0), s.cusum_alarm)
    if 0.0 <= t.arrivals_per_s < math.inf:
        s.slow_per_s += -math.expm1(-window_s / _SLOW_S) * (t.arrivals_per_s - s.slow_per_s)
    s.seen_s += window_s
    s.mode_s += window_s
    alarm, quiet, hold_s = s.cusum >= s.cusum_alarm, z <= s.cusum_slack, s.hold_s
    if s.told == s.told:
        alarm, quiet, hold_s = s.told > 0.0, s.told <= 0.0, 0.0
    if s.mode == BURST:
        s.quiet_s = s.quiet_s + window_s if quiet else 0.0
        if (quiet and s.quiet_s >= hold_s) or s.mode_s >= s.longest_s:
            _enter(s, RECOVER)
    elif s.mode == RECOVER and s.mode_s >= s.cooldown_s:
        _enter(s, NORMAL)
    elif s.mode == NORMAL and alarm:
        _enter(s, BURST)
    if s.mode != BURST:
        _learn_calm(s)


@subkernel
def burst_action(gap, s):
    """What a burst adds to the action: towards the pool that this window's price gap finds short."""
    return min(max(s.burst_gain * gap, -s.most_burst), s.most_burst) if s.mode == BURST else 0.0


@subkernel
def most_change(t, s):
    """By how much kv_share may change in this window."""
    return s.refill_per_s * t.window_s if s.mode == RECOVER else math.inf
