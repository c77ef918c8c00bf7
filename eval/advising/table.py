"""What controllers do in the same episodes: run once each, looked up by name; and the search for the best split."""

from collections.abc import Iterable, Sequence

import numpy as np

from hbmgym.eval.advising.traffic import Traffic
from hbmgym.eval.cells import Runner, Task
from hbmgym.eval.intervals import Interval, relative_difference
from hbmgym.eval.oracle import DYNAMIC
from hbmgym.eval.rollout import Rollout
from hbmgym.eval.statics import JUDGED, best_static

FIRST_STEP = 4
"""Splits of the grid that the search skips at first; a power of 2."""


class Runs:
    """Rollouts by controller, in the order of the episodes."""

    def __init__(self, runner: Runner, traffic: Traffic) -> None:
        self._runner, self._cases = runner, traffic.cases
        self._rollouts: dict[str, list[Rollout]] = {}

    def run(self, names: Iterable[str], label: str) -> None:
        """Those that have not run yet."""
        new = [name for name in dict.fromkeys(names) if name not in self._rollouts]
        tasks = [Task(name, place, seed) for name in new for place, seed in self._cases]
        found = iter(self._runner.run(tasks, label)) if tasks else iter(())
        for name in new:
            self._rollouts[name] = [next(found) for _ in self._cases]

    def run_oracle(self, shares: Sequence[float]) -> None:
        """The dynamic oracle, through what the static splits at `shares` cost; it runs as oracle.DYNAMIC."""
        tasks = [Task("", place, seed, oracle_shares=tuple(shares)) for place, seed in self._cases]
        self._rollouts[DYNAMIC] = self._runner.run(tasks, "dynamic oracle")

    def add(self, name: str, rollouts: Sequence[Rollout]) -> None:
        """What was run elsewhere, in the same episodes."""
        self._rollouts[name] = list(rollouts)

    def of(self, name: str) -> list[Rollout]:
        return self._rollouts[name]

    def column(self, name: str, figure: str) -> list[float]:
        """One value per episode."""
        return [float(rollout.cell[figure]) for rollout in self._rollouts[name]]

    def mean(self, name: str, figure: str) -> float:
        return float(np.mean(self.column(name, figure)))

    def against(self, name: str, reference: str, figure: str = "cost") -> Interval:
        """What `name` has more of it than `reference`, as a part of that."""
        return relative_difference(self.column(name, figure), self.column(reference, figure))

    def best(self, names: Sequence[str], episode: int | None = None) -> str:
        """The static split that `eval.statics` calls the best one, of all episodes or of one."""
        own = slice(None) if episode is None else slice(episode, episode + 1)
        costs, unserved = (np.array([np.mean(self.column(name, figure)[own]) for name in names]) for figure in JUDGED)
        return names[best_static(costs, unserved)]


def search(runs: Runs, grid: Sequence[str]) -> tuple[str, list[str]]:
    """The best split of a grid, by halving steps around the best so far; and all that were tried, in grid order.

    As good as trying all of them where cost falls to one side of the best split and rises to the other one.
    """
    tried = {*range(0, len(grid), FIRST_STEP), len(grid) - 1}
    step, best = FIRST_STEP, -1
    while step:
        runs.run([grid[place] for place in sorted(tried)], "splits")
        found = grid.index(runs.best([grid[place] for place in sorted(tried)]))
        if found == best:
            step //= 2
        best = found
        tried |= {place for place in (best - step, best + step) if 0 <= place < len(grid)}
    return grid[best], [grid[place] for place in sorted(tried)]
