"""Cells are equal whatever computes them, comparable or refused, and written whole."""

import json

import pytest

from hbmgym.eval.cells import Bench, Runner, Task, UnequalCells, UnusableFolder, check_comparable, claimed, write_cells
from hbmgym.eval.comparison import ORACLE, compare

from .traffic import CHAT, CONFIG, MIX

SEEDS = (10_000, 10_001)
BENCH = Bench(CONFIG, (MIX, CHAT), "validation")


def cell(controller: str = "a", **changes):
    usual = {"trace": "t", "seed": 1, "cell_hash": "c", "setup_hash": "s", "budget_bytes": 10, "mapped_chunks": 5}
    return {"controller": controller, **usual, **changes}


def test_the_number_of_processes_does_not_change_a_byte(tmp_path):
    for jobs in (1, 2):
        folder = tmp_path / str(jobs)
        folder.mkdir()
        found = compare(BENCH, ["static-0.5", "threshold"], SEEDS, jobs=jobs, oracle=False, progress=False)
        write_cells(folder, found.rollouts)
    for name in ("cells.json", "cells.csv"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_rollouts_come_in_the_order_of_the_tasks():
    tasks = [Task("static-0.5", 1, 10_001), Task("threshold", 0, 10_000), Task("", 0, 10_001, (0.3, 0.7))]
    with Runner(BENCH, 1, progress=False) as runner:
        found = [(r.cell["controller"], r.cell["trace"], r.cell["seed"]) for r in runner.run(tasks, "tasks")]
    expected = [("static-0.500", "steady-chat", 10_001), ("threshold", "mix-shift", 10_000)]
    assert found == [*expected, (ORACLE, "mix-shift", 10_001)]


def test_written_cells_read_back(tmp_path):
    found = compare(BENCH, ["static-0.5"], SEEDS, jobs=1, oracle=False, progress=False)
    write_cells(tmp_path, found.rollouts)
    cells = json.loads((tmp_path / "cells.json").read_text())
    assert cells == [rollout.cell for rollout in found.rollouts]
    assert json.loads((tmp_path / "timings.json").read_text()) == [rollout.timing for rollout in found.rollouts]
    lines = (tmp_path / "cells.csv").read_text().splitlines()
    assert lines[0].split(",") == list(cells[0])
    assert len(lines) == 1 + len(cells)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cells.csv", "cells.json", "timings.json"]


def test_equal_cells_are_comparable():
    check_comparable([cell("a"), cell("b"), cell("a", seed=2), cell("b", seed=2)])


@pytest.mark.parametrize(
    ("key", "value", "other"),
    [("setup_hash", "s", "x"), ("cell_hash", "c", "x"), ("budget_bytes", 10, 12), ("mapped_chunks", 5, 6)],
)
def test_unequal_conditions_are_refused_naming_both_values(key, value, other):
    with pytest.raises(UnequalCells) as refusal:
        check_comparable([cell("a"), cell("b", **{key: other})])
    message = str(refusal.value)
    assert f"t seed 1: {key} is {other} for b but {value} for a" in message
    assert "\n" not in message


def test_a_missing_cell_is_refused_by_name():
    with pytest.raises(UnequalCells, match="t seed 2: there is no cell for b"):
        check_comparable([cell("a"), cell("b"), cell("a", seed=2)])


def test_conditions_may_differ_between_cases():
    check_comparable([cell("a"), cell("a", seed=2, cell_hash="d"), cell("a", trace="u", setup_hash="r")])


def test_a_new_or_an_empty_folder_can_be_claimed(tmp_path):
    for _ in range(2):
        with claimed(tmp_path / "some" / "where"):
            assert (tmp_path / "some" / "where").is_dir()
    with claimed(""):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["some", "where"]


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path):
    (tmp_path / "file").write_text("mine")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(UnusableFolder, match="is in use"), claimed(taken):
            pass
    with pytest.raises(UnusableFolder, match="cannot be made"), claimed(tmp_path / "file" / "below"):
        pass
    assert (tmp_path / "file").read_text() == "mine"


def test_an_empty_folder_that_was_there_before_stays_also_behind_a_link(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "link").symlink_to("own")
    for name in ("own", "link"):
        with pytest.raises(KeyboardInterrupt), claimed(tmp_path / name):
            (tmp_path / name / "half").mkdir()
            (tmp_path / name / "half" / "file").write_text("half")
            raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["link", "own"]


def test_an_unfinished_folder_goes_with_its_parents_but_not_with_what_others_put_there(tmp_path):
    for others in ((), ("theirs",)):
        with pytest.raises(KeyboardInterrupt), claimed(tmp_path / "a" / "b" / "c"):
            (tmp_path / "a" / "b" / "c" / "half").write_text("half")
            for name in others:
                (tmp_path / "a" / name).mkdir()
            raise KeyboardInterrupt
        assert [path.name for path in tmp_path.rglob("*")] == ["a", *others][: 2 * len(others)]
