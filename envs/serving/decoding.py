"""From the first token to the end: growth, preemption, finish, and how memory is given back (rules 6, 7)."""

from hbmgym.envs.serving.admission import grow
from hbmgym.envs.serving.arrival import book_miss, enqueue_first, reject, release_followers, ttft_over_slo
from hbmgym.envs.serving.forecast import note_length
from hbmgym.envs.serving.offload import copy_out
from hbmgym.envs.serving.order import add_event, is_older, leave_heap, push_last, remove
from hbmgym.envs.serving.pins import bound_pins, end_turn, pin_gives_way
from hbmgym.envs.serving.retention import drop_superseded
from hbmgym.envs.serving.shortage import MIGRATE, answer_shortage, fetch_room, page_needs_an_edge
from hbmgym.envs.serving.snapshots import boundary_depth, pop_private_page, publish_computed
from hbmgym.envs.serving.state import (
    DECODE_EVENTS,
    DECODING,
    DOES_NOT_FIT,
    FINISHED,
    GROWTH,
    PAST_FUTURE,
    PINS,
    PREFILL,
    WORST_RATIO,
)
from hbmgym.memory_backend.jit import subkernel
from hbmgym.memory_backend.oplog import KV
from hbmgym.memory_backend.pools import NONE, release, unpin
from hbmgym.memory_backend.prefix_cache import publish_snapshot
from hbmgym.memory_backend.resize import go_on_shrinking


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
            leave_heap(state, DECODE_EVENTS, row)
        engine.decoding -= 1
        engine.context_tokens -= tokens
    else:
        tokens = request.computed
        remove(state, PREFILL, row)
        engine.prefilling -= 1
    return tokens


@subkernel
def _give_back(state, row, tokens):
    """Publish what has ids and leave it cached, deepest first; what has none is free at once, as a page that is not
    full."""
    memory = state.memory
    request = state.requests[row]
    first = state.rows[row].ref_off
    publish_computed(state, row, tokens)
    while request.first_page != NONE:
        release(memory.kv, memory.log, pop_private_page(state, request))
    if 0 < request.reserved_depth <= request.published:
        publish_snapshot(memory, request.reserved, state.refs[first + request.reserved_depth - 1])
        drop_superseded(state, row, request.reserved_depth, boundary_depth(state, row))
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
    if state.heap_sizes[PINS] > 0:
        bound_pins(state)
    go_on_shrinking(memory, state.engine.now_s, state.engine.worker_chunk_s)


@subkernel
def finish(state, row):
    """A request has produced its last token."""
    engine = state.engine
    request = state.requests[row]
    trace = state.rows[row]
    tokens = _stop_running(state, row)
    _give_back(state, row, tokens)
    if engine.pins_sessions != 0:
        end_turn(state, row, tokens)
    request.status = FINISHED
    request.ended_s = engine.now_s
    engine.finished += 1
    if engine.admission == PAST_FUTURE:
        note_length(state, trace.output_tokens)
    met_tpot = True
    if trace.output_tokens > 1:
        tpot_s = (engine.now_s - request.first_token_s) / (trace.output_tokens - 1)
        tpot_over_slo = min(tpot_s / engine.tpot_slo_s, WORST_RATIO)
        engine.tpot_over_slo += tpot_over_slo
        engine.cost += max(tpot_over_slo - ttft_over_slo(request), 0.0)
        engine.tpots += 1
        met_tpot = tpot_s <= engine.tpot_slo_s
    if met_tpot and request.missed == 0:
        engine.met += 1
    else:
        book_miss(state, row)
    release_followers(state, row)


@subkernel
def grow_decoding(state, iteration, at_edge):
    """Give every decoding request the page that its token of `iteration` needs; False when one goes without.

    Between iteration edges nobody is preempted for it, and no time passes.
    """
    page_tokens = state.engine.page_tokens
    where = GROWTH + iteration % page_tokens
    row = state.ends[where, 0]
    while row != NONE:
        request = state.requests[row]
        needs_page = request.pages * page_tokens == request.goal + iteration - request.joined_at
        if needs_page and not _extend(state, row, at_edge):
            if not at_edge:
                return False
            _make_room(state, row)
            row = state.ends[where, 0]  # the list may have lost any of its members
        else:
            row = request.next
    return True


@subkernel
def _extend(state, row, at_edge):
    """Give a decoding request one page, if it is to be had."""
    if at_edge:
        fetch_room(state, 0, 1)
    elif page_needs_an_edge(state):
        return False
    kv = state.memory.kv.meta
    taken = grow(state, row, kv.capacity)
    while not taken and at_edge and pin_gives_way(state):
        fetch_room(state, 0, 1)
        taken = grow(state, row, kv.capacity)
    if not taken and at_edge and answer_shortage(state, KV, 0, 1, state.requests[row].pages + 1):
        taken = grow(state, row, kv.capacity)
    if taken and state.engine.on_shortage == MIGRATE:
        state.engine.head_tried = 0  # thresholds and throttle may let the queue's head in now
    return taken


@subkernel
def _make_room(state, needy):
    """Preempt the youngest running request that may be; failing that, give the needy one up."""
    youngest = _youngest_that_may_go(state)
    if youngest != NONE:
        _preempt(state, youngest)
    else:
        _give_back(state, needy, _stop_running(state, needy))
        reject(state, needy, DOES_NOT_FIT, state.engine.now_s)


@subkernel
def preempt_for_split(state):
    """Preempt, the youngest first, until what is live fits the split that was asked for, or nobody may go any more."""
    bound_pins(state)
    kv, ssm = state.memory.kv.meta, state.memory.ssm.meta
    while kv.live > kv.limit or ssm.live > ssm.limit:
        youngest = _youngest_that_may_go(state)
        if youngest == NONE:
            return
        _preempt(state, youngest)


@subkernel
def _youngest_that_may_go(state):
    """The youngest running request that may be preempted, which the oldest never may; NONE: there is none."""
    oldest, youngest = NONE, NONE
    for where in range(PREFILL, len(state.ends)):
        row = state.ends[where, 0]
        while row != NONE:
            if oldest == NONE or is_older(state, row, oldest):
                oldest = row
            may_go = state.requests[row].preemptions < state.engine.max_preemptions
            if may_go and (youngest == NONE or is_older(state, youngest, row)):
                youngest = row
            row = state.requests[row].next
    return NONE if youngest == oldest else youngest


@subkernel
def _preempt(state, row):
    """Throw a running request back to the head of the queue; what it published stays cached, and where there is host
    memory for preempted requests, a copy of all goes there."""
    request = state.requests[row]
    tokens = _stop_running(state, row)
    if state.engine.host_limit > 0:
        copy_out(state, row, tokens)
    _give_back(state, row, tokens)
    request.goal = state.rows[row].input_tokens + request.generated
    request.computed = 0
    request.preemptions += 1
    state.engine.preemptions += 1
    state.engine.preempted_now = 1
    state.engine.blocked_on = KV
    enqueue_first(state, row)
