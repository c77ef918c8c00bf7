"""Every row, and the static split that could have been set, on the same episodes of each case."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from hbmgym.controllers.static import static_name
from hbmgym.envs.serving.config import GIB
from hbmgym.envs.serving.core import make_layout
from hbmgym.envs.traces.scenarios import SCENARIOS
from hbmgym.envs.traces.seeds import SEED_RANGES
from hbmgym.envs.workload import episodes_with_rows
from hbmgym.eval.cells import Bench, Runner, Task
from hbmgym.eval.comparison import COARSE_STEP, static_shares
from hbmgym.eval.intervals import Interval, relative_difference
from hbmgym.eval.regrets.cases import SaneCase
from hbmgym.eval.rollout import Cell
from hbmgym.eval.rows import DEFAULT
from hbmgym.eval.statics import JUDGED, WORST_CLASS, best_static

ROOM = 0.05
"""There is room in a case where SGLang's default costs so much more than the split that could have been set."""


@dataclass(frozen=True)
class Regret:
    """One case under every row: figures over those of the static split that the map found on other episodes."""

    case: SaneCase
    cells: dict[str, list[Cell]]
    """By row, in the order of the seeds."""
    grid: tuple[str, ...] = field(default=())
    """Static splits among them, ascending, of which one is the best in hindsight."""

    def column(self, name: str, key: str) -> list[float]:
        return [cell[key] for cell in self.cells[name]]

    def mean(self, name: str, key: str) -> float:
        return float(np.mean(self.column(name, key)))

    def excess(self, name: str, key: str = "cost") -> float:
        """A figure, mostly the cost, over that of the split that could have been set, less 1."""
        return self.mean(name, key) / self.mean(self.case.best_static, key) - 1.0

    def relative(self, name: str, key: str = "cost") -> Interval:
        """Any figure's excess, with a 95 % interval over the episodes."""
        return relative_difference(self.column(name, key), self.column(self.case.best_static, key))

    def unserved(self, name: str) -> float:
        """Part of a class's tokens that it leaves unserved beyond what the reference does; below 0 where it serves
        more."""
        return self.mean(name, WORST_CLASS) - self.mean(self.case.best_static, WORST_CLASS)

    def gib_migrated(self, name: str) -> float:
        """Per episode."""
        return self.mean(name, "bytes_migrated") / GIB

    @property
    def in_hindsight(self) -> str | None:
        """The static split that is best on these very episodes; None where no others were run."""
        if not self.grid:
            return None
        costs, unserved = (np.array([self.mean(name, key) for name in self.grid]) for key in JUDGED)
        return self.grid[best_static(costs, unserved)]

    def over_hindsight(self, name: str) -> float | None:
        """Cost over that of the split that is best in hindsight, less 1."""
        return (
            None if self.in_hindsight is None else self.mean(name, "cost") / self.mean(self.in_hindsight, "cost") - 1.0
        )

    @property
    def has_room(self) -> bool:
        """Whether the split matters: SGLang's default costs ROOM more."""
        return DEFAULT in self.cells and self.excess(DEFAULT) > ROOM

    @property
    def is_reused(self) -> bool:
        """Whether the reference reuses anything: else it is no division of memory but a cap on concurrency."""
        return any(self.column(self.case.best_static, "hit_rate"))

    @property
    def kind(self) -> str:
        """recorded; or of generated traffic: no reuse, shifting (in phases), or steady, which may drift or swell."""
        if self.case.is_recorded:
            return "recorded"
        if not self.is_reused:
            return "no reuse"
        return "shifting" if SCENARIOS[self.case.name].has_phases else "steady"


def fresh_seeds(cases: Sequence[SaneCase]) -> list[int]:
    """All validation seeds on which the map has not chosen its splits."""
    return [seed for seed in SEED_RANGES["validation"] if seed > max(case.last_seed for case in cases)]


def measure(
    cases: Sequence[SaneCase],
    names: Sequence[str],
    seeds: Sequence[int],
    count: int,
    jobs: int,
    progress: bool,
    hindsight: bool = False,
) -> list[Regret]:
    """In the order of the cases, which are grouped by platform; each on the first `count` seeds that it has traffic
    for. The best split in hindsight needs a grid of them."""
    regrets: list[Regret] = []
    for platform in dict.fromkeys(case.traffic.platform for case in cases):
        own = [case for case in cases if case.traffic.platform == platform]
        bench = Bench(platform.config, tuple(case.traffic.workload() for case in own), "validation")
        shares = static_shares(make_layout(bench.config), COARSE_STEP) if hindsight else []
        with Runner(bench, jobs, progress) as runner:
            for place, case in enumerate(own):
                grid = tuple(map(static_name, sorted({*shares, case.best_share}))) if shares else ()
                everyone = list(dict.fromkeys((case.best_static, *names, *grid)))
                episodes = episodes_with_rows(bench.workloads[place], "validation", seeds, count)
                used = [episode.seed for episode in episodes]
                tasks = [Task(name, place, seed) for name in everyone for seed in used]
                found = runner.run(tasks, f"{len(regrets) + 1} of {len(cases)}: {case.traffic.name}")
                by_row = [found[i * count : (i + 1) * count] for i in range(len(everyone))]
                cells = {name: [rollout.cell for rollout in own] for name, own in zip(everyone, by_row, strict=True)}
                regrets.append(Regret(case, cells, grid))
    return regrets
