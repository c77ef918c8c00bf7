"""Distributions that classes of traffic are described by: lengths in tokens, gaps in seconds, turns."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Protocol

import numpy as np

_GRID = (np.arange(20_000) + 0.5) / 20_000
"""Midpoints of equal parts of (0, 1), for means of capped and rounded values."""


class Distribution(Protocol):
    """Positive numbers."""

    def draw(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """float64, shape (size,)."""
        ...

    def cdf(self, values: np.ndarray) -> np.ndarray:
        """float64, same shape: the probability of at most each value."""
        ...


@dataclass(frozen=True)
class LogNormal:
    """exp(N(mu, sigma)), at most `clip`."""

    mu: float
    sigma: float
    clip: float = float("inf")

    def draw(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """float64, shape (size,)."""
        return np.minimum(np.exp(self.mu + self.sigma * rng.standard_normal(size)), self.clip)

    def cdf(self, values: np.ndarray) -> np.ndarray:
        """float64, same shape."""
        with np.errstate(divide="ignore"):
            scores = (np.log(values) - self.mu) / self.sigma
        return np.where(values >= self.clip, 1.0, _normal_cdf(scores))

    @cached_property
    def mean_of_whole(self) -> float:
        """Mean of max(1, round(value))."""
        normal = NormalDist()
        scores = np.array([normal.inv_cdf(p) for p in _GRID.tolist()])
        return float(np.maximum(1.0, np.rint(np.minimum(np.exp(self.mu + self.sigma * scores), self.clip))).mean())


@dataclass(frozen=True)
class Mixture:
    """One of several lognormals: (weight, distribution), weights summing to 1."""

    parts: tuple[tuple[float, LogNormal], ...]

    def draw(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """float64, shape (size,)."""
        edges = np.cumsum([weight for weight, _ in self.parts])
        choice = np.searchsorted(edges[:-1], rng.random(size), side="right")
        columns = (np.array([getattr(part, key) for _, part in self.parts]) for key in ("mu", "sigma", "clip"))
        mu, sigma, clip = (column[choice] for column in columns)
        return np.asarray(np.minimum(np.exp(mu + sigma * rng.standard_normal(size)), clip))

    def cdf(self, values: np.ndarray) -> np.ndarray:
        """float64, same shape."""
        return np.asarray(sum(weight * part.cdf(values) for weight, part in self.parts))


@dataclass(frozen=True)
class Quantiles:
    """A table of (probability, value), from probability 0 to 1; log-linear in between."""

    table: tuple[tuple[float, float], ...]

    def draw(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """float64, shape (size,)."""
        probability, value = np.array(self.table).T
        return np.exp(np.interp(rng.random(size), probability, np.log(value)))

    def cdf(self, values: np.ndarray) -> np.ndarray:
        """float64, same shape."""
        probability, value = np.array(self.table).T
        return np.interp(np.log(values), np.log(value), probability, left=0.0, right=1.0)


class Turns(Protocol):
    """How many turns a session has."""

    @property
    def mean(self) -> float:
        """Mean of what `draw` gives."""
        ...

    def draw(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """int64, shape (size,), each at least 1."""
        ...


@dataclass(frozen=True)
class GeometricTurns:
    """min(geometric of mean `uncapped`, `most`)."""

    uncapped: float
    most: int

    @property
    def mean(self) -> float:
        """Of the capped number."""
        stay = 1.0 - 1.0 / self.uncapped
        return (1.0 - stay**self.most) / (1.0 - stay)

    def draw(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """int64, shape (size,)."""
        return np.minimum(rng.geometric(1.0 / self.uncapped, size), self.most)


@dataclass(frozen=True)
class SingleOrMoreTurns:
    """One turn with probability `single`, else 1 + geometric with the mean `tail` in all, at most `most`."""

    single: float
    tail: float
    most: int

    @property
    def mean(self) -> float:
        """Of the capped number."""
        return self.single + (1.0 - self.single) * (1.0 + self._beyond_first.mean)

    @property
    def _beyond_first(self) -> GeometricTurns:
        return GeometricTurns(self.tail - 1.0, self.most - 1)

    def draw(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """int64, shape (size,)."""
        more = rng.random(size) >= self.single
        return np.where(more, 1 + self._beyond_first.draw(rng, size), 1)


@dataclass(frozen=True)
class LogNormalTurns:
    """max(1, round(lognormal))."""

    lognormal: LogNormal

    @property
    def mean(self) -> float:
        """Of the rounded number."""
        return self.lognormal.mean_of_whole

    def draw(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """int64, shape (size,)."""
        return whole(self.lognormal.draw(rng, size))


@dataclass(frozen=True)
class TabledTurns:
    """n turns with probability `probabilities[n - 1]`; they sum to 1."""

    probabilities: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Of the table."""
        return sum(turns * probability for turns, probability in enumerate(self.probabilities, 1))

    def draw(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """int64, shape (size,)."""
        edges = np.cumsum(self.probabilities[:-1])
        return np.asarray(1 + np.searchsorted(edges, rng.random(size), side="right"), np.int64)


@dataclass(frozen=True)
class OneTurn:
    """A session is one request."""

    mean: float = 1.0

    def draw(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """int64, shape (size,)."""
        return np.ones(size, np.int64)


def whole(values: np.ndarray) -> np.ndarray:
    """int64, same shape: rounded, at least 1."""
    return np.asarray(np.maximum(1, np.rint(values)), np.int64)


def kolmogorov_smirnov(values: Sequence[float] | np.ndarray, distribution: Distribution) -> float:
    """The largest distance between the values' distribution function and the stated one."""
    values = np.sort(np.asarray(values, np.float64))
    count = len(values)
    found = distribution.cdf(values)
    # Of equal values, such as clipped ones, the function takes one step.
    upper = np.searchsorted(values, values, side="right") / count
    lower = np.searchsorted(values, values, side="left") / count
    below = distribution.cdf(np.nextafter(values, 0.0))
    return float(max(np.abs(upper - found).max(), np.abs(lower - below).max()))


def _normal_cdf(scores: np.ndarray) -> np.ndarray:
    return np.array([0.5 * math.erfc(-score / math.sqrt(2.0)) for score in np.ravel(scores).tolist()]).reshape(
        np.shape(scores)
    )
