"""When sessions start: a Poisson process per class whose rate follows a pattern over time."""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

Piece = tuple[float, float, float]
"""(begin, end, factor): within [begin, end) a class starts at `factor` times its rate."""

STEPS = 60
"""Pieces that stand for a smooth curve."""


class Pattern(Protocol):
    """What share of its rate each class has at each time."""

    def pieces(self, classes: int, rng: np.random.Generator, begin_s: float, end_s: float) -> list[list[Piece]]:
        """For each class, its pieces in order of time."""
        ...


@dataclass(frozen=True)
class Steady:
    """Always the same; several classes share the load equally."""

    def pieces(self, classes: int, rng: np.random.Generator, begin_s: float, end_s: float) -> list[list[Piece]]:
        """One piece for each class."""
        return [[(begin_s, end_s, 1.0 / classes)] for _ in range(classes)]


@dataclass(frozen=True)
class Phases:
    """Classes take turns; a phase lasts U(low, high) seconds."""

    low_s: float
    high_s: float

    def pieces(self, classes: int, rng: np.random.Generator, begin_s: float, end_s: float) -> list[list[Piece]]:
        """The seed chooses who begins."""
        found: list[list[Piece]] = [[] for _ in range(classes)]
        turn = int(rng.integers(classes))
        while begin_s < end_s:
            until_s = begin_s + rng.uniform(self.low_s, self.high_s)
            found[turn % classes].append((begin_s, min(until_s, end_s), 1.0))
            begin_s, turn = until_s, turn + 1
        return found


@dataclass(frozen=True)
class MixBursts:
    """The second class takes over for U(low, high) seconds, after the first has had its turn of exponential length."""

    low_s: float
    high_s: float
    mean_between_s: float

    def pieces(self, classes: int, rng: np.random.Generator, begin_s: float, end_s: float) -> list[list[Piece]]:
        """The load stays the same, only its kind changes."""
        assert classes == 2, "a burst has a class of its own"
        found: list[list[Piece]] = [[], []]
        burst = 0
        while begin_s < end_s:
            length_s = rng.uniform(self.low_s, self.high_s) if burst else rng.exponential(self.mean_between_s)
            found[burst].append((begin_s, min(begin_s + length_s, end_s), 1.0))
            begin_s, burst = begin_s + length_s, 1 - burst
        return found


@dataclass(frozen=True)
class Trend:
    """The rate grows exponentially to 1 over the episode, from 1 / growth; the second class's share goes from .2 to .8,
    or the other way round. Before time 0 all is as at 0."""

    growth: tuple[float, ...] = (1.5, 2.0, 4.0)

    def pieces(self, classes: int, rng: np.random.Generator, begin_s: float, end_s: float) -> list[list[Piece]]:
        """The seed chooses the growth and the direction of the mix."""
        assert classes == 2, "the mix drifts from one class to the other"
        growth, rising = float(rng.choice(self.growth)), bool(rng.integers(2))
        edges = np.concatenate(([min(begin_s, 0.0)], np.linspace(0.0, end_s, STEPS + 1)[1:]))
        passed = (np.arange(STEPS) + 0.5) / STEPS
        rate = growth ** (passed - 1.0)
        second = 0.2 + 0.6 * (passed if rising else 1.0 - passed)
        return [_curve(edges, rate * share) for share in (1.0 - second, second)]


@dataclass(frozen=True)
class Diurnal:
    """A day pressed into `day_s` seconds: rate (1 + A sin) / (1 + A), so that the peak is 1."""

    amplitude: float = 0.45
    """Peak / trough is (1 + A) / (1 - A); recorded services have 2 to 6.5."""
    day_s: float = 1200.0

    def pieces(self, classes: int, rng: np.random.Generator, begin_s: float, end_s: float) -> list[list[Piece]]:
        """The seed chooses the time of day at the start; all classes follow the same sun."""
        edges = np.linspace(begin_s, end_s, STEPS + 1)
        phase = 2.0 * math.pi * ((edges[:-1] + edges[1:]) / 2.0 / self.day_s + rng.random())
        rate = (1.0 + self.amplitude * np.sin(phase)) / (1.0 + self.amplitude) / classes
        return [_curve(edges, rate) for _ in range(classes)]


@dataclass(frozen=True)
class Bursts:
    """A Markov-modulated Poisson process of two states, scaled to a mean rate of 1."""

    low: float
    high: float
    """Rates of the two states; only their ratio counts."""
    burst_s: float
    calm_s: float
    """Mean seconds in each."""

    @property
    def factors(self) -> tuple[float, float]:
        """Of calm and burst."""
        mean = (self.low * self.calm_s + self.high * self.burst_s) / (self.calm_s + self.burst_s)
        return self.low / mean, self.high / mean

    def pieces(self, classes: int, rng: np.random.Generator, begin_s: float, end_s: float) -> list[list[Piece]]:
        """All classes burst together; the first state is drawn from the stationary ones."""
        found: list[Piece] = []
        burst = bool(rng.random() < self.burst_s / (self.burst_s + self.calm_s))
        while begin_s < end_s:
            until_s = min(begin_s + rng.exponential(self.burst_s if burst else self.calm_s), end_s)
            found.append((begin_s, until_s, self.factors[burst] / classes))
            begin_s, burst = until_s, not burst
        return [list(found) for _ in range(classes)]

    def index_of_dispersion(self, rate_per_s: float, bin_s: float) -> float:
        """Variance / mean of the starts in a bin: 1 + 2 p0 p1 (l1 - l0)^2 / (l s) (1 - (1 - e^{-sT}) / (s T))."""
        leave = 1.0 / self.burst_s + 1.0 / self.calm_s
        share = self.burst_s / (self.burst_s + self.calm_s)
        calm, burst = (factor * rate_per_s for factor in self.factors)
        decay = 1.0 - (1.0 - math.exp(-leave * bin_s)) / (leave * bin_s)
        return 1.0 + 2.0 * share * (1.0 - share) * (burst - calm) ** 2 / (rate_per_s * leave) * decay


def draw_starts_s(pieces: list[Piece], rate_per_s: float, rng: np.random.Generator) -> np.ndarray:
    """float64: times of a Poisson process of rate_per_s times each piece's factor, in order of time."""
    drawn = []
    for begin_s, end_s, factor in pieces:
        count = rng.poisson(rate_per_s * factor * (end_s - begin_s))
        drawn.append(np.sort(rng.uniform(begin_s, end_s, count)))
    return np.concatenate([np.zeros(0), *drawn])


def _curve(edges: np.ndarray, factors: np.ndarray) -> list[Piece]:
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), factors.tolist(), strict=True))
