"""From published rows to constants: what is unknown, how it is fitted, and whether the fit is good enough to load."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hbmgym.envs.serving.constants import PRIORS, CostConstants
from hbmgym.eval.calibration.closed_loop import serve
from hbmgym.eval.calibration.least_squares import bounded_least_squares
from hbmgym.eval.calibration.rows import FIGURES, PublishedRow

MOST_ERROR = 0.30
"""Median held-out error above which a fit is refused."""
JUDGED = ("ttft_ms", "tpot_ms")
AT_BOUND = 1e-3


@dataclass(frozen=True)
class Unknown:
    """A constant that is fitted on a logarithmic scale."""

    start: float
    low: float
    high: float
    meaning: str


UNKNOWNS: Mapping[str, Unknown] = {
    "t_fix": Unknown(1.0, 0.1, 10.0, "times its prior, 126 us + 32 us per layer"),
    "e_w": Unknown(PRIORS.e_w, 0.05, 1.0, "share of bandwidth, weights"),
    "e_k": Unknown(PRIORS.e_k, 0.05, 1.0, "share of bandwidth, KV"),
    "e_s": Unknown(0.86, 0.05, 1.0, "share of bandwidth, state; one for all GPUs"),
    "t_seq": Unknown(PRIORS.t_seq_s, 1e-7, 1e-3, "s per decoding request"),
    "e_c": Unknown(PRIORS.e_c, 0.05, 1.0, "share of FLOP rate"),
    "t_comm": Unknown(1e-5, 1e-7, 1e-3, "s per layer x (g - 1) / g, TP > 1 only"),
}


def constants_of(values: Sequence[float]) -> CostConstants:
    """The constants that UNKNOWNS stand for, in their order."""
    given = dict(zip(UNKNOWNS, map(float, values), strict=True))
    return CostConstants(
        t_fix_s=given["t_fix"] * PRIORS.t_fix_s,
        t_fix_per_layer_s=given["t_fix"] * PRIORS.t_fix_per_layer_s,
        t_seq_s=given["t_seq"],
        e_w=given["e_w"],
        e_k=given["e_k"],
        e_s=given["e_s"],
        e_c=given["e_c"],
        t_comm_s=given["t_comm"],
    )


@dataclass(frozen=True)
class Fitted:
    """Constants, and what the rows said about each unknown."""

    values: dict[str, float]
    """By name of the unknown."""
    at_bound: dict[str, bool]
    sensitivity: dict[str, float]
    """Median over the fitted figures of |relative change of the figure / relative change of the unknown|."""

    @property
    def constants(self) -> CostConstants:
        return constants_of(list(self.values.values()))


def fit(rows: Sequence[PublishedRow]) -> Fitted:
    """Fit all unknowns to every figure of `rows`, served in closed loop; residuals are log(modelled / measured).

    Without a row under tensor parallelism the communication term has no say and keeps its start.
    """
    start, low, high = (
        np.log([getattr(unknown, name) for unknown in UNKNOWNS.values()]) for name in ("start", "low", "high")
    )

    def residuals(x: np.ndarray) -> np.ndarray:
        constants = constants_of(np.exp(x).tolist())
        served = [(serve(row, constants), row.measured) for row in rows]
        return np.array([math.log(found[name] / value) for found, row in served for name, value in row.items()])

    found = bounded_least_squares(residuals, start, low, high)
    bound = np.minimum(found.x - low, high - found.x) < AT_BOUND
    sensitivity = np.median(np.abs(found.jacobian), axis=0)
    return Fitted(
        dict(zip(UNKNOWNS, np.exp(found.x).tolist(), strict=True)),
        dict(zip(UNKNOWNS, bound.tolist(), strict=True)),
        dict(zip(UNKNOWNS, sensitivity.tolist(), strict=True)),
    )


@dataclass(frozen=True)
class Error:
    """Of one figure over several rows: modelled / measured - 1."""

    rows: int
    median: float
    """Of the absolute error."""
    worst: float
    """The signed error that is largest in absolute value."""
    bias: float
    """Median of the signed error."""


def errors(rows: Sequence[PublishedRow], constants: CostConstants) -> dict[str, Error]:
    """The error of every figure that some row has."""
    served = [(serve(row, constants), row.measured) for row in rows]
    found = {}
    for name in FIGURES:
        off = np.array([modelled[name] / row[name] - 1.0 for modelled, row in served if name in row])
        if len(off):
            worst = float(off[np.argmax(np.abs(off))])
            found[name] = Error(len(off), float(np.median(np.abs(off))), worst, float(np.median(off)))
    return found


def is_accepted(held_out: Mapping[str, Error]) -> bool:
    """Whether the median errors of TTFT and TPOT on rows that were not fitted are small enough to load the fit."""
    return all(name in held_out and held_out[name].median <= MOST_ERROR for name in JUDGED)


def as_facts(found: Mapping[str, Error]) -> dict[str, dict[str, float]]:
    """Ready for JSON."""
    return {name: dataclasses.asdict(error) for name, error in found.items()}
