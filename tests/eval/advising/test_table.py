"""The search for the best split, and what the table of runs says: the same cells as a comparison's."""

from collections.abc import Callable

import numpy as np
import pytest

from hbmgym.envs.serving.core import make_layout
from hbmgym.envs.traces.seeds import seeds_for
from hbmgym.eval.advising.table import Runs, search
from hbmgym.eval.advising.traffic import of_scenario
from hbmgym.eval.cells import Bench, Runner
from hbmgym.eval.comparison import compare, static_shares

from ..traffic import CONFIG, MIX

SEEDS = seeds_for("validation", 2)
GRID = [f"static-{share:.3f}" for share in static_shares(make_layout(CONFIG))]


@pytest.fixture(scope="module")
def runs():
    traffic = of_scenario(MIX, len(SEEDS))
    with Runner(Bench(CONFIG, traffic.workloads, "all"), jobs=1, progress=False) as runner:
        yield Runs(runner, traffic)


@pytest.fixture(scope="module")
def comparison():
    return compare(Bench(CONFIG, (MIX,), "validation"), GRID, SEEDS, jobs=1, oracle=False, progress=False).results[0]


def test_the_search_finds_what_a_comparison_of_all_splits_finds(runs, comparison):
    best, tried = search(runs, GRID)
    assert best == comparison.best_static
    assert len(tried) < len(GRID)
    for name in tried:
        for figure in ("cost", "ttft_p99_s", "hit_rate", "worst_class_unserved"):
            assert runs.column(name, figure) == comparison.column(name, figure)


def test_what_a_split_costs_more_is_paired_by_episode(runs):
    runs.run(["static-0.300", "static-0.700"], "")
    costs = [np.mean(runs.column(name, "cost")) for name in ("static-0.700", "static-0.300")]
    value, low, high = runs.against("static-0.700", "static-0.300")
    assert value == pytest.approx(costs[0] / costs[1] - 1)
    assert low <= value <= high


def test_nothing_runs_twice(runs):
    runs.run(["static-0.500"], "")
    before = runs.of("static-0.500")
    runs.run(["static-0.500", "static-0.500"], "")
    assert runs.of("static-0.500") is before


class Slope(Runs):
    """Runs of splits whose cost is known."""

    def __init__(self, cost: Callable[[int], float], size: int) -> None:
        self.cost, self.grid, self.asked = cost, [str(place) for place in range(size)], 0

    def run(self, names, label):
        self.asked = len(set(names))

    def column(self, name: str, figure: str) -> list[float]:
        return [self.cost(int(name)) if figure == "cost" else 0.0]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 39, 40])
def test_a_valley_s_bottom_is_found_wherever_it_lies(size):
    for bottom in range(size):
        valley = Slope(lambda place, bottom=bottom: abs(place - bottom), size)
        best, tried = search(valley, valley.grid)
        assert best == str(bottom)
        assert tried == sorted(tried, key=int)
        assert size < 20 or valley.asked <= size // 2
