"""Product controllers on the AVMP paper's workloads: `python eval/compare.py --scenario avmp-...`."""

import json

import pytest

from hbmgym.eval import compare

SERVING = ("--model", "qwen3.5-4b", "--hbm-gib", "4", "--seeds", "1", "--jobs", "1", "--no-progress")


def test_a_comparison_runs_on_them_and_says_how_long_a_tick_is(tmp_path, capsys):
    scenario = ("--scenario", "avmp-uniform-short", "--tick-s", "2")
    compare.main([*SERVING, *scenario, "--controllers", "static-0.7,threshold", "--out", str(tmp_path / "new")])
    cells = json.loads((tmp_path / "new" / "cells.json").read_text())
    assert [(cell["controller"], cell["trace"]) for cell in cells] == [
        ("static-0.700", "avmp-uniform-short"),
        ("threshold", "avmp-uniform-short"),
    ]
    assert all(cell["hit_rate"] == 0.0 and cell["cost"] < 1.0 for cell in cells)
    assert "avmp-uniform-short: a tick lasts 2 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--tick-s", "2"), "only avmp- scenarios have ticks"),
        (("--scenario", "avmp-mixed-long", "--tick-s", "-1"), "tick_s is -1.0"),
        (("--scenario", "avmp-mixed-long", "--tick-s", "nan"), "tick_s is nan"),
        (("--scenario", "avmp-mixed-long", "--tick-s", "0.0001"), "expected at most 1000000"),
        (("--scenario", "avmp-mixed-long", "--tick-s", "x"), "--tick-s: invalid float value: 'x'"),
        (("--scenario", "avmp-sharegpt-replay", "--tick-s", "2"), "give avmp-sharegpt-replay:FILE"),
    ],
)
def test_a_mistake_is_one_line(arguments, named, capsys):
    with pytest.raises(SystemExit) as leaving:
        compare.main([*SERVING, *arguments])
    printed = capsys.readouterr()
    assert leaving.value.code == 2
    assert printed.err.count("\n") == 1 and named in printed.err
