"""What other pool sizes would have saved or lost: recovery seconds, booked whenever a request is admitted.

Four sizes more and four sizes less per pool, each with the other pool as it is (`MARGINAL_STEPS`, parts of the budget):

- gain: the pool evicted what the request could have reused, and fewer blocks have been lost since than the larger pool
  would have had on top. What left with a page is the KV pool's loss, a snapshot evicted under a resident page the SSM
  pool's. A page without a snapshot at or below it, and a snapshot without its page, save nothing. Losses that were
  fetched again meanwhile are counted too, so that gains are rather too small.
- cost: what the request reuses lies so near to eviction that the smaller pool would not hold it (`ages.slack`); what is
  left is the deepest snapshot that it would.

Both replay nothing: they assume that the smaller or larger pool had seen the same uses, as a stack algorithm (Mattson
et al., 1970) does under lru. lpb, flop_aware and tlru are none; there the same is reckoned from what was lost last and
used last, so that it says less about what other sizes would have been worth. Nor is lru one where retention drops
snapshots: what a slightly smaller SSM pool would cost is then reckoned too small, since the room that they left behind
was not there before.
"""

import numpy as np

from hbmgym.controllers.telemetry import MARGINAL_STEPS
from hbmgym.envs.serving.cost_model import recovery_s
from hbmgym.memory_backend.ages import slack
from hbmgym.memory_backend.jit import subkernel
from hbmgym.memory_backend.oplog import KV, SSM
from hbmgym.memory_backend.prefix_cache import snapshot_depth

STEP_COUNT = len(MARGINAL_STEPS)
GAIN, COST = range(2)


def make_marginal() -> np.ndarray:
    """float64, shape (2 pools, GAIN or COST, STEP_COUNT): recovery seconds so far."""
    return np.zeros((2, 2, STEP_COUNT))


def step_blocks(budget_bytes: int, page_bytes: int, slot_bytes: int) -> np.ndarray:
    """float64, shape (2 pools, STEP_COUNT): whole blocks nearest to each step."""
    return np.rint(np.outer([budget_bytes / page_bytes, budget_bytes / slot_bytes], MARGINAL_STEPS))


@subkernel
def book_admission(state, first, pages_live, reuse, resident, seen):
    """Before a request whose page ids begin at refs[`first`] takes its memory: of its leading pages that could be
    matched `seen` were ever resident, `resident` are, and `reuse` lie under a snapshot; `pages_live` are pinned."""
    if seen > resident:
        _book_kv_gain(state, first, reuse, resident, seen)
    if resident > reuse:
        _book_ssm_gain(state, first, reuse, resident)
    if reuse > 0:
        _book_cost(state, SSM, first, reuse)
        if pages_live < reuse:
            _book_cost(state, KV, first, reuse)


@subkernel
def _book_kv_gain(state, first, reuse, resident, seen):
    lost = state.memory.kv.meta.evictions
    step = STEP_COUNT - 1
    for depth in range(seen, resident, -1):
        state_lost = state.memory.ids[state.refs[first + depth - 1]].state_lost
        if state_lost < 0:
            step = _book_gain(state, KV, step, lost + state_lost, reuse, depth)
            if step < 0:
                return


@subkernel
def _book_ssm_gain(state, first, reuse, resident):
    lost = state.memory.ssm.meta.evictions
    step = STEP_COUNT - 1
    for depth in range(resident, reuse, -1):
        state_lost = state.memory.ids[state.refs[first + depth - 1]].state_lost
        if state_lost > 0:
            step = _book_gain(state, SSM, step, lost - state_lost, reuse, depth)
            if step < 0:
                return


@subkernel
def _book_gain(state, pool, step, lost_since, reuse, depth):
    """Book the steps down from `step` that would have held what `lost_since` blocks followed; the first that not."""
    while step >= 0 and lost_since < state.step_blocks[pool, step]:
        state.marginal[pool, GAIN, step] += recovery_s(state.cost, reuse, depth)
        step -= 1
    return step


@subkernel
def _book_cost(state, pool, first, reuse):
    widest = state.step_blocks[pool, STEP_COUNT - 1]
    left = _slack(state, pool, first, reuse, widest)
    if left >= widest:
        return
    depth = reuse
    for step in range(STEP_COUNT):
        while depth > 0 and left < state.step_blocks[pool, step]:
            depth = snapshot_depth(state.memory, state.refs, first, depth - 1)
            if depth > 0:
                left = _slack(state, pool, first, depth, widest)
        if depth < reuse:
            state.marginal[pool, COST, step] += recovery_s(state.cost, depth, reuse)


@subkernel
def _slack(state, pool, first, depth, enough):
    """Of the page that ends a row's first `depth`, or of its snapshot; who is live is in nobody's way."""
    page_id = state.memory.ids[state.refs[first + depth - 1]]
    kept, entry = state.memory.ssm, page_id.snapshot
    if pool == KV:
        kept, entry = state.memory.kv, page_id.page
    return np.int64(enough) if kept.entries[entry].pins > 0 else slack(kept, entry, enough)
