"""The table: statics at equal steps, the best of them in hindsight, the room, and names that can be told apart."""

import dataclasses

import numpy as np
import pytest

from hbmgym.controllers.registry import make_controller
from hbmgym.controllers.static import static_name
from hbmgym.envs.serving.core import make_layout
from hbmgym.envs.traces.load import load_trace
from hbmgym.envs.traces.seeds import seeds_for
from hbmgym.envs.workload import TraceWorkload
from hbmgym.eval.cells import Bench
from hbmgym.eval.comparison import ORACLE, WorkloadResult, compare, row_names, static_shares
from hbmgym.eval.intervals import LOOKED_LEVEL, relative_difference
from hbmgym.eval.statics import WORST_CLASS
from hbmgym.eval.table import print_comparison, summary_lines
from tests.envs.episodes import Ask, make_episode

from .traffic import CHAT, CONFIG, MIX, write_trace

LAYOUT = make_layout(CONFIG)
SEEDS = (10_000, 10_001)


@pytest.mark.parametrize("hbm_gib", [1.0, 2.0, 40.0])
@pytest.mark.parametrize("step", [0.025, 0.1])
def test_static_shares_are_realisable_and_near_each_other(hbm_gib, step):
    layout = make_layout(dataclasses.replace(CONFIG, hbm_gib=hbm_gib))
    shares = static_shares(layout, step)
    assert (shares[0], shares[-1]) == layout.share_bounds
    assert all(layout.share(layout.slots(share)) == share for share in shares)
    assert np.diff(shares).min() > 0.0
    # Where a slot is wider than the step, neighbours are a slot apart.
    assert np.diff(shares).max() <= max(step, layout.share_step + 1 / layout.chunks) + 1e-9


def test_static_shares_of_the_default_budget_are_at_most_a_fortieth_apart():
    layout = make_layout(dataclasses.replace(CONFIG, model="qwen3-next-80b-a3b", hbm_gib=40.0))
    assert np.diff(static_shares(layout)).max() <= 0.025


def test_names_are_kept_in_order_and_the_grid_is_expanded():
    names = row_names(" threshold, static-grid,demand ,", CONFIG)
    assert names == ["threshold", *map(static_name, static_shares(LAYOUT)), "demand"]


def test_every_static_of_the_grid_keeps_its_split_when_its_name_is_read():
    for name, share in zip(row_names("static-grid", CONFIG), static_shares(LAYOUT), strict=True):
        assert LAYOUT.share(LAYOUT.slots(make_controller(name).fixed_share)) == share


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "--controllers is empty"),
        (" , ", "--controllers is empty"),
        ("threshold,nobody", "'nobody' is unknown"),
        ("static-much", "'much' is not a number"),
        ("static-1.5", "1.5"),
        ("demand,threshold,demand", "demand twice"),
        ("static-0.5,static-0.50", "static-0.500 twice"),
        ("ppo:nowhere.npz", "nowhere.npz: no such file"),
    ],
)
def test_bad_names_are_refused_in_one_line(text, named):
    with pytest.raises(ValueError) as refusal:
        row_names(text, CONFIG)
    assert named in str(refusal.value) and "\n" not in str(refusal.value)


def result(**costs: list[float]) -> WorkloadResult:
    names = {name.replace("_", "-"): values for name, values in costs.items()}
    cells = [{"controller": name, "cost": cost, WORST_CLASS: 0.0} for name, values in names.items() for cost in values]
    return WorkloadResult("by hand", 0.5, cells)


def test_the_best_static_has_the_least_mean_cost_over_the_seeds():
    assert result(static_0=[1.0, 9.0], static_1=[4.0, 4.0], demand=[0.0, 0.0]).best_static == "static-1"


def test_the_cheapest_split_is_not_the_best_where_it_refuses():
    refused = result(static_0=[0.1, 0.1], static_1=[0.4, 0.4])
    for cell in refused.cells[:2]:
        cell[WORST_CLASS] = 0.3
    assert (refused.best_static, refused.cheapest_static) == ("static-1", "static-0")
    assert refused.best_static_per_seed == pytest.approx(0.4)


def test_without_a_static_there_is_no_best_one_and_no_room():
    assert result(demand=[1.0]).best_static is None
    assert result(demand=[1.0], oracle_phases=[0.5]).room("cost") is None


def test_room_is_what_the_oracle_saves_of_the_best_static():
    assert result(static_0=[2.0], static_1=[4.0], oracle_phases=[1.5]).room("cost") == pytest.approx(0.25)
    assert result(static_0=[2.0]).room("cost") is None


def test_every_cell_tells_the_rho_of_its_workload():
    bench = Bench(dataclasses.replace(CONFIG, hbm_gib=8.0), (MIX, CHAT), "validation")
    found = compare(bench, ["static-0.8"], SEEDS, jobs=1, oracle=False, progress=False)
    assert [result.name for result in found.results] == ["mix-shift", "steady-chat"]
    for one in found.results:
        assert {cell["rho"] for cell in one.cells} == {one.rho}
        assert len(one.cells) == len(SEEDS)
    assert found.results[0].rho != found.results[1].rho


def test_the_oracle_is_never_worse_than_its_start_and_only_where_there_are_phases(capsys):
    bench = Bench(CONFIG, (MIX, CHAT), "validation")
    found = compare(bench, ["static-0.3", "static-0.8", "demand"], SEEDS[:1], jobs=1, oracle=True, progress=False)
    mix, chat = found.results
    assert mix.mean(ORACLE, "cost") <= mix.mean(mix.best_static, "cost")
    assert mix.room("cost") >= 0.0
    assert ORACLE not in chat.controllers
    print_comparison(found)
    printed = capsys.readouterr().out
    assert "room (per-phase best under best static)" in printed
    assert f"{mix.best_static} (best static)" in printed
    for cell in mix.cells:
        wide = {"rejected": 12_345, "preemptions": 12_345, "moves_per_hour": 720.0, "gib_migrated_per_hour": 12_345.6}
        cell.update(wide, concurrency_cap_mean=1234.5, concurrency_cap_min=1234, hit_rate=0.123)
    print_comparison(found)
    assert "\N{HORIZONTAL ELLIPSIS}" not in capsys.readouterr().out, "a column is cut off"


MANY = seeds_for("validation", 20)


def of_many(within: float | None) -> WorkloadResult:
    names = ["static-0.3", "static-0.8", "sglang-0.9", "demand"]
    bench = Bench(CONFIG, (CHAT,), "validation")
    return compare(bench, names, MANY, jobs=1, oracle=False, progress=False, within=within).results[0]


@pytest.fixture(scope="module")
def counted() -> WorkloadResult:
    return of_many(None)


def widest_of(counted: WorkloadResult, episodes: int) -> float:
    """Half of the widest interval of its first episodes."""
    costs = {name: counted.column(name, "cost")[:episodes] for name in counted.controllers}
    best = min(counted.statics, key=lambda name: np.mean(costs[name]))
    pairs = [(costs["demand"], costs[reference]) for reference in (best, "sglang-0.9")]
    return max(relative_difference(*pair, LOOKED_LEVEL).half_width for pair in pairs)


def test_episodes_are_added_until_every_difference_is_known_well(counted):
    at_8, at_16, at_20 = (widest_of(counted, episodes) for episodes in (8, 16, 20))
    assert at_8 > at_16 > at_20
    for within, episodes, narrow in ((1.01 * at_8, 8, True), (0.99 * at_8, 16, True), (0.99 * at_20, 20, False)):
        found = of_many(within)
        assert found.cells == [cell for cell in counted.cells if cell["seed"] in MANY[:episodes]]
        why = summary_lines(found)[-1]
        assert why.startswith(f"{episodes} episodes: every" if narrow else f"{episodes} episodes, the limit: demand")
        assert ("so no more were added" in why, f"+-{at_20:.1%} only" in why) == (narrow, not narrow)


def test_intervals_that_were_looked_at_on_the_way_are_wider(counted):
    looked = dataclasses.replace(counted, within=1.0)
    for name, reference in counted.differences:
        assert looked.against(name, reference).half_width > 1.05 * counted.against(name, reference).half_width
    assert looked.cost("demand").half_width > 1.05 * counted.cost("demand").half_width
    assert looked.cost("demand").value == counted.cost("demand").value


def test_a_recorded_trace_with_the_name_of_a_scenario_has_no_oracle(tmp_path):
    trace = load_trace(write_trace(tmp_path / "mix-shift.jsonl"))
    bench = Bench(CONFIG, (TraceWorkload(trace, 1.0, CONFIG.page_tokens),), "validation")
    found = compare(bench, ["static-0.5"], SEEDS[:1], jobs=1, oracle=True, progress=False)
    assert found.results[0].controllers == ["static-0.500"]


def test_a_closed_loop_is_named_in_the_table_and_where_rho_is_told(capsys):
    for loop, named in (("open", False), ("closed", True)):
        bench = Bench(CONFIG, (dataclasses.replace(CHAT, loop=loop),), "validation")
        print_comparison(compare(bench, ["static-0.8"], SEEDS[:1], jobs=1, oracle=False, progress=False))
        printed = capsys.readouterr().out
        assert ("steady-chat, closed loop: 1 episodes" in printed) is named
        assert ("of the same rows in an open loop" in printed) is named


def test_a_static_split_that_refuses_what_others_serve_is_named():
    class OneLongPrompt:
        name = "by hand"

        def episode(self, part, seed):
            return make_episode([*(Ask(float(k), 640, 10) for k in range(9)), Ask(9.0, 64 * 300, 1)])

    bench = Bench(CONFIG, (OneLongPrompt(),), "validation")
    found = compare(bench, ["static-0.3", "sglang-0.9", "demand"], SEEDS[:1], jobs=1, oracle=False, progress=False)
    refusing = [line for line in summary_lines(found.results[0]) if "unserved that demand serves" in line]
    assert [line.split()[0] for line in refusing] == ["static-0.300", "sglang-0.9"]
    assert found.results[0].best_static == "static-0.300", "there is no other"


def test_an_overloaded_workload_is_marked():
    def first_line(rho: float) -> str:
        return summary_lines(dataclasses.replace(full_result(), rho=rho))[0]

    assert "overloaded" in first_line(1.2)
    assert "overloaded" not in first_line(0.9)


def full_result() -> WorkloadResult:
    bench = Bench(CONFIG, (CHAT,), "validation")
    return compare(bench, ["static-0.8"], SEEDS[:1], jobs=1, oracle=False, progress=False).results[0]


def test_without_an_oracle_the_room_is_said_to_be_unsearched():
    assert summary_lines(full_result())[0].endswith("room: unknown, no per-phase best was searched")


def test_a_rho_without_bound_is_null_in_the_cells():
    class OneForTheLargestPool:
        name = "by hand"

        def episode(self, part, seed):
            return make_episode([Ask(1.0, 64 * LAYOUT.pages(LAYOUT.min_slots), 1), Ask(2.0, 640, 10)])

    bench = Bench(CONFIG, (OneForTheLargestPool(),), "validation")
    result = compare(bench, ["static-0.8"], SEEDS[:1], jobs=1, oracle=False, progress=False).results[0]
    assert result.rho == float("inf")
    assert [cell["rho"] for cell in result.cells] == [None]
