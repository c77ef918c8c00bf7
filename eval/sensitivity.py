"""How far verdicts depend on the cost model: `python eval/sensitivity.py --out DIR`.

Rates of the GPU and constants of the host halved and doubled, prefill floors, copies, moves and engines, at several
loads, which are found anew for every variation; each time all controllers on the same episodes, ranked by cost against
the best static split. What has been measured stays in DIR and is not measured again.
"""

import sys

try:
    from hbmgym.cli import command, in_one_line, option, parse_options, user_errors
except ModuleNotFoundError as error:
    print(f"{error}: run `make train` once, or use .venv/bin/python {__file__}", file=sys.stderr)
    raise SystemExit(2) from None

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from hbmgym.envs.serving.core import setup_hash
from hbmgym.envs.traces.seeds import Part, seeds_for
from hbmgym.eval.cells import Bench, make_folder, write_json
from hbmgym.eval.comparison import COARSE_GRID, WorkloadResult, compare, row_names
from hbmgym.eval.intervals import relative_difference
from hbmgym.eval.options import ServingOptions
from hbmgym.eval.sensitivities.variations import Variation, variations
from hbmgym.eval.table import UNBOUNDED_WIDTH

PART: Part = "validation"
CONTROLLERS = "sglang-0.9,float,priced,threshold,demand,gradient,convex,helm"
Found = dict[str, Any]


@dataclass(frozen=True)
class SensitivityOptions(ServingOptions):
    """What is varied, on how many episodes, and where it is kept."""

    out: str = option("", "folder of the results; what it holds already is not measured again", metavar="DIR")
    controllers: str = option(CONTROLLERS, "comma-separated, beside static splits")
    loads: str = option("0.6,0.8,1", "comma-separated multiples of the calibrated load")
    only: str = option("", "comma-separated beginnings of the variations wanted (default: all)")
    seeds: int = option(5, "episodes each")
    jobs: int = option(min(2, os.cpu_count() or 1), "processes")
    progress: bool = option(True, "show progress bars")


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Vary, measure what is missing, print."""
    options = parse_options(SensitivityOptions, __doc__ or "", arguments)
    with tempfile.TemporaryDirectory() as scratch:
        with user_errors():
            loads, wanted = _prepare(options, Path(scratch))
        cases = [(variation, load) for variation in wanted for load in loads]
        show = options.progress and sys.stderr.isatty()
        found = []
        with in_one_line(ValueError, kept=f"what was measured is in {options.out}"):
            for variation, load in tqdm(cases, unit="case", disable=not show):
                found.append(_measured(options, variation, load))
    _print(found)
    print(f"results: {options.out}")


def _prepare(options: SensitivityOptions, scratch: Path) -> tuple[list[float], list[Variation]]:
    if not options.out:
        raise ValueError("--out is missing: name a folder for the results")
    if options.seeds < 1 or options.jobs < 1:
        raise ValueError(f"--seeds {options.seeds} and --jobs {options.jobs} must be at least 1")
    try:
        loads = [float(text) for text in options.loads.split(",")]
    except ValueError:
        raise ValueError(f"--loads is {options.loads!r}, expected numbers, comma-separated") from None
    config = options.serving_config()
    row_names(options.controllers, config)
    every = variations(config, scratch)
    begins = tuple(filter(None, options.only.split(",")))
    wanted = [variation for variation in every if not begins or variation.name.startswith(begins)]
    if not wanted:
        raise ValueError(f"--only {options.only!r} fits none of: {', '.join(variation.name for variation in every)}")
    make_folder(Path(options.out))
    return loads, wanted


def _measured(options: SensitivityOptions, variation: Variation, load: float) -> Found:
    """Of one variation at one load: kept from earlier, or measured now."""
    facts = {
        "variation": variation.name,
        "load": load,
        "traffic": [*options.scenario, *options.trace, options.loop, options.spread, options.tick_s],
        "setup_hash": setup_hash(variation.config),
        "controllers": options.controllers,
        "seeds": options.seeds,
    }
    path = Path(options.out) / f"{variation.name.replace(' ', '-')}-{load:g}.json"
    if (kept := _kept(path)) is not None:
        if {name: kept.get(name) for name in facts} != facts:
            raise ValueError(f"{path} is of other settings: name another --out, or remove it")
        return kept
    found = facts | _measure(options, variation, load)
    write_json(path, found)
    return found


def _kept(path: Path) -> Found | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and "results" in content else None


def _measure(options: SensitivityOptions, variation: Variation, load: float) -> Found:
    config = variation.config
    workloads = dataclasses.replace(options, load=load).workloads(config)
    names = row_names(f"{COARSE_GRID},{options.controllers}", config)
    seeds = seeds_for(PART, options.seeds)
    bench = Bench(config, tuple(workloads), PART)
    comparison = compare(bench, names, seeds, jobs=options.jobs, oracle=False, progress=False)
    return {"results": [_result(result) for result in comparison.results]}


def _result(result: WorkloadResult) -> Found:
    best = result.best_static
    assert best is not None
    reference = result.column(best, "cost")
    moving = [name for name in result.controllers if not name.startswith("static-")]
    costs = {name: result.column(name, "cost") for name in moving}
    return {
        "workload": result.name,
        "rho": result.rho,
        "best_static": best,
        "best_static_cost": float(result.mean(best, "cost")),
        "best_static_misses": float(result.mean(best, "slo_violation_rate")),
        "costs": {name: result.mean(name, "cost") for name in moving},
        "over_best_static": {name: relative_difference(own, reference).known for name, own in costs.items()},
    }


def ranking(result: Mapping[str, Any]) -> list[str]:
    """Controllers and the best static split, cheapest first."""
    costs = {**result["costs"], "best static": result["best_static_cost"]}
    return sorted(costs, key=lambda name: costs[name])


def _print(found: Sequence[Found]) -> None:
    console = Console(width=None if sys.stdout.isatty() else UNBOUNDED_WIDTH, soft_wrap=True)
    names = list(found[0]["results"][0]["costs"])
    table = Table(title="cost over that of the best static split, and the ranking", pad_edge=False)
    for column in ("variation", "load", "rho", "best static", "cost", *names, "ranking"):
        table.add_column(column, no_wrap=True)
    for one in found:
        for result in one["results"]:
            over = [f"{100 * result['over_best_static'][name][0]:+.1f} %" for name in names]
            start = [one["variation"], f"{one['load']:g}", f"{result['rho']:.2f}", result["best_static"][7:]]
            table.add_row(*start, f"{result['best_static_cost']:.3f}", *over, " < ".join(ranking(result)))
    console.print(table)
    _print_firsts(found, console)


def _print_firsts(found: Sequence[Found], console: Console) -> None:
    """How often each comes first, and how often it is dearer than the best static split."""
    results = [result for one in found for result in one["results"]]
    table = Table(title=f"of {len(results)} cases", pad_edge=False)
    for column in ("controller", "first", "dearer than the best static", "saves, lowest to highest"):
        table.add_column(column, no_wrap=True)
    for name in results[0]["costs"]:
        over = [result["over_best_static"][name][0] for result in results]
        first = sum(ranking(result)[0] == name for result in results)
        span = f"{-100 * max(over):.1f} to {-100 * min(over):.1f} %"
        table.add_row(name, str(first), str(sum(value > 0 for value in over)), span)
    console.print(table)


if __name__ == "__main__":
    main()
