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


def relative_difference(values: Sequence[float], reference: Sequence[float]) -> tuple[float, float, float]:
    """mean(values) / mean(reference) - 1 with its 95 % interval from a bootstrap over common episodes."""
    pairs = np.column_stack([values, reference]).astype(float)
    rng = np.random.default_rng(SEED)
    means = pairs[rng.integers(len(pairs), size=(RESAMPLES, len(pairs)))].mean(axis=1)
    ratios = means[:, 0] / np.maximum(means[:, 1], 1e-300) - 1.0
    low, high = np.percentile(ratios, [2.5, 97.5])
    center = pairs[:, 0].mean() / max(pairs[:, 1].mean(), 1e-300) - 1.0
    return float(center), float(low), float(high)
