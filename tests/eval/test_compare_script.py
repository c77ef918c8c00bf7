"""`python eval/compare.py`: flags in, a table and whole files out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hbmgym.eval.cells import UnequalCells
from hbmgym.eval.compare import main

from .traffic import HBM_GIB, MODEL, write_trace

SCRIPT = Path(__file__).resolve().parents[2] / "eval" / "compare.py"
SERVING = ("--model", MODEL, "--hbm-gib", str(HBM_GIB), "--seeds", "2", "--jobs", "1")


@pytest.fixture
def trace(tmp_path) -> tuple[str, ...]:
    return ("--trace", str(write_trace(tmp_path / "own.jsonl")))


def test_it_prints_the_table_and_writes_the_cells(tmp_path, trace, capsys):
    main([*SERVING, *trace, "--controllers", "static-0.3,static-0.8,sglang-0.9,threshold", "--out", f"{tmp_path}/new"])
    cells = json.loads((tmp_path / "new" / "cells.json").read_text())
    assert [(cell["controller"], cell["seed"]) for cell in cells] == [
        (name, seed)
        for name in ("static-0.300", "static-0.800", "sglang-0.9", "threshold")
        for seed in (10_000, 10_001)
    ]
    assert all(cell["rho"] > 0.0 for cell in cells)
    printed = capsys.readouterr().out
    assert "threshold against sglang-0.9" in printed
    assert {"cells.csv", "cells.json", "timings.json"} <= {path.name for path in (tmp_path / "new").iterdir()}


@pytest.mark.parametrize("controllers", ["static-0.3", "sglang-0.9", "threshold", "threshold,sglang-0.9"])
def test_any_selection_of_controllers_makes_a_table(tmp_path, trace, controllers):
    main([*SERVING, *trace, "--controllers", controllers, "--seeds", "1", "--out", str(tmp_path / "new")])
    assert (tmp_path / "new" / "cells.json").is_file()


def test_a_table_that_is_refused_leaves_no_folder(tmp_path, trace, capsys, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise UnequalCells("x seed 1: budget_bytes is 1 for a but 2 for b: give both equal budgets")

    monkeypatch.setattr("hbmgym.eval.compare.compare", refuse)
    with pytest.raises(SystemExit) as leaving:
        main([*SERVING, *trace, "--out", str(tmp_path / "new")])
    assert leaving.value.code == 2
    assert "budget_bytes is 1 for a but 2 for b" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_an_interruption_leaves_no_folder(tmp_path, trace, monkeypatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hbmgym.eval.compare.compare", interrupt)
    with pytest.raises(SystemExit) as leaving:
        main([*SERVING, *trace, "--out", str(tmp_path / "new")])
    assert leaving.value.code == 130
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("script", ["eval/compare.py", "eval/bench.py", "train/ppo.py"])
def test_without_the_package_a_script_says_so_in_one_line(script, tmp_path):
    # -S leaves site-packages out, and with them the package; -E whatever PYTHONPATH says.
    path = SCRIPT.parents[1] / script
    ended = subprocess.run([sys.executable, "-S", "-E", str(path)], capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1 and "make train" in ended.stderr
    assert not ended.stdout
