"""Who gets memory, when, and how it is given back: admission, reuse, snapshots, growth, preemption (rules 2-8)."""

from hbmgym.envs.serving.order import add_event, cancel_event, push_first, push_last, remove
from hbmgym.envs.serving.state import (
    DEADLINE,
    DECODING,
    DOES_NOT_FIT,
    FINISHED,
    GROWTH,
    HELD,
    HOLD,
    PREFILL,
    PREFILLING,
    QUEUE,
    REJECTED,
    WAITING,
    WORST_RATIO,
)
from hbmgym.memory_backend.jit import subkernel
from hbmgym.memory_backend.oplog import KV, SSM
from hbmgym.memory_backend.pools import NONE, abandon, copy, pin, release, stamp, touch, unpin, zero
from hbmgym.memory_backend.prefix_cache import (
    live_depth,
    publish_page,
    publish_snapshot,
    resident_depth,
    save_snapshot,
    seen_depth,
    snapshot_depth,
    take_page,
    take_slot,
)
from hbmgym.memory_backend.resize import go_on_shrinking

# --- arrival (rules 8 and 13) ---------------------------------------------------------------------------------------


@subkernel
def pull_arrivals(state):
    """Let every row that has arrived by now join the queue, wait for its parent, or be rejected."""
    engine = state.engine
    while engine.next_row < len(state.rows) and state.rows[engine.next_row].arrival_s <= engine.now_s:
        row = engine.next_row
        engine.next_row += 1
        engine.arrived += 1
        engine.arrived_tokens += state.rows[row].input_tokens
        _arrive(state, row)


@subkernel
def _arrive(state, row):
    trace = state.rows[row]
    request = state.requests[row]
    request.goal = trace.input_tokens
    request.waits_since_s = trace.arrival_s
    # The last output token is never written to the cache.
    pages = -(-(trace.input_tokens + trace.output_tokens - 1) // state.engine.page_tokens)
    if pages > state.engine.max_pages:
        reject(state, row, DOES_NOT_FIT, trace.arrival_s)
    elif trace.parent != NONE and state.requests[trace.parent].status < FINISHED:
        request.status = HELD
        state.engine.held += 1
        push_last(state, HOLD, row)
    else:
        enqueue_last(state, row)


@subkernel
def enqueue_last(state, row):
    """Join the queue at its end."""
    state.requests[row].status = WAITING
    if state.engine.waiting == 0:
        state.engine.head_tried = 0
    state.engine.waiting += 1
    push_last(state, QUEUE, row)


@subkernel
def _enqueue_first(state, row):
    request = state.requests[row]
    request.status = WAITING
    request.waits_since_s = state.engine.now_s
    state.engine.waiting += 1
    state.engine.head_tried = 0
    push_first(state, QUEUE, row)


@subkernel
def leave_queue(state, row):
    """Take the queue's head out; the next one has not been tried."""
    remove(state, QUEUE, row)
    state.engine.waiting -= 1
    state.engine.head_tried = 0
    state.engine.blocked_on = NONE


@subkernel
def _release_children(state, row):
    """Children that were held for this request join the queue, in order of arrival."""
    child = state.ends[HOLD, 0]
    while child != NONE:
        after = state.requests[child].next
        if state.rows[child].parent == row:
            remove(state, HOLD, child)
            state.engine.held -= 1
            enqueue_last(state, child)
        child = after


# --- admission (rules 2 and 3) --------------------------------------------------------------------------------------


@subkernel
def head_deadline_s(state):
    """When the queue's head gives up; the queue must not be empty."""
    head = state.requests[state.ends[QUEUE, 0]]
    return head.waits_since_s + state.engine.deadline_slos * head.ttft_slo_s


@subkernel
def try_admit_head(state):
    """Admit the queue's head, or say in `blocked_on` which pool it waits for; the queue must not be empty."""
    engine = state.engine
    row = state.ends[QUEUE, 0]
    request = state.requests[row]
    trace = state.rows[row]
    memory = state.memory
    # At least the last token is recomputed.
    depth_limit = min(trace.known_ids, (request.goal - 1) // engine.page_tokens)
    resident = resident_depth(memory, state.refs, trace.ref_off, depth_limit)
    reuse = snapshot_depth(memory, state.refs, trace.ref_off, resident)
    if memory.ssm.meta.live + engine.slots_per_request > memory.ssm.meta.limit:
        engine.blocked_on = SSM
        return False
    pinned = live_depth(memory, state.refs, trace.ref_off, reuse)
    pages = -(-request.goal // engine.page_tokens)
    if memory.kv.meta.live + pages - pinned > memory.kv.meta.limit:
        engine.blocked_on = KV
        return False
    seen = seen_depth(memory, state.refs, trace.ref_off, depth_limit)
    engine.kv_loss_tokens += (seen - resident) * engine.page_tokens
    engine.ssm_loss_tokens += (resident - reuse) * engine.page_tokens
    leave_queue(state, row)
    _start(state, row, reuse, resident, pages)
    return True


@subkernel
def _start(state, row, reuse, resident, pages):
    """Give an admitted request its memory and put it among the prefilling ones."""
    engine = state.engine
    request = state.requests[row]
    first = state.rows[row].ref_off
    for j in range(reuse):
        pin(state.memory.kv, state.memory.ids[state.refs[first + j]].page)
    _take_slots(state, row, reuse)
    request.published = reuse
    request.pages = reuse
    for _ in range(pages - reuse):
        grow(state, row, state.memory.kv.meta.limit)
    reused = reuse * engine.page_tokens
    if request.admitted_s != request.admitted_s:  # NaN: first admission
        request.admitted_s = engine.now_s
        request.reused_tokens = reused
        engine.admitted_tokens += request.goal
        engine.reused_tokens += reused
    else:
        engine.recomputed_tokens += request.goal - reused
    request.status = PREFILLING
    request.computed = reused
    request.branch_depth = resident if resident > reuse else 0
    engine.prefilling += 1
    push_last(state, PREFILL, row)


@subkernel
def _take_slots(state, row, reuse):
    """Take the request's slots, the working one last: it holds the reused state or zeros."""
    engine = state.engine
    request = state.requests[row]
    ssm = state.memory.ssm
    log = state.memory.log
    snapshot = NONE
    if reuse > 0:
        snapshot = state.memory.ids[state.refs[state.rows[row].ref_off + reuse - 1]].snapshot
        touch(ssm, snapshot)
    for i in range(1, engine.slots_per_request):
        slot = take_slot(state.memory)
        if i == 1:
            request.reserved = slot
        else:
            ssm.entries[slot].next = request.idle_slots
            request.idle_slots = slot
    request.reserved_depth = 0
    if snapshot == NONE:
        request.working = take_slot(state.memory)
        zero(ssm, log, request.working)
    elif ssm.meta.evict_first == snapshot and ssm.meta.live + ssm.meta.cached >= ssm.meta.limit:
        # Every other slot is live, so the request goes on in the snapshot's own slot.
        state.memory.ids[ssm.entries[snapshot].key].snapshot = NONE
        ssm.entries[snapshot].key = NONE
        pin(ssm, snapshot)
        request.working = snapshot
    else:
        request.working = take_slot(state.memory)
        copy(ssm, log, snapshot, request.working)
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
    return True


# --- publishing and snapshots (rules 3 and 6) -----------------------------------------------------------------------


@subkernel
def _pop_private_page(state, request):
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
        entry = _pop_private_page(state, request)
        publish_page(state.memory, entry, state.refs[trace.ref_off + request.published])
        request.published += 1


@subkernel
def next_prefill_stop(state, row):
    """Tokens at which the request's next prefill chunk must end: branch point, last page boundary, or the goal."""
    request = state.requests[row]
    page_tokens = state.engine.page_tokens
    branch = request.branch_depth * page_tokens
    if branch > request.computed:
        return branch
    # A boundary without an id could never be matched, so nothing is saved there.
    boundary = min(request.goal // page_tokens, state.rows[row].known_ids) * page_tokens
    return boundary if boundary > request.computed else request.goal


@subkernel
def save_prefill_snapshot(state, row):
    """At a page boundary of the prompt: save the state in a free or evictable slot, else in the reserved one."""
    engine = state.engine
    request = state.requests[row]
    depth = request.computed // engine.page_tokens
    page_id = state.refs[state.rows[row].ref_off + depth - 1]
    present = state.memory.ids[page_id].snapshot
    if present != NONE:
        touch(state.memory.ssm, present)
        return
    if not save_snapshot(state.memory, request.working, page_id):
        if request.reserved == NONE:
            engine.skipped_snapshots += 1
            return
        _save_in_reserved(state, request, depth)
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


# --- decoding and its end -------------------------------------------------------------------------------------------


@subkernel
def context_of(state, row):
    """Tokens of a decoding request that are in the cache."""
    request = state.requests[row]
    return request.goal + state.engine.iterations - request.joined_at


@subkernel
def generated_by(state, row):
    """Output tokens that a decoding request has produced."""
    request = state.requests[row]
    return request.generated + state.engine.iterations - request.joined_at


@subkernel
def _growth_list(state, row):
    """The list of the residue of iteration counts at which this request needs its next page."""
    request = state.requests[row]
    return GROWTH + (request.joined_at - request.goal) % state.engine.page_tokens


@subkernel
def schedule_decode_event(state, row):
    """The next thing that happens to a decoding request by itself: a snapshot, or its end."""
    engine = state.engine
    request = state.requests[row]
    trace = state.rows[row]
    end = request.joined_at + trace.output_tokens - request.generated
    iteration = end
    if request.reserved != NONE:
        context = context_of(state, row)
        decoded = context - trace.input_tokens
        tokens = trace.input_tokens + (decoded // engine.decode_snapshot_tokens + 1) * engine.decode_snapshot_tokens
        boundary = tokens // engine.page_tokens * engine.page_tokens
        if boundary <= context:
            boundary = (tokens + engine.decode_snapshot_tokens) // engine.page_tokens * engine.page_tokens
        iteration = min(end, request.joined_at + boundary - request.goal)
    add_event(state, row, iteration)


@subkernel
def start_decoding(state, row):
    """Prefill is done and the first token is out: join the decoding requests."""
    engine = state.engine
    request = state.requests[row]
    request.status = DECODING
    request.joined_at = engine.iterations
    engine.decoding += 1
    engine.context_tokens += request.goal
    push_last(state, _growth_list(state, row), row)
    schedule_decode_event(state, row)


@subkernel
def _stop_running(state, row):
    """Leave the decoding or prefilling requests; returns the tokens in the cache."""
    engine = state.engine
    request = state.requests[row]
    if request.status == DECODING:
        tokens = context_of(state, row)
        request.generated = generated_by(state, row)
        remove(state, _growth_list(state, row), row)
        if request.heap_place != NONE:
            cancel_event(state, row)
        engine.decoding -= 1
        engine.context_tokens -= tokens
    else:
        tokens = request.computed
        remove(state, PREFILL, row)
        engine.prefilling -= 1
    return tokens


@subkernel
def _give_back(state, row, tokens):
    """Publish what has ids and leave it cached, deepest first; what nobody can match goes before all else.

    Private blocks are kept as well: a real engine does not know that they will never be asked for again.
    """
    memory = state.memory
    request = state.requests[row]
    first = state.rows[row].ref_off
    publish_computed(state, row, tokens)
    while request.first_page != NONE:
        abandon(memory.kv, _pop_private_page(state, request))
    if 0 < request.reserved_depth <= request.published:
        publish_snapshot(memory, request.reserved, state.refs[first + request.reserved_depth - 1])
    elif request.reserved_depth > 0:
        abandon(memory.ssm, request.reserved)
    elif request.reserved != NONE:
        release(memory.ssm, memory.log, request.reserved)
    release(memory.ssm, memory.log, request.working)
    while request.idle_slots != NONE:
        slot = request.idle_slots
        request.idle_slots = memory.ssm.entries[slot].next
        release(memory.ssm, memory.log, slot)
    for j in range(request.published - 1, -1, -1):
        unpin(memory.kv, memory.ids[state.refs[first + j]].page)
    request.published = 0
    request.pages = 0
    request.working = NONE
    request.reserved = NONE
    request.reserved_depth = 0
    state.engine.head_tried = 0
    go_on_shrinking(memory, state.engine.now_s, state.engine.worker_chunk_s)


@subkernel
def book_miss(state, row):
    """Count a request's SLO miss once."""
    if state.requests[row].missed == 0:
        state.requests[row].missed = 1
        state.engine.missed += 1


@subkernel
def reject(state, row, reason, at_s):
    """Give a request up that holds no memory and is in no list."""
    request = state.requests[row]
    request.status = REJECTED
    request.reject_reason = reason
    request.ended_s = at_s
    state.engine.rejected += 1
    book_miss(state, row)
    _release_children(state, row)


@subkernel
def reject_late_head(state):
    """Give the queue's head up when its deadline has passed; the queue must not be empty."""
    if state.engine.now_s < head_deadline_s(state):
        return False
    row = state.ends[QUEUE, 0]
    leave_queue(state, row)
    reject(state, row, DEADLINE, state.engine.now_s)
    return True


@subkernel
def finish(state, row):
    """A request has produced its last token."""
    engine = state.engine
    request = state.requests[row]
    trace = state.rows[row]
    _give_back(state, row, _stop_running(state, row))
    request.status = FINISHED
    request.ended_s = engine.now_s
    engine.finished += 1
    met_tpot = True
    if trace.output_tokens > 1:
        tpot_s = (engine.now_s - request.first_token_s) / (trace.output_tokens - 1)
        engine.tpot_over_slo += min(tpot_s / engine.tpot_slo_s, WORST_RATIO)
        engine.tpots += 1
        met_tpot = tpot_s <= engine.tpot_slo_s
    if met_tpot and request.missed == 0:
        engine.met += 1
    else:
        book_miss(state, row)
    _release_children(state, row)


# --- growth and preemption (rule 7) ---------------------------------------------------------------------------------


@subkernel
def grow_decoding(state, iteration, may_preempt):
    """Give every decoding request the page that its token of `iteration` needs; False when one goes without."""
    page_tokens = state.engine.page_tokens
    where = GROWTH + iteration % page_tokens
    row = state.ends[where, 0]
    while row != NONE:
        request = state.requests[row]
        needs_page = request.pages * page_tokens == request.goal + iteration - request.joined_at
        if needs_page and not grow(state, row, state.memory.kv.meta.capacity):
            if not may_preempt:
                return False
            _make_room(state, row)
            row = state.ends[where, 0]  # the list may have lost any of its members
        else:
            row = request.next
    return True


@subkernel
def _make_room(state, needy):
    """Preempt the youngest running request that may be; failing that, give the needy one up."""
    oldest, youngest = needy, NONE
    for where in range(PREFILL, len(state.ends)):
        row = state.ends[where, 0]
        while row != NONE and where != HOLD:
            oldest = min(oldest, row)
            if state.requests[row].preemptions < state.engine.max_preemptions:
                youngest = max(youngest, row)
            row = state.requests[row].next
    if youngest > oldest:
        _preempt(state, youngest)
    else:
        _give_back(state, needy, _stop_running(state, needy))
        reject(state, needy, DOES_NOT_FIT, state.engine.now_s)


@subkernel
def _preempt(state, row):
    """Throw a running request back to the head of the queue; what it published stays cached."""
    request = state.requests[row]
    _give_back(state, row, _stop_running(state, row))
    request.goal = state.rows[row].input_tokens + request.generated
    request.computed = 0
    request.preemptions += 1
    state.engine.preemptions += 1
    state.engine.preempted_now = 1
    state.engine.blocked_on = KV
    _enqueue_first(state, row)
