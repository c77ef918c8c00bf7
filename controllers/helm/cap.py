"""A cap on how many requests run at once, where nothing is ever reused.

There memory is worth nothing as a cache, and all that the split decides is how many requests have slots. Few of them
decode fast and let others wait: the cap balances TPOT against TTFT, of which the larger one is what a request costs.
"""

import math

from hbmgym.memory_backend.jit import subkernel

# Part of the prompt tokens that was reused, or would have been had it not been evicted, per request; requests and
# seconds that it was seen in; how many ran, averaged; the cap, in requests (nan: there is reuse, or nobody knows).
CAP_FIELDS = ("reuse", "reuse_requests", "reuse_s", "mean_running", "cap")

_FIRST = 4.0  # requests: the cap starts no lower
_RUNNING_S = 100.0  # over which those running are averaged; a plain mean before
_NOISE = 0.01  # of an SLO: below it TTFT and TPOT count as equal


@subkernel
def _average_reuse(t, s):
    arrivals, tokens_per_s = t.arrivals_per_s * t.window_s, t.prompt_tokens_per_s_10s
    lost = t.kv_loss_tokens_per_s + t.ssm_loss_tokens_per_s
    # Without prompt tokens, as from an engine that does not export them, nothing is known.
    part = t.hit_rate_10s + lost / tokens_per_s if tokens_per_s > 0.0 else math.nan
    if 0.0 < t.window_s < math.inf:
        s.reuse_s += t.window_s
    if 0.0 < arrivals < math.inf and part >= 0.0:
        s.reuse_requests += arrivals
        # A plain mean until the memory is full.
        rate = max(arrivals / s.reuse_requests, -math.expm1(-arrivals / s.reuse_average_requests))
        s.reuse += rate * (min(part, 1.0) - s.reuse)


@subkernel
def _average_running(t, s):
    """After `_average_reuse`, which counts the seconds."""
    running = min(t.running, t.concurrency_cap)
    if 0.0 < t.window_s < math.inf and 0.0 <= running < math.inf:
        rate = max(t.window_s / s.reuse_s, -math.expm1(-t.window_s / _RUNNING_S))
        s.mean_running += rate * (running - s.mean_running)


@subkernel
def _start(t):
    return t.running + t.waiting if t.running + t.waiting > _FIRST else _FIRST


@subkernel
def nothing_reused(t, s):
    """Does the cap decide in this window?"""
    _average_reuse(t, s)
    _average_running(t, s)
    if s.cap == s.cap:
        if s.reuse > s.reuse_again:
            s.cap = math.nan
    elif s.reuse < s.no_reuse and s.reuse_requests >= s.reuse_least_requests and s.reuse_s >= s.reuse_least_s:
        s.cap = _start(t)
    return s.cap == s.cap


@subkernel
def _room(t):
    """As many requests as the budget holds with their slots and the KV of their prompts; nan in a broken record."""
    tokens = t.tokens_per_request_100s if t.tokens_per_request_100s > 0.0 else 0.0
    room = t.budget_bytes / (t.slots_per_request * t.slot_bytes + tokens * t.kv_token_bytes)
    return max(room, 1.0) if 0.0 < room < math.inf else math.nan


@subkernel
def _follow(t, s):
    """The cap after a window: slowly towards the balance, at once where a queue waits too long."""
    ttft, tpot = t.ttft_over_slo_10s, t.tpot_over_slo_10s
    if 0.0 <= ttft < math.inf and 0.0 <= tpot < math.inf and 0.0 < t.window_s < math.inf:
        gap = min(max(math.log((ttft + _NOISE) / (s.cap_balance * tpot + _NOISE)), -1.0), 1.0)
        s.cap *= math.exp(min(t.window_s * (s.cap_up_per_s if gap > 0.0 else s.cap_down_per_s), 1.0) * gap)
    opened = t.running + s.cap_opening * t.waiting
    if t.waiting > s.cap_queue * s.cap and t.mean_wait_over_slo > s.cap_wait * tpot and opened > s.cap:
        s.cap = opened


@subkernel
def ask_for_cap(t, s):
    """The kv_share to ask for, or nan: that of a whole number of requests, within the bounds."""
    room = _room(t)
    if room != room:
        return math.nan
    _follow(t, s)
    s.cap = min(max(s.cap, s.cap_running * s.mean_running, 1.0), room)
    slot = t.slot_bytes / t.budget_bytes
    wanted = 1.0 - math.floor(s.cap + 0.5) * t.slots_per_request * slot
    s.wanted = min(max(wanted, s.low), s.high)
    if abs(s.wanted - s.asked) < 0.5 * slot:
        return math.nan
    s.asked = s.wanted
    return s.asked
