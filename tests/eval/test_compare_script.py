"""`python eval/compare.py`: flags in, a table and whole files out."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hbmgym.controllers.helm.policy import Policy
from hbmgym.controllers.observation import OBSERVATION_SIZE
from hbmgym.eval.cells import UnequalCells
from hbmgym.eval.compare import main
from tests.memory_backend.vmm.cuda_double.processes import build_or_skip, run_on_double

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


def test_with_seeds_auto_the_table_says_why_it_has_so_many_episodes(tmp_path, trace, capsys):
    flags = [
        *SERVING,
        *trace,
        "--controllers",
        "static-0.3,static-0.8,threshold",
        "--seeds",
        "auto",
        "--within",
        "1000",
    ]
    main([*flags, "--out", f"{tmp_path}/new"])
    printed = capsys.readouterr().out
    assert ": 8 episodes, means" in printed
    assert "8 episodes: every difference in cost is known within +-100000.0%, so no more were added" in printed
    assert len(json.loads((tmp_path / "new" / "cells.json").read_text())) == 3 * 8


def test_of_one_episode_the_table_says_that_there_is_no_interval(trace, capsys):
    main([*SERVING, *trace, "--controllers", "static-0.3,threshold", "--seeds", "1"])
    printed = capsys.readouterr().out
    assert printed.count(" (one episode)") == 5, "two costs and three differences"
    assert "[" not in printed.replace("(one episode)", "")


def test_all_flags_are_explained(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["--help"])
    assert leaving.value.code == 0
    assert "--seeds N|auto" in capsys.readouterr().out


def test_a_priced_engine_says_what_it_chose(trace, capsys):
    main([*SERVING, *trace, "--controllers", "static-0.3,static-0.8", "--policies", "on_shortage=priced"])
    line = next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("priced, all its rows: own-free")
    )
    assert sum(float(share) for share in re.findall(r"([\d.]+)%", line)) == pytest.approx(100.0, abs=0.5)


@pytest.mark.parametrize("controllers", ["static-0.3", "sglang-0.9", "threshold", "threshold,sglang-0.9"])
def test_any_selection_of_controllers_makes_a_table(tmp_path, trace, controllers):
    main([*SERVING, *trace, "--controllers", controllers, "--seeds", "1", "--out", str(tmp_path / "new")])
    assert (tmp_path / "new" / "cells.json").is_file()


@pytest.fixture
def sparse(tmp_path) -> tuple[str, ...]:
    """Little traffic on little memory: where bytes really move, they take their time."""
    path = write_trace(tmp_path / "own.jsonl", rate_per_s=0.1)
    return ("--trace", str(path), "--hbm-gib", "0.5", "--seeds", "1", "--no-oracle")


def cells_of(folder: Path, *flags: str) -> bytes:
    main([*SERVING, *flags, "--out", str(folder)])
    return (folder / "cells.json").read_bytes()


def test_host_memory_says_what_it_moved_and_changes_no_cell(tmp_path, sparse, capsys):
    flags = (*sparse, "--controllers", "static-0.5,random")
    expected = cells_of(tmp_path / "accounting", *flags)
    assert "backend" not in capsys.readouterr().out
    assert cells_of(tmp_path / "host", *flags, "--backend", "host", "--check") == expected
    moved, stamps, microseconds = reported("host", capsys.readouterr().out)
    timings = json.loads((tmp_path / "host" / "timings.json").read_text())
    assert moved == sum(timing["chunks_moved"] for timing in timings) > 0
    assert stamps == sum(timing["stamps_checked"] for timing in timings) > 0
    assert microseconds > 0.0


def reported(backend: str, printed: str) -> tuple[int, int, float]:
    """(chunks moved, stamps read back, microseconds per chunk) of the backend's line."""
    line = next(line for line in printed.splitlines() if line.startswith(f"backend {backend} in "))
    found = re.search(r": ([\d,]+) chunks moved \(([\d.]+) us each\), ([\d,]+) stamps read back and right$", line)
    assert found, line
    return int(found[1].replace(",", "")), int(found[3].replace(",", "")), float(found[2])


def test_a_policy_moves_memory_of_a_gpu_as_accounting_says(tmp_path, sparse):
    double = build_or_skip(tmp_path)
    layers = [(np.full((8, OBSERVATION_SIZE), 0.1), np.zeros(8)), (np.ones((1, 8)), np.zeros(1))]
    Policy.from_layers([(w.astype(np.float32), b.astype(np.float32)) for w, b in layers]).save(tmp_path / "policy.npz")
    flags = (*sparse, "--controllers", f"ppo:{tmp_path / 'policy.npz'}")
    expected = cells_of(tmp_path / "accounting", *flags)
    flags = (*SERVING, *flags, "--backend", "cuda", "--out", str(tmp_path / "cuda"))
    ended = run_on_double(double, "eval/compare.py", *flags)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "cuda" / "cells.json").read_bytes() == expected
    moved, stamps, _ = reported("cuda", ended.stdout)
    assert moved > 0 and stamps > 0


def test_a_budget_that_the_backend_cannot_hold_is_one_line(tmp_path, trace):
    ended = run_on_double(build_or_skip(tmp_path), "eval/compare.py", *trace, "--hbm-gib", "40", "--backend", "cuda")
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1 and "give a smaller budget" in ended.stderr


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


@pytest.mark.parametrize(
    "script", ["eval/compare.py", "eval/bench.py", "eval/gpu_check.py", "eval/tune.py", "train/ppo.py"]
)
def test_without_the_package_a_script_says_so_in_one_line(script, tmp_path):
    # -S leaves site-packages out, and with them the package; -E whatever PYTHONPATH says.
    path = SCRIPT.parents[1] / script
    ended = subprocess.run([sys.executable, "-S", "-E", str(path)], capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1 and "make train" in ended.stderr
    assert not ended.stdout


def test_it_says_what_the_times_do_not_rest_on(tmp_path, trace, capsys):
    costs = tmp_path / "costs.json"
    costs.write_text(json.dumps({"constants": {"chunk_move_s": 6e-5}, "measured_on": {"name": "NVIDIA H200"}}))
    flags = ("--tensor-parallel", "2", "--costs", str(costs), "--seeds", "1", "--controllers", "static-0.5")
    main([*SERVING, *trace, *flags, "--out", str(tmp_path / "new")])
    said = capsys.readouterr().err
    assert f"{costs}: chunk_move_s 6e-05, measured on NVIDIA H200" in said


@pytest.mark.parametrize(("gpu", "said"), [("rtx3060", True), ("h200", False)])
def test_a_gpu_on_which_nothing_was_measured_is_said_to_be_an_estimate(gpu, said, tmp_path, trace, capsys):
    main(
        [*SERVING, *trace, "--gpu", gpu, "--seeds", "1", "--controllers", "static-0.5", "--out", str(tmp_path / "new")]
    )
    assert ("RTX 3060 12G (an estimate): " in capsys.readouterr().err) == said
