"""Who comes and who leaves unserved: arrival, the queue, children held for a parent, rejection (rules 8, 13)."""

from hbmgym.envs.serving.order import push_first, push_last, remove
from hbmgym.envs.serving.state import DEADLINE, DOES_NOT_FIT, FINISHED, HELD, HOLD, QUEUE, REJECTED, WAITING
from hbmgym.memory_backend.jit import subkernel
from hbmgym.memory_backend.pools import NONE


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
def enqueue_first(state, row):
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
def release_children(state, row):
    """Children that were held for this request join the queue, in order of arrival."""
    child = state.ends[HOLD, 0]
    while child != NONE:
        after = state.requests[child].next
        if state.rows[child].parent == row:
            remove(state, HOLD, child)
            state.engine.held -= 1
            enqueue_last(state, child)
        child = after


@subkernel
def head_deadline_s(state):
    """When the queue's head gives up; the queue must not be empty."""
    head = state.requests[state.ends[QUEUE, 0]]
    return head.waits_since_s + state.engine.deadline_slos * head.ttft_slo_s


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
def reject(state, row, reason, at_s):
    """Give a request up that holds no memory and is in no list."""
    request = state.requests[row]
    request.status = REJECTED
    request.reject_reason = reason
    request.ended_s = at_s
    state.engine.rejected += 1
    book_miss(state, row)
    release_children(state, row)


@subkernel
def book_miss(state, row):
    """Count a request's SLO miss once."""
    if state.requests[row].missed == 0:
        state.requests[row].missed = 1
        state.engine.missed += 1
