"""Tune the controllers' numbers, each with equally many trials on training seeds: `python eval/tune.py --help`.

A trial's score is the mean over all episodes of its cost / the cost of the best of a few static splits there, so that
no workload outweighs the others; 1 is what the right split from the start would reach. The first trial has the
controller's own numbers, so that tuned is never worse on these episodes. Equal commands find equal numbers.
"""

import sys

try:
    from hbmgym.cli import command, in_one_line, option, parse_options, user_errors
except ModuleNotFoundError as error:
    print(f"{error}: run `make train` once, or use .venv/bin/python {__file__}", file=sys.stderr)
    raise SystemExit(2) from None

import dataclasses
import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hbmgym.controllers.registry import untuned_parameters
from hbmgym.controllers.static import static_name
from hbmgym.controllers.tuning import RANGES, TABLE, Choice, Range, check_tunable, read_table
from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.serving.core import make_layout, setup_hash
from hbmgym.envs.traces.seeds import seeds_for
from hbmgym.envs.traces.trace import TraceError
from hbmgym.envs.workload import Workload
from hbmgym.eval.cells import Bench, Runner, Task, shown_anyway, write_json
from hbmgym.eval.comparison import static_shares
from hbmgym.eval.options import ServingOptions
from hbmgym.eval.statics import JUDGED, best_costs
from hbmgym.files import locked

SCENARIOS = (
    *("mix-shift", "mix-shift-900", "mix-burst", "shift-documents", "trend"),
    *("steady-chat", "steady-documents", "steady-conversation"),
)
"""Shifting and steady ones in about equal parts: a controller that always moves has to pay for it."""
STATIC_STEP = 0.1
SAMPLER_SEED = 0

Parameters = Mapping[str, float]


@dataclass(frozen=True)
class TuneOptions(ServingOptions):
    """Which controllers, on which training episodes, for how long."""

    scenario: tuple[str, ...] = option(
        (), f"generated scenario, repeatable (default, unless traces are given: {', '.join(SCENARIOS)})"
    )
    controller: tuple[str, ...] = option((), f"repeatable (default: all of {', '.join(RANGES)})")
    trials: int = option(30, "per controller, its own numbers among them")
    seeds: int = option(4, "training episodes per workload")
    jobs: int = option(min(2, os.cpu_count() or 1), "processes")
    out: str = option(str(TABLE), "where the numbers go; <name>:tuned reads the default only", metavar="FILE")
    progress: bool = option(True, "show progress bars")

    def workloads(self, config: ServingConfig) -> list[Workload]:
        """Those of ServingOptions, with other defaults."""
        own = self.scenario or (() if self.trace else SCENARIOS)
        return ServingOptions.workloads(dataclasses.replace(self, scenario=own), config)


@dataclass(frozen=True)
class Trial:
    """Numbers that were tried, and what came out."""

    parameters: Parameters
    score: float


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Tune one controller after the other; each is in the table as soon as it is done."""
    options = parse_options(TuneOptions, (__doc__ or "").splitlines()[0], arguments)
    with user_errors():
        table = Path(options.out)
        bench, names, seeds = _prepare(options)
    progress = options.progress and sys.stderr.isatty()
    kept = f"what was tuned before is in {table}"
    with in_one_line(TraceError, kept=kept), Runner(bench, options.jobs, progress) as runner:
        scores = Scores(runner, seeds)
        for name in names:
            found = search(name, options.trials, lambda parameters, name=name: scores.of(name, parameters))  # type: ignore[misc]
            watched = tqdm(found, total=options.trials, desc=name, disable=not progress, leave=False)
            trials = list(watched)
            with shown_anyway(lambda name=name, trials=trials: print(_line(name, trials))):  # type: ignore[misc]
                _keep(table, name, trials, bench, seeds)
            print(_line(name, trials))


def _prepare(options: TuneOptions) -> tuple[Bench, list[str], list[int]]:
    names = list(dict.fromkeys(options.controller)) or list(RANGES)
    for name in names:
        check_tunable(name)
    for flag, value in (("trials", options.trials), ("seeds", options.seeds), ("jobs", options.jobs)):
        if value < 1:
            raise ValueError(f"--{flag} {value} must be at least 1")
    seeds = seeds_for("train", options.seeds)
    _optuna()
    table = Path(options.out)
    read_table(table)
    if not os.access(table.parent, os.W_OK):
        raise ValueError(f"--out {table}: {table.parent} is no folder that can be written")
    config = options.serving_config()
    workloads = options.workloads(config)
    options.announce(workloads, "train", seeds[0])
    return Bench(config, tuple(workloads), "train"), names, seeds


def _optuna() -> Any:
    """The library that proposes numbers: only this script needs it."""
    try:
        optuna = importlib.import_module("optuna")
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}: run pip install -c constraints.txt -e '.[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


class Scores:
    """Judges parameters on all workloads and seeds of a runner; the static splits are run once."""

    def __init__(self, runner: Runner, seeds: Sequence[int]) -> None:
        self._runner = runner
        self._episodes = [(workload, seed) for workload in range(len(runner.bench.workloads)) for seed in seeds]
        shares = static_shares(make_layout(runner.bench.config), STATIC_STEP)
        tasks = [Task(static_name(share), *episode) for share in shares for episode in self._episodes]
        cells = [rollout.cell for rollout in runner.run(tasks, "static splits")]
        shape = len(shares), len(runner.bench.workloads), len(seeds)
        costs, unserved = (np.array([cell[key] for cell in cells]).reshape(shape) for key in JUDGED)
        own = [best_costs(costs[:, workload], unserved[:, workload]) for workload in range(shape[1])]
        self._reference = np.concatenate(own)

    def of(self, controller: str, parameters: Parameters) -> float:
        """Mean of cost / cost of the best static split of the same episode."""
        tasks = [Task(controller, *episode, parameters=tuple(parameters.items())) for episode in self._episodes]
        return float((self._costs(tasks, controller) / self._reference).mean())

    def _costs(self, tasks: Sequence[Task], label: str) -> np.ndarray:
        return np.array([rollout.cell["cost"] for rollout in self._runner.run(tasks, label)])


def search(name: str, trials: int, score: Callable[[Parameters], float]) -> Iterator[Trial]:
    """So many trials of a controller's numbers, its own first; equal scores give equal trials."""
    optuna = _optuna()
    space = {key: _distribution(optuna, among) for key, among in RANGES[name].items()}
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=SAMPLER_SEED))
    study.enqueue_trial(untuned_parameters(name))
    for _ in range(trials):
        asked = study.ask(space)
        trial = Trial(asked.params, score(asked.params))
        study.tell(asked, trial.score)
        yield trial


def _distribution(optuna: Any, among: Range | Choice) -> Any:
    if not isinstance(among, Range):
        return optuna.distributions.CategoricalDistribution(among)
    if among.is_whole:
        return optuna.distributions.IntDistribution(among.low, among.high, log=among.log)
    return optuna.distributions.FloatDistribution(among.low, among.high, log=among.log)


def _best(trials: Sequence[Trial]) -> int:
    """The first of the best: where nothing is gained, a controller keeps its own numbers."""
    return min(range(len(trials)), key=lambda place: trials[place].score)


def _keep(table: Path, name: str, trials: Sequence[Trial], bench: Bench, seeds: Sequence[int]) -> None:
    best = _best(trials)
    entry = {
        "parameters": dict(trials[best].parameters),
        "score": trials[best].score,
        "untuned_score": trials[0].score,
        "best_trial": best,
        "trials": len(trials),
        "workloads": [workload.name for workload in bench.workloads],
        "seeds": list(seeds),
        "model": bench.config.model,
        "gpu": bench.config.gpu,
        "hbm_gib": bench.config.hbm_gib,
        "setup_hash": setup_hash(bench.config),
    }
    with locked(table.parent):
        entries = {**read_table(table), name: entry}
        write_json(table, {key: entries[key] for key in sorted(entries)})


def _line(name: str, trials: Sequence[Trial]) -> str:
    best, own = trials[_best(trials)], trials[0]
    changes = (f"{key} {own.parameters[key]:.4g} -> {value:.4g}" for key, value in best.parameters.items())
    where = f"trial {_best(trials)} of 0 to {len(trials) - 1}"
    return f"{name}: {own.score:.4f} untuned, {best.score:.4f} tuned ({where}): {', '.join(changes)}"


if __name__ == "__main__":
    main()
