"""What of a running request becomes matchable: pages, and snapshots at page boundaries (rules 3, 6)."""

from hbmgym.envs.serving.retention import (
    INTERVAL,
    OPTIMAL,
    drop_superseded,
    next_interval_depth,
    next_planned_depth,
)
from hbmgym.envs.serving.shortage import fetch_room
from hbmgym.memory_backend.jit import subkernel
from hbmgym.memory_backend.pools import NONE, copy, stamp
from hbmgym.memory_backend.prefix_cache import publish_page, refresh_snapshot, save_snapshot


@subkernel
def pop_private_page(state, request):
    entry = request.first_page
    request.first_page = state.memory.kv.entries[entry].next
    if request.first_page == NONE:
        request.last_page = NONE
    return entry


@subkernel
def publish_computed(state, row, tokens):
    """Make the full pages of the first `tokens` tokens that have ids matchable."""
    request = state.requests[row]
    trace = state.rows[row]
    full = min(tokens // state.engine.page_tokens, trace.known_ids)
    while request.published < full:
        entry = pop_private_page(state, request)
        publish_page(state.memory, entry, state.refs, trace.ref_off, request.published)
        request.published += 1


@subkernel
def next_prefill_stop(state, row):
    """Tokens at which the request's next prefill chunk must end: where a snapshot is saved, if that ends chunks, or the
    goal."""
    request = state.requests[row]
    if state.cost.snapshots_end_chunks == 0:
        return request.goal
    depth = _next_saved_depth(state, row, request.computed // state.engine.page_tokens)
    return depth * state.engine.page_tokens if depth > 0 else request.goal


@subkernel
def boundary_depth(state, row):
    """Pages of the prompt's last boundary that can be matched: one without an id never could."""
    return min(state.requests[row].goal // state.engine.page_tokens, state.rows[row].known_ids)


@subkernel
def _next_saved_depth(state, row, depth):
    """Pages, more than `depth`, after which the next state of the prompt is saved: the branch point, the last boundary,
    and what retention asks for; 0: none is."""
    engine = state.engine
    saved = boundary_depth(state, row)
    if saved <= depth:
        return 0
    branch = state.requests[row].branch_depth
    if branch > depth:
        saved = min(saved, branch)
    if engine.retention == INTERVAL:
        saved = min(saved, next_interval_depth(engine, depth))
    elif engine.retention == OPTIMAL:
        planned = next_planned_depth(state, row, depth)
        if planned > 0:
            saved = min(saved, planned)
    return saved


@subkernel
def save_prefill_snapshots(state, row, before):
    """After a chunk from `before` tokens on: save the states that it has passed."""
    page_tokens = state.engine.page_tokens
    depth = _next_saved_depth(state, row, before // page_tokens)
    while depth > 0 and depth * page_tokens <= state.requests[row].computed:
        _save_prefill_snapshot(state, row, depth)
        depth = _next_saved_depth(state, row, depth)


@subkernel
def _save_prefill_snapshot(state, row, depth):
    """Save the record after `depth` pages of the prompt in a free or evictable slot, else in the reserved one."""
    engine = state.engine
    request = state.requests[row]
    page_id = state.refs[state.rows[row].ref_off + depth - 1]
    present = state.memory.ids[page_id].snapshot
    if present != NONE:
        refresh_snapshot(state.memory, present)
        drop_superseded(state, row, depth, boundary_depth(state, row))
        return
    fetch_room(state, 1, 0)
    if not save_snapshot(state.memory, request.working, page_id):
        if request.reserved == NONE:
            engine.skipped_snapshots += 1
            return
        _save_in_reserved(state, request, depth)
    else:
        engine.allocations += 1
        drop_superseded(state, row, depth, boundary_depth(state, row))
    engine.saved_snapshots += 1
    engine.debt_s += state.cost.slot_copy_s


@subkernel
def _save_in_reserved(state, request, depth):
    memory = state.memory
    copy(memory.ssm, memory.log, request.working, request.reserved)
    stamp(memory.ssm, memory.log, request.working)  # the state goes on
    request.reserved_depth = depth


@subkernel
def save_decode_snapshot(state, row, tokens):
    """While decoding: refresh the snapshot in the reserved slot."""
    _save_in_reserved(state, state.requests[row], tokens // state.engine.page_tokens)
    state.engine.saved_snapshots += 1
    state.engine.debt_s += state.cost.slot_copy_s
