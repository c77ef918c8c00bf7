"""Steady, trend or burst: what the load of a clocked trace does over time."""

from dataclasses import dataclass, replace

import numpy as np

BIN_S, SHORT_BIN_S, SHORT_SPAN_S = 60.0, 20.0, 1500.0
MIN_BINS, MAX_BINS = 6, 1_000_000
BURST_CV, BURST_PEAK, TREND_RISE = 0.5, 2.0, 0.5
WAVE_BINS_S, WAVE_CV = (20.0, 5.0, 1.0), 0.9
"""Waves within a minute are seen in shorter bins, by how much their requests vary beyond what chance makes of a steady
rate: by 1 for a wave every other second; by .7 at most in ServeGen's samples, which come by clients in bursts."""


@dataclass(frozen=True)
class Regime:
    """What is measured on the load per bin; all but `bin_s` have no unit."""

    name: str
    """Burst: cv >= 0.5 or peak >= 2, or waves within a bin (`judge`). Trend: else, where |rise| >= 0.5 over the whole
    or over a half. Steady: else."""
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
    arrival_s: np.ndarray, amount: np.ndarray | None = None, *, most: int = MAX_BINS, bin_s: float | None = None
) -> tuple[np.ndarray, float]:
    """Sum of `amount` (None: number) of the arrivals in each whole bin since the first one, and a bin's length in s.

    Bins are `bin_s` long or, where it is None, 60 s, 20 s where the trace spans less than 25 minutes; longer where
    there would be more than `most` of them. float64 (bins,).
    """
    clock_s = arrival_s - arrival_s[0]
    span_s = float(clock_s[-1])
    bin_s = max(bin_s or (SHORT_BIN_S if span_s < SHORT_SPAN_S else BIN_S), span_s / most)
    bins = int(span_s / bin_s)
    place = np.minimum(clock_s / bin_s, bins).astype(np.int64)
    return np.bincount(place, amount, bins + 1)[:bins].astype(np.float64), bin_s


def judge(arrival_s: np.ndarray, amount: np.ndarray | None = None) -> Regime | None:
    """What the load is over time: per minute or, where that hides waves, in bins that show them; None as `regime_of`.

    Sorted arrivals, seconds, and what each brings (None: 1).
    """
    regime = regime_of(*load_per_bin(arrival_s, amount))
    if regime is None or regime.name == "Burst":
        return regime
    for bin_s in WAVE_BINS_S:
        if bin_s < regime.bin_s and _wave_cv(arrival_s, bin_s) >= WAVE_CV:
            waves = regime_of(*load_per_bin(arrival_s, amount, bin_s=bin_s))
            return waves and replace(waves, name="Burst")
    return regime


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


def _wave_cv(arrival_s: np.ndarray, bin_s: float) -> float:
    """Coefficient of variation of the requests per bin beyond a Poisson process's; 0 where bins hold less than one."""
    requests, taken_s = load_per_bin(arrival_s, bin_s=bin_s)
    mean = float(requests.mean()) if len(requests) else 0.0
    return max(0.0, float(requests.var()) - mean) ** 0.5 / mean if mean >= 1.0 and taken_s == bin_s else 0.0


def _line(load: np.ndarray) -> tuple[float, np.ndarray]:
    """Rise of the least-squares line over its length and mean, and the residuals from it."""
    place = np.arange(len(load)) - (len(load) - 1) / 2
    mean = load.mean()
    slope = float(place @ load / (place @ place))
    return (slope * len(load) / mean if mean else 0.0), load - mean - slope * place
