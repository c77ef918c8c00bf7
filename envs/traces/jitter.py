"""Arrivals that their recorder rounded: which recorders do, how it is seen, and how the rows are spread again.

Rows that share a bucket are spread over it, in file order. Only what a format is known to round is looked at: requests
that really came together stay together.
"""

from dataclasses import dataclass

import numpy as np

SLACK_S = 0.002
"""Published buckets are off by a truncated millisecond here and there (5.999, 9.000)."""


@dataclass(frozen=True)
class Clock:
    """How a recorder stamps arrivals."""

    source: str
    """The repository of its traces, as the `meta` of a compact file may name it."""
    steps_s: tuple[tuple[float, float], ...]
    """Shortest and longest time between two stamps that follow each other, one pair per way of stamping."""


CLOCKS = {
    # FAST25-release/traces: timestamps are multiples of 3,000 ms. mooncake_trace.jsonl, the first one, was polled:
    # its timestamps follow each other by 3,050 to 3,056 ms.
    "Mooncake": Clock("kvcache-ai/Mooncake", ((3.0, 3.0), (3.05, 3.056))),
    # README: Timestamp is in seconds, and all are whole.
    "BurstGPT": Clock("HPMLL/BurstGPT", ((1.0, 1.0),)),
}
"""By the name that a `Trace` gives its clock; arrivals of every other trace are taken as they are."""

SPREAD = "spread arrivals that a format is known to round over their bucket (Mooncake 3 s, BurstGPT 1 s)"
"""What the flag --spread does, wherever a trace is read."""


def buckets_of(arrival_s: np.ndarray, clock: str) -> tuple[np.ndarray, float]:
    """Start of each (sorted) arrival's bucket and the buckets' width in s; (`arrival_s`, 0.0) if none were rounded.

    They were if all fit the clock's stamps, some coincide, and the stamps between them have no common divisor: what
    comes every minute was not rounded to seconds.
    """
    for shortest_s, longest_s in CLOCKS[clock].steps_s if clock else ():
        stamps = np.rint(np.diff(arrival_s, prepend=arrival_s[:1]) / ((shortest_s + longest_s) / 2))
        passed = np.cumsum(stamps)
        starts_s = np.clip(arrival_s, arrival_s[0] + shortest_s * passed, arrival_s[0] + longest_s * passed)
        fits = np.abs(arrival_s - starts_s).max() <= SLACK_S and _steps_fit(arrival_s, stamps, shortest_s, longest_s)
        if fits and not stamps[1:].all() and np.gcd.reduce(stamps.astype(np.int64)) == 1:
            return starts_s, shortest_s
    return arrival_s, 0.0


def spread(arrival_s: np.ndarray, clock: str, rng: np.random.Generator) -> np.ndarray:
    """Sorted arrivals, rounded ones plus U(0, width): still sorted, row i stays before row i + 1 and in its bucket."""
    starts_s, width_s = buckets_of(arrival_s, clock)
    return spread_over(starts_s, width_s, rng) if width_s else arrival_s


def spread_over(starts_s: np.ndarray, width_s: float, rng: np.random.Generator) -> np.ndarray:
    """Sorted times in buckets of one width that begin at `starts_s` (sorted, equal or at least `width_s` apart)."""
    # Buckets do not overlap, so sorting the sum hands each bucket's draws out in file order.
    return np.sort(starts_s + width_s * rng.random(len(starts_s)))


def _steps_fit(arrival_s: np.ndarray, stamps: np.ndarray, shortest_s: float, longest_s: float) -> bool:
    """Whether the arrivals themselves follow each other as the stamps say, and not in the sum only."""
    steps_s, passed = np.diff(arrival_s), stamps[1:]
    fitting_s = np.clip(steps_s, shortest_s * passed, longest_s * passed)
    return bool((np.abs(steps_s - fitting_s) <= 2 * SLACK_S).all())
