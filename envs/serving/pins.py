"""Session pins (pin=ttl): what a finished turn leaves stays for a time to live, in case the session goes on.

Source: Continuum (arXiv 2511.02230): a turn's KV is pinned for the time that maximises the chance that the next turn
comes within it x what is saved then, less the cost of holding memory for so long. What the terms are is ours:

    TTL = argmax over T of  F(T) gain_s - price (1 + waiting) share x integral of 1 - F from 0 to T

- F(T): turns so far that were gone on from within T seconds of their end / turns so far. A turn counts from its end on,
  so a session that goes on later is taken for one that does not. T is one of THINK_BINS times, 50 ms to 3.4 minutes.
- gain_s: seconds of prefill for all that is kept. Without a pin it is taken to be lost, as in the paper; what the paper
  adds for the queue that a pinned turn skips is left out, since the queue here is in order of arrival.
- share of the budget that is kept, by bytes. Each second of all of it costs one second to each request that waits and
  `pin_price` times that; the integral is the time for which it is held, which ends when the next turn comes.

An engine knows with a request's arrival which turn it goes on from, and nothing earlier. Pins are bounded and give way:
to whoever runs and lacks a page, to the queue's head where nothing runs, and to a pool that shrinks.
"""

import math

from hbmgym.envs.serving.cost_model import recovery_s
from hbmgym.envs.serving.order import enter_heap, leave_heap, next_pin_end_s
from hbmgym.envs.serving.state import PINS, THINK_BINS
from hbmgym.memory_backend.jit import subkernel
from hbmgym.memory_backend.pools import MOST_SESSIONS
from hbmgym.memory_backend.prefix_cache import keep_prefix, resident_depth, snapshot_depth, stop_keeping_prefix
from hbmgym.memory_backend.resize import go_on_shrinking

FIRST_BIN_S, BIN_FACTOR = 0.05, math.sqrt(2.0)
MOST_SHARE = 2
"""Pins keep at most 1 / MOST_SHARE of each pool's limit, pages of two pins counted twice."""


@subkernel
def note_follower(state, row, follower):
    """A turn has ended, and `follower`, of which nobody knows yet, needs it: does that go on from what it left?"""
    depth = state.requests[row].left_pages
    trace = state.rows[follower]
    if trace.known_ids >= depth and _ends_alike(state, row, trace.ref_off, depth):
        state.requests[follower].follows = row


@subkernel
def see_follow_up(state, row):
    """A request has come that goes on from an ended turn: count the time between, once a turn."""
    before = state.requests[state.requests[row].follows]
    if before.followed != 0:
        return
    before.followed = 1
    think_s = state.requests[row].arrival_s - before.ended_s
    end_s = FIRST_BIN_S
    for i in range(THINK_BINS):
        if think_s <= end_s:
            state.think_times[i] += 1
            return
        end_s *= BIN_FACTOR


@subkernel
def end_turn(state, row, tokens):
    """A request has finished and given its memory back: keep its pages up to the latest snapshot, if that pays."""
    engine, memory = state.engine, state.memory
    request = state.requests[row]
    trace = state.rows[row]
    full = tokens // engine.page_tokens
    resident = resident_depth(memory, state.refs, trace.ref_off, min(full, trace.known_ids))
    depth = snapshot_depth(memory, state.refs, trace.ref_off, resident)
    if depth == 0:
        return
    request.left_pages = depth
    engine.turns += 1
    ttl_s = _time_to_live_s(state, full)
    if ttl_s > 0.0:
        end_pins_under(state, row, depth)  # a snapshot is kept by one turn
        keep_prefix(memory, state.refs, trace.ref_off, depth)
        request.pin_ends_s = engine.now_s + ttl_s
        enter_heap(state, PINS, row)
        engine.pins += 1
        engine.pinned_pages += depth
        engine.pin_ends_s = next_pin_end_s(state)
        bound_pins(state)


@subkernel
def _time_to_live_s(state, pages):
    """Of the pages of a turn that has just ended and their snapshot; 0: keeping them does not pay.

    All its full pages: which of them a later turn will name is not known yet.
    """
    engine = state.engine
    kv, ssm = state.memory.kv.meta, state.memory.ssm.meta
    gain_s = recovery_s(state.cost, 0, pages)
    share = (pages * kv.block_bytes + ssm.block_bytes) / (state.memory.split.chunks * kv.chunk_bytes)
    holding = engine.pin_price * share * (1 + engine.waiting + engine.aside)
    best_s, most, followed, held_s = 0.0, 0.0, 0, 0.0
    begin_s, end_s = 0.0, FIRST_BIN_S
    for i in range(THINK_BINS):
        held_s += (end_s - begin_s) * (1.0 - followed / engine.turns)
        followed += state.think_times[i]
        worth_s = gain_s * followed / engine.turns - holding * held_s
        if worth_s > most:
            best_s, most = end_s, worth_s
        begin_s, end_s = end_s, end_s * BIN_FACTOR
    return best_s


@subkernel
def end_due_pins(state):
    """Let go of what has been kept for its time."""
    while state.engine.pin_ends_s <= state.engine.now_s:
        _end_pin(state, state.heaps[PINS, 0])


@subkernel
def end_pins_under(state, row, depth):
    """Let go of what is kept under a row's leading `depth` pages: whoever holds those keeps it. How many pins that
    were."""
    place, ended = 0, 0
    while place < state.heap_sizes[PINS]:
        other = state.heaps[PINS, place]
        pages = state.requests[other].left_pages
        if pages <= depth and _ends_alike(state, other, state.rows[row].ref_off, pages):
            _end_pin(state, other)
            ended += 1
            place = 0
        else:
            place += 1
    return ended


@subkernel
def _ends_alike(state, row, first, depth):
    """Is page `depth` of a row, and so all before it, that of the row whose ids begin at refs[`first`]?"""
    return state.refs[state.rows[row].ref_off + depth - 1] == state.refs[first + depth - 1]


@subkernel
def pin_gives_way(state):
    """Let go of the pin that would end first; False when there is none."""
    if state.heap_sizes[PINS] == 0:
        return False
    _end_pin(state, state.heaps[PINS, 0])
    state.engine.pins_given_up += 1
    return True


@subkernel
def pins_are_in_the_way(state):
    """Is something kept beside more live blocks than a pool's limit, as when it shrinks?"""
    kv, ssm = state.memory.kv.meta, state.memory.ssm.meta
    return state.heap_sizes[PINS] > 0 and (kv.live > kv.limit or ssm.live > ssm.limit)


@subkernel
def bound_pins(state):
    """Let pins give way until they are few enough and in nobody's way."""
    if not _too_many(state):
        return
    while _too_many(state):
        pin_gives_way(state)
    go_on_shrinking(state.memory, state.engine.now_s, state.engine.worker_chunk_s)


@subkernel
def _too_many(state):
    if pins_are_in_the_way(state):
        return True
    most = min(state.memory.ssm.meta.limit // MOST_SHARE, MOST_SESSIONS)
    return state.heap_sizes[PINS] > most or state.engine.pinned_pages > state.memory.kv.meta.limit // MOST_SHARE


@subkernel
def _end_pin(state, row):
    engine = state.engine
    depth = state.requests[row].left_pages
    leave_heap(state, PINS, row)
    stop_keeping_prefix(state.memory, state.refs, state.rows[row].ref_off, depth)
    engine.pinned_pages -= depth
    engine.pin_ends_s = next_pin_end_s(state)
    engine.head_tried = 0
