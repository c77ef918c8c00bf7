"""What a calibration found: facts for JSON, and tables for people."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from hbmgym.envs.serving.engines import EngineProfile
from hbmgym.eval.calibration.fit import Calibrated, errors
from hbmgym.eval.calibration.metrics_fit import WindowFit
from hbmgym.eval.calibration.prometheus import MetricsWindow
from hbmgym.eval.calibration.rows import FIGURES, Row
from hbmgym.eval.provenance import provenance
from hbmgym.eval.table import UNBOUNDED_WIDTH

PACKAGES = ("hbmgym", "numpy", "numba")
LABELS = {"ttft": "TTFT", "tpot": "TPOT"}
Ratios = Mapping[str, float]
"""Modelled / measured of a row, keys as `rows.FIGURES`."""


def refusals(rows: Sequence[Row]) -> list[str]:
    """One line per figure that is not used: where it stands, and why."""
    return [f"{row.where}: no {LABELS[name]}: {reason}" for row in rows for name, reason in row.refused.items()]


def error_facts(
    found: Sequence[Calibrated], uncalibrated: Sequence[Sequence[Ratios]], rows: Sequence[Row]
) -> dict[str, Any]:
    """Errors over all deployments and by deployment, every row's times, and what was refused. `uncalibrated` has the
    ratios of the rows of each of `found`; `rows` also those with nothing to use."""
    return {
        "held_out": _errors(ratio for one in found for ratio in one.held_out),
        "uncalibrated": _errors(ratio for ratios in uncalibrated for ratio in ratios),
        "deployments": [_deployment_facts(*pair) for pair in zip(found, uncalibrated, strict=True)],
        "refused": refusals(rows),
        "made_with": made_with(),
    }


def made_with() -> dict[str, Any]:
    """Versions and commit; not the command, which names places of a machine."""
    return {name: value for name, value in provenance(PACKAGES).items() if name != "command"}


def _deployment_facts(one: Calibrated, uncalibrated: Sequence[Ratios]) -> dict[str, Any]:
    return {
        **dataclasses.asdict(one.deployment),
        "profile": dataclasses.asdict(one.profile),
        "held_out": _errors(one.held_out),
        "uncalibrated": _errors(uncalibrated),
        "rows": [
            {
                "where": row.where,
                "run": row.name,
                "fitted": row in one.fitted,
                "measured_ms": dict(row.measured),
                "modelled_ms": _times(row, fitted),
                "uncalibrated_ms": _times(row, other),
            }
            for row, fitted, other in zip(one.rows, one.ratios, uncalibrated, strict=True)
        ],
    }


def _times(row: Row, ratios: Ratios) -> dict[str, float]:
    return {name: ratio * row.measured[name] for name, ratio in ratios.items()}


def _errors(ratios: Any) -> dict[str, dict[str, float]]:
    return {name: dataclasses.asdict(error) for name, error in errors(ratios).items()}


def window_facts(pairs: Sequence[str], found: WindowFit, profile: EngineProfile) -> dict[str, Any]:
    """The profile, and what it makes of each window, which is named by its two files."""
    return {
        "profile": dataclasses.asdict(profile),
        "windows": [
            {"window": pair, "modelled_s": modelled, "measured_s": measured}
            for pair, modelled, measured in zip(pairs, found.modelled, found.measured, strict=True)
        ],
        "made_with": made_with(),
    }


def print_errors(found: Sequence[Calibrated], uncalibrated: Sequence[Sequence[Ratios]]) -> None:
    """A line per deployment: its constants, and errors on the rows that were held out."""
    title = "error on rows held out: median and 90th percentile of |modelled / measured - 1|"
    columns = ("deployment", "fitted", "held out", "kp", "layer us", "floor ms", "request ms", *LABELS.values())
    table = _table(title, *columns, "uncalibrated (all rows)")
    for one, others in zip(found, uncalibrated, strict=True):
        counts = (str(len(one.fitted)), str(len(one.held_out)))
        table.add_row(one.deployment.name, *counts, *_constants(one.profile), *_shown(one.held_out, others))
    held_out = [ratio for one in found for ratio in one.held_out]
    fitted = sum(len(one.fitted) for one in found)
    everything = [ratio for others in uncalibrated for ratio in others]
    table.add_section()
    table.add_row("all", str(fitted), str(len(held_out)), *[""] * 4, *_shown(held_out, everything))
    _show(table)


def _constants(profile: EngineProfile) -> list[str]:
    return [
        f"{profile.prefill_factor:.2f}",
        f"{1e6 * profile.layer_s:.0f}",
        f"{1e3 * profile.prefill_floor_s:.2f}",
        f"{1e3 * profile.request_s:.0f}",
    ]


def _shown(held_out: Sequence[Ratios], uncalibrated: Sequence[Ratios]) -> list[str]:
    own, other = errors(held_out), errors(uncalibrated)
    texts = [f"{own[name].median:.1%} {own[name].p90:.0%}" if name in own else "" for name in FIGURES]
    return [*texts, ", ".join(f"{LABELS[name]} {error.median:.0%}" for name, error in other.items())]


def print_windows(pairs: Sequence[str], windows: Sequence[MetricsWindow], found: WindowFit) -> None:
    """A line per window."""
    table = _table(
        "windows: milliseconds modelled / measured", "window", "requests", "running", "request", "prefill", "itl"
    )
    for pair, window, modelled, measured in zip(pairs, windows, found.modelled, found.measured, strict=True):
        times = [
            f"{1e3 * modelled[name]:.1f} / {1e3 * measured[name]:.1f}" if name in measured else ""
            for name in ("request", "prefill", "itl")
        ]
        table.add_row(pair, f"{window.requests:.0f}", f"{window.running:.1f}", *times)
    _show(table)
    print("request: the server's own part; HTTP, network and client are not in a server's metrics")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _show(table: Table) -> None:
    # Without a terminal there is no width to respect, and a table that is folded cannot be read.
    Console(width=None if sys.stdout.isatty() else UNBOUNDED_WIDTH, soft_wrap=True).print(table)
