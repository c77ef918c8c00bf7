"""The regret table: sane cases of the map, equal episodes, marks where there is room, one line for a bad map."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbmgym.envs.platforms import find_platform
from hbmgym.envs.serving.core import make_layout
from hbmgym.eval import opportunity
from hbmgym.eval.comparison import OTHERS_BEST, static_shares
from hbmgym.eval.opportunities.cases import Case
from hbmgym.eval.regret import MAP as SHIPPED_MAP
from hbmgym.eval.regret import main
from hbmgym.eval.regrets.cases import SaneCase, sane_cases, static_name
from hbmgym.eval.regrets.measure import Regret, _others_best, measure
from hbmgym.eval.regrets.share_error import GRID_STEP
from hbmgym.eval.regrets.summary import groups, price_of_saving, summary
from hbmgym.eval.rollout import Rollout
from hbmgym.eval.statics import best_static

from .traffic import HBM_GIB, MODEL, write_trace

MAP = Path(SHIPPED_MAP)
DEFAULT = find_platform("qwen3-next-80b-a3b@h200")
SMALL = f"{MODEL}@h200@{HBM_GIB:g}"


def sane(scenario: str = "steady-chat", cost_room: float = 0.1, trace: str = "", chosen_room: float = 0.04) -> SaneCase:
    return SaneCase(Case(DEFAULT, scenario, trace), 0.5, 0.25, cost_room, chosen_room, 0.2, best_cost=1.0, episodes=2)


def regret(cost: Sequence[float], best: Sequence[float], case: SaneCase | None = None, hit_rate: float = 0.5) -> Regret:
    def cells(costs: Sequence[float]) -> list[dict[str, float]]:
        usual = {"bytes_migrated": 2.0**31, "hit_rate": hit_rate, "unserved_tokens": 0.0}
        return [{"cost": c, "token_cost": 3.0 * c, "ttft_p99_s": 2.0 * c, **usual} for c in costs]

    case = case or sane()
    return Regret(case, {case.best_static: cells(best), "rule": cells(cost)})


def row(name: str) -> dict[str, Any]:
    """A row of a map."""
    rooms = {"cost": [0.1, 0.0, 0.2], "ttft_p99_s": [None, None, None]}
    best = {"best_static_share": 0.5, "best_static_cost": 0.5, "unserved_tokens": 0.0}
    best["best_static_cost_chosen_per_episode"] = 0.48
    return {"case": name, "platform": SMALL, "rho": 0.5, "episodes": 1, "room": rooms, **best}


def test_sane_cases_can_be_served_by_a_static_split():
    rows = {(row["case"], row["platform"]): row for row in json.loads(MAP.read_text(encoding="utf-8"))}
    cases = sane_cases(MAP)
    for case in cases:
        row = rows[case.name, case.platform]
        assert row["rho"] < 1.0 and row["unserved_tokens"] <= 0.01
        assert row["verdict"] not in ("overloaded", "turns away")
    left_out = {key for key in rows if key not in {(case.name, case.platform) for case in cases}}
    assert ("shift-documents", "qwen3.5-9b@rtx3060") in left_out, "its longest documents fit no split"
    assert ("mix-shift", "falcon-h1-34b@h100") not in left_out, "the cheapest split refuses, but others serve"
    assert ("mooncake_conversation", DEFAULT.name) in left_out
    chosen = sane_cases(MAP, ["falcon-h1-34b@h100"], ["burst"])
    assert [(case.name, case.platform) for case in chosen] == [("burst", "falcon-h1-34b@h100")]


def test_a_regret_is_relative_to_the_best_static_of_the_same_episodes():
    measured = regret([0.9, 1.2], [1.0, 1.0])
    assert measured.excess("rule") == measured.relative("rule")[0] == pytest.approx(0.05)
    assert measured.worst_seed("rule", "cost") == pytest.approx(0.2)
    assert measured.gap_closed("rule") == pytest.approx(-0.5)


def test_the_summary_tells_the_worst_case():
    totals = summary([regret([1.3], [1.0]), regret([0.95], [1.0]), regret([1.02], [1.0])], "rule")
    assert totals["worst"] == pytest.approx(0.3)
    assert totals["median"] == pytest.approx(0.02)
    assert (totals["far"], totals["cases"], totals["gib_migrated"]) == (1, 3, 2.0)
    assert totals["gap_closed_median"] == pytest.approx(-0.2)
    assert totals["share_error"] is None


def test_only_cases_with_room_have_a_gap_to_close():
    cases = [regret([0.9], [1.0], sane(cost_room=0.049)), regret([0.98], [1.0], sane(cost_room=0.05))]
    assert summary(cases, "rule")["gap_closed_median"] == pytest.approx(0.4)
    assert summary(cases[:1], "rule")["gap_closed_median"] is None


def test_what_hindsight_saves_without_moving_is_no_gap_of_moving():
    cases = [regret([0.9], [1.0], sane(chosen_room=0.04)), regret([0.98], [1.0], sane(chosen_room=0.06))]
    assert summary(cases, "rule")["gap_closed_median_where_moving_saves"] == pytest.approx(1.0)
    assert summary(cases[1:], "rule")["gap_closed_median_where_moving_saves"] is None


def test_bytes_are_set_against_all_that_is_saved():
    price = price_of_saving([regret([0.9], [1.0]), regret([1.05], [1.0])], "best static", "rule")
    assert price == pytest.approx({"gib": 4.0, "saved_percent": 5.0, "gib_per_percent": 0.8})
    lost = price_of_saving([regret([1.1], [1.0])], "best static", "rule")
    assert lost is not None and lost["gib_per_percent"] is None
    assert price_of_saving([regret([0.9], [1.0])], "sglang-0.9", "rule") is None


def test_a_map_of_other_traffic_is_told():
    assert regret([1.0, 1.0], [1.0, 1.0]).is_as_mapped
    assert not regret([1.0, 1.0], [1.0, 1.1]).is_as_mapped
    assert regret([1.0], [1.1]).is_as_mapped  # of other episodes nothing is known


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


def test_the_best_static_may_be_asked_for():
    case = sane_cases(MAP, [DEFAULT.name], ["idle"])[0]
    measured = measure([case], [case.best_static, "sglang-0.9"], [10_000, 10_001], 1, False)[0]
    assert {name: len(cells) for name, cells in measured.cells.items()} == {case.best_static: 2, "sglang-0.9": 2}
    assert measured.relative(case.best_static)[0] == 0.0


def test_the_command_prints_and_keeps_the_table(tmp_path, capsys):
    asked = ["--platform", DEFAULT.name, "--scenario", "idle", "--seeds", "2", "--jobs", "1"]
    main([*asked, "--map", str(MAP), "--controllers", "sglang-0.9", "--out", str(tmp_path / "out")])
    kept = json.loads((tmp_path / "out" / "regret.json").read_text(encoding="utf-8"))
    assert [row["case"] for row in kept["cases"]] == ["idle"]
    assert kept["summary"]["sglang-0.9"]["cases"] == 1
    assert "idle" in capsys.readouterr().out


def test_a_recorded_trace_is_judged_with_its_distance_to_good_splits(tmp_path, capsys):
    trace, table = write_trace(tmp_path / "own.jsonl", span_s=9000.0), tmp_path / "map.json"
    table.write_text(json.dumps([row("own"), row("idle"), row("other")]))
    asked = ["--map", str(table), "--trace", str(trace), "--share-error", "--seeds", "1", "--jobs", "1"]
    main([*asked, "--controllers", "sglang-0.9,demand", "--out", str(tmp_path / "out")])
    kept = json.loads((tmp_path / "out" / "regret.json").read_text(encoding="utf-8"))
    assert [(case["case"], case["kind"]) for case in kept["cases"]] == [("own", "recorded")]
    assert 0.0 < kept["cases"][0]["load"] <= 1.0
    shares = kept["cases"][0]["share_error"]
    assert set(shares) == {"static-0.500000", "sglang-0.9", "demand"}  # one episode has no others
    assert all(0.0 <= share["error"] <= share["mae"] <= 1.0 for share in shares.values())
    said = capsys.readouterr().out
    assert "share error" in said and "are not independent" in said
    assert f"own on {SMALL}: the best static costs" in said and "in the map 0.5000" in said


def test_the_static_of_other_episodes_has_no_hindsight():
    cases = sane_cases(MAP, [DEFAULT.name], ["mix-burst"])
    seeds = range(10_000, 10_004)
    (measured,) = measure(cases, [], seeds, 1, False, with_share_error=True)
    statics = [static_name(share) for share in static_shares(make_layout(DEFAULT.config), GRID_STEP)]
    (grid,) = measure(cases, statics, seeds, 1, False)
    costs, unserved = (np.array([grid.column(name, key) for name in statics]) for key in ("cost", "unserved_tokens"))
    for place, found in enumerate(measured.column(OTHERS_BEST, "cost")):
        others = np.arange(len(seeds)) != place
        best = best_static(costs[:, others].mean(axis=1), unserved[:, others].mean(axis=1))
        assert found == costs[best, place]
    assert measured.mean(OTHERS_BEST, "cost") >= min(grid.mean(name, "cost") for name in statics)
    assert 0.0 < measured.share_errors[OTHERS_BEST].error < 1.0


def test_where_no_split_matters_the_middle_one_is_taken():
    statics = [
        [
            Rollout({"cost": cost, "kv_share_mean": share, "unserved_tokens": 0.0}, {})
            for cost in (0.1 + 0.2 if share > 0.5 else 0.3, 0.4, 0.5)
        ]
        for share in (0.05, 0.3, 0.55, 0.9)
    ]
    assert {rollout.cell["kv_share_mean"] for rollout in _others_best(statics)} == {0.55}


def test_the_oracle_is_the_map_s_and_may_be_late(tmp_path):
    opportunity.main(["--scenario", "idle", "--platform", DEFAULT.name, "--seeds", "3", "--out", str(tmp_path)])
    cases = sane_cases(tmp_path / "map.json", [DEFAULT.name], ["idle"])
    (measured,) = measure(cases, ["oracle:0", "oracle:30"], range(10_000, 10_003), 1, False)
    assert -measured.excess("oracle:0") == pytest.approx(cases[0].cost_room)
    assert measured.excess("oracle:0") <= measured.excess("oracle:30") <= -cases[0].chosen_room + 1e-4


@pytest.mark.parametrize("seconds", ["-1", "soon", "inf"])
def test_an_oracle_cannot_be_early(seconds, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--oracle-late-s", seconds])
    assert stop.value.code == 2
    assert f"--oracle-late-s is {seconds}, expected a number of seconds" in capsys.readouterr().err


def test_a_trace_that_the_map_has_not_is_named(tmp_path, capsys):
    trace = write_trace(tmp_path / "idle.jsonl")
    for arguments, message in (
        ([trace], "idle.jsonl: the map's recorded traces are agentic_claude_code_weka, "),
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
        ("[{}]", "is no map of eval/opportunity.py"),
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
