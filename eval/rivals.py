"""Other engines' ways to share the memory: `python eval/rivals.py --scenario NAME`. Each against the best static split.

All rows have the same traffic and bytes; every row has the rules of its engine, and what they leave open is as given.
"""

import sys

try:
    from hbmgym.cli import command, in_one_line, option, parse_options, user_errors
except ModuleNotFoundError as error:
    print(f"{error}: run `make train` once, or use .venv/bin/python {__file__}", file=sys.stderr)
    raise SystemExit(2) from None

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from hbmgym.envs.serving.config import ServingConfig, with_policies
from hbmgym.envs.traces.seeds import Part, seeds_for
from hbmgym.envs.traces.trace import TraceError
from hbmgym.envs.workload import Workload
from hbmgym.eval.advising.settings import default_controller
from hbmgym.eval.cells import Bench, Runner, Task
from hbmgym.eval.comparison import COARSE_GRID, WorkloadResult, row_names
from hbmgym.eval.intervals import mean_interval, relative_difference
from hbmgym.eval.options import ServingOptions
from hbmgym.eval.rows import is_split
from hbmgym.eval.table import UNBOUNDED_WIDTH
from hbmgym.memory_backend.geometry import find_model
from hbmgym.memory_backend.padding import can_be_padded

DEFAULT_SPLIT = "SGLang's default"
BEST_STATIC = "best static"


@dataclass(frozen=True)
class Rival:
    """An engine's rules: policies and settings other than those given, and who moves the split."""

    title: str
    controller: str = DEFAULT_SPLIT
    transfers: str | None = None
    policies: tuple[tuple[str, str], ...] = ()

    def config(self, given: ServingConfig) -> ServingConfig:
        policies = dataclasses.replace(given.policies, **dict(self.policies))
        config = dataclasses.replace(given, transfers=self.transfers or given.transfers)
        return with_policies(config, policies)


RIVALS = (
    Rival("SGLang, fixed split"),
    Rival("SGLang, one buffer", transfers="overlapped", policies=(("on_shortage", "float"),)),
    Rival("vLLM, padded pool", transfers="overlapped", policies=(("on_shortage", "float-lru"), ("layout", "padded"))),
    Rival("the same, not padded", transfers="overlapped", policies=(("on_shortage", "float-lru"),)),
    Rival("TensorRT-LLM, rebalancer", "moving-average", "suspend"),
    Rival("the same, beside the work", "moving-average", "overlapped"),
    Rival("the same, tuned", "moving-average:tuned", "suspend"),
    Rival("tlru, fixed split", policies=(("eviction", "tlru"),)),
    Rival("tlru, best static", BEST_STATIC, policies=(("eviction", "tlru"),)),
)


def rivals_of(config: ServingConfig) -> dict[Rival, ServingConfig]:
    """The rivals and what each runs under; without the padded pool where there is nothing to pad."""
    padded = can_be_padded(find_model(config.model))
    rivals = [rival for rival in RIVALS if padded or ("layout", "padded") not in rival.policies]
    return {rival: rival.config(config) for rival in rivals}


@dataclass(frozen=True)
class RivalOptions(ServingOptions):
    """What is served, on how many episodes, and which static splits are tried."""

    statics: str = option(COARSE_GRID, "comma-separated static splits of which the best is the reference")
    seeds: int = option(8, "episodes per workload")
    split: str = option("validation", "part of the data", choices=("train", "validation", "all"))
    jobs: int = option(min(2, os.cpu_count() or 1), "processes")


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, run, print."""
    options = parse_options(RivalOptions, (__doc__ or "").splitlines()[0], arguments)
    part: Part = options.split  # type: ignore[assignment]
    with user_errors():
        config = options.serving_config()
        if options.seeds < 1 or options.jobs < 1:
            raise ValueError(f"--seeds {options.seeds} and --jobs {options.jobs} must be at least 1")
        statics = row_names(options.statics, config)
        if movers := [name for name in statics if not is_split(name)]:
            raise ValueError(f"--statics names {movers[0]}, expected static-<kv_share> or {COARSE_GRID}")
        configs = rivals_of(config)
        workloads = {rival: options.workloads(own) for rival, own in configs.items()}
        seeds = seeds_for("validation" if part == "all" else part, options.seeds)
        options.announce(options.workloads(config), part, seeds[0])
    with in_one_line(TraceError):
        for w, workload in enumerate(options.workloads(config)):
            reference = _run(config, workload, statics, part, seeds, options.jobs)
            best = reference.best_static
            assert best is not None, "all of them are static"
            results = {}
            for rival, own in configs.items():
                held = {BEST_STATIC: best, DEFAULT_SPLIT: default_controller(own)}
                name = held.get(rival.controller, rival.controller)
                results[rival] = _run(own, workloads[rival][w], [name], part, seeds, options.jobs)
            _show(workload.name, reference, results)


def _run(
    config: ServingConfig, workload: Workload, names: Sequence[str], part: Part, seeds: Sequence[int], jobs: int
) -> WorkloadResult:
    with Runner(Bench(config, (workload,), part), jobs, sys.stderr.isatty()) as runner:
        rollouts = runner.run([Task(name, 0, seed) for name in names for seed in seeds], f"{workload.name}: {names[0]}")
    return WorkloadResult(workload.name, float("nan"), [rollout.cell for rollout in rollouts])


def _show(name: str, reference: WorkloadResult, results: Mapping[Rival, WorkloadResult]) -> None:
    best = reference.best_static
    assert best is not None
    console = Console(width=None if sys.stdout.isatty() else UNBOUNDED_WIDTH, soft_wrap=True)
    costs = reference.column(best, "cost")
    table = Table(title=f"{name}: {len(costs)} episodes; differences from the best static split, {best}")
    for title in ("rules", "controller", "kv_share", "cost", "p99 TTFT s", "hit", "preempted", "unserved %", "moves/h"):
        table.add_column(title, justify="left" if title in ("rules", "controller") else "right", no_wrap=True)
    table.add_row(BEST_STATIC, *_columns(reference, best, mean_interval(costs).text(".3f")))
    for rival, result in results.items():
        controller = result.controllers[0]
        change = relative_difference(result.column(controller, "cost"), costs)
        cost = f"{result.mean(controller, 'cost'):.3f} {change.text('+.1%')}"
        table.add_row(rival.title, *_columns(result, controller, cost))
    console.print(table)


def _columns(result: WorkloadResult, controller: str, cost: str) -> Iterator[str]:
    yield controller
    yield f"{result.mean(controller, 'kv_share_mean'):.3f}"
    yield cost
    yield f"{result.mean(controller, 'ttft_p99_s'):.2f}"
    yield f"{result.mean(controller, 'hit_rate'):.3f}"
    yield f"{result.mean(controller, 'preemptions'):.1f}"
    yield f"{100 * result.mean(controller, 'unserved_tokens'):.2f}"
    yield f"{result.mean(controller, 'moves_per_hour'):.1f}"


if __name__ == "__main__":
    main()
