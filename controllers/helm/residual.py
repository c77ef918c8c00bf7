"""The residual adapter: a small, bounded correction of the base's action that follows the prices of the two pools.

A pool's price is what it is short of: prefill seconds per second that 5 % of the budget more would have saved, plus the
part of the time in which requests waited for it. Where w x KV's price exceeds the other one the residual grows, else it
falls; it leaks, and it starts at 0. The trim log w follows the cost of requests by SPSA (Spall 1992): one interval with
more, one with less. In a few intervals the base decides alone; where its cost is lower than that of the intervals on
either side, gate and residual halve.
"""

import math

from hbmgym.memory_backend.jit import subkernel

# Averaged prices of KV and SSM, s/s; residual, in actions; gate.
_ADAPTER = ("kv_price", "ssm_price", "residual", "gate")
# Trim; direction of the present probe; cost of the probe that went before it (nan: none).
_TRIM = ("trim", "direction", "first_cost")
# Of the present interval; is it forced to the base.
_INTERVAL = ("interval_cost", "interval_arrivals", "windows", "forced")
# Costs of the last interval of the adapter, and of the forced one that followed (nan: none).
_COSTS = ("cost_before", "forced_cost")
# Mean and variance of the adapter's extra cost over comparisons, how many there were; does it harm, how often in a row.
_HARM = ("harm_mean", "harm_variance", "comparisons", "harmful", "harms")
RESIDUAL_FIELDS = (*_ADAPTER, *_TRIM, *_INTERVAL, *_COSTS, *_HARM, "draws")

_MEMORY = 20  # comparisons, after which older ones fade
_LEAST = 3  # comparisons, before which nothing is said


@subkernel
def _draw(s):
    """A number in [0, 1), by the minimal standard generator (Park and Miller 1988)."""
    s.draws = float(int(s.draws) * 48271 % 2147483647)
    return s.draws / 2147483647.0


@subkernel
def _weight(s):
    return math.exp(s.trim + s.direction * s.trim_probe)


@subkernel
def _price(gain, blocked):
    price = gain + blocked
    return price if abs(price) < math.inf else 0.0


@subkernel
def price_gap(t, s):
    """w x KV's price - SSM's in this window, s/s; averages both on the way."""
    kv = _price(t.kv_gain_5pct, t.blocked_kv_fraction)
    ssm = _price(t.ssm_gain_5pct, t.blocked_ssm_fraction)
    if t.window_s > 0.0:
        rate = -math.expm1(-t.window_s / s.price_average_s)
        s.kv_price += rate * (kv - s.kv_price)
        s.ssm_price += rate * (ssm - s.ssm_price)
    return _weight(s) * kv - ssm


@subkernel
def adapt(t, s):
    """Move the residual by one window, and close the interval when it is full."""
    if t.window_s > 0.0 and s.forced == 0.0:
        gap = min(max(_weight(s) * s.kv_price - s.ssm_price, -s.most_gap), s.most_gap)
        residual = s.residual * math.exp(-t.window_s / s.leak_s) + s.learn_per_s * t.window_s * gap
        s.residual = min(max(residual, -s.most_residual), s.most_residual)
    if abs(t.cost) < math.inf and t.arrivals_per_s * t.window_s < math.inf:
        s.interval_cost += t.cost
        s.interval_arrivals += t.arrivals_per_s * t.window_s
    s.windows += 1.0
    if s.windows >= s.interval_windows:
        _close_interval(s)


@subkernel
def _close_interval(s):
    # Without arrivals there is no cost of a request: nothing to compare.
    cost = s.interval_cost / s.interval_arrivals if s.interval_arrivals > 0.5 else math.nan
    if s.forced > 0.0:
        s.forced_cost = cost
        s.forced = 0.0
    else:
        _compare(cost, s)
        _probe(cost, s)
        after_forced = s.forced_cost == s.forced_cost
        s.forced_cost = math.nan
        s.cost_before = cost
        s.forced = 1.0 if _draw(s) < s.forced_part and not after_forced else 0.0
    s.interval_cost = s.interval_arrivals = s.windows = 0.0


@subkernel
def _compare(cost, s):
    """The cost of a forced interval with those on either side of it: what drifts evenly cancels out."""
    extra = 0.5 * (s.cost_before + cost) - s.forced_cost
    if extra == extra:
        _judge(extra, s)
    if s.harms >= s.harm_times:
        s.gate *= 0.5
        s.residual *= 0.5
        s.harms = 0.0
    elif s.harmful == 0.0:
        s.gate = min(s.gate + s.gate_growth, 1.0)


@subkernel
def _judge(extra, s):
    s.comparisons += 1.0
    rate = max(1.0 / s.comparisons, 1.0 / _MEMORY)
    surprise = extra - s.harm_mean
    s.harm_mean += rate * surprise
    s.harm_variance = (1.0 - rate) * (s.harm_variance + rate * surprise * surprise)
    if s.comparisons >= _LEAST:
        error = math.sqrt(s.harm_variance / (min(s.comparisons, _MEMORY) - 1.0))
        s.harmful = 1.0 if s.harm_mean > s.harm_errors * error else 0.0
        s.harms = s.harms + 1.0 if s.harmful > 0.0 else 0.0


@subkernel
def _probe(cost, s):
    """The second of two opposite probes moves the trim against the dearer one; the next pair begins at random."""
    if cost != cost or s.first_cost != s.first_cost:
        s.first_cost = cost
        s.direction = -s.direction
        return
    total = s.first_cost + cost
    if total > 0.0:
        # `direction` is that of the second probe.
        s.trim -= s.trim_step * s.direction * (cost - s.first_cost) / total
        s.trim = min(max(s.trim, -s.most_trim), s.most_trim)
    s.first_cost = math.nan
    s.direction = 1.0 if _draw(s) < 0.5 else -1.0


@subkernel
def rest(s):
    """What holds for the moment alone is forgotten; trim and gate, and what they were learned from, stay."""
    s.residual = s.interval_cost = s.interval_arrivals = s.windows = s.forced = 0.0
    s.first_cost = s.cost_before = s.forced_cost = math.nan


@subkernel
def correction(s):
    """What the adapter adds to the action."""
    if s.forced > 0.0:
        return 0.0
    return s.gate * min(max(s.residual, -s.most_residual), s.most_residual)
