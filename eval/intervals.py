"""Means and intervals over episodes; differences are paired by seed."""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
SEED = 0


def _resampled_means(values: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(SEED)
    return values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(axis=1)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95 % bootstrap interval (percentile)."""
    array = np.asarray(values, dtype=float)
    low, high = np.percentile(_resampled_means(array), [2.5, 97.5])
    return float(array.mean()), float(low), float(high)


def iqm(values: Sequence[float]) -> float:
    """Interquartile mean: of the middle half, its ends counted in part (Agarwal et al., NeurIPS 2021)."""
    ordered = np.sort(np.asarray(values, dtype=float))
    edges = np.arange(len(ordered) + 1) / len(ordered)
    weights = np.clip(np.minimum(edges[1:], 0.75) - np.maximum(edges[:-1], 0.25), 0.0, None)
    return float(weights @ ordered / weights.sum())


def relative_difference(values: Sequence[float], reference: Sequence[float]) -> tuple[float, float, float]:
    """mean(values) / mean(reference) - 1 with its 95 % interval from a bootstrap over common episodes.

    Of a reference of 0 everything above differs by inf, and another 0 by 0.
    """
    pairs = np.column_stack([values, reference]).astype(float)
    rng = np.random.default_rng(SEED)
    means = pairs[rng.integers(len(pairs), size=(RESAMPLES, len(pairs)))].mean(axis=1)
    # Between two infinities there is nothing to interpolate.
    low, high = np.percentile(_excess(means), [2.5, 97.5], method="nearest")
    return float(_excess(pairs.mean(axis=0))), float(low), float(high)


def _excess(pairs: np.ndarray) -> np.ndarray:
    """value / reference - 1 of the pairs in the last axis."""
    values, references = pairs[..., 0], pairs[..., 1]
    without = np.where(values > 0.0, np.inf, 0.0)
    return np.divide(values - references, references, out=without, where=references > 0.0)
