"""Lists and heaps of requests, without allocation."""

import math

from hbmgym.envs.serving.state import DECODE_EVENTS, PINS, RELEASES
from hbmgym.memory_backend.jit import subkernel
from hbmgym.memory_backend.pools import NONE


@subkernel
def push_last(state, where, row):
    """Append a request to a list."""
    last = state.ends[where, 1]
    state.requests[row].prev = last
    state.requests[row].next = NONE
    if last == NONE:
        state.ends[where, 0] = row
    else:
        state.requests[last].next = row
    state.ends[where, 1] = row


@subkernel
def push_first(state, where, row):
    """Put a request at the head of a list."""
    first = state.ends[where, 0]
    state.requests[row].prev = NONE
    state.requests[row].next = first
    if first == NONE:
        state.ends[where, 1] = row
    else:
        state.requests[first].prev = row
    state.ends[where, 0] = row


@subkernel
def remove(state, where, row):
    """Take a request out of the list that holds it."""
    before, after = state.requests[row].prev, state.requests[row].next
    if before == NONE:
        state.ends[where, 0] = after
    else:
        state.requests[before].next = after
    if after == NONE:
        state.ends[where, 1] = before
    else:
        state.requests[after].prev = before


@subkernel
def is_older(state, row, other):
    """Old and young go by arrival; of two that arrived together the lower row is older."""
    arrival_s, other_s = state.requests[row].arrival_s, state.requests[other].arrival_s
    return arrival_s < other_s or (arrival_s == other_s and row < other)


@subkernel
def _comes_before(state, heap, row, other):
    if heap == DECODE_EVENTS:
        return state.requests[row].event_key < state.requests[other].event_key
    if heap == RELEASES:
        return is_older(state, row, other)
    end_s, other_s = state.requests[row].pin_ends_s, state.requests[other].pin_ends_s
    return end_s < other_s or (end_s == other_s and row < other)


@subkernel
def _place(state, heap, place, row):
    state.heaps[heap, place] = row
    state.requests[row].heap_place = place


@subkernel
def _sift_up(state, heap, place, row):
    while place > 0:
        parent = (place - 1) // 2
        if not _comes_before(state, heap, row, state.heaps[heap, parent]):
            break
        _place(state, heap, place, state.heaps[heap, parent])
        place = parent
    _place(state, heap, place, row)


@subkernel
def _sift_down(state, heap, place, row):
    size = state.heap_sizes[heap]
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        right = child + 1
        if right < size and _comes_before(state, heap, state.heaps[heap, right], state.heaps[heap, child]):
            child = right
        if not _comes_before(state, heap, state.heaps[heap, child], row):
            break
        _place(state, heap, place, state.heaps[heap, child])
        place = child
    _place(state, heap, place, row)


@subkernel
def enter_heap(state, heap, row):
    """Put a request into a heap."""
    state.heap_sizes[heap] += 1
    _sift_up(state, heap, state.heap_sizes[heap] - 1, row)


@subkernel
def leave_heap(state, heap, row):
    """Take a request out of the heap that holds it."""
    place = state.requests[row].heap_place
    state.requests[row].heap_place = NONE
    state.heap_sizes[heap] -= 1
    size = state.heap_sizes[heap]
    if place == size:
        return
    moved = state.heaps[heap, size]
    if place > 0 and _comes_before(state, heap, moved, state.heaps[heap, (place - 1) // 2]):
        _sift_up(state, heap, place, moved)
    else:
        _sift_down(state, heap, place, moved)


@subkernel
def add_event(state, row, iteration):
    """Remember that something happens to a decoding request after `iteration`; ties go by row."""
    state.requests[row].event_key = (iteration << 28) | row
    enter_heap(state, DECODE_EVENTS, row)


@subkernel
def next_event(state):
    """The iteration after which the next event happens; there must be one."""
    return state.requests[state.heaps[DECODE_EVENTS, 0]].event_key >> 28


@subkernel
def next_release_s(state):
    """When the next row arrives of those whose needs have ended, inf if there is none."""
    return state.requests[state.heaps[RELEASES, 0]].arrival_s if state.heap_sizes[RELEASES] > 0 else math.inf


@subkernel
def next_pin_end_s(state):
    """When the next of the pins ends, inf if there is none."""
    return state.requests[state.heaps[PINS, 0]].pin_ends_s if state.heap_sizes[PINS] > 0 else math.inf
