"""What each part of the release recipe is worth, by training without it: `python train/ablate.py --help`."""

import sys

try:
    from hbmgym.cli import command, in_one_line, option, parse_options, user_errors
except ModuleNotFoundError as error:
    print(f"{error}: run `make train` once, or use .venv/bin/python {__file__}", file=sys.stderr)
    raise SystemExit(2) from None

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from hbmgym.controllers.helm.policy import PolicyError
from hbmgym.controllers.observation import OBSERVATION_GROUPS
from hbmgym.envs.traces.seeds import SEED_RANGES, seeds_for
from hbmgym.eval.cells import make_folder, shown_anyway, write_json
from hbmgym.eval.provenance import provenance
from hbmgym.eval.regret import MAP
from hbmgym.eval.regrets.cases import SaneCase, sane_cases
from hbmgym.eval.regrets.measure import measure
from hbmgym.eval.table import UNBOUNDED_WIDTH
from hbmgym.train.domains import Domain
from hbmgym.train.online import LEARNING_RATE, live_costs
from hbmgym.train.options import TrainOptions
from hbmgym.train.ppo import Run, by_recipe, learn_each, prepare, with_references
from hbmgym.train.runs import CannotGoOn, last_checkpoint

FULL = "full"
TRAINED: Mapping[str, Mapping[str, Any]] = {
    FULL: {},
    "absolute": {"absolute": True},
    "shifting": {"recipe": "shifting"},
    **{f"without-{group}": {"blind": (group,)} for group in OBSERVATION_GROUPS},
}
"""What differs from the release recipe."""
LIVE = {"noise": 0.0, "online": LEARNING_RATE}
"""Rates at which the full policies go on learning in every episode that they are judged on, with the noise that it
takes; with `noise` that alone."""
ARMS = (*TRAINED, *LIVE)
JUDGED = 2
"""Validation episodes at the end of a training; what an arm is worth is judged on others."""
TELLING = 0.5
"""Per cent of a case's cost from which on an arm is called better or worse there."""


@dataclass(frozen=True)
class AblateOptions:
    """Which parts, how long, and where it goes."""

    arms: str = option(",".join(ARMS), f"comma-separated; {FULL} comes with any of them")
    seeds: int = option(3, "policies per arm")
    total_timesteps: int = option(300_000, "windows of each training, also 3e5")
    episodes: int = option(6, "validation episodes per sane case of the opportunity map")
    jobs: int = option(min(2, os.cpu_count() or 1), "processes")
    out: str = option("runs/ablations", "folder; policies that it has already are not trained again")
    progress: bool = option(True, "show progress bars")

    def __post_init__(self) -> None:
        for name in ("seeds", "total_timesteps", "episodes", "jobs"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected an integer >= 1")
        if unknown := [name for name in self.chosen if name not in ARMS]:
            raise ValueError(f"--arms has {unknown[0]!r}, expected some of: {', '.join(ARMS)}")

    @property
    def chosen(self) -> list[str]:
        """The full arm first."""
        return list(dict.fromkeys([FULL, *(name.strip() for name in self.arms.split(",") if name.strip())]))

    @property
    def trained(self) -> list[str]:
        """Those chosen that have policies of their own."""
        return [arm for arm in self.chosen if arm in TRAINED]

    @property
    def bars(self) -> bool:
        """Progress bars, where somebody sees them."""
        return self.progress and sys.stderr.isatty()

    def folder(self, arm: str, seed: int) -> Path:
        """Of one training."""
        return Path(self.out) / f"{arm}-{self.total_timesteps}" / f"seed-{seed}"

    def policy(self, arm: str, seed: int) -> Path:
        """What a training ends with."""
        return self.folder(arm, seed) / "last_policy.npz"


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Train, judge, print, write ablations.json."""
    options = parse_options(AblateOptions, (__doc__ or "").splitlines()[0], arguments)
    with user_errors():
        cases, episodes = sane_cases(Path(MAP)), _episodes(options)
        make_folder(Path(options.out))
    with in_one_line(CannotGoOn, PolicyError, kept=f"the same command goes on with what {options.out} has"):
        _train(options)
        costs, best = _judge(options, cases, episodes)
    known = {"best static": best, **costs}
    facts = {"options": dataclasses.asdict(options), **provenance(("hbmgym",))}
    rows = {
        "cases": [case.traffic.name for case in cases],
        **{arm: own.tolist() for arm, own in known.items()},
        **facts,
    }
    with shown_anyway(lambda: print_ablations(costs, best, options.episodes)):
        write_json(Path(options.out) / "ablations.json", rows)
    print_ablations(costs, best, options.episodes)


def _episodes(options: AblateOptions) -> Sequence[int]:
    """Those that judge; ValueError where they run into those that each training has to itself."""
    if options.episodes + JUDGED > len(SEED_RANGES["validation"]):
        raise ValueError(
            f"--episodes is {options.episodes}, expected {len(SEED_RANGES['validation']) - JUDGED} at most"
        )
    return seeds_for("validation", options.episodes)


def _train(options: AblateOptions) -> None:
    """Every policy that is not there yet. Arms take turns, so that an interrupted run has seeds of all of them."""
    missing = [
        (arm, seed)
        for seed in range(options.seeds)
        for arm in options.trained
        if not options.policy(arm, seed).is_file()
    ]
    domains = {recipe: _domains(options, recipe) for recipe in dict.fromkeys(_recipe(arm) for arm, _ in missing)}
    runs = [
        Run(_options(options, arm, seed), options.folder(arm, seed), *domains[_recipe(arm)]) for arm, seed in missing
    ]
    for run in learn_each(runs, options.jobs):
        print(f"trained: {run.folder}", flush=True)


def _recipe(arm: str) -> str:
    return str(TRAINED[arm].get("recipe", "release"))


def _options(options: AblateOptions, arm: str, seed: int) -> TrainOptions:
    steps = options.total_timesteps
    given = {"recipe": "release", **TRAINED[arm], "total_timesteps": steps, "eval_freq": 2 * steps}  # at the end
    return by_recipe(TrainOptions(**given, seed=seed), {"total_timesteps", "eval_freq"})


def _domains(options: AblateOptions, recipe: str) -> tuple[list[Domain], list[Domain]]:
    own = TrainOptions(recipe=recipe, eval_episodes=JUDGED, jobs=options.jobs, progress=options.bars)
    return with_references(own, Path(options.out), *prepare(own))


def _judge(
    options: AblateOptions, cases: Sequence[SaneCase], episodes: Sequence[int]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Mean costs of the arms, float64 (seeds, cases), and of the best static share of each case."""
    names = {arm: [f"ppo:{options.policy(arm, seed)}" for seed in range(options.seeds)] for arm in options.trained}
    regrets = measure(
        cases, [name for own in names.values() for name in own], episodes, len(episodes), options.jobs, options.bars
    )
    costs = {arm: np.array([[r.mean(name, "cost") for r in regrets] for name in own]) for arm, own in names.items()}
    for arm in (arm for arm in options.chosen if arm in LIVE):
        checkpoints = [_checkpoint(options.folder(FULL, seed)) for seed in range(options.seeds)]
        costs[arm] = live_costs(checkpoints, cases, episodes, LIVE[arm], options.jobs, options.bars)
    return costs, np.array([regret.mean(regret.case.best_static, "cost") for regret in regrets])


def _checkpoint(folder: Path) -> Path:
    found = last_checkpoint(folder)
    if found is None:
        raise CannotGoOn(f"{folder} has a policy but no checkpoint to learn on from: remove it to train it again")
    return found


def print_ablations(costs: Mapping[str, np.ndarray], best: np.ndarray, episodes: int) -> None:
    """Each arm over the best static splits, and over the full arm, seeds averaged first.

    The standard error has two parts: of the mean over cases, and of the means over seeds, whose trainings differ.
    """
    full = costs[FULL].mean(axis=0)
    cases = len(full)
    luck = {arm: 100.0 * _error((own / full).mean(axis=1)) for arm, own in costs.items()}
    title = f"cost over the best static split's, and over the full arm's, - 1, %, {cases} cases x {episodes} episodes"
    table = Table(title=title, title_justify="left", pad_edge=False)
    for column in ("arm", "mean of the seeds", "mean", "worst case", f"over {FULL}", "better", "worse"):
        table.add_column(column, justify="left" if column == "arm" else "right", no_wrap=True)
    for arm, own in costs.items():
        over = 100.0 * (own / best - 1.0)
        more = 100.0 * (own.mean(axis=0) / full - 1.0)
        error = float(np.sqrt(_error(more) ** 2 + luck[arm] ** 2 + luck[FULL] ** 2))
        table.add_row(
            arm,
            " ".join(f"{seed:+.1f}" for seed in over.mean(axis=1)),
            f"{over.mean():+.1f}",
            f"{over.mean(axis=0).max():+.0f}",
            *(("", "", "") if arm == FULL else (f"{more.mean():+.1f} +- {error:.1f}", *_told(more))),
        )
    Console(width=None if sys.stdout.isatty() else UNBOUNDED_WIDTH, soft_wrap=True).print(table)
    print(
        f"+-: standard error, of the cases and of the trainings; better, worse: cases that differ from {FULL} by more "
        f"than {TELLING} %"
    )


def _error(values: np.ndarray) -> float:
    """Standard error of a mean; 0 of a single value, which says nothing of it."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def _told(more: np.ndarray) -> tuple[str, str]:
    return f"{(more < -TELLING).sum()}", f"{(more > TELLING).sum()}"


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
