"""`python eval/avmp_paper/run.py`: cells and tables out, one line for a mistake."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hbmgym.eval.avmp_paper import findings, run
from hbmgym.eval.avmp_paper.sweeps import GRID_RATIOS

from .paper import SHAREGPT, sharegpt_lengths

FIELDS = [
    *("sweep", "variant", "workload", "model", "pool_bytes", "seed", "oom_count", "completed", "submitted"),
    *("rebalance_count", "rebalance_rejected", "bytes_migrated", "bytes_wasted", "effective_batch_size_p50"),
]


def test_table1_writes_its_cells_and_tables(tmp_path, capsys):
    run.main(["--sweep", "table1", "--out", str(tmp_path / "new")])
    cells = json.loads((tmp_path / "new" / "cells.json").read_text())
    assert len(cells) == 180
    assert all(list(cell) == FIELDS for cell in cells)
    assert {cell["seed"] for cell in cells if cell["workload"] == "agentic_burst"} == {3, 4, 5}
    text = (tmp_path / "new" / "tables.md").read_text()
    printed = capsys.readouterr().out
    assert text.strip() in printed
    assert "312 of 312 published figures of table1 come out exactly" in printed
    row = "| avmp_dynamic_b128 | 9.0 | 9.0 | 364.3 | 364.3 | 136.7 | 136.7 | 510.0 ± 18.6 | 510.0 ± 18.6 |"
    assert row in text
    assert "[-10.33, -1.33] | [-10.33, -1.33] | yes" in text


def test_the_threshold_sweep_shows_the_default_and_does_not_write_it(tmp_path, capsys):
    run.main(["--sweep", "threshold", "--out", str(tmp_path / "new")])
    cells = json.loads((tmp_path / "new" / "cells.json").read_text())
    assert len(cells) == 252
    names = {cell["variant"] for cell in cells}
    assert "avmp_dynamic_b128_th_high_010" in names and "avmp_dynamic_b128" not in names
    assert "| avmp_dynamic_b128 | 0.05 | 0.30 | 510.0 | 510.0 | 84 | 84 | 458 |" in capsys.readouterr().out


def test_the_static_grid_says_its_ratio(tmp_path):
    run.main(["--sweep", "static-grid", "--out", str(tmp_path / "new")])
    cells = json.loads((tmp_path / "new" / "cells.json").read_text())
    assert {(cell["variant"], cell["mamba_ratio"]) for cell in cells} >= {("fixed_dual_mr_0.10", 0.1)}
    assert {cell["mamba_ratio"] for cell in cells} == set(GRID_RATIOS)


def test_sharegpt_reads_its_lengths(capsys):
    sharegpt_lengths()
    run.main(["--sweep", "sharegpt", "--sharegpt", str(SHAREGPT)])
    assert "104 of 104 published figures of sharegpt come out exactly" in capsys.readouterr().out


def test_other_lengths_are_another_trace_and_say_so(tmp_path, capsys):
    (tmp_path / "own.json").write_text("[40, 400]")
    with pytest.raises(SystemExit) as leaving:
        run.main(["--sweep", "sharegpt", "--sharegpt", str(tmp_path / "own.json")])
    assert leaving.value.code == 1
    printed = capsys.readouterr()
    assert " of 104 published figures of sharegpt come out exactly" in printed.out
    assert "padded_unified sharegpt_replay jamba_1_5_mini 1073741824: oom_count_mean is" in printed.err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--sweep", "everything"), "--sweep: invalid choice: 'everything'"),
        (("--sweep", "sharegpt"), "give --sharegpt FILE"),
        (("--sweep", "sharegpt", "--sharegpt", "nowhere.json"), "nowhere.json: cannot be read: No such file"),
        (("--sweep", "sharegpt", "--sharegpt", "."), "Is a directory"),
        (("--sweep", "batch", "--sharegpt", "x.json"), "is read by --sweep sharegpt only"),
        (("--out", "taken"), "--out taken is in use"),
        (("--colour", "red"), "unrecognized arguments: --colour"),
    ],
)
def test_a_mistake_is_one_line(arguments, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(SystemExit) as leaving:
        run.main(list(arguments))
    printed = capsys.readouterr()
    assert leaving.value.code == 2
    assert printed.err.count("\n") == 1 and named in printed.err
    assert not printed.out
    assert [path.name for path in tmp_path.rglob("*")] == ["taken", "file"]


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch, capsys):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hbmgym.eval.avmp_paper.run.run_cells", interrupt)
    with pytest.raises(SystemExit) as leaving:
        run.main(["--out", str(tmp_path / "new")])
    assert leaving.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("script", ["run.py", "findings.py"])
def test_without_the_package_a_script_says_so_in_one_line(script, tmp_path):
    path = Path(__file__).resolve().parents[3] / "eval" / "avmp_paper" / script
    ended = subprocess.run([sys.executable, "-S", "-E", str(path)], capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1 and "make train" in ended.stderr


def test_a_missing_page_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as leaving:
        findings.main(["--page", str(tmp_path / "none.md")])
    assert leaving.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
