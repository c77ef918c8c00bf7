"""Lists and heap of requests against Python's own."""

from typing import NamedTuple

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hbmgym.envs.serving.order import (
    add_event,
    enter_heap,
    leave_heap,
    next_event,
    next_pin_end_s,
    next_release_s,
    push_first,
    push_last,
    remove,
)
from hbmgym.envs.serving.state import DECODE_EVENTS, HEAPS, PINS, RELEASES, make_requests
from hbmgym.memory_backend.jit import kernel
from hbmgym.memory_backend.pools import NONE

ROWS = 30
LISTS = 3
PUSH_LAST, PUSH_FIRST, REMOVE = range(3)
ADD, CANCEL = range(2)


class Lists(NamedTuple):
    requests: np.recarray
    ends: np.ndarray
    heaps: np.ndarray
    heap_sizes: np.ndarray


def make_lists() -> Lists:
    ends, heaps = np.full((LISTS, 2), NONE, np.int32), np.zeros((HEAPS, ROWS), np.int32)
    return Lists(make_requests(ROWS), ends, heaps, np.zeros(HEAPS, np.int64))


@kernel
def edit_list(state, edit, where, row):
    if edit == PUSH_LAST:
        push_last(state, where, row)
    elif edit == PUSH_FIRST:
        push_first(state, where, row)
    else:
        remove(state, where, row)


@kernel
def edit_heap(state, edit, heap, row, when):
    if edit == CANCEL:
        leave_heap(state, heap, row)
    elif heap == DECODE_EVENTS:
        add_event(state, row, int(when))
    else:
        state.requests[row].arrival_s = state.requests[row].pin_ends_s = when
        enter_heap(state, heap, row)


@kernel
def when_next(state, heap):
    if heap == DECODE_EVENTS:
        return float(next_event(state))
    return next_release_s(state) if heap == RELEASES else next_pin_end_s(state)


def read(state: Lists, where: int) -> list[int]:
    """The list from first to last, checked from last to first."""
    rows, row = [], state.ends[where, 0]
    while row != NONE:
        rows.append(int(row))
        row = state.requests[row].next
    back, row = [], state.ends[where, 1]
    while row != NONE:
        back.append(int(row))
        row = state.requests[row].prev
    assert back == rows[::-1]
    return rows


@settings(derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.integers(0, ROWS - 1), st.integers(0, LISTS - 1), st.booleans()), max_size=60))
def test_lists_keep_the_order_of_pushes_and_removals(edits):
    state, expected = make_lists(), [[] for _ in range(LISTS)]
    for row, where, first in edits:
        held_in = next((i for i in range(LISTS) if row in expected[i]), None)
        if held_in is not None:
            edit_list(state, REMOVE, held_in, row)
            expected[held_in].remove(row)
        elif first:
            edit_list(state, PUSH_FIRST, where, row)
            expected[where].insert(0, row)
        else:
            edit_list(state, PUSH_LAST, where, row)
            expected[where].append(row)
        assert [read(state, i) for i in range(LISTS)] == expected


@settings(derandomize=True, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, ROWS - 1), st.integers(0, HEAPS - 1), st.integers(0, 8)), max_size=80),
    st.booleans(),
)
def test_a_heap_yields_by_time_then_by_row_whatever_the_order_of_adding(edits, late):
    state, expected = make_lists(), [{} for _ in range(HEAPS)]
    for row, heap, when in edits:
        held_in = next((i for i in range(HEAPS) if row in expected[i]), None)
        if held_in is not None:
            edit_heap(state, CANCEL, held_in, row, 0.0)
            del expected[held_in][row]
            assert state.requests[row].heap_place == NONE
        else:
            expected[heap][row] = when + 2.0**33 * late + 0.1 * (heap != DECODE_EVENTS)
            edit_heap(state, ADD, heap, row, expected[heap][row])
    for heap in range(HEAPS):
        for when, row in sorted((when, row) for row, when in expected[heap].items()):
            assert (when_next(state, heap), state.heaps[heap, 0]) == (when, row)
            edit_heap(state, CANCEL, heap, row, 0.0)
        assert state.heap_sizes[heap] == 0
    assert when_next(state, RELEASES) == when_next(state, PINS) == np.inf
