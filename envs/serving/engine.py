"""The serving engine: continuous batching over simulated time (rules 1 and 11), advanced window by window.

One turn of `run` is one iteration edge: arrivals, a run of moved chunks, growth, admission, then either one iteration
with prefill, or as many decode iterations as pass before anything else can happen, in closed form.
"""

import math

from hbmgym.envs.serving.admission import try_admit_head
from hbmgym.envs.serving.arrival import (
    book_miss,
    head_deadline_s,
    most_pages_needed,
    pull_arrivals,
    reject_late_aside,
    reject_late_head,
    reject_late_waiting,
    set_large_head_aside,
    take_back_those_aside,
)
from hbmgym.envs.serving.cost_model import decode_iterations_until, decode_span_s, iteration_s
from hbmgym.envs.serving.decoding import (
    finish,
    generated_by,
    grow_decoding,
    preempt_for_split,
    schedule_decode_event,
    start_decoding,
)
from hbmgym.envs.serving.order import leave_heap, next_event, remove
from hbmgym.envs.serving.pins import bound_pins, end_due_pins, pins_are_in_the_way
from hbmgym.envs.serving.queueing import bring_next_first
from hbmgym.envs.serving.shortage import is_one_buffer, split_is_under_way
from hbmgym.envs.serving.snapshots import (
    next_prefill_stop,
    publish_computed,
    save_decode_snapshot,
    save_prefill_snapshots,
)
from hbmgym.envs.serving.state import DECODE_EVENTS, OVERLAPPED, PINS, PREFILL, SUSPEND, WORST_RATIO, state_at
from hbmgym.memory_backend.eviction import turn_epoch
from hbmgym.memory_backend.jit import kernel, subkernel
from hbmgym.memory_backend.oplog import KV, NOTHING, SSM
from hbmgym.memory_backend.pools import NONE
from hbmgym.memory_backend.resize import most_slots_beside, request_split, run_arrives, ssm_chunks_of
from hbmgym.memory_backend.split import nearest_slots

REACHED, LOG_FULL = range(2)


@kernel
def run(table, until_s, log_margin):
    """Advance to the first iteration edge at or after `until_s` (REACHED), or until fewer than `log_margin` entries
    of the op log are free (LOG_FULL: empty it and call again)."""
    state = state_at(table)
    engine = state.engine
    log = state.memory.log
    while True:
        if log.head.level != NOTHING and log.head.count + log_margin > len(log.ops):
            return LOG_FULL
        pull_arrivals(state)
        if engine.transfers == SUSPEND:
            preempt_for_split(state)
        while state.memory.split.tick_s <= engine.now_s:
            _let_chunks_arrive(state)
        while engine.epoch_end_s <= engine.now_s:
            _turn_epoch(state)
        if engine.pin_ends_s <= engine.now_s:
            end_due_pins(state)
        if engine.now_s >= until_s:
            return REACHED
        engine.preempted_now = 0
        engine.migrated_now = engine.refused_now = 0
        reject_late_aside(state)
        grow_decoding(state, engine.iterations, True)
        if state.heap_sizes[PINS] > 0:
            bound_pins(state)
        if engine.reorders != 0:
            _look_at_order(state)
        _plan_prefill(state)
        if engine.chunk_tokens > 0:
            _iterate(state)
        elif engine.decoding > 0:
            _decode_span(state, until_s)
        else:
            _idle(state, until_s)


@kernel
def ask_for_share(table, kv_share):
    """Ask for the realisable split nearest to `kv_share`; replaces a request that is still under way. In one pool there
    is no split to ask for, and nothing happens."""
    state = state_at(table)
    if is_one_buffer(state):
        return
    split, ssm = state.memory.split, state.memory.ssm.meta
    kv_share = min(max(kv_share, state.engine.share_min), state.engine.share_max)
    slots = nearest_slots(split.chunks, ssm.chunk_bytes, ssm.block_bytes, split.min_slots, split.max_slots, kv_share)
    if slots != split.requested_slots:
        _ask(state, slots, ssm_chunks_of(state.memory, slots))


@subkernel
def _ask(state, slots, ssm_chunks):
    request_split(state.memory, slots, ssm_chunks, state.engine.now_s, state.engine.worker_chunk_s)
    bound_pins(state)
    _limits_may_have_grown(state)  # at once, where the request takes back a shrink


@subkernel
def _limits_may_have_grown(state):
    state.engine.head_tried = 0
    if state.engine.aside > 0:
        take_back_those_aside(state)


@subkernel
def _let_chunks_arrive(state):
    engine = state.engine
    cost = state.cost
    if engine.transfers == OVERLAPPED:
        run_arrives(state.memory, engine.worker_chunk_s, cost.block_copy_s_per_byte)
    else:  # the run waits for nothing, but the next iteration waits for the run
        chunks, copied = run_arrives(state.memory, engine.worker_chunk_s, 0.0)
        engine.debt_s += chunks * cost.chunk_move_s + copied * cost.block_copy_s_per_byte
    _limits_may_have_grown(state)


@subkernel
def _turn_epoch(state):
    turn_epoch(state.memory.kv)
    turn_epoch(state.memory.ssm)
    state.engine.epoch_end_s += state.engine.epoch_s


@subkernel
def _look_at_order(state):
    """Who is late leaves wherever it stands in the queue, and where the order has changed by itself it is made anew."""
    reject_late_waiting(state)
    if state.engine.reorder_s <= state.engine.now_s:
        state.engine.head_tried = 0


@subkernel
def _plan_prefill(state):
    """Share the prefill budget among those admitted, in that order; what is left over admits from the queue."""
    engine = state.engine
    engine.chunk_tokens = 0
    engine.chunk_attention = 0.0
    row = state.ends[PREFILL, 0]
    while row != NONE:
        _plan_chunk(state, row)
        row = state.requests[row].next
    # An iteration that preempted admits nobody, or the victim would be back at once; unless nothing else is left.
    if engine.preempted_now != 0 and engine.decoding + engine.prefilling > 0:
        return
    while engine.waiting > 0 and engine.chunk_tokens < state.cost.prefill_budget:
        if engine.reorders != 0 and engine.head_tried == 0 and not bring_next_first(state):
            engine.head_tried, engine.blocked_on = 1, NONE  # until one of the long prompts is through
            return
        if reject_late_head(state) or set_large_head_aside(state):
            continue
        if engine.head_tried != 0 or not try_admit_head(state):
            # Where this edge has migrated already, the next one may do so for the head; a forecast changes by itself.
            engine.head_tried = int(engine.migrated_now == 0 and engine.refused_now == 0)
            return
        _plan_chunk(state, state.ends[PREFILL, 1])


@subkernel
def _plan_chunk(state, row):
    engine = state.engine
    request = state.requests[row]
    left = min(state.cost.prefill_budget - engine.chunk_tokens, engine.request_budget)
    request.chunk = min(left, next_prefill_stop(state, row) - request.computed)
    engine.chunk_tokens += request.chunk
    engine.chunk_attention += request.chunk * (request.computed + 0.5 * request.chunk)


@subkernel
def _set_time(state, now_s):
    state.engine.now_s = now_s
    state.memory.kv.meta.now_s = now_s
    state.memory.ssm.meta.now_s = now_s


@subkernel
def _advance(state, seconds, busy):
    """Let time pass, and book it."""
    engine = state.engine
    _set_time(state, engine.now_s + seconds)
    if busy:
        engine.busy_s += seconds
    if engine.aside > 0 or (engine.waiting > 0 and engine.blocked_on == KV):
        engine.blocked_kv_s += seconds
    if engine.waiting > 0 and engine.blocked_on == SSM:
        engine.blocked_ssm_s += seconds
    # Before anything else happens at this edge, so that the order of the queue is that of stepping edge by edge.
    pull_arrivals(state)


@subkernel
def _iterate(state):
    """One iteration with prefill: the planned chunks, and one token for every decoding request if they are mixed."""
    engine = state.engine
    decoding = 0 if engine.exclusive != 0 else engine.decoding
    context_tokens = 0 if engine.exclusive != 0 else engine.context_tokens
    seconds = iteration_s(state.cost, decoding, context_tokens, engine.chunk_tokens, engine.chunk_attention)
    seconds += engine.debt_s
    engine.debt_s = 0.0
    _advance(state, seconds, True)
    if engine.exclusive == 0:
        engine.iterations += 1
        engine.context_tokens += decoding
        _handle_decode_events(state)
    _apply_chunks(state)
    engine.listens_at = engine.iterations
    engine.head_tried = 0  # what was published may let the head reuse more


@subkernel
def _apply_chunks(state):
    row = state.ends[PREFILL, 0]
    while row != NONE:
        request = state.requests[row]
        after = request.next
        if request.chunk > 0:
            _apply_chunk(state, row)
        row = after


@subkernel
def _apply_chunk(state, row):
    engine = state.engine
    request = state.requests[row]
    before = request.computed
    request.computed += request.chunk
    publish_computed(state, row, request.computed)
    save_prefill_snapshots(state, row, before)
    if request.computed < request.goal:
        return
    if request.first_token_s != request.first_token_s:  # NaN: this is the first token
        _book_first_token(state, row)
    request.generated += 1
    remove(state, PREFILL, row)
    engine.prefilling -= 1
    start_decoding(state, row)
    if request.generated >= state.rows[row].output_tokens:
        finish(state, row)


@subkernel
def _book_first_token(state, row):
    engine = state.engine
    request = state.requests[row]
    request.first_token_s = engine.now_s
    ratio = (engine.now_s - request.arrival_s) / request.ttft_slo_s
    engine.first_tokens += 1
    engine.ttft_over_slo += min(ratio, WORST_RATIO)
    engine.cost += min(ratio, WORST_RATIO)
    if ratio > 1.0:
        book_miss(state, row)


@subkernel
def _handle_decode_events(state):
    engine = state.engine
    while state.heap_sizes[DECODE_EVENTS] > 0 and next_event(state) <= engine.iterations:
        row = state.heaps[DECODE_EVENTS, 0]
        leave_heap(state, DECODE_EVENTS, row)
        if generated_by(state, row) >= state.rows[row].output_tokens:
            finish(state, row)
        else:
            request = state.requests[row]
            save_decode_snapshot(state, row, request.goal + engine.iterations - request.joined_at)
            schedule_decode_event(state, row)


@subkernel
def _next_change_s(state, until_s):
    """The next time at which something happens other than decoding and the receipt of a row."""
    engine = state.engine
    change_s = min(until_s, state.memory.split.tick_s, engine.epoch_end_s, engine.aside_deadline_s, engine.pin_ends_s)
    if engine.waiting == 0:
        return change_s
    if engine.reorders == 0:
        return min(change_s, head_deadline_s(state))
    return min(change_s, engine.queue_deadline_s, engine.reorder_s)


@subkernel
def _next_receipt_s(state):
    """When the next row comes that may change something: a blocked head waits for memory, and nothing behind it does
    before that, but where it can go first, or makes it dearer to defer the head."""
    engine = state.engine
    return math.inf if engine.waiting > 0 and engine.arrivals_matter == 0 else engine.next_receipt_s


@subkernel
def _iterations_until(state, at_s):
    engine = state.engine
    seconds = at_s - engine.now_s - engine.debt_s
    return decode_iterations_until(state.cost, engine.decoding, engine.context_tokens, seconds)


@subkernel
def _iterations_until_change(state, until_s):
    """Decode iterations until something else happens; rows are received where the engine looks for them."""
    engine = state.engine
    change_s = _next_change_s(state, until_s)
    if engine.receive_interval == 1:
        return _iterations_until(state, min(change_s, _next_receipt_s(state)))
    # Whatever a row changes there: an engine that went past such an edge would not see it before the next one.
    late = max(engine.iterations + _iterations_until(state, engine.next_receipt_s) - engine.listens_at, 0)
    looks = -(-late // engine.receive_interval)
    heard = engine.listens_at + looks * engine.receive_interval - engine.iterations
    return min(_iterations_until(state, change_s), heard)


@subkernel
def _head_is_to_be_tried(engine):
    return engine.waiting > 0 and engine.head_tried == 0


@subkernel
def _decode_span(state, until_s):
    """Decode iterations up to the next event, in closed form; pages are handed out on the way."""
    engine = state.engine
    count = min(_iterations_until_change(state, until_s), next_event(state) - engine.iterations)
    # A head that has not been tried, or may fare better now, is tried at the next edge.
    if _head_is_to_be_tried(engine):
        count = 1
    keeps_pins = state.heap_sizes[PINS] > 0
    for k in range(1, count):
        has_grown = grow_decoding(state, engine.iterations + k, False)
        if not has_grown or _head_is_to_be_tried(engine) or (keeps_pins and pins_are_in_the_way(state)):
            count = k
            break
    _advance(state, engine.debt_s + decode_span_s(state.cost, engine.decoding, engine.context_tokens, count), True)
    engine.debt_s = 0.0
    engine.iterations += count
    engine.context_tokens += engine.decoding * count
    _handle_decode_events(state)


@subkernel
def _idle(state, until_s):
    """Nothing runs: jump to the next time at which something can."""
    engine = state.engine
    # Those set aside wait for the controller, but not beside an engine that has nothing else to do with its memory.
    if engine.aside > 0 and not split_is_under_way(state):
        engine.idle_pages = most_pages_needed(state)
        slots = most_slots_beside(state.memory, engine.idle_pages)
        _ask(state, slots, ssm_chunks_of(state.memory, slots))
    change_s = min(_next_change_s(state, until_s), _next_receipt_s(state))
    engine.debt_s = max(engine.debt_s - (change_s - engine.now_s), 0.0)  # copies go on while nothing runs
    _advance(state, change_s - engine.now_s, False)
    _set_time(state, change_s)  # without the rounding of a sum
