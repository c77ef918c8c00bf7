"""Cells: controller x trace x seed, computed in parallel, checked to be comparable, written whole or not at all."""

import csv
import io
import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from hbmgym.controllers.base import Controller
from hbmgym.controllers.registry import make_controller, with_parameters
from hbmgym.envs.serving.config import Policies, ServingConfig, with_policies
from hbmgym.envs.serving.core import Core, setup_hash
from hbmgym.envs.traces.episode import Episode
from hbmgym.envs.traces.seeds import Part
from hbmgym.envs.workload import Workload
from hbmgym.eval.load import rho
from hbmgym.eval.oracle import dynamic_oracle, phase_oracle
from hbmgym.eval.rollout import Cell, Rollout, cell_hash, run_episode
from hbmgym.eval.rows import find_row
from hbmgym.files import write_atomically
from hbmgym.processes import Workers

T = TypeVar("T")


@dataclass(frozen=True)
class Bench:
    """What every cell of a table shares."""

    config: ServingConfig
    workloads: tuple[Workload, ...]
    part: Part
    backend: str = "accounting"
    check: bool = False


@dataclass(frozen=True)
class Task:
    """One episode to run under a row of the table (`eval.rows`).

    `phase_shares` stands for the per-phase oracle instead, `oracle_shares` for the dynamic one; `parameters` replace
    some of a controller's own.
    """

    row: str
    workload: int
    seed: int
    phase_shares: tuple[float, ...] = ()
    oracle_shares: tuple[float, ...] = ()
    parameters: tuple[tuple[str, float], ...] = ()


_worker: dict[str, Any] = {}


def _start_worker(bench: Bench) -> None:
    _worker["bench"] = bench
    _worker["cores"] = {}


def _core_of(policies: Policies) -> Core:
    """The bench's engine under a row's rules, made once."""
    bench: Bench = _worker["bench"]
    cores: dict[Policies, Core] = _worker["cores"]
    if policies not in cores:
        config = with_policies(bench.config, policies)
        cores[policies] = Core(config, backend=bench.backend, check=bench.check)
    return cores[policies]


def _run_task(task: Task) -> Rollout:
    bench: Bench = _worker["bench"]
    episode = bench.workloads[task.workload].episode(bench.part, task.seed)
    if task.phase_shares or task.oracle_shares or task.parameters:
        core = _core_of(bench.config.policies)
        rollout = run_episode(_without_row(task, core, episode), core, episode)
    else:
        row = find_row(task.row, bench.config)
        core = _core_of(row.config(bench.config).policies)
        rollout = run_episode(make_controller(row.controller), core, episode)
        _sign(rollout, row.name, bench.config, episode)
    return rollout


def _without_row(task: Task, core: Core, episode: Episode) -> Controller:
    if task.phase_shares:
        return phase_oracle(episode.name, task.phase_shares, task.seed, episode.horizon_s)
    if task.oracle_shares:
        return dynamic_oracle(core, episode, task.oracle_shares)
    return with_parameters(task.row, dict(task.parameters))


def _sign(rollout: Rollout, name: str, table: ServingConfig, episode: Episode) -> None:
    """Name the row. Its own rules are in `policies`; the hashes are those of what all rows of the table share."""
    rollout.cell["controller"] = rollout.timing["controller"] = name
    rollout.cell["setup_hash"] = setup = setup_hash(table)
    rollout.cell["cell_hash"] = cell_hash(setup, episode)


def _run_rho(question: tuple[int, int, tuple[float, ...]]) -> float:
    workload, seed, shares = question
    bench: Bench = _worker["bench"]
    return rho(shares, bench.workloads[workload].episode(bench.part, seed), bench.config)


class Runner:
    """Runs tasks of one bench, in `jobs` processes; results do not depend on how many. A context manager."""

    def __init__(self, bench: Bench, jobs: int, progress: bool = True) -> None:
        self.bench = bench
        self._progress = progress
        self._workers: Workers | None = None
        if jobs > 1:
            self._workers = Workers(jobs, _start_worker, bench)
        else:
            _start_worker(bench)

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *_: object) -> None:
        if self._workers is not None:
            self._workers.close()
        else:
            for core in _worker["cores"].values():
                core.close()

    def run(self, tasks: Sequence[Task], label: str) -> list[Rollout]:
        """In the order of the tasks."""
        results = self._workers.map(_run_task, tasks, self._name) if self._workers else map(_run_task, tasks)
        return list(self._watch(results, len(tasks), label))

    def rho(self, workload: int, seed: int, shares: Sequence[float]) -> float:
        """rho of one workload, judged on one episode."""
        questions = [(workload, seed, (share,)) for share in shares]
        name = f"rho of {self.bench.workloads[workload].name}"
        results = self._workers.map(_run_rho, questions, lambda _: name) if self._workers else map(_run_rho, questions)
        return min(self._watch(results, len(questions), "rho"))

    def _name(self, task: Task) -> str:
        who = task.row or "the oracle"
        return f"{who} on {self.bench.workloads[task.workload].name}, seed {task.seed}"

    def _watch(self, results: Iterable[T], total: int, label: str) -> Iterable[T]:
        return tqdm(results, total=total, desc=label, disable=not self._progress, leave=False)


class UnequalCells(ValueError):
    """Rows of one table that were not measured under equal conditions."""


def check_comparable(cells: Sequence[Cell]) -> None:
    """Raise UnequalCells unless all controllers agree on every cell's hash and budget, and all have every cell."""
    cases: dict[tuple[str, int], dict[str, Cell]] = defaultdict(dict)
    for cell in cells:
        cases[cell["trace"], cell["seed"]][cell["controller"]] = cell
    names = {cell["controller"] for cell in cells}
    for (trace, seed), rows in cases.items():
        if missing := names - set(rows):
            raise UnequalCells(f"{trace} seed {seed}: there is no cell for {', '.join(sorted(missing))}")
        first = next(iter(rows.values()))
        for row in rows.values():
            for key in ("cell_hash", "setup_hash", "budget_bytes", "mapped_chunks"):
                if row[key] != first[key]:
                    raise UnequalCells(
                        f"{trace} seed {seed}: {key} is {row[key]} for {row['controller']} but {first[key]} for "
                        f"{first['controller']}: give both equal budgets and policies"
                    )


class UnusableFolder(ValueError):
    """An output folder that is in use or cannot be made."""


def check_folder(path: Path) -> None:
    """UnusableFolder when an output folder holds something already."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UnusableFolder(f"--out {path} is in use: name a new folder, or remove it")


def make_folder(path: Path) -> None:
    """Make an output folder unless it is there; UnusableFolder when it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnusableFolder(f"--out {path} cannot be made: {error.strerror}") from error


@contextmanager
def claimed(out: str | Path) -> Iterator[None]:
    """Make an output folder ("": there is none); it goes again, with the parents that were made for it, unless all that
    belongs there is written. UnusableFolder when it is in use or cannot be made."""
    if not out:
        yield
        return
    path = Path(out)
    check_folder(path)
    made = [place for place in (path, *path.parents) if not place.exists()]
    try:
        make_folder(path)
        yield
    except BaseException:
        _empty(path)
        for place in made:
            with suppress(OSError):  # others have put something there
                place.rmdir()
        raise


def _empty(folder: Path) -> None:
    for place in folder.iterdir() if folder.is_dir() else ():
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place, ignore_errors=True)
        else:
            with suppress(OSError):
                place.unlink()


@contextmanager
def shown_anyway(show: Callable[[], object]) -> Iterator[None]:
    """Show what was measured also when it cannot be written."""
    try:
        yield
    except OSError:
        show()
        raise


def write_cells(folder: Path, rollouts: Sequence[Rollout]) -> None:
    """cells.json and cells.csv (equal for equal inputs) and timings.json (wall clock)."""
    cells = [rollout.cell for rollout in rollouts]
    write_json(folder / "cells.json", cells)
    write_json(folder / "timings.json", [rollout.timing for rollout in rollouts])
    text = io.StringIO()
    columns = dict.fromkeys(column for cell in cells for column in cell)  # some rules count more than others
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(cells)
    write_atomically(folder / "cells.csv", text.getvalue().encode())


def write_json(path: Path, content: object) -> None:
    """Whole or not at all."""
    write_atomically(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
