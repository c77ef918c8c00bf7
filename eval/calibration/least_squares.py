"""Nonlinear least squares within bounds, for a handful of unknowns and residuals that cost a simulation each."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

STEP = 0.01
"""Of the finite differences: wide enough to see over the small jumps of a simulation's event order."""
DAMPING, MOST_DAMPING = 1e-3, 1e6
TOLERANCE = 1e-8
"""It ends when no step lowers the sum of squares by this fraction."""

Residuals = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Fit:
    """Where the search ended."""

    x: np.ndarray
    """The unknowns, shape (n,)."""
    residuals: np.ndarray
    """There, shape (m,)."""
    jacobian: np.ndarray
    """There, shape (m, n), by finite differences."""


def bounded_least_squares(
    residuals: Residuals, start: np.ndarray, low: np.ndarray, high: np.ndarray, iterations: int = 50
) -> Fit:
    """The x with low <= x <= high that minimises sum(residuals(x) ** 2), locally, from `start`.

    Levenberg-Marquardt (Marquardt 1963) on the unknowns that are free: one at a bound whose gradient points outwards
    stays there for the step. Steps are clipped to the bounds and taken only if they improve.
    """
    x = np.clip(start, low, high)
    found, jacobian = residuals(x), _jacobian(residuals, x, high)
    damping = DAMPING
    for _ in range(iterations):
        step = _step(residuals, x, found, jacobian, damping, low, high)
        if step is None:
            break
        gained = 1.0 - step.found @ step.found / (found @ found)
        x, found, damping = step.x, step.found, max(step.damping / 10.0, 1e-9)
        jacobian = _jacobian(residuals, x, high)
        if gained < TOLERANCE:
            break
    return Fit(x, found, jacobian)


@dataclass(frozen=True)
class _Step:
    x: np.ndarray
    found: np.ndarray
    damping: float


def _step(
    residuals: Residuals,
    x: np.ndarray,
    found: np.ndarray,
    jacobian: np.ndarray,
    damping: float,
    low: np.ndarray,
    high: np.ndarray,
) -> _Step | None:
    """The first step that improves, with damping raised until one does; None if none does."""
    gradient = jacobian.T @ found
    free = ~(((x <= low) & (gradient > 0)) | ((x >= high) & (gradient < 0)))
    own = jacobian[:, free]
    square = own.T @ own
    scale = np.diag(np.maximum(np.diag(square), 1e-12))
    while free.any() and damping <= MOST_DAMPING:
        trial = x.copy()
        trial[free] -= np.linalg.solve(square + damping * scale, gradient[free])
        trial = np.clip(trial, low, high)
        after = residuals(trial)
        if after @ after < found @ found:
            return _Step(trial, after, damping)
        damping *= 10.0
    return None


def _jacobian(residuals: Residuals, x: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Central differences, one-sided at an upper bound."""
    columns = []
    for j in range(len(x)):
        up, down = x.copy(), x.copy()
        up[j], down[j] = min(x[j] + STEP, high[j]), x[j] - STEP
        columns.append((residuals(up) - residuals(down)) / (up[j] - down[j]))
    return np.array(columns).T
