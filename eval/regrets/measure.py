"""Every controller and the best static split on the same episodes of each case."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from hbmgym.envs.serving.config import GIB, ServingConfig
from hbmgym.envs.serving.core import make_layout
from hbmgym.envs.traces.scenarios import SCENARIOS
from hbmgym.eval.cells import Bench, Runner, Task
from hbmgym.eval.comparison import OTHERS_BEST, static_shares
from hbmgym.eval.intervals import relative_difference
from hbmgym.eval.opportunities.verdict import Interval
from hbmgym.eval.regrets.cases import SaneCase, static_name
from hbmgym.eval.regrets.share_error import GRID_STEP, SEGMENT_S, ShareError, share_error
from hbmgym.eval.rollout import Cell, Rollout
from hbmgym.eval.statics import best_on_others

ORACLES = "oracle:"
"""With a number of seconds behind it: the replayed dynamic oracle, whose moves come so late."""
SAME = 1e-6
"""Costs that differ by so small a part differ by the order of sums."""


@dataclass(frozen=True)
class Regret:
    """One case under every controller: figures over those of the best static."""

    case: SaneCase
    cells: dict[str, list[Cell]]
    """By controller, in the order of the seeds."""
    share_errors: dict[str, ShareError] = field(default_factory=dict)
    """By controller, where they were asked for."""

    def column(self, name: str, key: str) -> list[float]:
        return [cell[key] for cell in self.cells[name]]

    def mean(self, name: str, key: str) -> float:
        return float(np.mean(self.column(name, key)))

    def excess(self, name: str, key: str = "cost") -> float:
        """A figure, mostly the cost, over that of the best static, less 1."""
        return self.mean(name, key) / self.mean(self.case.best_static, key) - 1.0

    def relative(self, name: str, key: str = "cost") -> Interval:
        """Any figure's excess, with a 95 % interval over the episodes."""
        return relative_difference(self.column(name, key), self.column(self.case.best_static, key))

    def unserved(self, name: str) -> float:
        """Part of the tokens that it leaves unserved and the best static serves; below 0 where it serves more."""
        return self.mean(name, "unserved_tokens") - self.mean(self.case.best_static, "unserved_tokens")

    def worst_seed(self, name: str, key: str) -> float:
        """Largest relative difference of any episode."""
        pairs = zip(self.column(name, key), self.column(self.case.best_static, key), strict=True)
        return max(value / reference - 1.0 for value, reference in pairs)

    def gap_closed(self, name: str) -> float:
        """Part of what the dynamic oracle saves that the controller saves."""
        return -self.excess(name) / self.case.cost_room

    def saved(self, name: str, reference: str) -> float:
        """Cost saved against another controller, in per cent."""
        return 100.0 * (1.0 - self.mean(name, "cost") / self.mean(reference, "cost"))

    def gib_migrated(self, name: str) -> float:
        """Per episode."""
        return self.mean(name, "bytes_migrated") / GIB

    @property
    def is_as_mapped(self) -> bool:
        """Whether the best static costs what the map says, where both have equally many episodes."""
        case = self.case
        if len(self.cells[case.best_static]) != case.episodes:
            return True
        return bool(np.isclose(self.mean(case.best_static, "cost"), case.best_cost, rtol=SAME, atol=0.0))

    @property
    def is_reused(self) -> bool:
        """Whether the best static reuses anything: else it is no division of memory but a cap on concurrency."""
        return any(self.column(self.case.best_static, "hit_rate"))

    @property
    def kind(self) -> str:
        """recorded; or of generated traffic: no reuse, shifting (in phases), or steady, which may drift or swell."""
        if self.case.is_recorded:
            return "recorded"
        if not self.is_reused:
            return "no reuse"
        return "shifting" if SCENARIOS[self.case.name].has_phases else "steady"


def measure(
    cases: Sequence[SaneCase],
    names: Sequence[str],
    seeds: Sequence[int],
    jobs: int,
    progress: bool,
    with_share_error: bool = False,
) -> list[Regret]:
    """In the order of the cases, which are grouped by platform. The share error needs all static splits of a grid;
    where these are run on several episodes OTHERS_BEST is judged as well."""
    regrets: list[Regret] = []
    for platform in dict.fromkeys(case.traffic.platform for case in cases):
        own = [case for case in cases if case.traffic.platform == platform]
        bench = Bench(platform.config, tuple(case.traffic.workload() for case in own), "validation")
        with Runner(bench, jobs, progress) as runner:
            for place, case in enumerate(own):
                grid = _grid(case, bench.config) if with_share_error else {}
                label = f"{len(regrets) + 1} of {len(cases)}: {case.traffic.name}"
                everyone = list(dict.fromkeys((case.best_static, *names, *grid.values())))
                rollouts = _rollouts(runner, place, everyone, seeds, SEGMENT_S if grid else 0.0, label)
                judged = [case.best_static, *names]
                if grid and len(seeds) > 1:
                    rollouts[OTHERS_BEST] = _others_best([rollouts[name] for name in _even(grid, bench.config)])
                    judged.append(OTHERS_BEST)
                cells = {name: [rollout.cell for rollout in rollouts[name]] for name in judged}
                regrets.append(Regret(case, cells, _share_errors(grid, rollouts, judged) if grid else {}))
    return regrets


def _even(grid: Mapping[float, str], config: ServingConfig) -> list[str]:
    """Without the best one, which hindsight has put there."""
    return [grid[share] for share in static_shares(make_layout(config), GRID_STEP)]


def _grid(case: SaneCase, config: ServingConfig) -> dict[float, str]:
    """Static controllers by share, ascending: the best one and those at most GRID_STEP apart."""
    shares = sorted({*static_shares(make_layout(config), GRID_STEP), case.best_share})
    return {share: static_name(share) for share in shares}


def _rollouts(
    runner: Runner, workload: int, names: Sequence[str], seeds: Sequence[int], segment_s: float, label: str
) -> dict[str, list[Rollout]]:
    """By controller, in the order of the seeds."""
    shares = tuple(static_shares(make_layout(runner.bench.config)))
    tasks = [
        Task(name, workload, seed, oracle_shares=shares, late_s=float(name.removeprefix(ORACLES)), segment_s=segment_s)
        if name.startswith(ORACLES)
        else Task(name, workload, seed, segment_s=segment_s)
        for name in names
        for seed in seeds
    ]
    found = runner.run(tasks, label)
    return {name: found[place * len(seeds) : (place + 1) * len(seeds)] for place, name in enumerate(names)}


def _others_best(statics: Sequence[list[Rollout]]) -> list[Rollout]:
    """Of every episode the rollout of that static split which is best on the others; the splits ascend."""
    figures = (
        np.array([[rollout.cell[key] for rollout in own] for own in statics]) for key in ("cost", "unserved_tokens")
    )
    return [statics[place][k] for k, place in enumerate(best_on_others(*figures))]


def _share_errors(
    grid: Mapping[float, str], rollouts: Mapping[str, list[Rollout]], names: Sequence[str]
) -> dict[str, ShareError]:
    statics = [rollouts[name] for name in grid.values()]
    return {name: share_error(list(grid), statics, rollouts[name]) for name in names}
