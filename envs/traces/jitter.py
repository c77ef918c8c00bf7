"""Timestamps that were rounded to buckets: detect them, and spread them again, in file order."""

import numpy as np

MIN_QUANTUM_S = 1.0
"""Finer rounding is left alone: it changes nothing that a window of seconds can see."""
SLACK_S = 0.002
"""Published buckets are off by a truncated millisecond here and there (5.999, 9.000)."""
_GRID_S = 0.01


def quantum_of(arrival_s: np.ndarray) -> float:
    """Step of >= 1 s of which all (sorted) arrivals are multiples, with ties; 0.0 when there is none."""
    offset_s = arrival_s - arrival_s[0]
    ticks = np.rint(offset_s / _GRID_S).astype(np.int64)
    steps = np.diff(ticks)
    if np.abs(offset_s - ticks * _GRID_S).max() > SLACK_S or not (steps == 0).any():
        return 0.0
    quantum_s = float(np.gcd.reduce(steps)) * _GRID_S
    return round(quantum_s, 2) if quantum_s >= MIN_QUANTUM_S else 0.0


def snap(arrival_s: np.ndarray, quantum_s: float) -> np.ndarray:
    """Arrivals moved onto the start of their bucket; the same array where there are no buckets."""
    if quantum_s <= 0.0:
        return arrival_s
    snapped: np.ndarray = arrival_s[0] + quantum_s * np.rint((arrival_s - arrival_s[0]) / quantum_s)
    return snapped


def spread(arrival_s: np.ndarray, quantum_s: float, rng: np.random.Generator) -> np.ndarray:
    """Sorted arrivals plus U(0, quantum_s): still sorted, row i stays before row i + 1 and in its bucket."""
    if quantum_s <= 0.0:
        return arrival_s
    # Buckets do not overlap, so sorting the sum hands each bucket's draws out in file order.
    return np.sort(snap(arrival_s, quantum_s) + quantum_s * rng.random(len(arrival_s)))
