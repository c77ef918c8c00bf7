"""Who comes and who leaves unserved: arrival, the queue, rows held for what they need, rejection (rules 8, 13)."""

import math

from hbmgym.envs.serving.offload import drop_copy
from hbmgym.envs.serving.order import enter_heap, leave_heap, next_release_s, push_first, push_last, remove
from hbmgym.envs.serving.pins import note_follower, see_follow_up
from hbmgym.envs.serving.shortage import split_is_given
from hbmgym.envs.serving.state import (
    ASIDE,
    DEADLINE,
    DECODE_EVENTS,
    DOES_NOT_FIT,
    HELD,
    HOLD,
    PREFILL,
    QUEUE,
    REJECTED,
    RELEASES,
    WAITING,
    WORST_RATIO,
)
from hbmgym.memory_backend.jit import subkernel
from hbmgym.memory_backend.pools import NONE


@subkernel
def pull_arrivals(state):
    """Let every row that has reached the engine by now join the queue, wait for its needs, or be rejected; unless the
    engine does not look for new rows at this edge."""
    engine = state.engine
    if engine.receive_interval > 1 and not _listens(engine):
        return
    while engine.next_receipt_s <= engine.now_s:
        _arrive(state, _take_next(state))


@subkernel
def _listens(engine):
    """An engine that only decodes looks for new rows every receive_interval iterations; any other, at every edge."""
    ahead = engine.iterations - engine.listens_at
    if engine.decoding > 0 and (ahead < 0 or ahead % engine.receive_interval != 0):
        return False
    engine.listens_at = engine.iterations + engine.receive_interval
    return True


@subkernel
def _take_next(state):
    """The row that reaches the engine next, of two at one time the lower: its arrival is fixed, or set since its needs
    ended."""
    engine = state.engine
    row, fixed_s = engine.next_row, _fixed_receipt_s(state)
    released, released_s = state.heaps[RELEASES, 0], _released_receipt_s(state)
    if released_s < fixed_s or (released_s == fixed_s and released < row):
        row = released
        leave_heap(state, RELEASES, row)
    else:
        state.requests[row].arrival_s = state.rows[row].arrival_s
        _pass_fixed(state)
    engine.next_receipt_s = min(_fixed_receipt_s(state), _released_receipt_s(state))
    return row


@subkernel
def _fixed_receipt_s(state):
    if state.engine.next_row >= len(state.rows):
        return math.inf
    return state.rows[state.engine.next_row].arrival_s + state.cost.request_s


@subkernel
def _released_receipt_s(state):
    return next_release_s(state) + state.cost.request_s


@subkernel
def _pass_fixed(state):
    """Go on to the next row whose arrival is fixed; in a closed loop that of a row with needs is not."""
    engine = state.engine
    engine.next_row += 1
    while engine.closed != 0 and engine.next_row < len(state.rows) and state.rows[engine.next_row].needs > 0:
        engine.next_row += 1


@subkernel
def _arrive(state, row):
    request = state.requests[row]
    request.goal = state.rows[row].input_tokens
    request.waits_since_s = request.arrival_s
    if _most_pages(state, row) > state.engine.max_pages:
        _receive(state, row)
        reject(state, row, DOES_NOT_FIT, request.arrival_s)
    elif request.unmet > 0:
        request.status = HELD
        state.engine.held += 1
        push_last(state, HOLD, row)
    else:
        enqueue_last(state, row)


@subkernel
def _receive(state, row):
    """Count a request as one that the engine has: a held one has not been sent yet."""
    state.engine.received += 1
    state.engine.received_tokens += state.rows[row].input_tokens
    if state.requests[row].follows != NONE:
        see_follow_up(state, row)


@subkernel
def _most_pages(state, row):
    """Pages that a request holds at its end; its last output token is never written to the cache."""
    trace = state.rows[row]
    return -(-(trace.input_tokens + trace.output_tokens - 1) // state.engine.page_tokens)


@subkernel
def enqueue_last(state, row):
    """Join the queue at its end."""
    _receive(state, row)
    state.requests[row].status = WAITING
    if state.engine.waiting == 0 or state.engine.arrivals_matter != 0:
        state.engine.head_tried = 0
    state.engine.waiting += 1
    push_last(state, QUEUE, row)
    _note_deadline(state, row)


@subkernel
def enqueue_first(state, row):
    request = state.requests[row]
    request.status = WAITING
    request.waits_since_s = state.engine.now_s
    state.engine.waiting += 1
    state.engine.head_tried = 0
    push_first(state, QUEUE, row)
    _note_deadline(state, row)


@subkernel
def _note_deadline(state, row):
    """Where every waiting request is judged, remember when the first of them gives up."""
    if state.engine.reorders != 0:
        state.engine.queue_deadline_s = min(state.engine.queue_deadline_s, _deadline_s(state, row))


@subkernel
def leave_queue(state, row):
    """Take a request out of the queue, the head as a rule; the one that is the head now has not been tried."""
    remove(state, QUEUE, row)
    state.engine.waiting -= 1
    state.engine.head_tried = 0
    state.engine.blocked_on = NONE


@subkernel
def release_followers(state, row):
    """A request has ended: rows that needed nothing else join the queue if they are held for it, in order of arrival;
    in a closed loop they arrive after their gap."""
    trace = state.rows[row]
    for i in range(trace.followers_off, trace.followers_off + trace.followers):
        follower = state.followers[i]
        if state.requests[row].left_pages > 0:
            note_follower(state, row, follower)
        request = state.requests[follower]
        request.unmet -= 1
        if request.unmet > 0:
            continue
        if state.engine.closed != 0:
            request.arrival_s = state.requests[row].ended_s + state.rows[follower].gap_s
            enter_heap(state, RELEASES, follower)
            state.engine.next_receipt_s = min(state.engine.next_receipt_s, _released_receipt_s(state))
        elif request.status == HELD:
            remove(state, HOLD, follower)
            state.engine.held -= 1
            enqueue_last(state, follower)


@subkernel
def most_pages_needed(state):
    """Pages that the KV pool must hold for the largest request of those set aside, the queue's head and those running,
    under a split that only the controller changes; else 0."""
    if not split_is_given(state):
        return 0
    pages = _most_pages(state, state.ends[QUEUE, 0]) if state.ends[QUEUE, 0] != NONE else 0
    for where in (ASIDE, PREFILL):
        row = state.ends[where, 0]
        while row != NONE:
            pages = max(pages, _most_pages(state, row))
            row = state.requests[row].next
    for i in range(state.heap_sizes[DECODE_EVENTS]):
        pages = max(pages, _most_pages(state, state.heaps[DECODE_EVENTS, i]))
    return pages


@subkernel
def _outgrows_pool(state, row):
    """Is a request larger than the KV pool, were it empty, under a split that only the controller changes?"""
    return _most_pages(state, row) > state.memory.kv.meta.limit and split_is_given(state)


@subkernel
def set_large_head_aside(state):
    """Let a queue's head that outgrows its pool wait aside, so that those behind it may pass; there must be a head."""
    row = state.ends[QUEUE, 0]
    if not _outgrows_pool(state, row):
        return False
    leave_queue(state, row)
    push_last(state, ASIDE, row)
    state.engine.aside += 1
    state.engine.aside_deadline_s = min(state.engine.aside_deadline_s, _deadline_s(state, row))
    return True


@subkernel
def take_back_those_aside(state):
    """The pool may have grown: those that no longer outgrow it go to the queue's head, in the order they left it."""
    row = state.ends[ASIDE, 1]
    while row != NONE:
        before = state.requests[row].prev
        if not _outgrows_pool(state, row):
            _leave_aside(state, row)
            push_first(state, QUEUE, row)
            _note_deadline(state, row)
            state.engine.waiting += 1
            state.engine.head_tried = 0
        row = before
    _set_aside_deadline(state)


@subkernel
def reject_late_aside(state):
    """Give up those set aside whose deadline has passed."""
    if state.engine.now_s < state.engine.aside_deadline_s:
        return
    row = state.ends[ASIDE, 0]
    while row != NONE:
        after = state.requests[row].next
        if state.engine.now_s >= _deadline_s(state, row):
            _leave_aside(state, row)
            reject(state, row, DEADLINE, state.engine.now_s)
        row = after
    _set_aside_deadline(state)


@subkernel
def _leave_aside(state, row):
    remove(state, ASIDE, row)
    state.engine.aside -= 1


@subkernel
def _set_aside_deadline(state):
    state.engine.aside_deadline_s = _first_deadline_s(state, ASIDE)


@subkernel
def _first_deadline_s(state, where):
    """When the first request of a list gives up, inf if it is empty."""
    first_s = math.inf
    row = state.ends[where, 0]
    while row != NONE:
        first_s = min(first_s, _deadline_s(state, row))
        row = state.requests[row].next
    return first_s


@subkernel
def _deadline_s(state, row):
    request = state.requests[row]
    return request.waits_since_s + state.engine.deadline_slos * request.ttft_slo_s


@subkernel
def head_deadline_s(state):
    """When the queue's head gives up; the queue must not be empty."""
    return _deadline_s(state, state.ends[QUEUE, 0])


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
def reject_late_waiting(state):
    """Give up all whose deadline has passed: where the order changes, who is late need not come to the queue's head."""
    engine = state.engine
    while engine.now_s >= engine.queue_deadline_s:  # once more for those whom a rejection has released too late
        row = state.ends[QUEUE, 0]
        while row != NONE:
            after = state.requests[row].next
            if engine.now_s >= _deadline_s(state, row):
                leave_queue(state, row)
                reject(state, row, DEADLINE, engine.now_s)
            row = after
        engine.queue_deadline_s = _first_deadline_s(state, QUEUE)


@subkernel
def reject(state, row, reason, at_s):
    """Give a request up that holds no memory on the GPU and is in no list."""
    request = state.requests[row]
    drop_copy(state, row)
    request.status = REJECTED
    request.reject_reason = reason
    request.ended_s = at_s
    state.engine.rejected += 1
    state.engine.cost += WORST_RATIO - ttft_over_slo(request)
    book_miss(state, row)
    release_followers(state, row)


@subkernel
def ttft_over_slo(request):
    """min(TTFT / SLO, 10), which has been booked as cost; 0 before the first token."""
    if request.first_token_s != request.first_token_s:
        return 0.0
    return min((request.first_token_s - request.arrival_s) / request.ttft_slo_s, WORST_RATIO)


@subkernel
def book_miss(state, row):
    """Count a request's SLO miss once."""
    if state.requests[row].missed == 0:
        state.requests[row].missed = 1
        state.engine.missed += 1
