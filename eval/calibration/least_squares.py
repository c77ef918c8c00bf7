"""Nonlinear least squares within bounds, for a handful of unknowns and residuals that cost a simulation each."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

DAMPING, MOST_DAMPING = 1e-3, 1e6
TOLERANCE = 1e-4
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
    loss: float
    """Sum of squares there, or what stands for it."""


def bounded_least_squares(
    residuals: Residuals,
    start: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    iterations: int = 50,
    outlier: float = math.inf,
    width: float = 0.01,
) -> Fit:
    """The x with low <= x <= high that minimises sum(residuals(x) ** 2), locally, from `start`.

    Residuals r beyond `outlier` o count with less than their square: 2 o^2 (sqrt(1 + (r / o)^2) - 1), the soft L1 loss.
    Derivatives are differences over `width` to both sides: wide enough to see over the small jumps of a simulation.
    Levenberg-Marquardt (Marquardt 1963) on the unknowns that are free: one at a bound whose gradient points outwards
    stays there for the step. Steps are clipped to the bounds and taken only if they improve.
    """
    x = np.clip(start, low, high)
    found, damping = residuals(x), DAMPING
    jacobian, loss = _jacobian(residuals, x, high, width), _loss(found, outlier)
    for _ in range(iterations):
        step = _step(residuals, x, found, jacobian, damping, low, high, outlier)
        if step is None:
            break
        gained = 1.0 - step.loss / loss
        x, found, loss, damping = step.x, step.found, step.loss, max(step.damping / 10.0, 1e-9)
        jacobian = _jacobian(residuals, x, high, width)
        if gained < TOLERANCE:
            break
    return Fit(x, found, jacobian, loss)


def _loss(found: np.ndarray, outlier: float) -> float:
    if math.isinf(outlier):
        return float(found @ found)
    return float(2.0 * outlier**2 * (np.sqrt(1.0 + (found / outlier) ** 2) - 1.0).sum())


@dataclass(frozen=True)
class _Step:
    x: np.ndarray
    found: np.ndarray
    loss: float
    damping: float


def _step(
    residuals: Residuals,
    x: np.ndarray,
    found: np.ndarray,
    jacobian: np.ndarray,
    damping: float,
    low: np.ndarray,
    high: np.ndarray,
    outlier: float,
) -> _Step | None:
    """The first step that improves, with damping raised until one does; None if none does."""
    weights = 1.0 / np.sqrt(1.0 + (found / outlier) ** 2)
    gradient = jacobian.T @ (weights * found)
    free = ~(((x <= low) & (gradient > 0)) | ((x >= high) & (gradient < 0)))
    own = jacobian[:, free]
    square = own.T @ (weights[:, None] * own)
    scale = np.diag(np.maximum(np.diag(square), 1e-12))
    loss = _loss(found, outlier)
    while free.any() and damping <= MOST_DAMPING:
        trial = x.copy()
        trial[free] -= np.linalg.solve(square + damping * scale, gradient[free])
        trial = np.clip(trial, low, high)
        after = residuals(trial)
        if (lower := _loss(after, outlier)) < loss:
            return _Step(trial, after, lower, damping)
        damping *= 10.0
    return None


def _jacobian(residuals: Residuals, x: np.ndarray, high: np.ndarray, width: float) -> np.ndarray:
    """Central differences, one-sided at an upper bound."""
    columns = []
    for j in range(len(x)):
        up, down = x.copy(), x.copy()
        up[j], down[j] = min(x[j] + width, high[j]), x[j] - width
        columns.append((residuals(up) - residuals(down)) / (up[j] - down[j]))
    return np.array(columns).T
