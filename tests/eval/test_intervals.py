"""Bootstrap intervals over episodes."""

import numpy as np
import pytest

from hbmgym.eval.intervals import iqm, mean_interval, relative_difference


def test_the_interval_of_equal_values_is_the_value():
    assert mean_interval([2.0] * 5) == (2.0, 2.0, 2.0)


def test_one_episode_has_no_width():
    assert mean_interval([3.0]) == (3.0, 3.0, 3.0)


def test_the_interval_has_the_width_of_the_mean_of_normal_values():
    values = np.random.default_rng(1).normal(10.0, 2.0, 100)
    center, low, high = mean_interval(values.tolist())
    half = 1.96 * values.std() / 10
    assert center == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((center - half, center + half), rel=0.01)


def test_intervals_are_reproducible():
    assert mean_interval([1.0, 2.0, 4.0]) == mean_interval([1.0, 2.0, 4.0])


def test_differences_are_paired():
    reference = np.random.default_rng(2).uniform(1.0, 100.0, 20)
    assert relative_difference((1.1 * reference).tolist(), reference.tolist()) == pytest.approx((0.1, 0.1, 0.1))


def test_a_difference_is_one_of_means():
    center, low, high = relative_difference([1.0, 5.0], [2.0, 2.0])
    assert center == pytest.approx(0.5)
    assert (low, high) == pytest.approx((-0.5, 1.5))


def test_two_zeros_do_not_differ():
    assert relative_difference([0.0, 0.0], [0.0, 0.0]) == (0.0, 0.0, 0.0)


def test_anything_is_infinitely_more_than_zero():
    assert relative_difference([1.0, 2.0], [0.0, 0.0]) == (np.inf, np.inf, np.inf)


def test_the_interquartile_mean_is_of_the_middle_half():
    assert iqm([1.0, 2.0, 3.0, 100.0]) == 2.5
    assert iqm([5.0]) == 5.0
    assert iqm([0.0, 1.0, 5.0]) == pytest.approx((0.0 / 12 + 1.0 / 3 + 5.0 / 12) / 0.5)
