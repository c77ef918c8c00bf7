"""Rows of a table: which controller and which rules a name stands for, and that rows of other rules can be compared."""

import dataclasses

import pytest

from hbmgym.envs.platforms import find_platform
from hbmgym.envs.serving.config import Policies
from hbmgym.eval.cells import Bench, Runner, Task, check_comparable
from hbmgym.eval.comparison import DEFAULT_CONTROLLERS, OTHERS_BEST, compare, row_names
from hbmgym.eval.rows import RULES, find_row

from .traffic import CONFIG, MIX

SEEDS = (10_000, 10_001, 10_002)


@pytest.mark.parametrize(
    ("name", "controller", "changed"),
    [
        ("demand", "demand", {}),
        ("demand@priced", "demand", {"on_shortage": "priced"}),
        ("demand@on_shortage=priced", "demand", {"on_shortage": "priced"}),
        ("sglang-0.9@float+retention=all", "sglang-0.9", {"on_shortage": "float", "retention": "all"}),
        ("static-0.5@eviction=lpb", "static-0.5", {"eviction": "lpb"}),
        *((rule, "sglang-0.9", {"on_shortage": rule}) for rule in RULES),
    ],
)
def test_a_name_stands_for_a_controller_under_rules(name, controller, changed):
    row = find_row(name, CONFIG)
    assert row.controller == controller
    assert row.config(CONFIG).policies == dataclasses.replace(CONFIG.policies, **changed)
    assert row.is_static == (not changed and controller != "demand")


def test_rows_of_one_controller_under_other_rules_have_names_of_their_own():
    assert [find_row(name, CONFIG).name for name in ("static-.5", "static-.5@float", "float")] == [
        "static-0.500",
        "static-0.500@float",
        "float",
    ]


def test_a_rule_alone_starts_at_the_default_split_of_the_model():
    gemma = find_platform("gemma-4-31b@h100").config
    assert find_row("priced", gemma).controller.startswith("static-0.1")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nobody@float", "controller 'nobody' is unknown"),
        ("demand@flaot", "controller 'demand@flaot' is unknown"),
        ("demand@colour=red", "'colour' is none of eviction, admission"),
        ("demand@layout=padded", "'layout' is none of"),
        ("demand@retention=none", "policy retention is 'none', expected one of"),
        ("demand@float+on_shortage=priced", "on_shortage is given twice"),
        ("demand@priced+admission=past-future", "choose one of them"),
    ],
)
def test_what_makes_no_row_is_one_line(name, said):
    with pytest.raises(ValueError, match=said) as error:
        find_row(name, CONFIG)
    assert "\n" not in str(error.value)


def test_a_policy_makes_no_row_of_a_table_with_other_windows():
    slow = dataclasses.replace(CONFIG, window_s=30.0)
    for name in ("helm", "helm-base@priced"):
        with pytest.raises(ValueError, match="was trained on windows of 5 s, window_s is 30: "):
            find_row(name, slow)
    assert find_row("gradient@priced", slow).controller == "gradient"


def test_nobody_who_names_no_rows_is_refused_for_those_of_others(capsys):
    slow = dataclasses.replace(CONFIG, window_s=30.0)
    named = row_names(DEFAULT_CONTROLLERS, slow)
    assert [*named, "helm"] == row_names(DEFAULT_CONTROLLERS, CONFIG)
    assert "helm is left out: helm was trained on windows of 5 s, window_s is 30: " in capsys.readouterr().err
    with pytest.raises(ValueError, match="was trained on windows of 5 s"):
        row_names("static-0.5,helm", slow)


def test_rows_under_other_rules_are_the_same_episodes_as_tables_of_their_own():
    names = ["static-0.5", "float", "static-0.5@retention=all"]
    with Runner(Bench(CONFIG, (MIX,), "validation"), 1, False) as runner:
        cells = [rollout.cell for rollout in runner.run([Task(name, 0, SEEDS[0]) for name in names], "")]
    check_comparable(cells)
    for cell, changed in zip(cells[1:], ({"on_shortage": "float"}, {"retention": "all"}), strict=True):
        config = dataclasses.replace(CONFIG, policies=dataclasses.replace(Policies(), **changed))
        with Runner(Bench(config, (MIX,), "validation"), 1, False) as runner:
            controller = "sglang-0.9" if "on_shortage" in changed else "static-0.5"
            (own,) = runner.run([Task(controller, 0, SEEDS[0])], "")
        differ = {key for key in own.cell if own.cell[key] != cell[key]}
        assert differ == {"controller", "setup_hash", "cell_hash"}
    assert len({cell["cost"] for cell in cells}) == 3


def test_the_split_that_could_have_been_set_is_the_first_reference():
    bench = Bench(CONFIG, (MIX,), "validation")
    names = ["static-0.2", "static-0.5", "static-0.8", "default", "demand", "float", "static-0.5@retention=all"]
    (result,) = compare(bench, names, SEEDS, jobs=1, oracle=False, progress=False).results
    against = [reference for name, reference in result.differences if name == "demand"]
    assert against == [OTHERS_BEST, result.best_static]
    assert result.rivals == ["demand", "float", "static-0.500@retention=all"]
    for k, cost in enumerate(result.column(OTHERS_BEST, "cost")):
        others = {name: sum(c for i, c in enumerate(result.column(name, "cost")) if i != k) for name in result.statics}
        assert cost == result.column(min(others, key=others.__getitem__), "cost")[k]
    assert result.mean(OTHERS_BEST, "cost") >= result.mean(result.best_static, "cost")
