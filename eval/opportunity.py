"""The opportunity map: where a wrong split hurts, and where moving it could pay. `python eval/opportunity.py --help`.

Every scenario on every platform: the best static split in hindsight, what being wrong by .1 and .2 costs, SGLang's
default against the best, and the replayed dynamic oracle against the best. Loads are the calibrated ones.
"""

import sys

try:
    from hbmgym.cli import command, in_one_line, option, parse_options, user_errors
except ModuleNotFoundError as error:
    print(f"{error}: run `make train` once, or use .venv/bin/python {__file__}", file=sys.stderr)
    raise SystemExit(2) from None

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from hbmgym.envs.platforms import PLATFORMS, find_platform
from hbmgym.envs.serving.core import make_layout, setup_hash
from hbmgym.envs.serving.shortage import ONE_BUFFER
from hbmgym.envs.traces.jitter import SPREAD
from hbmgym.envs.traces.load import load_trace
from hbmgym.envs.traces.scenarios import SCENARIOS, find_scenario
from hbmgym.envs.traces.seeds import SEED_RANGES, seeds_for
from hbmgym.envs.traces.trace import TraceError
from hbmgym.envs.workload import seeds_with_rows
from hbmgym.eval.cells import make_folder, write_json
from hbmgym.eval.comparison import RHO_SHARES
from hbmgym.eval.load import rho
from hbmgym.eval.opportunities.cases import Case, cases
from hbmgym.eval.opportunities.figure import draw_map
from hbmgym.eval.opportunities.measure import FIGURES, measure
from hbmgym.eval.opportunities.verdict import OFFSETS, CaseResult
from hbmgym.eval.options import say_notices
from hbmgym.eval.rollout import cell_hash
from hbmgym.eval.statics import UNSERVED
from hbmgym.eval.table import UNBOUNDED_WIDTH
from hbmgym.files import write_atomically
from hbmgym.processes import Workers

WORDS = ("case", "platform", "verdict")
COLUMNS = (
    *("case", "platform", "rho", "best share", "cost"),
    *(f"{offset:+.1f}" for offset in OFFSETS),
    *("default p99", *ONE_BUFFER, "room p99 TTFT", "room violations", "room cost"),
    *("chosen per seed", "beyond floating", "both full", "verdict"),
)


@dataclass(frozen=True)
class OpportunityOptions:
    """What is mapped, on how many episodes, and where it is kept."""

    scenario: tuple[str, ...] = option((), "scenario, repeatable (default: all, unless traces are given)")
    trace: tuple[str, ...] = option((), "recorded trace, repeatable; its load is calibrated", metavar="PATH")
    spread: bool = option(True, SPREAD)
    platform: tuple[str, ...] = option(
        (), f"model@gpu or model@gpu@GiB, repeatable (default: {', '.join(p.name for p in PLATFORMS)})"
    )
    seeds: int = option(10, "validation episodes per case")
    jobs: int = option(min(2, os.cpu_count() or 1), "processes")
    out: str = option(
        "runs/opportunity", "folder for map.json, .md, .png and finished episodes, which are not run again"
    )


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then print, write and draw the map."""
    options = parse_options(OpportunityOptions, (__doc__ or "").splitlines()[0], arguments)
    folder = Path(options.out)
    with user_errors():
        seeds_for("validation", options.seeds)
        chosen = _with_traffic(_cases(options), options.seeds)
        make_folder(folder / "episodes")
    with in_one_line(TraceError, kept=f"finished episodes are in {folder} and will not be run again"):
        results = _results(chosen, folder, options.jobs)
        _print_map(results)
        write_json(folder / "map.json", [result.as_json() for result in results])
        write_atomically(folder / "map.md", _markdown(results).encode())
        draw_map(folder / "map.png", results)
    print(f"map.json, map.md and map.png are in {folder}")


def _cases(options: OpportunityOptions) -> list[Case]:
    if options.seeds < 1 or options.jobs < 1:
        raise ValueError(f"--seeds {options.seeds} and --jobs {options.jobs} must be at least 1")
    for name in options.scenario:
        find_scenario(name)
    traces = [load_trace(path, spread=options.spread) for path in options.trace]
    platforms = [find_platform(name) for name in options.platform] or list(PLATFORMS)
    scenarios = options.scenario or (() if options.trace else tuple(SCENARIOS))
    say_notices(traces)
    return cases(scenarios, options.trace, platforms, options.spread)


def _with_traffic(chosen: Sequence[Case], count: int) -> dict[Case, list[int]]:
    """The seeds of `count` episodes of each, at the load that is found for it; without those for which none can be
    found, or so small a one that next to nothing arrives: they leave a line."""
    found = {}
    for case in chosen:
        try:
            calibrated = case.calibrated()
            found[calibrated] = seeds_with_rows(calibrated.workload(), "validation", SEED_RANGES["validation"], count)
        except ValueError as reason:
            print(f"{case.name} is left out: {reason}", file=sys.stderr)
    if not found:
        raise ValueError("no case is left: give other scenarios, traces or platforms")
    return found


def _results(chosen: Mapping[Case, Sequence[int]], folder: Path, jobs: int) -> list[CaseResult]:
    """In the order of the cases, whose seeds are given."""
    questions = [
        Question(case, seed, seed == seeds[0], folder / "episodes") for case, seeds in chosen.items() for seed in seeds
    ]
    with Workers(jobs) as workers:
        answers = workers.map(_answer, questions, lambda question: f"{question.case.name}, seed {question.seed}")
        found = list(tqdm(answers, total=len(questions), desc="episodes", disable=not sys.stderr.isatty()))
    results = []
    for case, seeds in chosen.items():
        episodes, found = found[: len(seeds)], found[len(seeds) :]
        results.append(CaseResult(case.workload_name, case.platform.name, _rho(episodes[0]), episodes))
    return results


def _rho(first: dict[str, Any]) -> float:
    return float("inf") if first["rho"] is None else float(first["rho"])


class Question(NamedTuple):
    """An episode that is to be measured."""

    case: Case
    seed: int
    is_first: bool
    """Of its case: rho is found in it."""
    folder: Path


def _answer(question: Question) -> dict[str, Any]:
    """The figures of one episode: read if they are there, else measured and kept. The first one has the case's rho."""
    case, seed, is_first, folder = question
    config = case.platform.config
    episode = case.workload().episode("validation", seed)
    # Another setup or other traffic is another episode, so it is measured again.
    file = folder / f"{case.workload_name}-{case.platform.name}-{seed}-{cell_hash(setup_hash(config), episode)}.json"
    if (kept := _kept(file)) is not None:
        return kept
    figures = measure(config, episode)
    low, high = make_layout(config).share_bounds
    shares = np.linspace(low, high, RHO_SHARES + 2)[1:-1].tolist()
    found = rho(shares, episode, config) if is_first else 0.0
    figures["rho"] = found if np.isfinite(found) else None  # JSON knows no infinity
    write_json(file, figures)
    return figures


def _kept(file: Path) -> dict[str, Any] | None:
    """What a file holds; None where it is missing or damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or not {"statics", "default", "dynamic", "rho", *ONE_BUFFER} <= set(found):
        return None
    return found if set(FIGURES) <= set(found["default"]) else None  # another version kept less


def _print_map(results: Sequence[CaseResult]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 2 * UNBOUNDED_WIDTH, soft_wrap=True)
    table = Table(title=f"{len(results[0].episodes) if results else 0} validation episodes per case", pad_edge=False)
    for title in COLUMNS:
        table.add_column(title, justify="left" if title in WORDS else "right", no_wrap=True)
    for result in results:
        table.add_row(*_row(result))
    console.print(table)
    print(
        "+-.1, +-.2: cost at so much from the best share / its cost. default p99: p99 TTFT of SGLang's default / that "
        "of the best share. float, float-lru: cost of one floating pool / that of the best share - 1. room: 1 - "
        "replayed dynamic oracle / the share that is best in that figure; each episode has a path of its own, so "
        "compare it with the cost of the best share chosen per seed. beyond floating: 1 - cost of the oracle / that of "
        "the cheaper floating pool. both full: cost if both pools had all bytes. best share: of those "
        f"that leave at most {UNSERVED:.0%} of a class's tokens more unserved than the one that leaves least. turns "
        "away: every share leaves more than that unserved. Seeds of a recorded trace share most of their rows: their "
        "intervals say little."
    )


def _markdown(results: Sequence[CaseResult]) -> str:
    """The same table, for a page."""
    rule = ["---" if title in WORDS else "---:" for title in COLUMNS]
    rows = [COLUMNS, rule, *(_row(result) for result in results)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(result: CaseResult) -> list[str]:
    wrong = [result.wrong_by(offset) for offset in OFFSETS]
    return [
        result.name,
        result.platform,
        f"{result.rho:.2f}",
        f"{result.shares[result.best]:.3f}",
        f"{result.static_costs[result.best]:.3f}",
        *("-" if cost is None else f"{cost:.2f}x" for cost in wrong),
        result.default_over_best("ttft_p99_s").text(".2f", "x"),
        *(result.floating_over_best(rule).text("+.0%") for rule in ONE_BUFFER),
        *(result.room(figure).text("+.0%") for figure in ("ttft_p99_s", "slo_violation_rate", "cost")),
        f"{result.chosen_per_episode:.3f}",
        result.room_beyond_floating.text("+.0%"),
        f"{np.mean(result.of('both_full', 'cost')):.3f}",
        result.verdict,
    ]


if __name__ == "__main__":
    main()
