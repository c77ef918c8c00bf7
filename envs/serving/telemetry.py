"""The Telemetry record at the end of a window, by TELEMETRY_TABLE.

After traffic has ended averaged rates fall, while the ratio of two stays what it was, since both fall alike: nothing
new is learned of requests while none come. Floating-point numbers do not fall for ever: after two hours both would be
left with one bit, and their ratio would be 1 until traffic comes back. So a rate below LEAST_RATE is 0, and a ratio
keeps its value once less than LEAST_WHOLE is left of what it is a part of. Before the first request it is 0.
"""

import math
from typing import NamedTuple

import numpy as np

from hbmgym.controllers.telemetry import (
    AVERAGES,
    COUNTERS,
    FAST_S,
    KV_DEMAND,
    MARGINAL_FIELDS,
    SLOW_S,
    TELEMETRY_TABLE,
)
from hbmgym.envs.serving.arrival import book_miss, most_pages_needed
from hbmgym.envs.serving.marginal import STEP_COUNT
from hbmgym.envs.serving.shortage import slots_within_reach
from hbmgym.envs.serving.state import ASIDE, PINS, PREFILL, QUEUE, WORST_RATIO, state_at
from hbmgym.memory_backend.jit import kernel, subkernel
from hbmgym.memory_backend.pools import NONE, blocks_kept_only, free_blocks

LEAST_WHOLE = 1e-100
LEAST_RATE = 1e-200  # far less, so that the part of a ratio is there for as long as the whole

SUM, RATE, FAST, SLOW = range(len(AVERAGES))  # of Window.told, in the order of AVERAGES
_COUNTERS = np.dtype((np.record, [(name, "f8") for name in COUNTERS]))
_MARGINALS = COUNTERS.index(MARGINAL_FIELDS[0])


def _places(counters: int) -> np.ndarray:
    """int64, shape (fields, 2 + `counters`): the place in a record, the row of Window.told and the counters of each
    field that tells of so many."""
    rows = [
        (place, AVERAGES.index(field.average), *map(COUNTERS.index, field.counters))
        for place, field in enumerate(TELEMETRY_TABLE)
        if len(field.counters) == counters
    ]
    return np.array(rows, np.int64)


_ALONE, _RATIOS = _places(1), _places(2)
_KV_DEMANDS = np.array(
    [(i, AVERAGES.index(field.average)) for i, field in enumerate(TELEMETRY_TABLE) if field.source == KV_DEMAND],
    np.int64,
)
_RECEIVED, _RECEIVED_TOKENS = COUNTERS.index("received"), COUNTERS.index("received_tokens")


class Window(NamedTuple):
    """What has to be remembered from window to window."""

    totals: np.ndarray
    """float64, shape (COUNTERS,): of the episode, at the end of the window."""
    seen: np.ndarray
    """As they were at the end of the window before."""
    told: np.ndarray
    """float64, shape (AVERAGES, COUNTERS): growth in the window, that per second, rates averaged over about FAST_S, and
    over about SLOW_S."""
    start_s: np.ndarray
    """Shape (1,)."""


def make_window() -> Window:
    count = len(COUNTERS)
    return Window(np.zeros(count), np.zeros(count), np.zeros((len(AVERAGES), count)), np.zeros(1))


@subkernel
def _count(state, totals, waiting_cost):
    """Write every counter: those of COUNTERS by name, and the marginal ones behind them."""
    engine, memory = state.engine, state.memory
    total = totals.view(_COUNTERS)[0]
    total.received = engine.received
    total.received_tokens = engine.received_tokens
    total.admitted_tokens = engine.admitted_tokens
    total.reused_tokens = engine.reused_tokens
    total.kv_loss_tokens = engine.kv_loss_tokens
    total.ssm_loss_tokens = engine.ssm_loss_tokens
    total.kv_evictions = memory.kv.meta.evictions
    total.ssm_evictions = memory.ssm.meta.evictions
    total.first_tokens = engine.first_tokens
    total.ttft_over_slo = engine.ttft_over_slo
    total.tpots = engine.tpots
    total.tpot_over_slo = engine.tpot_over_slo
    total.cost = engine.cost + waiting_cost
    total.busy_s = engine.busy_s
    total.blocked_kv_s = engine.blocked_kv_s
    total.blocked_ssm_s = engine.blocked_ssm_s
    total.finished = engine.finished
    total.met = engine.met
    total.missed = engine.missed
    total.preemptions = engine.preemptions
    total.rejected = engine.rejected
    total.moved_chunks = memory.split.moved_chunks
    total.relocated_bytes = memory.split.relocated_bytes
    for pool in range(len(state.marginal)):
        for side in range(2):
            for step in range(STEP_COUNT):
                totals[_MARGINALS + (2 * pool + side) * STEP_COUNT + step] = state.marginal[pool, side, step]


@subkernel
def _average(window, seconds):
    """Bring `told` up to date with `totals`, of which `seen` are known."""
    totals, seen, told = window.totals, window.seen, window.told
    fast, slow = -math.expm1(-seconds / FAST_S), -math.expm1(-seconds / SLOW_S)
    for i in range(len(totals)):
        growth = totals[i] - seen[i]
        seen[i] = totals[i]
        told[SUM, i] = growth
        told[RATE, i] = growth / seconds
        told[FAST, i] = _moved(told[FAST, i], told[RATE, i], fast)
        told[SLOW, i] = _moved(told[SLOW, i], told[RATE, i], slow)


@subkernel
def _moved(average, rate, weight):
    average += weight * (rate - average)
    return average if abs(average) >= LEAST_RATE else 0.0


@subkernel
def _write_counted(state, window, telemetry, values):
    told = window.told
    for i in range(len(_ALONE)):
        values[_ALONE[i, 0]] = told[_ALONE[i, 1], _ALONE[i, 2]]
    for i in range(len(_RATIOS)):
        average = _RATIOS[i, 1]
        _write_ratio(values, _RATIOS[i, 0], told[average, _RATIOS[i, 2]], told[average, _RATIOS[i, 3]])
    for i in range(len(_KV_DEMANDS)):
        rates = told[_KV_DEMANDS[i, 1]]
        kv_bytes = rates[_RECEIVED_TOKENS] * telemetry.kv_token_bytes
        slot_bytes = rates[_RECEIVED] * state.engine.slots_per_request * telemetry.slot_bytes
        _write_ratio(values, _KV_DEMANDS[i, 0], kv_bytes, kv_bytes + slot_bytes)


@subkernel
def _write_ratio(values, place, part, whole):
    if whole >= LEAST_WHOLE:
        values[place] = part / whole


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
    telemetry.mean_wait_over_slo = total / count if count > 0 else 0.0
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
    _count(state, window.totals, waiting_cost)
    _average(window, seconds)
    _look_at_pools(state, telemetry)
    _write_counted(state, window, telemetry, values)
