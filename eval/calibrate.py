"""Fit the cost model to published rows of whole engines, and say how far off it is: `python eval/calibrate.py`.

Every other row is fitted, the rest is held out. If the median held-out error exceeds 30 % for TTFT or TPOT, the fit is
reported but refused, and the priors stay loaded.
"""

import sys

try:
    from hbmgym.cli import command, option, parse_options, user_errors
except ModuleNotFoundError as error:
    print(f"{error}: run `make train` once, or use .venv/bin/python {__file__}", file=sys.stderr)
    raise SystemExit(2) from None

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hbmgym.envs.serving.constants import FILE, PRIORS, CostConstants
from hbmgym.eval.calibration.closed_loop import serve
from hbmgym.eval.calibration.fit import MOST_ERROR, UNKNOWNS, Error, Fitted, as_facts, errors, fit, is_accepted
from hbmgym.eval.calibration.rows import PUBLISHED, PublishedRow, halves, read_rows
from hbmgym.eval.cells import write_json
from hbmgym.eval.provenance import provenance
from hbmgym.eval.table import UNBOUNDED_WIDTH

PACKAGES = ("hbmgym", "numpy", "numba")
LABELS = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "output_tokens_per_s": "output tokens/s"}


@dataclass(frozen=True)
class CalibrateOptions:
    """Which rows, and where the result goes."""

    rows: str = option("", "JSON file of published rows (default: eval/calibration/published.json)", metavar="FILE")
    out: str = option("", "file for the result (default, without --rows: the one that is loaded)", metavar="FILE")


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Read, fit one half, hold the other against it, print, write."""
    options = parse_options(CalibrateOptions, __doc__ or "", arguments)
    with user_errors():
        if options.rows and not options.out:
            raise ValueError("--rows needs --out FILE: the constants that are loaded follow from the published rows")
        out = Path(options.out or FILE)
        rows = read_rows(Path(options.rows) if options.rows else PUBLISHED)
        if not out.parent.is_dir():
            raise ValueError(f"--out {out}: there is no folder {out.parent}")
        for row in rows:
            serve(row, PRIORS)  # one that does not fit its GPU is refused here
    to_fit, held_out = halves(rows)
    fitted = fit(to_fit)
    priors, own = errors(held_out, PRIORS), errors(held_out, fitted.constants)
    accepted = is_accepted(own)
    console = Console(width=None if sys.stdout.isatty() else UNBOUNDED_WIDTH, soft_wrap=True)
    for table in (_table_of_unknowns(fitted), _table_of_errors(priors, own), _table_of_rows(rows, fitted)):
        console.print(table)
    print(_verdict(accepted))
    try:
        write_json(out, _facts(rows, fitted, priors, own, accepted))
    except OSError as error:
        with user_errors():
            raise ValueError(f"--out {out} cannot be written: {error.strerror}") from error
    print(f"result: {out}")


def _verdict(accepted: bool) -> str:
    if accepted:
        return f"median held-out errors of TTFT and TPOT are at most {MOST_ERROR:.0%}: the fit is loaded"
    return f"a median held-out error of TTFT or TPOT exceeds {MOST_ERROR:.0%}: the priors stay loaded"


def _facts(
    rows: Sequence[PublishedRow],
    fitted: Fitted,
    priors: Mapping[str, Error],
    own: Mapping[str, Error],
    accepted: bool,
) -> dict[str, Any]:
    unknowns = {
        name: {
            **dataclasses.asdict(unknown),
            "fitted": fitted.values[name],
            "at_bound": fitted.at_bound[name],
            "sensitivity": fitted.sensitivity[name],
        }
        for name, unknown in UNKNOWNS.items()
    }
    made_with = {name: value for name, value in provenance(PACKAGES).items() if name != "command"}
    return {
        "accepted": accepted,
        "constants": dataclasses.asdict(fitted.constants if accepted else PRIORS),
        "unknowns": unknowns,
        "held_out_errors": {"priors": as_facts(priors), "fitted": as_facts(own)},
        "rows": [_row_facts(row, fitted.constants, number % 2 == 1) for number, row in enumerate(rows)],
        "made_with": made_with,
    }


def _row_facts(row: PublishedRow, constants: CostConstants, held_out: bool) -> dict[str, Any]:
    modelled = {"priors": serve(row, PRIORS), "fitted": serve(row, constants)}
    return {**dataclasses.asdict(row), "held_out": held_out, "modelled": modelled}


def _table_of_unknowns(fitted: Fitted) -> Table:
    table = Table(title="unknowns, fitted to half of the rows", pad_edge=False)
    for title in ("unknown", "start", "fitted", "sensitivity", "meaning"):
        table.add_column(title, no_wrap=True)
    for name, unknown in UNKNOWNS.items():
        value = f"{fitted.values[name]:.3g}{' (at its bound)' if fitted.at_bound[name] else ''}"
        table.add_row(name, f"{unknown.start:.3g}", value, f"{fitted.sensitivity[name]:.3f}", unknown.meaning)
    return table


def _table_of_errors(priors: Mapping[str, Error], own: Mapping[str, Error]) -> Table:
    table = Table(title="error on the held-out rows: modelled / measured - 1", pad_edge=False)
    for title in ("figure", "rows", "constants", "median of absolute", "median", "worst"):
        table.add_column(title, no_wrap=True)
    for name in own:
        for label, found in (("priors", priors[name]), ("fitted", own[name])):
            table.add_row(
                LABELS[name], str(found.rows), label, f"{found.median:.1%}", f"{found.bias:+.1%}", f"{found.worst:+.1%}"
            )
    return table


def _table_of_rows(rows: Sequence[PublishedRow], fitted: Fitted) -> Table:
    table = Table(title="modelled / measured, fitted constants", pad_edge=False)
    for title in ("row", "half", "ms to first token", "ms per token", "tokens/s"):
        table.add_column(title, no_wrap=True)
    for number, row in enumerate(rows):
        modelled = serve(row, fitted.constants)
        figures = [
            f"{modelled[name]:,.1f} / {row.measured[name]:,.1f}" if name in row.measured else "" for name in LABELS
        ]
        table.add_row(row.name, "held out" if number % 2 else "fitted", *figures)
    return table


if __name__ == "__main__":
    main()
