"""The opportunity map: what its episodes measure, and what they are taken to say."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from hbmgym.envs.platforms import PLATFORMS
from hbmgym.envs.serving.core import Core
from hbmgym.envs.traces.trace import TraceError
from hbmgym.envs.workload import ScenarioWorkload
from hbmgym.eval import opportunity
from hbmgym.eval.opportunities.cases import Case
from hbmgym.eval.opportunities.measure import FIGURES, both_pools_full, measure
from hbmgym.eval.opportunities.verdict import CaseResult
from hbmgym.eval.statics import WORST_CLASS
from hbmgym.memory_backend.oplog import KV

from .traffic import CONFIG, MIX

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)


def figures(value):
    return {**dict.fromkeys(FIGURES, value), WORST_CLASS: 0.0}


def episode(costs, default, dynamic):
    """One whose figures are all equal to its costs."""
    statics = [{"share": share, **figures(cost)} for share, cost in zip(SHARES, costs, strict=True)]
    return {
        "seed": 10_000,
        "statics": statics,
        "default": figures(default),
        "dynamic": figures(dynamic),
        "float": figures(0.9 * default),
        "float-lru": figures(0.8 * default),
        "both_full": figures(0.1),
        "rho": 0.8,
    }


def result(*episodes, rho=0.8):
    return CaseResult("case", "platform", rho, episodes)


def test_the_best_static_is_one_share_for_all_episodes():
    both = result(episode((9, 1, 2, 9, 9), 2, 1), episode((9, 4, 2, 9, 9), 2, 1))
    assert both.shares[both.best] == 0.5
    assert both.static_costs.tolist() == [9, 2.5, 2, 9, 9]


def test_being_wrong_is_a_ratio_of_mean_costs_and_unknown_beyond_the_bounds():
    one = result(episode((4, 3, 2, 1, 8), 2, 1))
    assert one.wrong_by(-0.2) == pytest.approx(2.0)
    assert one.wrong_by(0.2) == pytest.approx(8.0)
    assert one.wrong_by(0.3) is None


def test_a_default_far_from_the_best_in_every_episode_is_a_cliff():
    cliff = result(*(episode((9, 9, 1, 9, 9), 2.5 + 0.1 * i, 1) for i in range(6)))
    assert cliff.verdict == "cliff"
    assert cliff.default_over_best("ttft_p99_s")[0] == pytest.approx(2.75)


def test_one_bad_episode_of_many_is_no_cliff():
    lottery = result(episode((9, 9, 1, 9, 9), 30, 1), *(episode((9, 9, 1, 9, 9), 1, 1) for _ in range(5)))
    assert lottery.default_over_best("ttft_p99_s")[0] > 2.0
    assert lottery.verdict == "none"


def test_room_is_what_the_dynamic_oracle_saves_of_the_best_static():
    room = result(*(episode((9, 9, 1, 9, 9), 1, 0.8 - 0.01 * i) for i in range(6)))
    value, low, high = room.room("ttft_p99_s")
    assert value == pytest.approx(0.225)
    assert 0.18 <= low <= value <= high <= 0.27
    assert room.verdict == "room"
    assert result(*(episode((9, 9, 1, 9, 9), 1, 0.9) for _ in range(6))).verdict == "none"


def test_room_in_a_figure_is_counted_from_the_share_that_is_best_in_it():
    episodes = [episode((9, 9, 1, 9, 9), 1, 0.8) for _ in range(6)]
    for one in episodes:
        one["statics"][3]["ttft_p99_s"] = 0.7
        one["statics"][1]["slo_violation_rate"] = 0.8
    assert result(*episodes).room("ttft_p99_s")[0] < 0.0
    assert result(*episodes).verdict == "none"


def test_room_beyond_floating_is_counted_from_the_cheaper_floating_pool():
    value, low, high = result(*(episode((9, 9, 1, 9, 9), 1, 0.6) for _ in range(6))).room_beyond_floating
    assert low == value == high == pytest.approx(0.25), "float-lru costs .8, the oracle .6"


def test_nothing_is_concluded_of_an_overloaded_case():
    assert result(episode((9, 9, 1, 9, 9), 9, 0.1), rho=1.2).verdict == "overloaded"


def test_a_split_that_refuses_is_not_the_best():
    away = episode((9, 9, 1, 3, 9), 9, 0.1)
    away["statics"][2][WORST_CLASS] = 0.02
    assert result(away).shares[result(away).best] == 0.7
    assert result(away).chosen_per_episode == 3.0
    assert result(away).room("ttft_p99_s")[0] == pytest.approx(1.0 - 0.1 / 3)


def test_nothing_is_concluded_where_no_split_serves_all():
    away = episode((9, 9, 1, 9, 9), 9, 0.1)
    for static in away["statics"]:
        static[WORST_CLASS] = 0.02
    assert result(away).verdict == "turns away"


def test_what_is_kept_is_json_even_where_there_is_nothing_to_compare_with():
    nobody_missed = episode((9, 9, 1, 9, 9), 3, 1)
    nobody_missed["statics"][2]["slo_violation_rate"] = 0.0
    kept = json.loads(json.dumps(result(nobody_missed).as_json(), allow_nan=False))
    assert kept["default_over_best"]["slo_violation_rate"] == [None, 0.0, None]
    assert kept["default_over_best"]["cost"] == [3.0, 0.0, None], "one episode has no bounds"


def test_the_table_for_a_page_has_a_line_per_case_and_a_cell_per_column():
    lines = opportunity._markdown([result(episode((9, 9, 1, 9, 9), 3, 0.5))] * 2).splitlines()
    assert len(lines) == 4 and {line.count("|") for line in lines} == {len(opportunity.COLUMNS) + 1}
    assert lines[2].startswith("| case | platform | 0.80 | 0.500 | 1.000 | 9.00x | 1.00x | 1.00x | 9.00x | 3.00x ")


def test_both_full_has_the_whole_budget_in_each_pool():
    plain, relaxed = Core(CONFIG), both_pools_full(CONFIG)
    relaxed.reset(MIX.episode("validation", 10_000), 0.5)
    kv, ssm = relaxed.memory.kv.meta, relaxed.memory.ssm.meta
    assert abs(int(kv.chunks) - int(ssm.chunks)) <= 2 * -(-plain.layout.slot_bytes // plain.layout.chunk_bytes)
    assert kv.pool == KV
    assert kv.chunks + ssm.chunks == 2 * plain.layout.chunks


def test_an_episode_measures_statics_default_dynamic_and_twice_the_memory_on_the_same_rows():
    found = measure(CONFIG, MIX.episode("validation", 10_000))
    costs = [static["cost"] for static in found["statics"]]
    assert len(costs) > 3
    assert np.isfinite([*costs, found["default"]["cost"], found["dynamic"]["cost"]]).all()
    # The dynamic oracle may always hold the best static share.
    assert found["dynamic"]["cost"] <= min(costs) + 0.05
    assert np.isfinite(found["both_full"]["cost"])


def test_platforms_leave_an_eighth_of_the_memory_and_the_first_is_the_default():
    assert [platform.config.hbm_gib for platform in PLATFORMS] == [40.0, 40.0, 33.0, 1.3, 33.0, 7.3, 36.0]


def test_finished_episodes_are_not_run_again(tmp_path, monkeypatch):
    asked = opportunity.Question(Case(PLATFORMS[0], scenario="mix-shift"), 1, tmp_path)
    monkeypatch.setattr(opportunity, "measure", lambda *_: episode((9, 9, 1, 9, 9), 3, 1))
    first = opportunity._answer(asked)
    (file,) = tmp_path.iterdir()
    monkeypatch.setattr(opportunity, "measure", lambda *_: pytest.fail("measured again"))
    assert opportunity._answer(asked) == first
    file.write_text(file.read_text()[:100])  # damaged, so it is measured anew
    monkeypatch.setattr(opportunity, "measure", lambda *_: episode((9, 9, 2, 9, 9), 3, 1))
    assert opportunity._answer(asked)[0]["statics"][2]["cost"] == 2


def test_ctrl_c_while_the_map_is_drawn_leaves_no_half_a_picture(tmp_path, monkeypatch, capsys):
    def save_half(_, target, **__):
        with target.open("wb") if isinstance(target, Path) else contextlib.nullcontext(target) as file:
            file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(opportunity, "_results", lambda *_: [result(episode((9, 9, 1, 9, 9), 3, 1))])
    monkeypatch.setattr(Figure, "savefig", save_half)
    with pytest.raises(SystemExit) as ended:
        case = ["--scenario", "steady-chat", "--platform", PLATFORMS[0].name]
        opportunity.main([*case, "--out", str(tmp_path)])
    assert ended.value.code == 130
    assert capsys.readouterr().err.startswith(f"interrupted; finished episodes are in {tmp_path}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["episodes", "map.json", "map.md"]


class Rare:
    """Traffic of which some seeds have none."""

    name = "rare"

    def __init__(self, *empty):
        self.empty = empty

    def episode(self, part, seed):
        if seed in self.empty:
            raise TraceError("own: the episode has 0 rows")
        return ScenarioWorkload("steady-chat", {"chat": 1.0}, 1.0, 64).episode(part, seed)


@pytest.fixture
def measured(monkeypatch):
    """Episodes are not run, but have their seeds in what is told of them."""
    told = episode((9, 9, 1, 9, 9), 9, 0.1)
    monkeypatch.setattr(opportunity, "measure", lambda config, episode: told | {"seed": episode.seed})
    monkeypatch.setattr(opportunity, "rho", lambda *_: 0.5)


def test_a_seed_without_traffic_is_passed_over_and_the_map_says_how_far_it_went(measured, monkeypatch, tmp_path):
    case = Case(PLATFORMS[0], scenario="burst")
    monkeypatch.setattr(Case, "workload", lambda case: Rare(10_000, 10_002))
    answer = opportunity._answer(opportunity.Question(case, 3, tmp_path))
    assert [own["seed"] for own in answer] == [10_001, 10_003, 10_004]
    (found,) = opportunity._told([case], [answer])
    assert (found.rho, found.as_json()["last_seed"]) == (0.5, 10_004)


def test_a_case_of_which_too_few_seeds_have_traffic_is_left_out(measured, monkeypatch, tmp_path, capsys):
    cases = [Case(PLATFORMS[0], trace="own.npz"), Case(PLATFORMS[0], scenario="burst")]
    monkeypatch.setattr(Case, "workload", lambda case: Rare(*(range(10_001, 10_008) if case.trace else ())))
    answers = [opportunity._answer(opportunity.Question(case, 2, tmp_path)) for case in cases]
    assert [found.name for found in opportunity._told(cases, answers)] == ["burst"]
    assert "own on qwen3-next-80b-a3b@h200 is left out: own: the episode has 0 rows" in capsys.readouterr().err
    with pytest.raises(TraceError, match="no case is left"):
        opportunity._told(cases[:1], answers[:1])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--platform", "gpt-2@h200"), "platform 'gpt-2@h200': unknown model 'gpt-2'"),
        (("--scenario", "rush-hour"), "scenario is 'rush-hour'"),
        (("--seeds", "0"), "--seeds 0"),
        (("--seeds", "1001"), "1001 seeds of part 'validation'"),
        (("--trace", "nowhere.npz"), "nowhere.npz: cannot be read"),
    ],
)
def test_a_bad_flag_of_the_map_ends_in_one_line(arguments, named, capsys):
    with pytest.raises(SystemExit) as ended:
        opportunity.main(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip()
    assert named in said and len(said.splitlines()) == 1
