"""Who of those that wait is tried next: the order of admission (rule 2).

| admission | source | who goes first |
|---|---|---|
| fcfs | every engine's default or fallback | who has joined the queue first |
| lpm | SGLang, `schedule_policy.py` | who can reuse most tokens; beyond LPM_LIMIT waiting requests the oldest |
| slo | least slack first, with ageing | see below |
| past-future | LightLLM, arXiv 2507.10150 | as fcfs, but only while the forecast peak fits (`forecast.py`) |

slo: first those that have waited AGEING of the time after which they are given up, the oldest of them first; then those
that can still meet their TTFT SLO if they start now, the one that has to start soonest first; then those that cannot,
the oldest first. So whoever has aged is admitted before all that arrived later, and who is late lets those pass that
are not, until it has aged.

Under every order preempted requests go first, and of equals the oldest. With `max_long_prefills`
prompts longer than `long_prefill_tokens` are passed over while so many prefill. The order is made anew when somebody
may fare better: after memory was given back or has moved, an iteration with prefill, an arrival, and at the time at
which slo's order changes by itself; as SGLang, which asks nobody while its batch is full.
"""

import math

import numpy as np

from hbmgym.envs.serving.admission import reusable
from hbmgym.envs.serving.cost_model import recovery_s
from hbmgym.envs.serving.order import is_older, push_first, remove
from hbmgym.envs.serving.state import FCFS, LPM, PAST_FUTURE, PREFILL, QUEUE, SLO
from hbmgym.memory_backend.jit import subkernel
from hbmgym.memory_backend.pools import NONE

ADMISSION_RULES = {"fcfs": FCFS, "lpm": LPM, "slo": SLO, "past-future": PAST_FUTURE}
LPM_LIMIT = 128
AGEING = 0.5
PREEMPTED, AGED, IN_TIME, LATE = range(4)


@subkernel
def bring_next_first(state):
    """Bring whoever is to be tried next to the queue's head; False when nobody is. The queue must not be empty."""
    engine = state.engine
    engine.reorder_s = math.inf
    no_long = engine.max_long_prefills > 0 and _long_prefills(state) >= engine.max_long_prefills
    first, first_rank, first_key = NONE, 0, 0.0
    row = state.ends[QUEUE, 0]
    while row != NONE:
        _, reuse = reusable(state, row)
        done = max(reuse * engine.page_tokens, np.int64(state.requests[row].offloaded))
        if not (no_long and _is_long(state, row, done)):
            rank, key = _place_in_order(state, row, reuse)
            if first == NONE or _goes_before(state, row, rank, key, first, first_rank, first_key):
                first, first_rank, first_key = row, rank, key
        row = state.requests[row].next
    if first == NONE:
        return False
    if first != state.ends[QUEUE, 0]:
        remove(state, QUEUE, first)
        push_first(state, QUEUE, first)
    return True


@subkernel
def _goes_before(state, row, rank, key, other, other_rank, other_key):
    if rank != other_rank:
        return rank < other_rank
    return key < other_key or (key == other_key and is_older(state, row, other))


@subkernel
def _place_in_order(state, row, reuse):
    """(Rank, key) of a waiting request that can reuse so many pages: the least goes first."""
    engine = state.engine
    if state.requests[row].preemptions > 0:
        return PREEMPTED, 0.0
    if engine.admission == SLO:
        return _place_by_slack(state, row, reuse)
    is_matched = engine.admission == LPM and engine.waiting <= LPM_LIMIT
    return IN_TIME, -float(reuse) if is_matched else 0.0


@subkernel
def _place_by_slack(state, row, reuse):
    """As `_place_in_order`; notes in `reorder_s` when the place changes as time passes."""
    engine = state.engine
    request = state.requests[row]
    aged_s = request.arrival_s + AGEING * engine.deadline_slos * request.ttft_slo_s
    if engine.now_s >= aged_s:
        return AGED, 0.0
    start_by_s = request.arrival_s + request.ttft_slo_s - _prefill_s(state, row, reuse)
    if engine.now_s >= start_by_s:
        engine.reorder_s = min(engine.reorder_s, aged_s)
        return LATE, 0.0
    engine.reorder_s = min(engine.reorder_s, start_by_s, aged_s)
    return IN_TIME, start_by_s


@subkernel
def _prefill_s(state, row, reuse):
    """Seconds that the engine would take alone for what the request cannot reuse."""
    return recovery_s(state.cost, reuse, -(-state.requests[row].goal // state.engine.page_tokens))


@subkernel
def _is_long(state, row, done):
    """Are there more tokens left, after `done`, than an iteration takes of one request?"""
    return state.requests[row].goal - done > state.engine.request_budget


@subkernel
def _long_prefills(state):
    count = 0
    row = state.ends[PREFILL, 0]
    while row != NONE:
        count += _is_long(state, row, state.requests[row].computed)
        row = state.requests[row].next
    return count
