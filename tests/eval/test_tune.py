"""`python eval/tune.py`: equal trials on training seeds, and the table that `<name>:tuned` is made from."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from hbmgym.controllers import tuning
from hbmgym.controllers.registry import is_static, make_controller, untuned_parameters, with_parameters
from hbmgym.controllers.tuning import RANGES, TABLE, Range, read_table
from hbmgym.eval import compare, tune
from hbmgym.eval.rollout import run_episode

from .traffic import HBM_GIB, MODEL, write_trace

SERVING = ("--model", MODEL, "--hbm-gib", str(HBM_GIB), "--jobs", "1")
needs_optuna = pytest.mark.skipif(find_spec("optuna") is None, reason="optuna is not installed: pip install '.[tune]'")


@pytest.fixture
def trace(tmp_path) -> tuple[str, ...]:
    return ("--trace", str(write_trace(tmp_path / "own.jsonl")))


@pytest.fixture
def table(tmp_path, monkeypatch) -> Path:
    """An empty table in place of the package's."""
    monkeypatch.setattr(tuning, "TABLE", tmp_path / "tuned.json")
    return tmp_path / "tuned.json"


def run(table: Path, *flags: str) -> dict:
    tune.main([*SERVING, "--seeds", "1", "--trials", "2", "--out", str(table), *flags])
    return json.loads(table.read_text())


@needs_optuna
def test_what_is_tuned_has_its_place_in_a_comparison(table, trace, tmp_path, capsys):
    entry = run(table, *trace, "--controller", "tail-blame")["tail-blame"]
    assert (entry["trials"], entry["seeds"], entry["workloads"]) == (2, [0], ["own"])
    assert entry["score"] <= entry["untuned_score"]
    assert "tail-blame: " in capsys.readouterr().out
    rows = ("--controllers", "tail-blame,tail-blame:tuned", "--seeds", "1", "--out", str(tmp_path / "new"))
    compare.main([*SERVING, *trace, *rows])
    cells = json.loads((tmp_path / "new" / "cells.json").read_text())
    assert [cell["controller"] for cell in cells] == ["tail-blame", "tail-blame:tuned"]


@needs_optuna
def test_equal_commands_find_equal_numbers_and_keep_the_others(table, trace):
    first = run(table, *trace, "--controller", "gradient")
    table.write_text(json.dumps({"bandit": {"parameters": {}}}))
    assert run(table, *trace, "--controller", "gradient") == {"bandit": {"parameters": {}}, **first}


@needs_optuna
def test_an_interruption_leaves_the_controllers_that_are_done(table, trace, monkeypatch, capsys):
    real = tune.Scores.of

    def interrupt(scores, name, parameters):
        if name == "gradient":
            raise KeyboardInterrupt
        return real(scores, name, parameters)

    monkeypatch.setattr(tune.Scores, "of", interrupt)
    with pytest.raises(SystemExit) as leaving:
        run(table, *trace, "--controller", "tail-blame", "--controller", "gradient")
    assert leaving.value.code == 130
    assert list(read_table(table)) == ["tail-blame"]
    assert capsys.readouterr().err.endswith(f"\ninterrupted; what was tuned before is in {table}\n")


@needs_optuna
def test_only_training_seeds_are_seen(table, trace, monkeypatch):
    seen = set()

    def look(controller, core, episode, on_window=None):
        seen.add(episode.seed)
        return run_episode(controller, core, episode, on_window)

    monkeypatch.setattr("hbmgym.eval.cells.run_episode", look)
    run(table, *trace, "--controller", "tail-blame", "--seeds", "3")
    assert seen == {0, 1, 2}


@needs_optuna
@pytest.mark.parametrize("name", RANGES)
def test_the_first_trial_is_untuned_and_the_others_are_better_where_the_best_lies_elsewhere(name):
    aim = {key: among.high if isinstance(among, Range) else among[0] for key, among in RANGES[name].items()}

    def distance(parameters):
        return sum(abs(parameters[key] / value - 1.0) for key, value in aim.items())

    trials = list(tune.search(name, 15, distance))
    assert trials[0].parameters == untuned_parameters(name)
    assert min(trial.score for trial in trials) < trials[0].score
    assert trials == list(tune.search(name, 15, distance))
    for trial in trials:
        assert all(trial.parameters[key] in among for key, among in RANGES[name].items())


@pytest.mark.parametrize("name", RANGES)
def test_untuned_numbers_lie_in_their_ranges_and_the_ends_of_ranges_are_taken(name):
    untuned = untuned_parameters(name)
    for key, among in RANGES[name].items():
        assert untuned[key] in among, key
        for end in (among.low, among.high) if isinstance(among, Range) else among:
            changed = with_parameters(name, {key: end})
            assert changed.name == name
            assert getattr(changed.parameters, key) == end


def test_a_range_of_whole_numbers_holds_no_other_ones():
    assert 3 in Range(1, 5) and 3.5 not in Range(1, 5) and 6 not in Range(1, 5)
    assert 1 in Range(0.5, 2.0) and True not in Range(0.5, 2.0) and "1" not in Range(0.5, 2.0)


@pytest.mark.parametrize("name", RANGES)
def test_the_registry_reads_the_table(table, name):
    values = {key: among.high if isinstance(among, Range) else among[0] for key, among in RANGES[name].items()}
    table.write_text(json.dumps({name: {"parameters": values}}))
    controller = make_controller(f"{name}:tuned")
    assert controller.name == f"{name}:tuned" and not is_static(controller.name)
    assert {key: getattr(controller.parameters, key) for key in values} == values
    assert {key: getattr(make_controller(name).parameters, key) for key in values} == untuned_parameters(name)


def test_the_table_of_the_package_can_be_read():
    for name, entry in read_table(TABLE).items():
        assert entry["score"] <= entry["untuned_score"]
        assert max(entry["seeds"]) < 10_000  # of the training part
        make_controller(f"{name}:tuned")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "'gradient:tuned' has not been tuned: run python eval/tune.py --controller gradient"),
        ("{", "cannot be read as JSON"),
        ("[1]", "is no table"),
        ('{"gradient": 1}', "is no table"),
        ('{"gradient": {"parameters": 1}}', "does not fit what may be tuned: run python eval/tune.py"),
        ('{"gradient": {"parameters": {"ghost": 0.1}}}', "does not fit what may be tuned"),
        ('{"gradient": {"parameters": {"ghost": 9, "credit_per_s": 0.1, "max_step_per_s": "x"}}}', "does not fit"),
    ],
)
def test_a_controller_without_tuned_numbers_is_refused(table, content, named, capsys):
    if content is not None:
        table.write_text(content)
    with pytest.raises(SystemExit) as leaving:
        compare.main(["--controllers", "gradient,gradient:tuned"])
    assert leaving.value.code == 2
    said = capsys.readouterr().err
    assert named in said and said.count("\n") == 1


@needs_optuna
@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--controller", "demand"), "'demand' has no numbers to tune, expected one of: threshold, "),
        (("--controller", "nobody"), "'nobody' has no numbers to tune"),
        (("--trials", "0"), "--trials 0 must be at least 1"),
        (("--seeds", "0"), "--seeds 0 must be at least 1"),
        (("--seeds", "10001"), "10001 seeds of part 'train'"),
        (("--jobs", "0"), "--jobs 0 must be at least 1"),
        (("--scenario", "rush-hour"), "scenario is 'rush-hour'"),
        (("--out", "nowhere/tuned.json"), "nowhere is no folder that can be written"),
        (("--out", "."), "cannot be read as JSON"),
    ],
)
def test_a_bad_flag_of_the_tuner_ends_in_one_line(flags, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as leaving:
        tune.main(flags)
    assert leaving.value.code == 2
    said = capsys.readouterr().err
    assert named in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_without_optuna_it_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SystemExit) as leaving:
        tune.main([])
    assert leaving.value.code == 2
    said = capsys.readouterr().err
    assert "optuna" in said and "pip install -c constraints.txt -e '.[tune]'" in said and said.count("\n") == 1
