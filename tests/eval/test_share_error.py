"""The share error: hand-computed examples, and what must hold for any costs."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbmgym.eval.regrets.share_error import ShareError, mean_shares, nearest_best, share_error
from hbmgym.eval.rollout import Rollout

GRID = [0.1, 0.2, 0.4, 0.7]
COSTS = np.array([[2.0, 1.0, 3.0], [1.005, 1.0, 3.0], [1.0, 5.0, 3.0], [1.02, 1.005, 3.0]])
"""(shares, segments): best at .2 and .4; at .1, .2 and .7; anywhere."""
ARRIVALS = [2.0, 1.0, 5.0]
BEGIN_S, END_S = [0.0, 60.0, 120.0], [60.0, 120.0, 150.0]


def held(shares: list[float], costs: Sequence[float] = (), arrivals: Sequence[float] = ARRIVALS) -> Rollout:
    """An episode with one window per segment."""
    segments = {"begin_s": BEGIN_S, "end_s": END_S, "arrivals": list(arrivals), "cost": list(costs)}
    return Rollout({}, {}, {"time_s": END_S, "kv_share_effective": shares}, segments)


def judged(shares: list[float], costs: np.ndarray = COSTS, arrivals: Sequence[float] = ARRIVALS) -> ShareError:
    statics = [[held([share] * 3, own, arrivals)] for share, own in zip(GRID, costs, strict=True)]
    return share_error(GRID, statics, [held(shares)])


def error_of(shares: list[float], costs: np.ndarray = COSTS) -> float:
    return judged(shares, costs).error


def test_the_error_is_the_distance_to_the_nearest_split_that_would_have_done():
    assert error_of([0.1, 0.5, 0.6]) == pytest.approx((2 * 0.1 + 1 * 0.2 + 5 * 0.0) / 8)
    assert error_of([0.9, 0.0, 0.1]) == pytest.approx((2 * 0.5 + 1 * 0.1 + 5 * 0.0) / 8)


def test_between_neighbours_that_both_do_there_is_no_error():
    assert error_of([0.3, 0.15, 0.55]) == 0.0
    assert error_of([0.3, 0.4, 0.55]) == pytest.approx(1 * 0.2 / 8)  # .2 and .7 do, but .4 lies between them


def test_the_plain_distance_follows_the_best_split_that_is_nearest_to_the_one_before():
    assert nearest_best(GRID, COSTS) == [2, 1, 1]
    measured = judged([0.3, 0.3, 0.3])
    assert measured.mae == pytest.approx(0.1)
    assert measured.requests == pytest.approx(8 / 3)


def test_the_share_of_a_segment_is_its_mean_over_time():
    history = {"time_s": [30.0, 90.0, 100.0], "kv_share_effective": [0.2, 0.8, 0.5]}
    assert mean_shares(history, BEGIN_S, END_S) == pytest.approx([0.5, (30 * 0.8 + 30 * 0.5) / 60, 0.5])


def test_a_segment_without_requests_counts_for_nothing():
    costs = COSTS.copy()
    costs[:, 1] = 0.0
    measured = judged([0.1, 0.9, 0.6], costs, [2.0, 0.0, 5.0])
    assert measured.error == pytest.approx(2 * 0.1 / 7)
    assert measured.requests == pytest.approx(3.5)


some_costs = st.lists(st.lists(st.floats(0.01, 10.0), min_size=3, max_size=3), min_size=4, max_size=4).map(np.array)
some_shares = st.lists(st.floats(0.0, 1.0), min_size=3, max_size=3)


@given(some_costs)
def test_the_best_split_of_each_segment_has_no_error(costs):
    assert error_of([GRID[place] for place in costs.argmin(axis=0)], costs) == 0.0


@given(some_costs, some_shares)
def test_the_error_is_at_most_the_distance_to_the_best_split(costs, shares):
    best = np.array(GRID)[costs.argmin(axis=0)]
    assert error_of(shares, costs) <= np.average(np.abs(shares - best), weights=ARRIVALS) + 1e-12


@given(st.integers(0, 3), some_shares, st.floats(0.0, 1.0))
def test_where_one_split_does_the_error_falls_with_every_step_towards_it(place, shares, part):
    costs = np.full((4, 3), 2.0)
    costs[place] = 1.0
    nearer = [GRID[place] + part * (share - GRID[place]) for share in shares]
    assert error_of(nearer, costs) == pytest.approx(part * error_of(shares, costs))


@given(some_costs, some_shares, st.sampled_from([2.0**-20, 0.5, 8.0]))
def test_the_error_knows_no_scale_of_cost(costs, shares, scale):
    assert error_of(shares, scale * costs) == error_of(shares, costs)
