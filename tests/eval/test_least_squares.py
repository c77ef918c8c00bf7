import numpy as np
import pytest

from hbmgym.eval.calibration.least_squares import bounded_least_squares

LOW, HIGH = np.full(2, -5.0), np.full(2, 5.0)


def rosenbrock(x: np.ndarray) -> np.ndarray:
    return np.array([10.0 * (x[1] - x[0] ** 2), 1.0 - x[0]])


def test_a_curved_valley_is_followed_to_its_end():
    found = bounded_least_squares(rosenbrock, np.array([-1.2, 1.0]), LOW, HIGH)
    assert found.x == pytest.approx([1.0, 1.0], abs=1e-6)
    assert found.residuals == pytest.approx([0.0, 0.0], abs=1e-6)


def test_a_bound_in_the_way_is_reached_and_the_rest_fitted_along_it():
    # On x0 = 0.5 the best x1 is 0.25.
    found = bounded_least_squares(rosenbrock, np.array([-1.2, 1.0]), LOW, np.array([0.5, 5.0]))
    assert found.x == pytest.approx([0.5, 0.25], abs=1e-6)


def test_a_line_is_fitted_as_by_the_normal_equations():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(20, 2)), rng.normal(size=20)
    found = bounded_least_squares(lambda x: a @ x - b, np.zeros(2), LOW, HIGH)
    assert found.x == pytest.approx(np.linalg.lstsq(a, b, rcond=None)[0], abs=1e-6)
    assert found.jacobian == pytest.approx(a, rel=1e-6)


def test_a_start_outside_the_bounds_is_brought_inside():
    found = bounded_least_squares(lambda x: x - 7.0, np.array([9.0, -9.0]), LOW, HIGH)
    assert found.x == pytest.approx([5.0, 5.0])


def test_an_unknown_without_a_say_keeps_its_start():
    found = bounded_least_squares(lambda x: np.array([x[0] - 1.0]), np.array([0.0, 0.3]), LOW, HIGH)
    assert found.x == pytest.approx([1.0, 0.3], abs=1e-6)


def test_a_perfect_start_is_kept():
    found = bounded_least_squares(rosenbrock, np.ones(2), LOW, HIGH)
    assert found.x.tolist() == [1.0, 1.0]


def test_a_wild_residual_does_not_carry_the_line_away():
    x = np.linspace(0.0, 1.0, 21)
    y = 1.0 + 2.0 * x
    y[3] += 50.0

    def residuals(line: np.ndarray) -> np.ndarray:
        return line[0] + line[1] * x - y

    assert bounded_least_squares(residuals, np.zeros(2), LOW, HIGH, outlier=0.1).x == pytest.approx(
        [1.0, 2.0], abs=0.05
    )
    assert bounded_least_squares(residuals, np.zeros(2), LOW, HIGH).x[0] > 4.0


def test_the_loss_is_the_soft_l1_of_the_residuals():
    found = bounded_least_squares(lambda x: np.array([x[0] - 1.0, 3.0, 0.1]), np.zeros(2), LOW, HIGH, outlier=0.5)
    assert found.x[0] == pytest.approx(1.0)
    assert found.loss == pytest.approx(0.5 * (np.sqrt(37.0) - 1.0) + 0.5 * (np.sqrt(1.04) - 1.0))
    assert bounded_least_squares(lambda x: x - 7.0, np.zeros(2), LOW, HIGH).loss == pytest.approx(8.0)


def test_small_jumps_are_seen_over_from_afar():
    def staircase(x: np.ndarray) -> np.ndarray:
        return np.array([np.round(40.0 * x[0]) / 40.0 - 1.0, x[1]])

    near = bounded_least_squares(staircase, np.array([-2.0, 0.0]), LOW, HIGH, width=0.001)
    far = bounded_least_squares(staircase, np.array([-2.0, 0.0]), LOW, HIGH, width=0.1)
    assert abs(far.residuals[0]) < 0.03 < abs(near.residuals[0])
