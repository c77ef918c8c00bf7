"""The Budgeter's program against cvxpy and Clarabel, and its laws; the curves it is given."""

import math

import cvxpy
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hbmgym.controllers.convex.budgeter import charge_moves, fill
from hbmgym.controllers.convex.utility import OFFSETS, concave_slopes, erlang_b

examples = settings(deadline=None, max_examples=40, derandomize=True)


@st.composite
def programs(draw, most_pools=4):
    """(starts, widths, slopes, budget): concave pools in pieces, and a budget between least and most."""
    count, pieces = draw(st.integers(2, most_pools)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    starts = rng.uniform(0.0, 2.0, count) * rng.integers(0, 2, count)
    widths = rng.uniform(0.1, 3.0, (count, pieces)) * rng.integers(0, 2, (count, pieces))
    slopes = -np.sort(-rng.uniform(0.01, 5.0, (count, pieces)))
    assume(widths.sum() > 0.5)
    budget = starts.sum() + draw(st.floats(0.05, 0.95)) * widths.sum()
    return starts, widths, slopes, budget


def worth(sizes, starts, widths, slopes):
    """Of the pieces that the sizes pay for, dearest first."""
    total = 0.0
    for size, start, width, slope in zip(sizes, starts, widths, slopes, strict=True):
        left = size - start
        for w, s in zip(width, slope, strict=True):
            total += s * min(w, max(left, 0.0))
            left -= w
    return total


def solve(starts, widths, slopes, budget):
    sizes = np.zeros(len(starts))
    return sizes, fill(budget, starts, widths, slopes, sizes)


def charged(cost, now, starts, widths, slopes):
    bent = slopes.copy()
    charge_moves(cost, now, starts, widths, bent)
    return bent


def clarabel(starts, widths, slopes, budget, cost=0.0, now=None):
    """(objective, dual of the budget) of the program as written, moves and all."""
    taken = cvxpy.Variable(widths.shape)
    objective = cvxpy.sum(cvxpy.multiply(slopes, taken))
    sizes = starts + cvxpy.sum(taken, axis=1)
    if cost:
        objective -= 0.5 * cost * cvxpy.norm1(sizes - now)
    within = cvxpy.sum(sizes) == budget
    problem = cvxpy.Problem(cvxpy.Maximize(objective), [within, taken >= 0, taken <= widths])
    problem.solve(solver="CLARABEL", tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11)
    return problem.value, abs(float(within.dual_value))


@examples
@given(program=programs())
def test_it_is_the_optimum_and_its_level_the_dual(program):
    starts, widths, slopes, budget = program
    sizes, level = solve(*program)
    expected, dual = clarabel(*program)
    assert worth(sizes, starts, widths, slopes) == pytest.approx(expected, rel=1e-8)
    assert sizes.sum() == pytest.approx(budget, rel=1e-12)
    # Complementary slackness: pieces dearer than the level are all taken, cheaper ones not at all.
    for size, start, width, slope in zip(sizes, starts, widths, slopes, strict=True):
        assert width[slope > level].sum() <= size - start + 1e-9
        assert size - start <= width[slope >= level].sum() + 1e-9
    used = sizes - starts
    strict_inside = any(
        1e-6 < used[i] - widths[i][: j].sum() < widths[i, j] - 1e-6
        for i in range(len(starts)) for j in range(widths.shape[1])
    )  # fmt: skip
    if strict_inside:  # the dual is unique
        assert level == pytest.approx(dual, rel=1e-3)


@examples
@given(program=programs(most_pools=2), where=st.floats(0, 1), cost=st.floats(0.01, 3.0))
def test_moves_are_paid_for_as_in_the_program(program, where, cost):
    starts, widths, slopes, budget = program
    most = starts + widths.sum(axis=1)
    low, high = max(starts[0], budget - most[1]), min(most[0], budget - starts[1])
    now = np.array([low + where * (high - low), 0.0])
    now[1] = budget - now[0]
    # `now` lies at a joint, as it does in a curve around the present size.
    cut = [_split(starts[i], widths[i], slopes[i], now[i]) for i in range(2)]
    widths, slopes = np.array([c[0] for c in cut]), np.array([c[1] for c in cut])
    sizes, _ = solve(starts, widths, charged(cost, now, starts, widths, slopes), budget)
    found = worth(sizes, starts, widths, slopes) - 0.5 * cost * np.abs(sizes - now).sum()
    expected, _ = clarabel(starts, widths, slopes, budget, cost, now)
    assert found == pytest.approx(expected, rel=1e-8, abs=1e-9)


def _split(start, widths, slopes, at):
    ends = start + np.cumsum(widths)
    begins = ends - widths
    parts = [(np.clip(at, b, e) - b, s) for b, e, s in zip(begins, ends, slopes, strict=True)]
    rest = [(e - np.clip(at, b, e), s) for b, e, s in zip(begins, ends, slopes, strict=True)]
    both = [x for pair in zip(parts, rest, strict=True) for x in pair]
    return [w for w, _ in both], [s for _, s in both]


def kkt_residual(sizes, level, starts, widths, slopes, budget, cost=0.0, now=None):
    """The largest violation of the optimality conditions, bytes in budgets and worth in the greatest slope.

    Pool i takes x_ij bytes of its pieces, 0 <= x_ij <= w_ij with multipliers b_ij, a_ij >= 0, and pays sigma_i, a
    subgradient of (cost / 2) |m_i - now_i|, for its last byte. Stationary: s_ij - sigma_i - level = a_ij - b_ij, which
    a and b are chosen to meet. Of every pair of multiplier and slack one must be 0: min() says by how much it is not.
    """
    worst = slopes.max() + cost
    residual = abs(sizes.sum() - budget) / budget
    for i, size in enumerate(sizes):
        taken = np.clip(size - starts[i] - np.concatenate([[0.0], np.cumsum(widths[i])[:-1]]), 0.0, widths[i])
        outside = abs(size - starts[i] - taken.sum()) / budget
        moved = 0.0 if now is None else size - now[i]

        def of_pool(sigma, i=i, taken=taken, moved=moved):
            left_over = slopes[i] - sigma - level
            above = np.minimum(np.maximum(left_over, 0.0) / worst, (widths[i] - taken) / budget)
            below = np.minimum(np.maximum(-left_over, 0.0) / worst, taken / budget)
            paid = min((0.5 * cost - np.sign(moved) * sigma) / worst, abs(moved) / budget)
            return max(above.max(), below.max(), paid)

        subgradients = np.clip([*(slopes[i] - level), -0.5 * cost, 0.5 * cost], -0.5 * cost, 0.5 * cost)
        residual = max(residual, outside, min(map(of_pool, subgradients)))
    return residual


@settings(deadline=None, max_examples=300, derandomize=True)
@given(program=programs(), cost=st.just(0.0) | st.floats(1e-3, 6.0), seed=st.integers(0, 2**32))
def test_the_optimality_conditions_hold_to_a_billionth(program, cost, seed):
    starts, widths, slopes, _ = program
    most = widths.sum(axis=1)
    now = starts + np.random.default_rng(seed).choice([0.0, 0.3, 0.7, 1.0], len(starts)) * most
    budget = now.sum()  # as in service: what moves is the present split
    assume(budget > 0.0)
    cut = [_split(*pool) for pool in zip(starts, widths, slopes, now, strict=True)]
    widths, slopes = np.array([c[0] for c in cut]), np.array([c[1] for c in cut])
    sizes, level = solve(starts, widths, charged(cost, now, starts, widths, slopes), budget)
    assert kkt_residual(sizes, level, starts, widths, slopes, budget, cost, now) <= 1e-9


@pytest.mark.parametrize(
    ("sizes", "level", "budget"),
    [((5.0, 5.0), 2.0, 10.0), ((9.0, 1.0), 2.0, 10.0), ((10.0, 0.0), 2.5, 10.0), ((10.0, 0.0), 2.2, 11.0)],
)
def test_the_residual_sees_what_is_not_optimal(sizes, level, budget):
    """The first pool's bytes are worth 4, then 3, the others' 1.5, then 1: they move at a price of 0.7 each."""
    conditions = (np.zeros(2), np.full((2, 2), 5.0), np.array([[4.0, 3.0], [1.5, 1.0]]))
    now = np.array([5.0, 5.0])
    assert kkt_residual(np.array([10.0, 0.0]), 2.2, *conditions, 10.0, 1.4, now) == 0.0
    assert kkt_residual(np.array(sizes), level, *conditions, budget, 1.4, now) > 0.01


@examples
@given(program=programs(), factor=st.floats(1e-6, 1e6), bytes_per_unit=st.floats(1.0, 1e10))
def test_scale_changes_nothing(program, factor, bytes_per_unit):
    starts, widths, slopes, budget = program
    sizes, level = solve(*program)
    others, scaled = solve(starts * bytes_per_unit, widths * bytes_per_unit, slopes * factor, budget * bytes_per_unit)
    assert others / bytes_per_unit == pytest.approx(sizes, rel=1e-6, abs=1e-9)
    assert scaled == pytest.approx(factor * level)


@examples
@given(program=programs())
def test_the_level_is_what_a_byte_more_is_worth(program):
    starts, widths, slopes, budget = program
    _, level = solve(*program)
    step = 1e-7
    more, less = (solve(starts, widths, slopes, budget + d)[0] for d in (step, -step))
    gained = (worth(more, starts, widths, slopes) - worth(less, starts, widths, slopes)) / (2 * step)
    above = solve(starts, widths, slopes, budget + step)[1]
    below = solve(starts, widths, slopes, budget - step)[1]
    assert below >= level >= above
    assert above - 1e-6 <= gained <= below + 1e-6


def test_pools_may_be_named_in_any_order():
    starts, widths, slopes = np.array([1.0, 0.0, 0.5]), np.ones((3, 2)), np.array([[3.0, 1.0], [5.0, 0.5], [4.0, 2.0]])
    order = [2, 0, 1]
    sizes, level = solve(starts, widths, slopes, 4.2)
    others, same = solve(starts[order], widths[order], slopes[order], 4.2)
    assert (sizes[order] == others).all() and level == same


def test_what_does_not_fit_or_all_fits():
    starts, widths, slopes = np.array([2.0, 3.0]), np.ones((2, 1)), np.ones((2, 1))
    assert math.isnan(solve(starts, widths, slopes, 4.0)[1])
    sizes, level = solve(starts, widths, slopes, 9.0)
    assert level == 0.0 and sizes.tolist() == [3.0, 4.0]
    nothing_fits, level = solve(starts, widths, slopes, 5.0)
    assert nothing_fits.tolist() == [2.0, 3.0] and level == 1.0, "a byte more would be worth so much"
    fixed, _ = solve(starts, 0.0 * widths, slopes, 5.0)
    assert fixed.tolist() == [2.0, 3.0]


NOW, STARTS, PIECES = np.array([5.0, 5.0]), np.array([0.0, 0.0]), np.full((2, 2), 5.0)


@pytest.mark.parametrize(("cost", "kv"), [(0.0, 10.0), (1.4, 10.0), (1.6, 5.0), (math.inf, 5.0)])
def test_a_byte_moves_when_it_is_worth_more_than_its_move(cost, kv):
    slopes = np.array([[4.0, 3.0], [1.5, 1.0]])  # a byte is worth 3 there and 1.5 here
    sizes, _ = solve(STARTS, PIECES, charged(cost, NOW, STARTS, PIECES, slopes), 10.0)
    assert sizes.tolist() == [kv, 10.0 - kv]


@examples
@given(values=st.lists(st.floats(-100, 100), min_size=len(OFFSETS), max_size=len(OFFSETS)))
def test_the_curve_is_the_least_concave_one_above(values):
    values, slopes = np.array(values), np.zeros(len(OFFSETS) - 1)
    concave_slopes(OFFSETS, values, slopes)
    hull = values[0] + np.concatenate([[0.0], np.cumsum(slopes * np.diff(OFFSETS))])
    assert np.all(np.diff(slopes) <= 1e-6)
    assert np.all(hull >= values - 1e-9)
    corners = np.flatnonzero(np.diff(slopes) < -1e-6) + 1
    assert hull[[0, *corners, -1]] == pytest.approx(values[[0, *corners, -1]], abs=1e-9)


@pytest.mark.parametrize("load", [0.3, 5.0, 50.0])
def test_erlang_b_is_the_direct_sum_and_convex(load):
    direct = [
        load**n / math.factorial(n) / sum(load**k / math.factorial(k) for k in range(n + 1)) for n in range(60)
    ]  # fmt: skip
    found = [erlang_b(load, 0, 1.0, n) for n in range(60)]
    assert found == pytest.approx(direct, rel=1e-12)
    assert np.all(np.diff(found, 2) >= -1e-12)
    assert erlang_b(load, 7, found[7], 40) == pytest.approx(found[40], rel=1e-12)
