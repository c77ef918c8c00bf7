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
from collections.abc import Sequence
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
from hbmgym.envs.traces.episode import Episode
from hbmgym.envs.traces.jitter import SPREAD
from hbmgym.envs.traces.load import load_trace
from hbmgym.envs.traces.scenarios import SCENARIOS, find_scenario
from hbmgym.envs.traces.seeds import SEED_RANGES, seeds_for
from hbmgym.envs.traces.trace import TraceError
from hbmgym.envs.workload import episodes_with_rows
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

Figures = dict[str, Any]
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
    jobs: int = option(min(2, os.cpu_count() or 1), "processes, each with a case of its own")
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
        chosen = _calibrated(_cases(options))
        make_folder(folder / "episodes")
    with in_one_line(TraceError, kept=f"finished episodes are in {folder} and will not be run again"):
        results = _results(chosen, options.seeds, folder / "episodes", options.jobs)
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


def _calibrated(chosen: Sequence[Case]) -> list[Case]:
    """Without those that no load can be found for; they leave a line."""
    found = []
    for case in chosen:
        try:
            found.append(case.calibrated())
        except ValueError as reason:
            _leave_out(case, str(reason))
    if not found:
        raise ValueError(_NO_CASE)
    return found


_NO_CASE = "no case is left: give other scenarios, traces or platforms"


def _leave_out(case: Case, reason: str) -> None:
    print(f"{case.name} is left out: {reason}", file=sys.stderr)


def _results(chosen: Sequence[Case], episodes: int, folder: Path, jobs: int) -> list[CaseResult]:
    """In the order of the cases."""
    questions = [Question(case, episodes, folder) for case in chosen]
    with Workers(jobs) as workers:
        answers = workers.map(_answer, questions, lambda question: question.case.name)
        found = list(tqdm(answers, total=len(questions), desc="cases", disable=not sys.stderr.isatty()))
    return _told(chosen, found)


def _told(chosen: Sequence[Case], answers: Sequence[list[Figures] | str]) -> list[CaseResult]:
    """Without the cases at whose load next to nothing arrives: they leave a line."""
    results = []
    for case, episodes in zip(chosen, answers, strict=True):
        if isinstance(episodes, str):
            _leave_out(case, episodes)
        else:
            results.append(CaseResult(case.workload_name, case.platform.name, _rho(episodes[0]), episodes))
    if not results:
        raise TraceError(_NO_CASE)
    return results


def _rho(first: Figures) -> float:
    return float("inf") if first["rho"] is None else float(first["rho"])


class Question(NamedTuple):
    """A case of which so many episodes are to be measured; their figures are kept in `folder`."""

    case: Case
    episodes: int
    folder: Path


def _answer(question: Question) -> list[Figures] | str:
    """The figures of the first episodes that have rows, of which the first has the case's rho; or why there are too few
    of them."""
    found: list[Figures] = []
    episodes = episodes_with_rows(question.case.workload(), "validation", SEED_RANGES["validation"], question.episodes)
    try:
        for episode in episodes:
            found.append(_figures(question.case, episode, not found, question.folder))
    except TraceError as reason:
        return str(reason)
    return found


def _figures(case: Case, episode: Episode, is_first: bool, folder: Path) -> Figures:
    """Read if they are there, else measured and kept."""
    config = case.platform.config
    # Another setup or other traffic is another episode, so it is measured again.
    digest = cell_hash(setup_hash(config), episode)
    file = folder / f"{case.workload_name}-{case.platform.name}-{episode.seed}-{digest}.json"
    if (kept := _kept(file)) is not None:
        return kept
    figures = measure(config, episode)
    low, high = make_layout(config).share_bounds
    shares = np.linspace(low, high, RHO_SHARES + 2)[1:-1].tolist()
    found = rho(shares, episode, config) if is_first else 0.0
    figures["rho"] = found if np.isfinite(found) else None  # JSON knows no infinity
    write_json(file, figures)
    return figures


def _kept(file: Path) -> Figures | None:
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
