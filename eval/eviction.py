"""Better eviction against a better split: `python eval/eviction.py --trace FILE`. Every order under every static split.

The table has a row per order and the default split, lru's best one, and the order's own best one. Stale snapshots are
those that a deeper snapshot on the same prefix supersedes: only a branch could still ask for them.
"""

import sys

try:
    from hbmgym.cli import command, in_one_line, option, parse_options, user_errors
except ModuleNotFoundError as error:
    print(f"{error}: run `make train` once, or use .venv/bin/python {__file__}", file=sys.stderr)
    raise SystemExit(2) from None

import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from hbmgym.controllers.registry import make_controller
from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.serving.core import Core, make_layout
from hbmgym.envs.traces.episode import Episode
from hbmgym.envs.traces.seeds import Part, seeds_for
from hbmgym.envs.traces.trace import TraceError
from hbmgym.envs.workload import Workload
from hbmgym.eval.cells import Bench
from hbmgym.eval.comparison import STATIC_GRID, WorkloadResult, compare, controller_names
from hbmgym.eval.intervals import mean_interval, relative_difference
from hbmgym.eval.options import ServingOptions
from hbmgym.eval.rollout import run_episode
from hbmgym.eval.table import UNBOUNDED_WIDTH
from hbmgym.memory_backend.eviction import ORDERS
from hbmgym.memory_backend.pools import NONE
from hbmgym.memory_backend.prefix_cache import Memory

DEFAULT_SPLIT = "sglang-0.9"
WINDOWS_PER_LOOK = 12


@dataclass(frozen=True)
class EvictionOptions(ServingOptions):
    """What is served, and on how many episodes; the order of --policies is not looked at."""

    seeds: int = option(5, "episodes per workload")
    split: str = option("validation", "part of the data", choices=("train", "validation", "all"))
    jobs: int = option(min(2, os.cpu_count() or 1), "processes")


@dataclass(frozen=True)
class Staleness:
    """Means over the measured part of an episode."""

    of_slots: float
    """Stale snapshots / slots."""
    of_snapshots: float
    """Stale snapshots / snapshots."""


def parents_of(episode: Episode) -> np.ndarray:
    """int32 (id_count,): the page id before each one in its prefix, NONE for a first page."""
    parents = np.full(episode.id_count, NONE, np.int32)
    for row in episode.rows:
        ids = episode.refs[row.ref_off : row.ref_off + row.known_ids]
        parents[ids[1:]] = ids[:-1]
    return parents


def count_stale(memory: Memory, parents: np.ndarray) -> tuple[int, int]:
    """(stale snapshots, snapshots) that are cached now."""
    snapshots = np.flatnonzero(memory.ids["snapshot"][: len(parents)] != NONE)
    above = np.zeros(len(parents), bool)  # ids with a snapshot further down
    for page_id in snapshots:
        page_id = parents[page_id]
        while page_id != NONE and not above[page_id]:
            above[page_id] = True
            page_id = parents[page_id]
    return int(np.count_nonzero(above[snapshots])), len(snapshots)


def measure_staleness(config: ServingConfig, episode: Episode, split: str) -> Staleness:
    """How much of the slots and of the snapshots is stale under one static split."""
    core, parents, looks, windows = Core(config), parents_of(episode), [], 0

    def look(telemetry: np.record) -> None:
        nonlocal windows
        windows += 1
        if episode.warmup_s < telemetry.time_s <= episode.horizon_s and windows % WINDOWS_PER_LOOK == 0:
            stale, snapshots = count_stale(core.memory, parents)
            looks.append((stale / telemetry.ssm_capacity, stale / max(snapshots, 1)))

    run_episode(make_controller(split), core, episode, look)
    return Staleness(*np.mean(looks, axis=0)) if looks else Staleness(np.nan, np.nan)


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, run, print."""
    options = parse_options(EvictionOptions, (__doc__ or "").splitlines()[0], arguments)
    part: Part = options.split  # type: ignore[assignment]
    with user_errors():
        config = options.serving_config()
        if options.seeds < 1 or options.jobs < 1:
            raise ValueError(f"--seeds {options.seeds} and --jobs {options.jobs} must be at least 1")
        workloads = options.workloads(config)
        seeds = seeds_for("validation" if part == "all" else part, options.seeds)
        options.announce(workloads, part, seeds[0])
    with in_one_line(TraceError):
        for workload in workloads:
            _show(_configs(config), workload, part, seeds, options.jobs)


def _configs(config: ServingConfig) -> dict[str, ServingConfig]:
    return {
        order: dataclasses.replace(config, policies=dataclasses.replace(config.policies, eviction=order))
        for order in ORDERS
    }


def _show(configs: dict[str, ServingConfig], workload: Workload, part: Part, seeds: Sequence[int], jobs: int) -> None:
    results = {}
    for order, config in configs.items():
        names = controller_names(f"{STATIC_GRID},{DEFAULT_SPLIT}", make_layout(config))
        bench = Bench(config, (workload,), part)
        progress = sys.stderr.isatty()
        results[order] = compare(bench, names, seeds, jobs=jobs, oracle=False, progress=progress).results[0]
    console = Console(width=None if sys.stdout.isatty() else UNBOUNDED_WIDTH, soft_wrap=True)
    table = Table(title=f"{workload.name}: {len(seeds)} episodes; differences from lru at the same kind of split")
    for title in ("eviction", "split", "kv_share", "cost", "p99 TTFT s", "hit", "stale / slots", "stale / snapshots"):
        table.add_column(title, justify="left" if title in ("eviction", "split") else "right", no_wrap=True)
    for row in _rows(configs, results, workload.episode(part, seeds[0])):
        table.add_row(*row)
    console.print(table)
    console.print(f"rho {results['lru'].rho:.2f} (lru); staleness is that of the first episode", highlight=False)


def _rows(
    configs: dict[str, ServingConfig], results: dict[str, WorkloadResult], episode: Episode
) -> Iterator[list[str]]:
    lru_best = results["lru"].best_static
    assert lru_best is not None, "a grid has static splits"
    for order, result in results.items():
        own_best = result.best_static
        assert own_best is not None
        splits = {"default": (DEFAULT_SPLIT, DEFAULT_SPLIT), "lru's best": (lru_best, lru_best)}
        if order != "lru":
            splits["its best"] = (own_best, lru_best)
        for kind, (split, reference) in splits.items():
            stale = measure_staleness(configs[order], episode, split)
            yield [
                order,
                kind,
                f"{result.mean(split, 'kv_share_mean'):.3f}",
                _cost(result.column(split, "cost"), results["lru"].column(reference, "cost"), order == "lru"),
                f"{result.mean(split, 'ttft_p99_s'):.2f}",
                f"{result.mean(split, 'hit_rate'):.3f}",
                f"{stale.of_slots:.2f}",
                f"{stale.of_snapshots:.2f}",
            ]


def _cost(values: Sequence[float], reference: Sequence[float], is_reference: bool) -> str:
    if is_reference:
        mean, low, high = mean_interval(values)
        return f"{mean:.3f} [{low:.3f}, {high:.3f}]"
    change, low, high = relative_difference(values, reference)
    return f"{np.mean(values):.3f} {change:+.1%} [{low:+.1%}, {high:+.1%}]"


if __name__ == "__main__":
    main()
