"""Compare controllers on equal memory, traffic and rules: `python eval/compare.py --help`."""

import sys

try:
    from hbmgym.cli import command, in_one_line, integer, option, parse_named, user_errors
except ModuleNotFoundError as error:
    print(f"{error}: run `make train` once, or use .venv/bin/python {__file__}", file=sys.stderr)
    raise SystemExit(2) from None

import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hbmgym.controllers.registry import MOVING_CONTROLLERS
from hbmgym.envs.serving.core import make_layout
from hbmgym.envs.traces.seeds import Part, seeds_for
from hbmgym.envs.traces.trace import TraceError
from hbmgym.eval.cells import Bench, UnequalCells, UnusableFolder, check_folder, claimed, shown_anyway, write_cells
from hbmgym.eval.comparison import (
    BATCH,
    DEFAULT_CONTROLLERS,
    SGLANG_DEFAULT,
    Comparison,
    compare,
    row_names,
)
from hbmgym.eval.options import ServingOptions
from hbmgym.eval.rows import RULES, is_split
from hbmgym.eval.table import backend_lines, print_comparison
from hbmgym.memory_backend.vmm import BACKENDS, VmmRefused, open_vmm

AUTO = "auto"
MOST = 40
"""Episodes that are run where the intervals stay wide."""


@dataclass(frozen=True)
class CompareOptions(ServingOptions):
    """What is compared, on how many episodes, and where the figures go."""

    controllers: str = option(
        DEFAULT_CONTROLLERS,
        "comma-separated: static-<kv_share>, static-grid, static-coarse, sglang-<ratio>, "
        f"{', '.join(MOVING_CONTROLLERS)}, "
        "<name>:tuned (eval/tune.py), helm (and its ablations, docs/helm.md), helm:<run or policy.npz>, ppo:<same>, "
        f"{', '.join(RULES)} (no controller); each also under other rules: helm@priced, static-0.5@retention=all",
    )
    seeds: str = option(
        "10",
        f"episodes per workload, {MOST} where a claim is made; {AUTO}: {BATCH} at a time, {MOST} at most, until every "
        f"difference in cost from the best static splits and from {SGLANG_DEFAULT} is known --within",
        metavar=f"N|{AUTO}",
    )
    within: float = option(0.03, f"with --seeds {AUTO}: half an interval, as a part of the reference's cost")
    split: str = option("validation", "part of the data", choices=("train", "validation", "test", "all"))
    backend: str = option(
        "accounting", "what executes the moves; host copies every state: minutes per episode", choices=BACKENDS
    )
    check: bool = option(False, "verify every invariant after every window (slow)")
    oracle: bool = option(True, "search the per-phase best of scenarios with phases")
    jobs: int = option(min(2, os.cpu_count() or 1), "processes")
    out: str = option("", "new folder for cells.json, cells.csv and timings.json")
    progress: bool = option(True, "show progress bars")


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, run, print, write."""
    options, named = parse_named(CompareOptions, __doc__ or "", arguments)
    with user_errors(VmmRefused):
        within = _within(options, "within" in named)
        bench, names, seeds = _prepare(options)
    progress = options.progress and sys.stderr.isatty()
    with in_one_line(TraceError, UnequalCells, UnusableFolder, VmmRefused), claimed(options.out):
        comparison = compare(
            bench, names, seeds, jobs=options.jobs, oracle=options.oracle, progress=progress, within=within
        )
        if options.out:
            with shown_anyway(lambda: _show(comparison)):
                _write(Path(options.out), comparison)
    if options.out:
        print(f"cells.json, cells.csv, timings.json and split-*.png are in {options.out}")
    _show(comparison)


def _write(folder: Path, comparison: Comparison) -> None:
    from hbmgym.eval.figure import draw_comparison  # matplotlib takes half a second, and a folder that can be written

    write_cells(folder, comparison.rollouts)
    draw_comparison(folder, comparison)


def _show(comparison: Comparison) -> None:
    print_comparison(comparison)
    for line in backend_lines(comparison):
        print(line)


def _within(options: CompareOptions, named: bool) -> float | None:
    """Where episodes are added until the intervals are narrow: how narrow."""
    if options.seeds != AUTO:
        if named:
            raise ValueError(f"--within {options.within:g} needs --seeds {AUTO}")
        return None
    if not 0.0 < options.within < math.inf:
        raise ValueError(f"--within is {options.within:g}, expected a number above 0, for example 0.03")
    return options.within


def _most_episodes(seeds: str) -> int:
    if seeds == AUTO:
        return MOST
    with suppress(ValueError):
        if (episodes := integer(seeds)) >= 1:
            return episodes
    raise ValueError(f"--seeds is {seeds!r}, expected an integer >= 1 or {AUTO}")


def _prepare(options: CompareOptions) -> tuple[Bench, list[str], list[int]]:
    if options.out:
        check_folder(Path(options.out))  # before scenarios are calibrated
    config = options.serving_config()
    layout = make_layout(config)
    names = row_names(options.controllers, config)
    part: Part = options.split  # type: ignore[assignment]
    if options.jobs < 1:
        raise ValueError(f"--jobs is {options.jobs}, expected an integer >= 1")
    seeds = seeds_for("validation" if part == "all" else part, _most_episodes(options.seeds))
    if options.seeds == AUTO and (all(map(is_split, names)) or not any(name.startswith("static-") for name in names)):
        raise ValueError(
            f"--seeds {AUTO} looks at differences from the best static split: --controllers needs a static-<kv_share> "
            "and one that moves"
        )
    if options.backend != "accounting":
        with open_vmm(options.backend, layout, layout.kv_chunks(layout.min_slots)) as vmm:
            print(f"backend: {vmm.why}")
    workloads = options.workloads(config)
    options.announce(workloads, part, seeds[0])
    return Bench(config, tuple(workloads), part, options.backend, options.check), names, seeds


if __name__ == "__main__":
    main()
