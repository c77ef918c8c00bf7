"""Steady, trend or burst: what the load of a clocked trace does over time."""

from dataclasses import dataclass

import numpy as np

BIN_S, SHORT_BIN_S, SHORT_SPAN_S = 60.0, 20.0, 1500.0
MIN_BINS, MAX_BINS = 6, 1_000_000
BURST_CV, BURST_PEAK, TREND_RISE = 0.5, 2.0, 0.5


@dataclass(frozen=True)
class Regime:
    """What is measured on the load per bin; all but `bin_s` have no unit."""

    name: str
    """Burst: cv >= 0.5 or peak >= 2. Trend: else, where |rise| >= 0.5 over the whole or over a half. Steady: else."""
    bin_s: float
    rise: float
    """Of the least-squares line from end to end, over the mean."""
    cv: float
    """Standard deviation of the residuals from that line, over the mean."""
    peak: float
    """Largest bin over the mean."""
    dispersion: float
    """Index of dispersion: variance of the residuals, over the mean."""


def load_per_bin(
    arrival_s: np.ndarray, amount: np.ndarray | None = None, *, most: int = MAX_BINS
) -> tuple[np.ndarray, float]:
    """Sum of `amount` (None: number) of the arrivals in each whole bin since the first one, and a bin's length in s.

    Bins are 60 s long, 20 s where the trace spans less than 25 minutes, longer where there would be more than `most`
    of them. float64 (bins,).
    """
    clock_s = arrival_s - arrival_s[0]
    span_s = float(clock_s[-1])
    bin_s = max(SHORT_BIN_S if span_s < SHORT_SPAN_S else BIN_S, span_s / most)
    bins = int(span_s / bin_s)
    place = np.minimum(clock_s / bin_s, bins).astype(np.int64)
    return np.bincount(place, amount, bins + 1)[:bins].astype(np.float64), bin_s


def regime_of(load: np.ndarray, bin_s: float) -> Regime | None:
    """Judge the load per bin; None for fewer than 6 bins, or without any load."""
    if len(load) < MIN_BINS or not load.any():
        return None
    mean = float(load.mean())
    rise, residuals = _line(load)
    variance = float(residuals.var())
    cv, peak = variance**0.5 / mean, float(load.max()) / mean
    halves = load[: len(load) // 2], load[len(load) // 2 :]
    if cv >= BURST_CV or peak >= BURST_PEAK:
        name = "Burst"
    elif max(abs(_line(part)[0]) for part in (load, *halves)) >= TREND_RISE:
        name = "Trend"
    else:
        name = "Steady"
    return Regime(name, bin_s, rise, cv, peak, variance / mean)


def _line(load: np.ndarray) -> tuple[float, np.ndarray]:
    """Rise of the least-squares line over its length and mean, and the residuals from it."""
    place = np.arange(len(load)) - (len(load) - 1) / 2
    mean = load.mean()
    slope = float(place @ load / (place @ place))
    return (slope * len(load) / mean if mean else 0.0), load - mean - slope * place
