"""Intervals over episodes: what they say, and how often they hold the truth."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from hbmgym.eval.comparison import BATCH
from hbmgym.eval.intervals import (
    LEVEL,
    LOOKED_LEVEL,
    Interval,
    iqm,
    mean_interval,
    relative_difference,
    student_quantile,
)


def test_the_interval_of_equal_values_is_the_value():
    assert mean_interval([2.0] * 5) == (2.0, 2.0, 2.0)


def test_one_episode_has_no_interval_and_says_so():
    assert mean_interval([3.0]) == (3.0, 0.0, math.inf)
    assert relative_difference([1.0], [2.0]) == (-0.5, -1.0, math.inf)
    assert mean_interval([3.0]).text(".2f", "x") == "3.00x (one episode)"
    assert relative_difference([0.0], [0.0]).text("+.0%") == "+0% (one episode)"
    assert relative_difference([1.0], [0.0]).text("+.0%") == "+inf% (one episode)"
    assert mean_interval([3.0]).known == [3.0, 0.0, None]


def test_an_interval_is_told_with_its_unit_once():
    assert Interval(0.5, 0.25, 1.0).text("+.0%") == "+50% [+25%, +100%]"
    assert Interval(0.5, 0.25, 1.0).text(".2f", "x") == "0.50x [0.25, 1.00]"


def test_the_interval_has_the_width_of_the_mean_of_normal_values():
    values = np.random.default_rng(1).normal(10.0, 2.0, 400)
    center, low, high = mean_interval(values.tolist())
    half = 1.96 * values.std() / 20
    assert center == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((center - half, center + half), rel=0.003)


def test_differences_are_paired():
    reference = np.random.default_rng(2).uniform(1.0, 100.0, 20)
    assert relative_difference((1.1 * reference).tolist(), reference.tolist()) == pytest.approx((0.1, 0.1, 0.1))


def test_a_difference_is_one_of_means():
    difference = relative_difference([1.0, 5.0, 3.0], [2.0, 2.0, 2.0])
    assert difference.value == pytest.approx(0.5)
    # The terms are -2/3, 2/3 and 0; three values have one degree of freedom at least.
    half = student_quantile(1.0, LEVEL) * (2.0 / 3.0) / math.sqrt(3.0)
    assert difference[1:] == pytest.approx((1.5 * math.exp(-half) - 1.0, 1.5 * math.exp(half) - 1.0))


def test_the_other_way_round_the_difference_is_the_inverse():
    a, b = [1.0, 2.0, 4.0, 3.0], [2.0, 1.5, 1.0, 2.5]
    (value, low, high), (other, least, most) = relative_difference(a, b), relative_difference(b, a)
    assert (1.0 + value, 1.0 + low, 1.0 + high) == pytest.approx((1 / (1 + other), 1 / (1 + most), 1 / (1 + least)))


def test_two_zeros_do_not_differ():
    assert relative_difference([0.0, 0.0], [0.0, 0.0]) == (0.0, 0.0, 0.0)


def test_nothing_is_all_less_than_something():
    assert relative_difference([0.0, 0.0], [1.0, 2.0]) == (-1.0, -1.0, -1.0)


def test_anything_is_infinitely_more_than_zero():
    difference = relative_difference([1.0, 2.0], [0.0, 0.0])
    assert difference == (np.inf, np.inf, np.inf)
    assert difference.known == [None, None, None]
    assert difference.text("+.1%") == "+inf% [+inf%, +inf%]"


def test_the_quantiles_are_those_of_the_printed_tables():
    found = [student_quantile(freedom, level) for freedom, level in ((1, 0.95), (7, 0.95), (13, 0.95), (2, 0.98))]
    assert found == pytest.approx([12.706, 2.365, 2.160, 6.965], abs=6e-4)


def test_the_interquartile_mean_is_of_the_middle_half():
    assert iqm([1.0, 2.0, 3.0, 100.0]) == 2.5
    assert iqm([5.0]) == 5.0
    assert iqm([0.0, 1.0, 5.0]) == pytest.approx((0.0 / 12 + 1.0 / 3 + 5.0 / 12) / 0.5)


Population = tuple[np.ndarray, np.ndarray]
"""Costs of two controllers in the same episodes."""


def _busy_days(rng: np.random.Generator, n: int) -> Population:
    """Load that both feel, and which makes episodes dearer by multiples."""
    load = np.exp(rng.normal(0.0, 0.8, n))
    return 0.8 * load * np.exp(rng.normal(0.0, 0.3, n)), load * np.exp(rng.normal(0.0, 0.3, n))


def _own_troubles(rng: np.random.Generator, n: int) -> Population:
    """Each has bad episodes of its own, as on Falcon's documents."""
    load = np.exp(rng.normal(0.0, 0.3, n))
    return 0.8 * load * np.exp(rng.normal(0.0, 0.6, n)), load * np.exp(rng.normal(0.0, 0.6, n))


def _relief(rng: np.random.Generator, n: int) -> Population:
    """The dearer an episode is with the reference, the more the other one saves, as on mix-shift."""
    reference = 0.36 + 0.5 * rng.gamma(0.5, 1.0, n)
    return 0.34 + 0.2 * (reference - 0.36) * np.exp(rng.normal(0.0, 0.5, n)), reference


def _floods(rng: np.random.Generator, n: int) -> Population:
    """In one episode of ten the reference breaks down, the other one half as badly."""
    flood = 4.0 * (rng.random(n) < 0.1)
    own = np.exp(rng.normal(0.0, 0.4, (2, n)))
    return 0.5 * own[0] + 0.5 * flood, 0.6 * own[1] + flood


def _large_jobs(rng: np.random.Generator, n: int) -> Population:
    """Costs with a power's tail, without a fourth moment."""
    load = 1.0 + rng.pareto(2.5, n)
    return load * np.exp(rng.normal(0.0, 0.3, n)), load * np.exp(rng.normal(0.0, 0.3, n))


POPULATIONS = (_busy_days, _own_troubles, _relief, _floods, _large_jobs)
DRAWS, EPISODES = 1000, 40
ENOUGH = 0.92


class Draws:
    """Samples of a population, and its true difference."""

    def __init__(self, population: Callable[[np.random.Generator, int], Population]) -> None:
        costs, reference = population(np.random.default_rng(0), 500_000)
        self.truth = costs.mean() / reference.mean() - 1.0
        rng = np.random.default_rng(1)
        self.samples = [population(rng, EPISODES) for _ in range(DRAWS)]
        self.spread = float((costs / reference.mean() - (1.0 + self.truth) * reference / reference.mean()).std())

    def coverage(self, interval: Callable[[np.ndarray, np.ndarray], tuple[float, float, float]]) -> float:
        """How often what is made of a sample's columns holds the truth."""
        found = [interval(*sample) for sample in self.samples]
        return float(np.mean([low <= self.truth <= high for _, low, high in found]))


@pytest.fixture(scope="module", params=POPULATIONS, ids=lambda population: population.__name__.strip("_"))
def draws(request) -> Draws:
    return Draws(request.param)


@pytest.mark.parametrize("episodes", [8, 10, 20, 40])
def test_intervals_hold_the_truth_as_often_as_they_say(draws, episodes):
    covered = draws.coverage(lambda a, b: relative_difference(a[:episodes], b[:episodes]))
    assert covered >= ENOUGH


@pytest.mark.parametrize("half_width", [1.5, 1.0, 0.7, 0.5, 0.35])
def test_stopping_where_the_interval_is_narrow_leaves_it_holding_the_truth(draws, half_width):
    """`half_width` in standard deviations of the difference: from stops at the first look to stops at the last one."""

    def until_narrow(costs: np.ndarray, reference: np.ndarray) -> Interval:
        for seen in range(BATCH, EPISODES + 1, BATCH):
            found = relative_difference(costs[:seen], reference[:seen], LOOKED_LEVEL)
            if found.half_width <= half_width * draws.spread:
                break
        return found

    assert draws.coverage(until_narrow) >= ENOUGH


def test_a_percentile_bootstrap_would_not_be_enough():
    """What these populations tell apart: resampled episodes know nothing of those that were not drawn."""
    picked = np.random.default_rng(2).integers(8, size=(400, 8))

    def percentile(costs: np.ndarray, reference: np.ndarray) -> tuple[float, float, float]:
        ratios = costs[:8][picked].mean(axis=1) / reference[:8][picked].mean(axis=1)
        low, high = np.percentile(ratios, [2.5, 97.5]) - 1.0
        return 0.0, float(low), float(high)

    assert max(Draws(population).coverage(percentile) for population in POPULATIONS) < ENOUGH
