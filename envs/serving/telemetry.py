"""The Telemetry record at the end of a window; what is early in it, TELEMETRY_TABLE says."""

import math
from typing import NamedTuple

import numpy as np

from hbmgym.envs.serving.arrival import book_miss, most_pages_needed
from hbmgym.envs.serving.marginal import MARGINAL_COUNT, STEP_COUNT
from hbmgym.envs.serving.shortage import slots_within_reach
from hbmgym.envs.serving.state import ASIDE, PINS, PREFILL, QUEUE, WORST_RATIO, state_at
from hbmgym.memory_backend.jit import kernel, subkernel
from hbmgym.memory_backend.pools import NONE, blocks_kept_only, free_blocks

FAST_S, SLOW_S = 10.0, 100.0

# Counters of the whole episode whose growth per window becomes a rate.
(
    ARRIVALS,
    TOKENS,
    ADMITTED,
    REUSED,
    KV_LOSS,
    SSM_LOSS,
    KV_EVICTIONS,
    SSM_EVICTIONS,
    FIRST_TOKENS,
    TTFT,
    TPOTS,
    TPOT,
    COST,
    BUSY,
    BLOCKED_KV,
    BLOCKED_SSM,
    FINISHED,
    MET,
    MISSED,
    PREEMPTIONS,
    REJECTED,
    MOVED,
    RELOCATED,
    MARGINAL,  # and those after it, in the order of State.marginal
) = range(24)
COUNTERS = MARGINAL + MARGINAL_COUNT


class Window(NamedTuple):
    """What has to be remembered from window to window; arrays of shape (COUNTERS,)."""

    seen: np.ndarray
    """Counters at the last window's end."""
    grown: np.ndarray
    """Growth in the window that ends."""
    fast: np.ndarray
    """Rates averaged over about FAST_S."""
    slow: np.ndarray
    """Rates averaged over about SLOW_S."""
    start_s: np.ndarray
    """Shape (1,)."""


def make_window() -> Window:
    return Window(np.zeros(COUNTERS), np.zeros(COUNTERS), np.zeros(COUNTERS), np.zeros(COUNTERS), np.zeros(1))


@subkernel
def _count(state, seen, grown, waiting_cost):
    """Write the growth of every counter since `seen`, and bring `seen` up to date."""
    engine = state.engine
    memory = state.memory
    grown[ARRIVALS] = engine.received
    grown[TOKENS] = engine.received_tokens
    grown[ADMITTED] = engine.admitted_tokens
    grown[REUSED] = engine.reused_tokens
    grown[KV_LOSS] = engine.kv_loss_tokens
    grown[SSM_LOSS] = engine.ssm_loss_tokens
    grown[KV_EVICTIONS] = memory.kv.meta.evictions
    grown[SSM_EVICTIONS] = memory.ssm.meta.evictions
    grown[FIRST_TOKENS] = engine.first_tokens
    grown[TTFT] = engine.ttft_over_slo
    grown[TPOTS] = engine.tpots
    grown[TPOT] = engine.tpot_over_slo
    grown[COST] = engine.cost + waiting_cost
    grown[BUSY] = engine.busy_s
    grown[BLOCKED_KV] = engine.blocked_kv_s
    grown[BLOCKED_SSM] = engine.blocked_ssm_s
    grown[FINISHED] = engine.finished
    grown[MET] = engine.met
    grown[MISSED] = engine.missed
    grown[PREEMPTIONS] = engine.preemptions
    grown[REJECTED] = engine.rejected
    grown[MOVED] = memory.split.moved_chunks
    grown[RELOCATED] = memory.split.relocated_bytes
    for pool in range(len(state.marginal)):
        for side in range(2):
            for step in range(STEP_COUNT):
                grown[MARGINAL + (2 * pool + side) * STEP_COUNT + step] = state.marginal[pool, side, step]
    for i in range(COUNTERS):
        total = grown[i]
        grown[i] = total - seen[i]
        seen[i] = total


@subkernel
def _average(rates, grown, seconds, time_constant_s):
    weight = -math.expm1(-seconds / time_constant_s)
    for i in range(COUNTERS):
        rates[i] += weight * (grown[i] / seconds - rates[i])


@subkernel
def _ratio(part, whole):
    return part / whole if whole > 0.0 else 0.0


@subkernel
def _kv_demand(state, telemetry, rates):
    kv_bytes = rates[TOKENS] * telemetry.kv_token_bytes
    slot_bytes = rates[ARRIVALS] * state.engine.slots_per_request * telemetry.slot_bytes
    return _ratio(kv_bytes, kv_bytes + slot_bytes)


@subkernel
def _look_at_waiting(state, telemetry):
    """Ages of the requests without a first token; those past their SLO are misses from now on."""
    oldest, total, count = 0.0, 0.0, 0
    for where in (QUEUE, ASIDE, PREFILL):
        row = state.ends[where, 0]
        while row != NONE:
            request = state.requests[row]
            if request.first_token_s != request.first_token_s:
                age = (state.engine.now_s - request.arrival_s) / request.ttft_slo_s
                if age > 1.0:
                    book_miss(state, row)
                total += min(age, WORST_RATIO)
                count += 1
                if where <= ASIDE:
                    oldest = max(oldest, age)
            row = request.next
    telemetry.oldest_wait_over_slo = oldest
    telemetry.mean_wait_over_slo = _ratio(total, count)
    return total


@subkernel
def _look_at_pools(state, telemetry):
    memory = state.memory
    kv, ssm = memory.kv.meta, memory.ssm.meta
    telemetry.kv_capacity = kv.capacity
    kv_kept, ssm_kept = 0, state.heap_sizes[PINS]
    if ssm_kept > 0:
        kv_kept = blocks_kept_only(memory.kv)
    telemetry.kv_live = kv.live - kv_kept
    telemetry.kv_cached = kv.cached + kv_kept
    telemetry.kv_free = free_blocks(memory.kv)
    telemetry.ssm_capacity = ssm.capacity
    telemetry.ssm_live = ssm.live - ssm_kept
    telemetry.ssm_cached = ssm.cached + ssm_kept
    telemetry.ssm_free = free_blocks(memory.ssm)
    telemetry.kv_share_effective = kv.chunks / memory.split.chunks
    telemetry.kv_share_requested = kv.target_chunks / memory.split.chunks
    telemetry.moving_chunks = abs(kv.chunks - kv.target_chunks)
    telemetry.concurrency_cap = slots_within_reach(state) // state.engine.slots_per_request


@subkernel
def _write_rates(state, window, telemetry, seconds):
    grown, fast, slow = window.grown, window.fast, window.slow
    telemetry.busy_fraction = grown[BUSY] / seconds
    telemetry.blocked_kv_fraction = grown[BLOCKED_KV] / seconds
    telemetry.blocked_ssm_fraction = grown[BLOCKED_SSM] / seconds
    telemetry.arrivals_per_s = grown[ARRIVALS] / seconds
    telemetry.arrivals_per_s_10s = fast[ARRIVALS]
    telemetry.arrivals_per_s_100s = slow[ARRIVALS]
    telemetry.prompt_tokens_per_s_10s = fast[TOKENS]
    telemetry.prompt_tokens_per_s_100s = slow[TOKENS]
    telemetry.tokens_per_request_10s = _ratio(fast[TOKENS], fast[ARRIVALS])
    telemetry.tokens_per_request_100s = _ratio(slow[TOKENS], slow[ARRIVALS])
    telemetry.kv_demand_10s = _kv_demand(state, telemetry, fast)
    telemetry.kv_demand_100s = _kv_demand(state, telemetry, slow)
    telemetry.hit_rate_10s = _ratio(fast[REUSED], fast[ADMITTED])
    telemetry.hit_rate_100s = _ratio(slow[REUSED], slow[ADMITTED])
    telemetry.kv_loss_tokens_per_s = fast[KV_LOSS]
    telemetry.ssm_loss_tokens_per_s = fast[SSM_LOSS]
    telemetry.kv_evictions_per_s = fast[KV_EVICTIONS]
    telemetry.ssm_evictions_per_s = fast[SSM_EVICTIONS]
    telemetry.finished_per_s = grown[FINISHED] / seconds
    telemetry.met = grown[MET]
    telemetry.missed = grown[MISSED]
    telemetry.cost = grown[COST]
    telemetry.preemptions = grown[PREEMPTIONS]
    telemetry.rejected = grown[REJECTED]
    telemetry.ttft_over_slo_10s = _ratio(fast[TTFT], fast[FIRST_TOKENS])
    telemetry.tpot_over_slo_10s = _ratio(fast[TPOT], fast[TPOTS])
    telemetry.moved_chunks = grown[MOVED]
    telemetry.relocated_bytes = grown[RELOCATED]


@subkernel
def _write_marginals(window, values):
    first = len(values) - 2 * MARGINAL_COUNT
    for i in range(MARGINAL_COUNT):
        values[first + i] = window.fast[MARGINAL + i]
        values[first + MARGINAL_COUNT + i] = window.slow[MARGINAL + i]


@kernel
def close_window(table, window, telemetry, values):
    """Fill `telemetry`, whose fields `values` holds as float64 (fields,), for the window that ends now, and start the
    next one."""
    state = state_at(table)
    engine = state.engine
    seconds = max(engine.now_s - window.start_s[0], 1e-9)
    window.start_s[0] = engine.now_s
    telemetry.time_s = engine.now_s
    telemetry.window_s = seconds
    telemetry.waiting = engine.waiting + engine.aside
    telemetry.running = engine.decoding + engine.prefilling
    telemetry.aside = engine.aside
    # Whoever an idle engine took another split for may have ended since: the controller learns of it all the same.
    telemetry.kv_needed = max(most_pages_needed(state), engine.idle_pages)
    engine.idle_pages = 0
    waiting_cost = _look_at_waiting(state, telemetry)
    _count(state, window.seen, window.grown, waiting_cost)
    _average(window.fast, window.grown, seconds, FAST_S)
    _average(window.slow, window.grown, seconds, SLOW_S)
    _look_at_pools(state, telemetry)
    _write_rates(state, window, telemetry, seconds)
    _write_marginals(window, values)
