"""The best static split is one that serves."""

import numpy as np
import pytest

from hbmgym.eval.statics import UNSERVED, best_costs, best_static, serves


def test_refusing_does_not_pay():
    costs, unserved = np.array([0.1, 0.5, 0.4]), np.array([0.3, 0.0, 0.0])
    assert serves(unserved).tolist() == [False, True, True]
    assert best_static(costs, unserved) == 2


def test_a_part_of_the_tokens_as_small_as_the_tolerance_is_forgiven():
    assert best_static(np.array([0.1, 0.5]), np.array([UNSERVED, 0.0])) == 0
    assert best_static(np.array([0.1, 0.5]), np.array([1.01 * UNSERVED, 0.0])) == 1


def test_what_no_split_serves_is_held_against_none():
    assert best_static(np.array([0.5, 0.4, 0.3]), np.array([0.6, 0.605, 0.7])) == 1


def test_each_episode_has_a_best_static_of_its_own():
    costs = np.array([[1.0, 0.2], [3.0, 0.3], [2.0, 0.4]])
    unserved = np.array([[0.0, 0.5], [0.0, 0.0], [0.0, 0.0]])
    assert best_costs(costs, unserved).tolist() == pytest.approx([2.0, 0.3])


def test_what_each_episode_s_own_best_costs_is_never_more_than_the_best_static():
    costs, unserved = np.array([[1.0, 1.0], [2.0, 2.0]]), np.array([[0.0, 0.018], [0.0, 0.0]])
    assert best_static(costs.mean(axis=1), unserved.mean(axis=1)) == 0
    assert best_costs(costs, unserved).mean() == 1.0
