"""Checkpoints along a prefix: the dynamic programme against every choice there is."""

from itertools import combinations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hbmgym.memory_backend.placement import make_placement, place_checkpoints

many_examples = settings(max_examples=400, derandomize=True, deadline=None)


def recomputed(weights, checkpoints):
    """Weighted positions that are computed again: a depth less the deepest checkpoint at or before it."""
    return sum(
        weight * (depth - max((c for c in checkpoints if c <= depth), default=0))
        for depth, weight in enumerate(weights, 1)
    )


def place(weights, allowed, most, room=0):
    placement = make_placement(len(weights) + room, most)
    placement.before[1 : len(weights) + 1] = weights
    placement.allowed[1 : len(weights) + 1] = allowed
    count = place_checkpoints(placement, len(weights))
    return placement.chosen[:count].tolist()


@many_examples
@given(data=st.data(), most=st.integers(1, 4), room=st.integers(0, 3))
def test_no_choice_of_so_many_checkpoints_recomputes_less(data, most, room):
    positions = data.draw(st.integers(1, 9))
    weights = data.draw(st.lists(st.integers(0, 20), min_size=positions, max_size=positions))
    allowed = data.draw(st.lists(st.booleans(), min_size=positions, max_size=positions))
    chosen = place(weights, allowed, most, room)
    places = [c for c, may in enumerate(allowed, 1) if may]
    choices = [choice for k in range(most + 1) for choice in combinations(places, k)]
    least = min(recomputed(weights, choice) for choice in choices)
    assert recomputed(weights, chosen) == least
    assert set(chosen) <= set(places)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(len(choice) for choice in choices if recomputed(weights, choice) == least)


def test_two_likely_depths_get_a_checkpoint_each():
    weights = np.zeros(1000, int)
    weights[[99, 899]] = 5, 1
    assert place(weights, np.ones(1000), 2) == [100, 900]
    assert place(weights, np.ones(1000), 1) == [900 if 5 * 100 < 900 else 100]


def test_nothing_is_chosen_where_nothing_is_likely():
    assert place([0, 0, 0], [1, 1, 1], 2) == []


def test_arrays_can_be_used_again():
    placement = make_placement(4, 2)
    for weights, expected in (([0, 3, 0, 1], [2, 4]), ([1, 0, 0, 0], [1])):
        placement.before[1:5] = weights
        placement.allowed[1:5] = 1
        assert placement.chosen[: place_checkpoints(placement, 4)].tolist() == expected
