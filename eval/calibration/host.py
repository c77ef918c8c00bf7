"""The four constants of an engine's host, sought so that modelled times come near measured ones."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.serving.engines import HOST_CONSTANTS, EngineProfile
from hbmgym.eval.calibration.least_squares import Fit, bounded_least_squares

BOUNDS: Mapping[str, tuple[float, float]] = {
    "prefill_factor": (0.5, 4.0),
    "layer_s": (1e-6, 1e-3),
    "prefill_floor_s": (1e-5, 1e-2),
    "request_s": (1e-3, 1.0),
}
"""Of the constants; they are sought on a logarithmic scale."""
HIGH_FLOOR_S = 4e-3
"""Per layer; few of the engines that were measured have a higher one."""
WIDTHS = (0.1, 0.01)
"""Relative changes of a constant from which derivatives are taken, one search after the other: the first one sees over
jumps where requests change places, the second one is exact."""
OUTLIER = 0.1
"""Residuals beyond this relative error count with less than their square (soft L1)."""
PULL = 0.003
"""Residual of a constant that is e times that of the profile it started from: so small that it decides only what the
measurements leave open."""


def fit_host(ratios: Callable[[EngineProfile], Sequence[float]], start: EngineProfile) -> EngineProfile:
    """`start` with the constants under which `ratios`, modelled / measured, come nearest to 1, by their logarithms."""
    low, high = np.log([BOUNDS[name] for name in HOST_CONSTANTS]).T
    prior = np.clip(np.log(np.maximum(constants_of(start), np.exp(low))), low, high)

    def residuals(x: np.ndarray) -> np.ndarray:
        off = np.array([math.log(ratio) for ratio in ratios(with_constants(start, np.exp(x)))])
        return np.concatenate([off, PULL * (x - prior)])

    def search(x: np.ndarray) -> Fit:
        for width in WIDTHS:
            found = bounded_least_squares(residuals, x, low, high, outlier=OUTLIER, width=width)
            x = found.x
        return found

    fits = map(search, _beginnings(prior))
    return with_constants(start, np.exp(min(fits, key=lambda fit: fit.loss).x))


def _beginnings(prior: np.ndarray) -> list[np.ndarray]:
    """Where searches begin: a floor below what kernels take changes no time, so nothing would lift it."""
    below_a_high_floor = prior.copy()
    below_a_high_floor[HOST_CONSTANTS.index("prefill_floor_s")] = math.log(HIGH_FLOOR_S)
    return [prior, below_a_high_floor]


def constants_of(profile: EngineProfile) -> list[float]:
    """In the order of HOST_CONSTANTS."""
    return [getattr(profile, name) for name in HOST_CONSTANTS]


def with_constants(profile: EngineProfile, values: Iterable[float]) -> EngineProfile:
    """`profile` with other constants, in the order of HOST_CONSTANTS."""
    constants: dict[str, Any] = dict(zip(HOST_CONSTANTS, map(float, values), strict=True))
    return dataclasses.replace(profile, **constants)


def middle_profile(fitted: Sequence[EngineProfile], start: EngineProfile) -> EngineProfile:
    """`start` with the medians of the constants of `fitted`."""
    return with_constants(start, np.median([constants_of(profile) for profile in fitted], axis=0))


def under(config: ServingConfig, engine: EngineProfile) -> ServingConfig:
    """The configuration with another engine."""
    return dataclasses.replace(config, engine=engine)
