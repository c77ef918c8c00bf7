"""The regret table: sane cases of the map, equal episodes, one line for a bad map."""

import json
from pathlib import Path

import pytest

from hbmgym.eval.regret import Regret, SaneCase, main, measure, sane_cases, summary

MAP = Path(__file__).parents[2] / "results" / "opportunity.json"
CASE = SaneCase("steady-chat", "qwen3-next-80b-a3b@h200", 0.5, 0.25, 0.1, 0.2)


def regret(cost: list[float], best: list[float]) -> Regret:
    def cells(costs: list[float]) -> list[dict[str, float]]:
        return [{"cost": c, "ttft_p99_s": 2.0 * c, "bytes_migrated": 2.0**31} for c in costs]

    return Regret(CASE, {CASE.best_static: cells(best), "rule": cells(cost)})


def test_sane_cases_can_be_served_by_a_static_split():
    rows = {(row["case"], row["platform"]): row for row in json.loads(MAP.read_text(encoding="utf-8"))}
    cases = sane_cases(MAP)
    for case in cases:
        row = rows[case.scenario, case.platform]
        assert row["rho"] < 1.0 and row["best_static_rejected_share"] <= 0.01
        assert row["verdict"] not in ("overloaded", "turns away")
    left_out = {key for key in rows if key not in {(case.scenario, case.platform) for case in cases}}
    assert ("mix-shift-60", "qwen3-next-80b-a3b@h200") in left_out
    assert ("mix-shift", "falcon-h1-34b@h100") in left_out
    chosen = sane_cases(MAP, ["falcon-h1-34b@h100"], ["burst"])
    assert [(case.scenario, case.platform) for case in chosen] == [("burst", "falcon-h1-34b@h100")]


def test_a_regret_is_relative_to_the_best_static_of_the_same_episodes():
    measured = regret([0.9, 1.2], [1.0, 1.0])
    assert measured.relative("rule")[0] == pytest.approx(0.05)
    assert measured.worst_seed("rule", "cost") == pytest.approx(0.2)
    assert measured.gap_closed("rule") == pytest.approx(-0.5)


def test_the_summary_tells_the_worst_case():
    totals = summary([regret([1.3], [1.0]), regret([0.95], [1.0]), regret([1.02], [1.0])], "rule")
    assert totals["worst"] == pytest.approx(0.3)
    assert totals["median"] == pytest.approx(0.02)
    assert (totals["far"], totals["cases"], totals["gib_migrated"]) == (1, 3, 2.0)
    assert totals["gap_closed_median"] == pytest.approx(-0.2)


def test_the_best_static_may_be_asked_for():
    case = sane_cases(MAP, [CASE.platform], ["idle"])[0]
    measured = measure([case], [case.best_static, "sglang-0.9"], [10_000, 10_001], 1, False)[0]
    assert {name: len(cells) for name, cells in measured.cells.items()} == {case.best_static: 2, "sglang-0.9": 2}
    assert measured.relative(case.best_static)[0] == 0.0


def test_the_command_prints_and_keeps_the_table(tmp_path, capsys):
    asked = ["--platform", CASE.platform, "--scenario", "idle", "--seeds", "2", "--jobs", "1"]
    main([*asked, "--map", str(MAP), "--controllers", "sglang-0.9", "--out", str(tmp_path / "out")])
    kept = json.loads((tmp_path / "out" / "regret.json").read_text(encoding="utf-8"))
    assert [row["case"] for row in kept["cases"]] == ["idle"]
    assert kept["summary"]["sglang-0.9"]["cases"] == 1
    assert "idle" in capsys.readouterr().out


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
