"""From runs to the profile of a deployment: which runs are fitted, and how far off the model is on the others."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hbmgym.envs.serving.engines import ENGINE_PROFILES, EngineProfile
from hbmgym.eval.calibration.closed_loop import Replay, replay
from hbmgym.eval.calibration.host import fit_host
from hbmgym.eval.calibration.rows import FIGURES, Deployment, Row

MOST_FITTED = 4
"""Rows of a deployment that its constants may be fitted to; the rest is held out."""
_RELEASE = re.compile(r"v?(\d{1,3})\.(\d+)(?:\.(\d+))?")
_MONTH = re.compile(r"(20\d\d)-?(\d\d)")


def starting_profile(deployment: Deployment) -> EngineProfile:
    """The bundled profile nearest to a deployment's engine, by its version."""
    if deployment.engine == "vLLM":
        return ENGINE_PROFILES["vllm-graph"]
    return ENGINE_PROFILES["sglang-graph" if _captures_prefill(deployment.version) else "sglang-eager"]


def _captures_prefill(version: str) -> bool:
    """SGLang runs prefill from graphs from 0.5.15 on, of July 2026; builds that are named by a date go by it."""
    if release := _RELEASE.match(version):
        return tuple(int(number or 0) for number in release.groups()) >= (0, 5, 15)
    date = _MONTH.search(version)
    return date is not None and date.groups() >= ("2026", "07")


def pick_rows(rows: Sequence[Row]) -> list[Row]:
    """Those to fit: MOST_FITTED, or all but one where there are fewer; the one where there is no other.

    The fewest clients of the shortest and the most of the longest prompts, the fewest of the longest, the middle of the
    shortest, and then by the number of clients. Neither what was measured nor the order of rows has a say.
    """
    ordered = sorted(rows, key=_settings)
    short = [row for row in ordered if row.input_tokens == ordered[0].input_tokens]
    long = [row for row in ordered if row.input_tokens == ordered[-1].input_tokens]
    wanted = [short[0], long[-1], long[0], short[len(short) // 2], *_spread(ordered)]
    return list(dict.fromkeys(wanted))[: min(MOST_FITTED, max(len(rows) - 1, 1))]


def _settings(row: Row) -> tuple[Any, ...]:
    """All that tells runs of a deployment apart, figures aside; where they stand only where all else is equal."""
    lengths = (row.input_tokens, row.concurrency, row.output_tokens, row.shortest is None, row.shortest or 0.0)
    others = (row.requests, row.prefill_chunk, row.receive_interval, row.statistic, row.speculative)
    return (*lengths, *others, row.date, row.source, row.lengths or (), row.where)


def _spread(rows: Sequence[Row]) -> list[Row]:
    by_clients = sorted(rows, key=lambda row: row.concurrency)
    places = np.linspace(0, len(by_clients) - 1, 2 * MOST_FITTED).round().astype(int)
    return [by_clients[place] for place in places] + by_clients


@dataclass(frozen=True)
class Calibrated:
    """A deployment's own profile, and what it and another one make of every row."""

    deployment: Deployment
    rows: tuple[Row, ...]
    fitted: tuple[Row, ...]
    """The rows that `judged` is fitted to: at most MOST_FITTED, and not all where there are several."""
    judged: EngineProfile
    """The profile that held-out errors are of."""
    profile: EngineProfile
    """To ship: as `judged`, or fitted to all rows where these are at most MOST_FITTED."""
    ratios: tuple[Mapping[str, float], ...]
    """Modelled / measured by row under `judged`, keys as `rows.FIGURES`."""

    @property
    def held_out(self) -> list[Mapping[str, float]]:
        """The ratios of the rows that were not fitted."""
        return [ratio for row, ratio in zip(self.rows, self.ratios, strict=True) if row not in self.fitted]


def calibrate(deployment: Deployment, rows: Sequence[Row], start: EngineProfile) -> Calibrated:
    """Fit the host's constants of one deployment, from those of `start` on."""
    fitted = pick_rows(rows)
    judged = _fitted_to(fitted, deployment, start)
    profile = _fitted_to(rows, deployment, start) if len(fitted) < len(rows) <= MOST_FITTED else judged
    found = tuple(ratios(replay(row), judged) for row in rows)
    return Calibrated(deployment, tuple(rows), tuple(fitted), judged, profile, found)


def _fitted_to(rows: Sequence[Row], deployment: Deployment, start: EngineProfile) -> EngineProfile:
    return named(fit(rows, start), deployment, f"fitted to {', '.join(row.name for row in rows)}")


def named(profile: EngineProfile, deployment: Deployment, origin: str) -> EngineProfile:
    """`profile` as that of `deployment`, with where it comes from."""
    engine = f"{deployment.engine} {deployment.version}".strip()
    return dataclasses.replace(profile, name=deployment.name, source=f"eval/calibrate.py: {engine}, {origin}")


def fit(rows: Iterable[Row], start: EngineProfile) -> EngineProfile:
    """`start` with the host's constants that its rows ask for; a row may have no figure that says anything."""
    replays = [replay(row) for row in rows if row.measured]
    return fit_host(lambda engine: [ratio for one in replays for ratio in ratios(one, engine).values()], start)


def ratios(one: Replay, engine: EngineProfile) -> dict[str, float]:
    """Modelled / measured of the figures that a row may be judged by."""
    modelled = one.figures(engine)
    return {name: modelled[name] / value for name, value in one.row.measured.items()}


@dataclass(frozen=True)
class Error:
    """Of one figure over several rows: |modelled / measured - 1|, as fractions."""

    rows: int
    median: float
    p90: float
    bias: float
    """Median of the signed error."""


def errors(found: Iterable[Mapping[str, float]]) -> dict[str, Error]:
    """Per figure, from modelled / measured by row; figures that no row has are left out."""
    by_figure: dict[str, list[float]] = {name: [] for name in FIGURES}
    for row in found:
        for name, ratio in row.items():
            by_figure[name].append(ratio - 1.0)
    return {name: _error(np.array(off)) for name, off in by_figure.items() if off}


def _error(off: np.ndarray) -> Error:
    size = np.abs(off)
    return Error(len(off), float(np.median(size)), float(np.quantile(size, 0.9)), float(np.median(off)))
