"""Fit an engine's host to measured runs, and say how far off the modelled times are: `python eval/calibrate.py`.

Four constants per deployment, fitted to at most four of its runs; the others are held out. Without --rows, --from-bench
or --from-prometheus the published runs are taken.
"""

import sys

try:
    from hbmgym.cli import command, option, parse_options, user_errors
except ModuleNotFoundError as error:
    print(f"{error}: run `make train` once, or use .venv/bin/python {__file__}", file=sys.stderr)
    raise SystemExit(2) from None

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hbmgym.envs.serving.engines import EngineProfile
from hbmgym.eval.calibration.bench_files import read_bench_folder
from hbmgym.eval.calibration.closed_loop import replay
from hbmgym.eval.calibration.fit import MOST_FITTED, Calibrated, calibrate, named, ratios, starting_profile
from hbmgym.eval.calibration.host import middle_profile
from hbmgym.eval.calibration.metrics_fit import fit_windows
from hbmgym.eval.calibration.own import OwnDeployment
from hbmgym.eval.calibration.prometheus import read_window
from hbmgym.eval.calibration.report import (
    Ratios,
    error_facts,
    print_errors,
    print_windows,
    refusals,
    window_facts,
)
from hbmgym.eval.calibration.rows import PUBLISHED, Deployment, Row, by_deployment, read_rows
from hbmgym.eval.cells import write_json
from hbmgym.processes import Workers

RESULT = Path(__file__).parent / "calibration" / "result.json"
SOURCES = ("rows", "from_bench", "from_prometheus")


@dataclass(frozen=True)
class CalibrateOptions(OwnDeployment):
    """Where measurements come from, what was measured, and where the result goes."""

    rows: str = option("", "runs, one per row, .csv or .json (default: the published ones)", metavar="FILE")
    from_bench: str = option(
        "",
        "folder with result files of `vllm bench serve --save-result --save-detailed` or SGLang's bench_serving with "
        "--output-details, of one deployment, which the flags below describe",
        metavar="DIR",
    )
    from_prometheus: tuple[str, ...] = option(
        (),
        "two scrapes of /metrics, before and after a window of traffic, of one deployment, which the flags below "
        "describe; repeatable, one pair per window",
        metavar="BEFORE,AFTER",
    )
    out: str = option("", "JSON file for the result (default: the committed one, for published runs)", metavar="FILE")
    profile: str = option("", "JSON file for the profile of a single deployment, for --engine", metavar="FILE")
    plot: str = option("", "picture of modelled against measured times (.png)", metavar="FILE")
    jobs: int = option(os.cpu_count() or 1, "processes")

    @property
    def sources(self) -> list[str]:
        """The flags that say where a user's own measurements are."""
        return [_flag(name) for name in SOURCES if getattr(self, name)]

    def __post_init__(self) -> None:
        if len(self.sources) > 1:
            raise ValueError(f"{' and '.join(self.sources)} exclude each other: give one")
        if self.sources and not (self.out or self.profile):
            raise ValueError(
                f"{self.sources[0]} needs --out FILE or --profile FILE: the committed result is of published runs"
            )
        if self.from_prometheus and self.plot:
            raise ValueError("--plot shows runs, and --from-prometheus has none: leave one out")
        described = [_flag(field.name) for field in dataclasses.fields(OwnDeployment) if self._is_changed(field)]
        if described and not (self.from_bench or self.from_prometheus):
            raise ValueError(
                f"{', '.join(described)}: only for --from-bench and --from-prometheus; rows say it themselves"
            )
        if self.served_name and not self.from_prometheus:
            raise ValueError("--served-name is only for --from-prometheus")
        if self.jobs < 1:
            raise ValueError(f"--jobs is {self.jobs}, expected an integer >= 1")
        if self.profile and not self.profile.endswith(".json"):
            raise ValueError(f"--profile {self.profile}: expected a name that ends in .json, as --engine does")
        if self.plot and not self.plot.endswith(".png"):
            raise ValueError(f"--plot {self.plot}: expected a name that ends in .png")
        for name in ("out", "profile", "plot"):
            path = Path(getattr(self, name))
            if not path.parent.is_dir():
                raise ValueError(f"{_flag(name)} {path}: there is no folder {path.parent}")

    def _is_changed(self, field: dataclasses.Field[Any]) -> bool:
        return bool(getattr(self, field.name) != field.default)


def _flag(field: str) -> str:
    return f"--{field.replace('_', '-')}"


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Read, fit, hold against the rest, print, write."""
    options = parse_options(CalibrateOptions, __doc__ or "", arguments)
    if options.from_prometheus:
        _calibrate_windows(options)
    else:
        _calibrate_runs(options)


def _calibrate_windows(options: CalibrateOptions) -> None:
    pairs = options.from_prometheus
    with user_errors():
        windows = [read_window(*_pair(text), options.served_name) for text in pairs]
        deployment = options.deployment(windows[0].engine)
        found = fit_windows(windows, options.config(starting_profile(deployment)))
    profile = named(found.profile, deployment, f"fitted to {len(windows)} windows of its metrics")
    print_windows(pairs, windows, found)
    _write(options, window_facts(pairs, found, profile), profile)


def _pair(text: str) -> tuple[Path, Path]:
    before, separator, after = text.partition(",")
    if not (before and separator and after) or "," in after:
        raise ValueError(f"--from-prometheus is {text!r}, expected two files: BEFORE,AFTER")
    return Path(before), Path(after)


def _calibrate_runs(options: CalibrateOptions) -> None:
    with user_errors():
        rows = _read(options)
        deployments = by_deployment(rows)
        if options.profile and len(deployments) > 1:
            raise ValueError(
                f"--profile takes the profile of one deployment, but the rows are of {len(deployments)}: give a file "
                "with those of one"
            )
        for row in rows:
            replay(row)  # a deployment that cannot be is refused before anything is fitted
        found = _calibrated(deployments, options.jobs)
    for line in refusals(rows):
        print(line, file=sys.stderr)
    uncalibrated = _uncalibrated(found, leave_out=not options.sources)
    print_errors(found, uncalibrated)
    _write(options, error_facts(found, uncalibrated, rows), found[0].profile)
    if options.plot:
        from hbmgym.eval.calibration.figure import draw_errors  # matplotlib takes half a second

        draw_errors(Path(options.plot), found)
        print(f"plot: {options.plot}")


def _read(options: CalibrateOptions) -> list[Row]:
    if options.from_bench:
        return [options.row(run) for run in read_bench_folder(Path(options.from_bench))]
    return read_rows(Path(options.rows) if options.rows else PUBLISHED)


def _calibrated(deployments: Mapping[Deployment, list[Row]], jobs: int) -> list[Calibrated]:
    """All deployments that have a figure to fit, in their order."""
    tasks = [(where, rows) for where, rows in deployments.items() if any(row.measured for row in rows)]
    if not tasks:
        refused = refusals([row for rows in deployments.values() for row in rows])
        more = f"; and {len(refused) - 1} more" if len(refused) > 1 else ""
        raise ValueError(f"every figure is refused: {refused[0]}{more}")
    with Workers(jobs) as workers:
        results = workers.map(_calibrate, tasks, name=lambda task: task[0].name)
        return list(tqdm(results, total=len(tasks), unit="deployment", disable=None, leave=False))


def _calibrate(task: tuple[Deployment, list[Row]]) -> Calibrated:
    deployment, rows = task
    return calibrate(deployment, [row for row in rows if row.measured], starting_profile(deployment))


def _uncalibrated(found: Sequence[Calibrated], leave_out: bool) -> list[list[Ratios]]:
    """What every row would be without one of its own deployment: under the bundled profile; for the published rows,
    which that stands on, under the medians of the other deployments of its kind, and nothing where there are none."""
    profiles = [_without(one, found) if leave_out else starting_profile(one.deployment) for one in found]
    return [
        [{} if profile is None else ratios(replay(row), profile) for row in one.rows]
        for one, profile in zip(found, profiles, strict=True)
    ]


def _without(one: Calibrated, found: Sequence[Calibrated]) -> EngineProfile | None:
    start = starting_profile(one.deployment)
    others = [
        other.judged
        for other in found
        if other is not one and len(other.rows) >= MOST_FITTED and starting_profile(other.deployment) == start
    ]
    return middle_profile(others, start) if others else None


def _write(options: CalibrateOptions, facts: Mapping[str, Any], profile: EngineProfile) -> None:
    out = options.out or ("" if options.sources else str(RESULT))
    with user_errors():
        if out:
            _write_to(out, "--out", facts)
            print(f"result: {out}")
        if options.profile:
            _write_to(options.profile, "--profile", dataclasses.asdict(profile))
            print(f"profile: {options.profile} (for --engine)")


def _write_to(path: str, flag: str, facts: Mapping[str, Any]) -> None:
    try:
        write_json(Path(path), facts)
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    main()
