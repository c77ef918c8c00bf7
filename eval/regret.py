"""What controllers cost against the best static split of every sane case: `python eval/regret.py --help`.

A case of the opportunity map is sane when a static split can serve it: rho below 1, and the best one rejects at most
1 %.
The best static share of each case is the map's; it and all controllers run on the same validation episodes.
"""

import sys

try:
    from hbmgym.cli import in_one_line, option, parse_options, user_errors
except ModuleNotFoundError as error:
    print(f"{error}: run `make train` once, or use .venv/bin/python {__file__}", file=sys.stderr)
    raise SystemExit(2) from None

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from hbmgym.controllers.registry import make_controller
from hbmgym.envs.platforms import find_platform
from hbmgym.envs.traces.scenarios import SCENARIOS
from hbmgym.envs.traces.seeds import seeds_for
from hbmgym.envs.traces.trace import TraceError
from hbmgym.envs.workload import open_workloads
from hbmgym.eval.cells import Bench, Runner, Task, claim_folder, whole_or_gone, write_json
from hbmgym.eval.intervals import relative_difference
from hbmgym.eval.opportunities.verdict import TURNED_AWAY
from hbmgym.eval.rollout import Cell
from hbmgym.eval.table import UNBOUNDED_WIDTH

MAP = str(Path(__file__).resolve().parent.parent / "results" / "opportunity.json")
FAR = 0.1
"""A regret that is called far from the best static."""
COST_ROOM = 0.02
"""Where the dynamic oracle saves less cost than that, there is no gap worth closing."""


@dataclass(frozen=True)
class RegretOptions:
    """Who is judged, and where."""

    controllers: str = option("sglang-0.9,demand,gradient,convex,helm", "comma-separated, as compare.py names them")
    seeds: int = option(10, "validation episodes per case")
    platform: tuple[str, ...] = option((), "of the map, repeatable (default: all)")
    scenario: tuple[str, ...] = option((), "of the map, repeatable (default: all)")
    map: str = option(MAP, "map.json of eval/opportunity.py", metavar="PATH")
    jobs: int = option(min(2, os.cpu_count() or 1), "processes")
    out: str = option("", "new folder for regret.json")
    progress: bool = option(True, "show progress bars")


@dataclass(frozen=True)
class SaneCase:
    """A scenario on a platform, and what the map knows of it."""

    scenario: str
    platform: str
    rho: float
    best_share: float
    cost_room: float
    """1 - cost of the replayed dynamic oracle / cost of the best static."""
    p99_room: float

    @property
    def best_static(self) -> str:
        return f"static-{self.best_share:.6f}"


@dataclass(frozen=True)
class Regret:
    """What a controller costs in one case; relative to the best static, with a 95 % interval over the episodes."""

    case: SaneCase
    cells: dict[str, list[Cell]]
    """By controller, in the order of the seeds."""

    def column(self, name: str, key: str) -> list[float]:
        return [cell[key] for cell in self.cells[name]]

    def relative(self, name: str, key: str = "cost") -> tuple[float, float, float]:
        return relative_difference(self.column(name, key), self.column(self.case.best_static, key))

    def worst_seed(self, name: str, key: str) -> float:
        """Largest relative difference of any episode."""
        pairs = zip(self.column(name, key), self.column(self.case.best_static, key), strict=True)
        return max(value / reference - 1.0 for value, reference in pairs)

    def gap_closed(self, name: str) -> float:
        """Part of what the dynamic oracle saves that the controller saves."""
        return -self.relative(name)[0] / self.case.cost_room


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print, write."""
    options = parse_options(RegretOptions, (__doc__ or "").splitlines()[0], arguments)
    with user_errors():
        names = _names(options)
        chosen = sane_cases(Path(options.map), options.platform, options.scenario)
        seeds = seeds_for("validation", options.seeds)
        if options.out:
            claim_folder(Path(options.out))
    progress = options.progress and sys.stderr.isatty()
    with in_one_line(TraceError), whole_or_gone(options.out):
        regrets = measure(chosen, names, seeds, options.jobs, progress)
        if options.out:
            write_json(Path(options.out) / "regret.json", as_json(regrets, names))
    print_regrets(regrets, names)


def _names(options: RegretOptions) -> list[str]:
    if options.seeds < 1 or options.jobs < 1:
        raise ValueError(f"--seeds {options.seeds} and --jobs {options.jobs} must be at least 1")
    names = [name.strip() for name in options.controllers.split(",") if name.strip()]
    if not names:
        raise ValueError("--controllers is empty: give names, for example helm,gradient")
    for name in names:
        make_controller(name)
    return list(dict.fromkeys(names))


def sane_cases(path: Path, platforms: Sequence[str] = (), scenarios: Sequence[str] = ()) -> list[SaneCase]:
    """The map's sane cases of generated scenarios; ValueError in one line for a bad file or when none is left."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        cases = [_case(row) for row in rows if row["case"] in SCENARIOS and _is_sane(row)]
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; run eval/opportunity.py, or give its map.json as --map") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: is no map of eval/opportunity.py ({error})") from None
    chosen = [
        case
        for case in cases
        if (not platforms or case.platform in platforms) and (not scenarios or case.scenario in scenarios)
    ]
    if not chosen:
        known = ", ".join(sorted({case.platform for case in cases}))
        raise ValueError(f"no sane case of the map is left: its platforms are {known}")
    return chosen


def _is_sane(row: dict[str, Any]) -> bool:
    return row["rho"] is not None and row["rho"] < 1.0 and row["best_static_rejected_share"] <= TURNED_AWAY


def _case(row: dict[str, Any]) -> SaneCase:
    find_platform(row["platform"])  # refuses what it does not know
    rooms = [row["room"][figure][0] or 0.0 for figure in ("cost", "ttft_p99_s")]
    return SaneCase(row["case"], row["platform"], row["rho"], row["best_static_share"], *rooms)


def measure(
    cases: Sequence[SaneCase], names: Sequence[str], seeds: Sequence[int], jobs: int, progress: bool
) -> list[Regret]:
    """In the order of the cases, which are grouped by platform."""
    regrets = []
    for platform in dict.fromkeys(case.platform for case in cases):
        own = [case for case in cases if case.platform == platform]
        config = find_platform(platform).config
        workloads = open_workloads(config, scenarios=[case.scenario for case in own])
        with Runner(Bench(config, tuple(workloads), "validation"), jobs, progress) as runner:
            tasks = [
                Task(name, place, seed)
                for place, case in enumerate(own)
                for name in dict.fromkeys((case.best_static, *names))
                for seed in seeds
            ]
            rollouts = runner.run(tasks, platform)
        for place, case in enumerate(own):
            cells: dict[str, list[Cell]] = {}
            for task, rollout in zip(tasks, rollouts, strict=True):
                if task.workload == place:
                    cells.setdefault(task.controller, []).append(rollout.cell)
            regrets.append(Regret(case, cells))
    return regrets


def as_json(regrets: Sequence[Regret], names: Sequence[str]) -> dict[str, Any]:
    """What is kept: every case's figures, and the summary by controller."""
    return {
        "cases": [
            {
                "case": regret.case.scenario,
                "platform": regret.case.platform,
                "rho": regret.case.rho,
                "best_static_share": regret.case.best_share,
                "best_static_cost": float(np.mean(regret.column(regret.case.best_static, "cost"))),
                "cost_room": regret.case.cost_room,
                "p99_room": regret.case.p99_room,
                "regret": {name: regret.relative(name) for name in names},
                "worst_seed": {name: regret.worst_seed(name, "cost") for name in names},
                "p99": {name: regret.relative(name, "ttft_p99_s") for name in names},
                "p99_worst_seed": {name: regret.worst_seed(name, "ttft_p99_s") for name in names},
                "gib_migrated": {name: _gib(regret, name) for name in names},
            }
            for regret in regrets
        ],
        "summary": {name: summary(regrets, name) for name in names},
    }


def _gib(regret: Regret, name: str) -> float:
    return float(np.mean(regret.column(name, "bytes_migrated"))) / 2**30


def summary(regrets: Sequence[Regret], name: str) -> dict[str, float]:
    """Over cases: worst, median and mean regret, how many are FAR, and the part of the oracle's gap closed."""
    values = np.array([regret.relative(name)[0] for regret in regrets])
    shifting = [regret for regret in regrets if regret.case.cost_room >= COST_ROOM]
    return {
        "worst": float(values.max()),
        "median": float(np.median(values)),
        "mean": float(values.mean()),
        "far": int((values > FAR).sum()),
        "cases": len(values),
        "gap_closed_median": float(np.median([regret.gap_closed(name) for regret in shifting])) if shifting else 0.0,
        "gib_migrated": float(np.mean([_gib(regret, name) for regret in regrets])),
    }


def print_regrets(regrets: Sequence[Regret], names: Sequence[str]) -> None:
    """One line per case, then the summary."""
    console = Console(width=None if sys.stdout.isatty() else 2 * UNBOUNDED_WIDTH, soft_wrap=True)
    episodes = len(next(iter(regrets[0].cells.values())))
    table = Table(title=f"cost over the best static split - 1, {episodes} validation episodes", pad_edge=False)
    for title in ("case", "platform", "rho", "best static", "oracle", *names):
        table.add_column(title, justify="left" if title in ("case", "platform") else "right", no_wrap=True)
    for regret in regrets:
        case = regret.case
        best = f"{case.best_share:.3f}: {np.mean(regret.column(case.best_static, 'cost')):.3f}"
        row = (case.scenario, case.platform, f"{case.rho:.2f}", best, f"{-case.cost_room:+.0%}")
        table.add_row(*row, *("{:+.0%} [{:+.0%}, {:+.0%}]".format(*regret.relative(name)) for name in names))
    table.add_section()
    totals = {name: summary(regrets, name) for name in names}
    for key, form in (("worst", "{:+.1%}"), ("median", "{:+.1%}"), ("mean", "{:+.1%}"), ("far", "{:d}")):
        title = f"cases above {FAR:.0%}" if key == "far" else key
        table.add_row(title, *[""] * 4, *(form.format(totals[name][key]) for name in names))
    title = f"oracle's gap closed, median where >= {COST_ROOM:.0%}"
    table.add_row(title, *[""] * 4, *(f"{totals[name]['gap_closed_median']:.0%}" for name in names))
    table.add_row("GiB migrated per episode", *[""] * 4, *(f"{totals[name]['gib_migrated']:.0f}" for name in names))
    console.print(table)
    print(
        "oracle: what the replayed dynamic oracle of the map saves; it is one path, and no bound. sane: rho < 1 and "
        f"the best static rejects at most {TURNED_AWAY:.0%}. Shares of the best static are the map's."
    )


if __name__ == "__main__":
    main()
