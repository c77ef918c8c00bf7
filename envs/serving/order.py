"""Lists of requests and the heap of decode events, both without allocation."""

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
def _place(state, place, row):
    state.heap[place] = row
    state.requests[row].heap_place = place


@subkernel
def _sift_up(state, place, row):
    key = state.requests[row].event_key
    while place > 0:
        parent = (place - 1) // 2
        if state.requests[state.heap[parent]].event_key <= key:
            break
        _place(state, place, state.heap[parent])
        place = parent
    _place(state, place, row)


@subkernel
def _sift_down(state, place, row):
    key = state.requests[row].event_key
    size = state.engine.heap_size
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        right = child + 1
        if right < size and (state.requests[state.heap[right]].event_key < state.requests[state.heap[child]].event_key):
            child = right
        if state.requests[state.heap[child]].event_key >= key:
            break
        _place(state, place, state.heap[child])
        place = child
    _place(state, place, row)


@subkernel
def add_event(state, row, iteration):
    """Remember that something happens to a decoding request after `iteration`; ties go in order of arrival."""
    state.requests[row].event_key = (iteration << 28) | row
    state.engine.heap_size += 1
    _sift_up(state, state.engine.heap_size - 1, row)


@subkernel
def next_event(state):
    """The iteration after which the next event happens; the heap must not be empty."""
    return state.requests[state.heap[0]].event_key >> 28


@subkernel
def cancel_event(state, row):
    """Take a request's event out of the heap."""
    place = state.requests[row].heap_place
    state.requests[row].heap_place = NONE
    state.engine.heap_size -= 1
    size = state.engine.heap_size
    if place == size:
        return
    moved = state.heap[size]
    if place > 0 and (state.requests[state.heap[(place - 1) // 2]].event_key > state.requests[moved].event_key):
        _sift_up(state, place, moved)
    else:
        _sift_down(state, place, moved)
