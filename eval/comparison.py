"""A comparison: every row on every workload and seed, the static split that could have been set, rho and the room."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hbmgym.controllers.static import static_name
from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.serving.core import make_layout
from hbmgym.envs.traces.scenarios import SCENARIOS
from hbmgym.envs.workload import ScenarioWorkload
from hbmgym.eval.cells import Bench, Runner, Task, check_comparable
from hbmgym.eval.intervals import LEVEL, LOOKED_LEVEL, Interval, mean_interval, relative_difference
from hbmgym.eval.oracle import ORACLE, coordinate_descent
from hbmgym.eval.rollout import Cell, Rollout
from hbmgym.eval.rows import find_row, is_split, usual_rows
from hbmgym.eval.statics import JUDGED, best_costs, best_on_others, best_static
from hbmgym.memory_backend.split import Layout

STATIC_GRID, COARSE_GRID = "static-grid", "static-coarse"
GRID_STEP, COARSE_STEP = 0.025, 0.05
GRIDS = {STATIC_GRID: GRID_STEP, COARSE_GRID: COARSE_STEP}
SGLANG_DEFAULT = "sglang-0.9"
DEFAULT_CONTROLLERS = f"{STATIC_GRID},{SGLANG_DEFAULT},float,priced,threshold,demand,gradient,convex,helm"
OTHERS_BEST = "static:others"
"""Row of the static split that is best on the other episodes: a split that could have been set before."""
RHO_SHARES = 9
ORACLE_CHOICES = 14
BATCH = 8
"""Episodes from one look at the intervals to the next, where episodes are added until these are narrow. LOOKED_LEVEL
was measured with it."""


def static_shares(layout: Layout, step: float = GRID_STEP) -> list[float]:
    """Realisable shares from bound to bound, at most `step` apart where a slot is not wider than that."""
    realisable = sorted({layout.share(slots) for slots in range(layout.min_slots, layout.max_slots + 1)})
    picked = [realisable[0]]
    for share, after in itertools.pairwise([*realisable[1:], float("inf")]):
        if after > picked[-1] + step:
            picked.append(share)
    return picked


def row_names(text: str, config: ServingConfig) -> list[str]:
    """Of `eval.rows`, from 'a,b@priced,static-grid'; ValueError in one line for one that is unknown or given twice. Of
    DEFAULT_CONTROLLERS those are left out that cannot decide in such windows; each leaves a line."""
    layout = make_layout(config)
    names: list[str] = []
    for name in filter(None, (part.strip() for part in text.split(","))):
        if step := GRIDS.get(name):
            names += map(static_name, static_shares(layout, step))
        else:
            names.append(name)
    if text == DEFAULT_CONTROLLERS:
        names = usual_rows(names, config)
    if not names:
        raise ValueError(f"--controllers is empty: give names, for example {DEFAULT_CONTROLLERS}")
    titles = [find_row(name, config).name for name in names]
    if twice := sorted({title for title in titles if titles.count(title) > 1}):
        raise ValueError(f"--controllers names {', '.join(twice)} twice: compare runs of one kind in separate tables")
    return names


@dataclass(frozen=True)
class WorkloadResult:
    """All rows of one workload."""

    name: str
    rho: float
    cells: list[Cell]
    within: float | None = None
    """Episodes were added until every difference in cost had so narrow an interval, or to the last; None: they were
    counted beforehand."""

    @property
    def loop(self) -> str:
        """open or closed."""
        return str(self.cells[0]["loop"])

    @property
    def controllers(self) -> list[str]:
        return list(dict.fromkeys(cell["controller"] for cell in self.cells))

    def column(self, controller: str, key: str) -> list[float]:
        """One value per seed, in the order of the seeds."""
        return [cell[key] for cell in self.cells if cell["controller"] == controller]

    def mean(self, controller: str, key: str) -> float:
        return float(np.mean(self.column(controller, key)))

    @property
    def statics(self) -> list[str]:
        """Splits under the rules of the table."""
        return [name for name in self.controllers if name.startswith("static-") and "@" not in name]

    @property
    def best_static(self) -> str | None:
        """The one static split with the least mean cost over the seeds, of those that serve what the machine can hold
        (`eval.statics`); None when no static was run."""
        if not self.statics:
            return None
        costs, unserved = (self._of_statics(key).mean(axis=1) for key in JUDGED)
        return self.statics[best_static(costs, unserved)]

    @property
    def best_static_per_seed(self) -> float | None:
        """Mean over the seeds of the cost of each one's own best static: what nobody could have set beforehand."""
        if not self.statics:
            return None
        return float(best_costs(*map(self._of_statics, JUDGED)).mean())

    @property
    def cheapest_static(self) -> str | None:
        """The one with the least mean cost, whatever it serves."""
        return min(self.statics, key=lambda name: self.mean(name, "cost"), default=None)

    def _of_statics(self, key: str) -> np.ndarray:
        """float64 (statics, seeds)."""
        return np.array([self.column(name, key) for name in self.statics])

    @property
    def rivals(self) -> list[str]:
        """Rows that are more than a split under the rules of the table, the oracle not among them."""
        return [name for name in self.controllers if not is_split(name) and name not in (ORACLE, OTHERS_BEST)]

    @property
    def differences(self) -> list[tuple[str, str]]:
        """Who is set against whom: rivals against the split that could have been set, the best one in hindsight, and
        SGLang's default; none where no static split was run."""
        if self.best_static is None:
            return []
        known = (OTHERS_BEST, self.best_static, SGLANG_DEFAULT)
        references = [name for name in known if name in self.controllers]
        return [(name, reference) for name in self.rivals for reference in references]

    def against(self, name: str, reference: str, key: str = "cost") -> Interval:
        """What `name` has more of it than `reference`, as a part of that."""
        return relative_difference(self.column(name, key), self.column(reference, key), self._level)

    def cost(self, name: str) -> Interval:
        """Mean over the seeds."""
        return mean_interval(self.column(name, "cost"), self._level)

    @property
    def _level(self) -> float:
        return LEVEL if self.within is None else LOOKED_LEVEL

    @property
    def widest(self) -> tuple[str, str]:
        """The difference in cost that is known worst."""
        return max(self.differences, key=lambda pair: self.against(*pair).half_width)

    @property
    def is_narrow(self) -> bool:
        """Whether every difference in cost is known within `within`."""
        return self.within is not None and self.against(*self.widest).half_width <= self.within

    def room(self, key: str) -> float | None:
        """1 - per-phase best / best static, None when either is missing."""
        if self.best_static is None or ORACLE not in self.controllers:
            return None
        return 1.0 - self.mean(ORACLE, key) / max(self.mean(self.best_static, key), 1e-300)


@dataclass(frozen=True)
class Comparison:
    rollouts: list[Rollout]
    results: list[WorkloadResult]


def compare(
    bench: Bench,
    names: Sequence[str],
    seeds: Sequence[int],
    *,
    jobs: int,
    oracle: bool,
    progress: bool,
    within: float | None = None,
) -> Comparison:
    """Run everything. With `within`, `seeds` are added by the BATCH until every difference in cost from the references
    is known so well (`WorkloadResult.is_narrow`). Raises UnequalCells if the rows turn out not to be comparable."""
    rollouts, results = [], []
    with Runner(bench, jobs, progress) as runner:
        for w in range(len(bench.workloads)):
            own = _rollouts(runner, w, names, seeds, within)
            if oracle:
                own += _oracle_rollouts(runner, w, own)
            rollouts += own
            results.append(_result(runner, w, own, within))
    return Comparison(rollouts, results)


def _rollouts(
    runner: Runner, workload: int, names: Sequence[str], seeds: Sequence[int], within: float | None
) -> list[Rollout]:
    """By controller, then by seed; of all controllers as many seeds."""
    name = runner.bench.workloads[workload].name
    found: dict[str, list[Rollout]] = {controller: [] for controller in names}
    size = len(seeds) if within is None else BATCH
    for begin in range(0, len(seeds), size):
        batch = seeds[begin : begin + size]
        new = iter(runner.run([Task(own, workload, seed) for own in names for seed in batch], name))
        for own in found.values():
            own += itertools.islice(new, len(batch))
        rollouts = [rollout for own in found.values() for rollout in own]
        cells = [rollout.cell for rollout in rollouts]
        if WorkloadResult(name, 0.0, [*cells, *_others_best(cells)], within).is_narrow:
            break
    return rollouts


def _result(runner: Runner, workload: int, rollouts: Sequence[Rollout], within: float | None) -> WorkloadResult:
    cells = [rollout.cell for rollout in rollouts]
    check_comparable(cells)
    rho = runner.rho(workload, cells[0]["seed"], rho_shares(runner.bench))
    for cell in cells:
        cell["rho"] = rho if np.isfinite(rho) else None  # JSON knows no infinity
    return WorkloadResult(runner.bench.workloads[workload].name, rho, [*cells, *_others_best(cells)], within)


def _others_best(cells: Sequence[Cell]) -> list[Cell]:
    """The cells of OTHERS_BEST; none where nothing can be learned from other episodes."""
    known = WorkloadResult("", 0.0, list(cells))
    if len(known.statics) < 2 or len(cells) < 2 * len(known.controllers):
        return []
    by_static = [[cell for cell in cells if cell["controller"] == name] for name in known.statics]
    by_static.sort(key=lambda own: float(own[0]["kv_share_mean"]))
    costs, unserved = (np.array([[cell[key] for cell in own] for own in by_static]) for key in JUDGED)
    chosen = best_on_others(costs, unserved)
    return [{**by_static[place][k], "controller": OTHERS_BEST} for k, place in enumerate(chosen)]


def rho_shares(bench: Bench) -> list[float]:
    low, high = make_layout(bench.config).share_bounds
    return [float(share) for share in np.linspace(low, high, RHO_SHARES + 2)[1:-1]]


def _oracle_rollouts(runner: Runner, workload: int, rollouts: Sequence[Rollout]) -> list[Rollout]:
    """The per-phase best of a scenario with phases, found by coordinate descent from the best static."""
    name = runner.bench.workloads[workload].name
    # A recorded trace may bear the name of a scenario, but has no marked phases.
    generated = isinstance(runner.bench.workloads[workload], ScenarioWorkload)
    if not generated or not SCENARIOS[name].has_phases:
        return []
    layout = make_layout(runner.bench.config)
    known = WorkloadResult(name, 0.0, [rollout.cell for rollout in rollouts])
    seeds = [rollout.cell["seed"] for rollout in rollouts if rollout.cell["controller"] == known.controllers[0]]
    start = 0.5 if known.best_static is None else known.mean(known.best_static, "kv_share_mean")
    found: dict[tuple[float, ...], list[Rollout]] = {}

    def cost(shares: tuple[float, ...]) -> float:
        if shares not in found:
            tasks = [Task(ORACLE, workload, seed, shares) for seed in seeds]
            found[shares] = runner.run(tasks, f"{ORACLE} {' / '.join(f'{share:.2f}' for share in shares)}")
        return float(np.mean([rollout.cell["cost"] for rollout in found[shares]]))

    low, high = layout.share_bounds
    choices = [float(share) for share in np.linspace(low, high, ORACLE_CHOICES + 2)[1:-1]]
    best, _ = coordinate_descent(cost, (start,) * len(SCENARIOS[name].classes), choices)
    return found[best]
