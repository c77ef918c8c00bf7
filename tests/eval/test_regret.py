"""The regret table: sane cases of the map, fresh and equal episodes, hindsight beside it, one line for a bad map."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hbmgym.envs.platforms import find_platform
from hbmgym.envs.traces.scenarios import SCENARIOS
from hbmgym.envs.traces.trace import TraceError
from hbmgym.eval.opportunities.cases import Case
from hbmgym.eval.regret import MAP as SHIPPED_MAP
from hbmgym.eval.regret import main
from hbmgym.eval.regrets.cases import SaneCase, sane_cases
from hbmgym.eval.regrets.measure import ROOM, Regret, fresh_seeds, measure
from hbmgym.eval.regrets.summary import WITH_ROOM, groups, summary
from hbmgym.eval.rows import DEFAULT
from hbmgym.eval.statics import WORST_CLASS

from .traffic import HBM_GIB, MODEL, write_trace

MAP = Path(SHIPPED_MAP)
PLATFORM = find_platform("qwen3-next-80b-a3b@h200")
SMALL = f"{MODEL}@h200@{HBM_GIB:g}"


def sane(scenario: str = "steady-chat", trace: str = "", last_seed: int = 10_009) -> SaneCase:
    return SaneCase(Case(PLATFORM, scenario, trace), 0.5, 0.25, last_seed)


def cells(costs: Sequence[float], hit_rate: float = 0.5, unserved: float = 0.0) -> list[dict[str, float]]:
    usual = {"bytes_migrated": 2.0**31, "hit_rate": hit_rate, WORST_CLASS: unserved, "kv_share_mean": 0.5}
    return [{"cost": c, "token_cost": 3.0 * c, "ttft_p99_s": 2.0 * c, **usual} for c in costs]


def regret(
    cost: Sequence[float], static: Sequence[float], case: SaneCase | None = None, hit_rate: float = 0.5
) -> Regret:
    case = case or sane()
    return Regret(case, {case.best_static: cells(static, hit_rate), "rule": cells(cost)})


def row(name: str) -> dict[str, Any]:
    """A row of a map."""
    best = {"best_static_share": 0.5, WORST_CLASS: 0.0}
    return {"case": name, "platform": SMALL, "rho": 0.5, "last_seed": 10_000, **best}


def test_sane_cases_can_be_served_by_a_static_split():
    rows = {(row["case"], row["platform"]): row for row in json.loads(MAP.read_text(encoding="utf-8"))}
    cases = sane_cases(MAP)
    for case in cases:
        row = rows[case.name, case.platform]
        assert row["rho"] < 1.0 and row[WORST_CLASS] <= 0.01
        assert row["verdict"] not in ("overloaded", "turns away")
    left_out = {key for key in rows if key not in {(case.name, case.platform) for case in cases}}
    assert all(rows[key]["verdict"] in ("overloaded", "turns away") for key in left_out if key[0] in SCENARIOS)
    chosen = sane_cases(MAP, ["falcon-h1-34b@h100"], ["burst"])
    assert [(case.name, case.platform) for case in chosen] == [("burst", "falcon-h1-34b@h100")]


def test_a_regret_is_relative_to_the_static_split_on_the_same_episodes():
    measured = regret([0.9, 1.2], [1.0, 1.0])
    assert measured.excess("rule") == measured.relative("rule")[0] == pytest.approx(0.05)
    assert measured.over_hindsight("rule") is None


def test_hindsight_is_the_best_split_on_these_episodes_that_serves():
    case = sane()
    rows = {case.best_static: cells([1.0, 1.0]), "static-0.1": cells([0.1, 0.1], unserved=0.3)}
    rows |= {"static-0.2": cells([0.2, 1.4]), "rule": cells([1.2, 1.2])}
    measured = Regret(case, rows, ("static-0.1", "static-0.2", case.best_static))
    assert measured.in_hindsight == "static-0.2"
    assert measured.over_hindsight("rule") == pytest.approx(0.5)
    assert summary([measured], "rule")["over_hindsight_mean"] == pytest.approx(0.5)
    assert summary([measured], "rule")["mean"] == pytest.approx(0.2)


def test_the_summary_tells_the_worst_case():
    totals = summary([regret([1.3], [1.0]), regret([0.95], [1.0]), regret([1.02], [1.0])], "rule")
    assert totals["worst"] == pytest.approx(0.3)
    assert totals["median"] == pytest.approx(0.02)
    assert (totals["far"], totals["cases"], totals["gib_migrated"]) == (1, 3, 2.0)
    assert totals["over_hindsight_mean"] is None


def test_kinds_are_facts_of_traffic_and_cells():
    cases = {
        "shifting": regret([1.0], [1.0], sane("mix-burst")),
        "steady": regret([1.0], [1.0], sane("trend")),
        "no reuse": regret([1.0], [1.0], sane("mix-shift"), hit_rate=0.0),
        "recorded": regret([1.0], [1.0], sane("", trace="some.npz")),
    }
    assert [case.kind for case in cases.values()] == list(cases)
    everything = list(cases.values())
    reused = [case for case in everything if case.kind != "no reuse"]
    assert groups(everything) == {"something reused": reused, **{kind: [case] for kind, case in cases.items()}}


def test_cases_where_the_default_is_far_from_the_static_are_a_group():
    with_room, without = (regret([1.0], [1.0]) for _ in range(2))
    with_room.cells[DEFAULT] = cells([1.01 + ROOM])
    without.cells[DEFAULT] = cells([0.99 + ROOM])
    assert groups([with_room, without])[WITH_ROOM] == [with_room]


def test_no_row_is_judged_on_the_episodes_that_chose_the_split():
    seeds = fresh_seeds([sane(last_seed=10_009), sane(last_seed=10_015)])
    assert seeds == list(range(10_016, 11_000))


def test_a_seed_without_traffic_makes_way_for_the_next():
    case = sane_cases(MAP, ["qwen3.5-27b@h100"], ["swarm"])[0]
    with pytest.raises(TraceError, match="0 rows"):
        case.traffic.workload().episode("validation", 10_015)
    (measured,) = measure([case], [], range(10_014, 10_100), 2, 1, False)
    assert [cell["seed"] for cell in measured.cells[case.best_static]] == [10_014, 10_016]


def test_every_row_and_the_grid_run_on_the_same_episodes():
    case = sane_cases(MAP, [PLATFORM.name], ["idle"])[0]
    (measured,) = measure([case], [case.best_static, "float", "default"], [10_020, 10_021], 2, 1, False, hindsight=True)
    assert {case.best_static, "float", "default"} < set(measured.cells)
    assert {tuple(cell["seed"] for cell in own) for own in measured.cells.values()} == {(10_020, 10_021)}
    assert measured.relative(case.best_static)[0] == 0.0
    assert case.best_static in measured.grid and len(measured.grid) > 10
    assert measured.excess(measured.in_hindsight) <= 0.0


def test_the_command_prints_and_keeps_the_table(tmp_path, capsys):
    asked = ["--platform", PLATFORM.name, "--scenario", "idle", "--seeds", "2", "--jobs", "1", "--no-hindsight"]
    main([*asked, "--map", str(MAP), "--controllers", "default,demand@priced", "--out", str(tmp_path / "out")])
    kept = json.loads((tmp_path / "out" / "regret.json").read_text(encoding="utf-8"))
    assert [row["case"] for row in kept["cases"]] == ["idle"]
    assert set(kept["summary"]) == {"default", "demand@priced"} and kept["summary"]["default"]["cases"] == 1
    said = capsys.readouterr().out
    assert "idle" in said and "demand@priced" in said


def test_a_recorded_trace_is_judged_at_its_load(tmp_path, capsys):
    trace, table = write_trace(tmp_path / "own.jsonl", span_s=9000.0), tmp_path / "map.json"
    table.write_text(json.dumps([row("own"), row("idle"), row("other")]))
    asked = ["--map", str(table), "--trace", str(trace), "--seeds", "1", "--jobs", "1", "--no-hindsight"]
    main([*asked, "--controllers", "default,demand", "--out", str(tmp_path / "out")])
    kept = json.loads((tmp_path / "out" / "regret.json").read_text(encoding="utf-8"))
    assert [(case["case"], case["kind"]) for case in kept["cases"]] == [("own", "recorded")]
    assert 0.0 < kept["cases"][0]["load"] <= 1.0
    assert "are not independent" in capsys.readouterr().out


def test_a_trace_that_the_map_has_not_is_named(tmp_path, capsys):
    trace = write_trace(tmp_path / "idle.jsonl")
    for arguments, message in (
        ([trace], "idle.jsonl: the map's recorded traces are "),
        ([trace, trace], "names one case of the map twice"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([word for path in arguments for word in ("--trace", str(path))])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory; run eval/opportunity.py"),
        ("[{}]", "is no map of this version's eval/opportunity.py"),
        pytest.param(MAP.read_text(encoding="utf-8").replace("@h200", "@h2"), "platform 'qwen3", id="unknown platform"),
        ("[]", "no sane case of the map is left"),
    ],
)
def test_a_map_that_cannot_be_used_gets_one_line(tmp_path, capsys, content, message):
    path = tmp_path / "map.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        main(["--map", str(path)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
