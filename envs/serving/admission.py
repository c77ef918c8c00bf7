"""Who gets memory and what it starts from: head of line, reuse of the deepest snapshot, slots, pages (rules 2, 3)."""

from hbmgym.envs.serving.admitter import evict_as_chosen, pool_to_wait_for
from hbmgym.envs.serving.arrival import leave_queue
from hbmgym.envs.serving.forecast import peak_fits
from hbmgym.envs.serving.marginal import book_admission
from hbmgym.envs.serving.offload import copy_back
from hbmgym.envs.serving.order import push_last
from hbmgym.envs.serving.pins import end_pins_under, pin_gives_way
from hbmgym.envs.serving.retention import plan_snapshots
from hbmgym.envs.serving.shortage import PRICED, answer_shortage, fetch_room, lacking_pool, take_split
from hbmgym.envs.serving.snapshots import boundary_depth
from hbmgym.envs.serving.state import PAST_FUTURE, PINS, PREFILL, PREFILLING, QUEUE
from hbmgym.memory_backend.jit import subkernel
from hbmgym.memory_backend.oplog import KV
from hbmgym.memory_backend.pools import NONE, copy, unpin, zero
from hbmgym.memory_backend.prefix_cache import (
    forget_snapshot,
    live_depth,
    resident_depth,
    reuse_page,
    reuse_snapshot,
    seen_depth,
    snapshot_depth,
    take_page,
    take_slot,
)


@subkernel
def reusable(state, row):
    """(Leading pages of a request that are resident, pages under the deepest snapshot of them, which it can reuse.)"""
    first, most = state.rows[row].ref_off, _most_reusable(state, row)
    resident = resident_depth(state.memory, state.refs, first, most)
    if state.requests[row].offloaded > 0:
        return resident, resident  # the state is in host memory
    return resident, snapshot_depth(state.memory, state.refs, first, resident)


@subkernel
def _most_reusable(state, row):
    """Pages that have an id; at least the last token is recomputed, and what host memory holds may end before that."""
    request = state.requests[row]
    tokens = request.offloaded if request.offloaded > 0 else request.goal - 1
    return min(state.rows[row].known_ids, tokens // state.engine.page_tokens)


@subkernel
def try_admit_head(state):
    """Admit the queue's head, or say in `blocked_on` which pool it waits for; the queue must not be empty."""
    engine = state.engine
    row = state.ends[QUEUE, 0]
    request = state.requests[row]
    trace = state.rows[row]
    memory = state.memory
    pages = -(-request.goal // engine.page_tokens)
    while True:
        resident, reuse = reusable(state, row)
        needed = pages - live_depth(memory, state.refs, trace.ref_off, reuse)
        if _pins_keep_head_out(state, needed) and pin_gives_way(state):
            continue
        if engine.on_shortage == PRICED:
            lacking = pool_to_wait_for(state, row, reuse, needed)
        else:
            lacking = lacking_pool(state, engine.slots_per_request, needed, pages)
        if lacking == NONE:
            break
        # The answer, of which an edge has one at most, may evict what would have been reused: look again.
        if engine.on_shortage == PRICED or not answer_shortage(state, lacking, engine.slots_per_request, needed, pages):
            engine.blocked_on = lacking
            return False
    if engine.admission == PAST_FUTURE and not peak_fits(state, row, reuse, needed):
        engine.refused_now = 1
        engine.blocked_on = KV
        return False
    seen = seen_depth(memory, state.refs, trace.ref_off, _most_reusable(state, row))
    if request.offloaded == 0:  # else nothing has to be computed for want of memory
        engine.kv_loss_tokens += (seen - resident) * engine.page_tokens
        engine.ssm_loss_tokens += (resident - reuse) * engine.page_tokens
        book_admission(state, trace.ref_off, pages - needed, reuse, resident, seen)
    leave_queue(state, row)
    plan_snapshots(state, row, reuse, seen, boundary_depth(state, row))
    _start(state, row, reuse, resident, pages)
    return True


@subkernel
def _pins_keep_head_out(state, pages):
    """Does nothing run, so that what is kept for those who may come has to make room for the head, who is there?"""
    engine = state.engine
    if state.heap_sizes[PINS] == 0 or engine.decoding + engine.prefilling > 0:
        return False
    return lacking_pool(state, engine.slots_per_request, pages, pages) != NONE


@subkernel
def _start(state, row, reuse, resident, pages):
    """Give an admitted request its memory and put it among the prefilling ones."""
    engine = state.engine
    request = state.requests[row]
    first = state.rows[row].ref_off
    for j in range(reuse):
        reuse_page(state.memory, state.refs[first + j])
    if state.heap_sizes[PINS] > 0:
        engine.pins_used += end_pins_under(state, row, reuse)
    _take_slots(state, row, reuse)
    request.published = reuse
    request.pages = reuse
    fetch_room(state, 0, pages - reuse)
    for _ in range(pages - reuse):
        grow(state, row, state.memory.kv.meta.limit)
    reused = reuse * engine.page_tokens
    request.computed = reused
    if request.offloaded > 0:
        copy_back(state, row, reuse)
    if request.admitted_s != request.admitted_s:  # NaN: first admission
        request.admitted_s = engine.now_s
        request.reused_tokens = reused
        engine.admitted_tokens += request.goal
        engine.reused_tokens += reused
    else:
        engine.recomputed_tokens += request.goal - request.computed
    request.status = PREFILLING
    request.branch_depth = resident if resident > reuse else 0
    engine.prefilling += 1
    push_last(state, PREFILL, row)


@subkernel
def _take_slots(state, row, reuse):
    """Take the request's slots, the working one last: it holds the reused record, zeros or the host's copy."""
    engine = state.engine
    request = state.requests[row]
    ssm = state.memory.ssm
    log = state.memory.log
    snapshot = NONE
    if reuse > 0 and request.offloaded == 0:
        snapshot = state.memory.ids[state.refs[state.rows[row].ref_off + reuse - 1]].snapshot
        reuse_snapshot(state.memory, snapshot)  # live, so that no slot taken below evicts it
    if engine.on_shortage == PRICED:
        evict_as_chosen(state)
        if engine.split_to_take != NONE:
            take_split(state, engine.split_to_take)
            engine.split_to_take = NONE
    engine.allocations += engine.slots_per_request
    for i in range(1, engine.slots_per_request):
        fetch_room(state, 1, 0)
        slot = take_slot(state.memory)
        if i == 1:
            request.reserved = slot
        else:
            ssm.entries[slot].next = request.idle_slots
            request.idle_slots = slot
    request.reserved_depth = 0
    fetch_room(state, 1, 0)
    if snapshot == NONE:
        request.working = take_slot(state.memory)
        if request.offloaded == 0:
            zero(ssm, log, request.working)
    elif ssm.meta.live >= ssm.meta.limit:
        # Every other slot is live, so the request goes on in the snapshot's own slot.
        forget_snapshot(state.memory, snapshot)
        request.working = snapshot
    else:
        request.working = take_slot(state.memory)
        copy(ssm, log, snapshot, request.working)
        unpin(ssm, snapshot)
        engine.debt_s += state.cost.slot_copy_s


@subkernel
def grow(state, row, bound):
    """Give a request its next page; False when `bound` pages are live."""
    entry = take_page(state.memory, bound)
    if entry == NONE:
        return False
    request = state.requests[row]
    if request.first_page == NONE:
        request.first_page = entry
    else:
        state.memory.kv.entries[request.last_page].next = entry
    request.last_page = entry
    request.pages += 1
    state.engine.allocations += 1
    return True
