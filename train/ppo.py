"""Train a PPO controller on replayed traffic and compare it: `python train/ppo.py --help`."""

import sys

try:
    from hbmgym.cli import command, fail, in_one_line, parse_named, user_errors
except ModuleNotFoundError as error:
    print(f"{error}: run `make train` once, or use .venv/bin/python {__file__}", file=sys.stderr)
    raise SystemExit(2) from None

import dataclasses
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from hbmgym.controllers.helm.policy import PolicyError
from hbmgym.envs.serving.core import make_layout
from hbmgym.envs.traces.seeds import SEED_RANGES, seeds_for
from hbmgym.envs.traces.trace import TraceError
from hbmgym.eval.cells import check_folder, write_json
from hbmgym.eval.options import ServingOptions
from hbmgym.eval.table import print_comparison, summary_lines
from hbmgym.files import write_atomically
from hbmgym.memory_backend.vmm import VmmRefused, open_vmm
from hbmgym.processes import Workers
from hbmgym.train import choice
from hbmgym.train.domains import Domain, Traffic, find_references
from hbmgym.train.finish import compare_policy, idle_lines, judge_everywhere, replay_on_memory, score_lines
from hbmgym.train.learn import learn
from hbmgym.train.options import SMOKE, TrainOptions
from hbmgym.train.recipes import RECIPES, at_costs, open_traffic, served
from hbmgym.train.runs import CannotGoOn, held, new_run, read_options

REFERENCE_SEEDS = 3


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, train, compare (a recipe: judge on every sane case) and replay on real memory, write summary.json."""
    given, named = parse_named(TrainOptions, __doc__ or "", arguments)
    with ExitStack() as stack:
        with user_errors(VmmRefused, OSError):
            options = _settle(given, named)
            if options.out and not given.resume:
                check_folder(Path(options.out))  # before scenarios are calibrated
            training, validation = prepare(options)
            folder = Path(given.resume) if given.resume else new_run(options)
            stack.enter_context(held(folder))
        _run(options, folder, training, validation)


def _run(options: TrainOptions, folder: Path, training: Sequence[Traffic], validation: Sequence[Traffic]) -> None:
    """Train and finish; what stops a run on its way is one line that says how it goes on, or why it cannot."""
    print(f"run folder: {folder}\ncurves:     tensorboard --logdir {folder}", flush=True)
    started = time.perf_counter()
    go_on = f"go on with: python train/ppo.py --resume {folder}"
    try:
        with in_one_line(kept=go_on):
            scores = _train(options, folder, *with_references(options, folder, training, validation))
            trained_s = time.perf_counter() - started
            print(f"trained in {trained_s:.0f} s; policy: {folder / 'policy.npz'}", flush=True)
            for line in score_lines(scores):
                print(line)
            summary = {"trained_s": trained_s, "validation_score_of_seeds": scores}
            write_json(folder / "summary.json", summary)
            if options.final:
                _finish(options, folder, training[0], summary)
    except CannotGoOn as error:
        fail(f"{folder} cannot be resumed: {error}: start a new run")
    except PolicyError as error:
        fail(f"{error}, or start a new run")
    except TraceError as error:
        fail(f"{error}; a run keeps its traffic: start a new one")
    except VmmRefused as refusal:
        fail(f"{refusal}; {go_on}")


def _settle(given: TrainOptions, named: set[str]) -> TrainOptions:
    """The options that hold: a resumed run keeps its own, a smoke run is small, bars need a terminal."""
    if given.resume and (others := named - {"resume", "progress"}):
        raise ValueError(f"--resume goes on with the run's own options: leave {_flags(others)} out, or start a new run")
    options = read_options(Path(given.resume)) if given.resume else given
    if options.recipe and not given.resume:
        options = by_recipe(options, named)
    if options.smoke:
        options = dataclasses.replace(options, **SMOKE)  # type: ignore[arg-type]
    return dataclasses.replace(options, progress=given.progress and sys.stderr.isatty())


def by_recipe(options: TrainOptions, named: set[str]) -> TrainOptions:
    """With the recipe's settings, where no flag says otherwise; platform and traffic are the recipe's alone."""
    recipe, serving = RECIPES[options.recipe], {field.name for field in dataclasses.fields(ServingOptions)}
    if others := named & (serving | {"backend"}):
        raise ValueError(f"--recipe {options.recipe} has platforms and traffic of its own: leave {_flags(others)} out")
    if options.smoke:
        raise ValueError(f"--recipe {options.recipe} has no small run: leave --smoke out, or give one platform")
    settings = {name: value for name, value in recipe.settings if name not in named}
    options = dataclasses.replace(options, **settings)  # type: ignore[arg-type]
    if options.n_envs < (least := len(recipe.training) * len(recipe.move_costs)):
        raise ValueError(
            f"--n-envs is {options.n_envs}, but --recipe {options.recipe} has {len(recipe.training)} platforms x "
            f"{len(recipe.move_costs)} costs of moves: give {least} or more"
        )
    return options


def _flags(names: set[str]) -> str:
    return ", ".join(sorted(f"--{name.replace('_', '-')}" for name in names))


def prepare(options: TrainOptions) -> tuple[list[Traffic], list[Traffic]]:
    """Traffic to train on and to be judged on. Everything that can be wrong is found here, before a folder is made."""
    if options.recipe:
        recipe = RECIPES[options.recipe]
        training = open_traffic(recipe.training, recipe.scenarios, recipe.loads)
        return training, open_traffic(recipe.validation, recipe.scenarios)
    config = options.serving_config()
    layout = make_layout(config)
    if options.backend != "accounting":
        with ExitStack() as opened:  # every environment has memory of its own
            kv_chunks = layout.kv_chunks(layout.min_slots)
            vmms = [opened.enter_context(open_vmm(options.backend, layout, kv_chunks)) for _ in range(options.n_envs)]
            print(f"backend: {vmms[0].why}")
    workloads = options.workloads(config)
    options.announce(workloads, "train", seeds_for("train", 1)[0])
    for workload in workloads:
        workload.episode("validation", seeds_for("validation", 1)[0])
    traffic = [Traffic(config, tuple(workloads))]
    return traffic, traffic


def with_references(
    options: TrainOptions, folder: Path, training: Sequence[Traffic], validation: Sequence[Traffic]
) -> tuple[list[Domain], list[Domain]]:
    """What the best fixed splits cost: on the first training seeds, and on the last validation seeds, which choose the
    policy; the table at the end uses the first ones."""
    file, jobs, progress = folder / "references.json", options.jobs, options.progress
    judged = SEED_RANGES["validation"][-options.eval_episodes :]
    domains = find_references(training, "train", seeds_for("train", REFERENCE_SEEDS), file, jobs, progress)
    judging = find_references(validation, "validation", judged, file, jobs, progress)
    if options.recipe:
        domains, judging = [served(domain) for domain in domains], [served(domain) for domain in judging]
        domains = at_costs(domains, RECIPES[options.recipe].move_costs)
    return domains, judging


def _train(
    options: TrainOptions, folder: Path, training: Sequence[Domain], validation: Sequence[Domain]
) -> dict[str, float]:
    """Scores on validation, cost over the best fixed split's: of the one seed its least evaluation, else those of
    `_choose`."""
    if options.seeds == 1:
        return {str(options.seed): learn(options, folder, training, validation)}
    seeds = range(options.seed, options.seed + options.seeds)
    runs = [
        Run(dataclasses.replace(options, seed=seed, seeds=1), folder / f"seed-{seed}", training, validation)
        for seed in seeds
    ]
    for _ in learn_each(runs, options.jobs):
        pass
    return _choose(options, folder, [run.folder for run in runs], validation)


def _choose(
    options: TrainOptions, folder: Path, parts: Sequence[Path], validation: Sequence[Domain]
) -> dict[str, float]:
    """Keep the best of all seeds' policies, the best ones in training and the last ones; the scores of all."""
    policies = [part / name for part in parts for name in ("policy.npz", "last_policy.npz")]
    file, jobs, progress = folder / "references.json", options.jobs, options.progress
    domains = find_references(validation, "validation", choice.SEEDS, file, jobs, progress)
    scores = choice.scores(policies, domains, jobs, progress)
    best = min(range(len(policies)), key=scores.__getitem__)
    write_atomically(folder / "policy.npz", policies[best].read_bytes())
    return {f"{path.parent.name}/{path.name}": score for path, score in zip(policies, scores, strict=True)}


class Run(NamedTuple):
    """What `learn` takes."""

    options: TrainOptions
    folder: Path
    training: Sequence[Domain]
    validation: Sequence[Domain]


def learn_each(runs: Sequence[Run], jobs: int) -> Iterator[Run]:
    """Learn in processes; yields the runs in their order, as they end."""
    for run in runs:
        for name in ("checkpoints", "best"):
            (run.folder / name).mkdir(parents=True, exist_ok=True)
    with Workers(jobs) as workers:
        for run, _ in zip(runs, workers.map(_learn_one, runs, lambda run: f"training in {run.folder}"), strict=True):
            yield run


def _learn_one(run: Run) -> float:
    return learn(dataclasses.replace(run.options, jobs=1, progress=False), run.folder, run.training, run.validation)


def _finish(options: TrainOptions, folder: Path, traffic: Traffic, summary: dict[str, object]) -> None:
    if options.recipe:
        judge_everywhere(options, folder, summary)
        return
    comparison = compare_policy(options, folder, traffic.config, traffic.workloads)
    print_comparison(comparison)
    if options.smoke:
        print("smoke run: two updates train nothing, the figures only show that everything works")
    idle = [] if options.smoke else idle_lines(comparison)
    report = replay_on_memory(options, folder, traffic.config)
    for line in (*idle, *report.lines):
        print(line)
    summary["tables"] = {result.name: summary_lines(result) for result in comparison.results}
    summary["failures"] = idle
    summary["replay"] = dataclasses.asdict(report)
    write_json(folder / "summary.json", summary)
    if idle or not report.good:
        raise SystemExit(1)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
