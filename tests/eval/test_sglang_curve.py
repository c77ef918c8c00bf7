"""The hit rate over the split, and the commands around SGLang's cache."""

import importlib.util
import json
import subprocess
import sys

import pytest

from hbmgym.eval.sglang_cache import curve, record
from hbmgym.eval.sglang_cache.families import LONG, SHORT, draw


@pytest.fixture(scope="module")
def short():
    return curve.hit_rates(draw(SHORT, seed=0))


@pytest.fixture(scope="module")
def long():
    return curve.hit_rates(draw(LONG, seed=0))


def best_ratio(rates):
    return curve.RATIOS[rates.index(max(rates))]


@pytest.mark.parametrize("family", ["short", "long"])
def test_the_best_split_is_an_interior_one_and_the_default_is_well_below(family, request):
    rates = request.getfixturevalue(family)
    assert max(rates[0], rates[-1]) < max(rates)
    assert rates[curve.DEFAULT] <= max(rates) - 0.05


def test_many_short_sessions_want_a_ratio_three_times_that_of_few_long_ones(short, long):
    assert best_ratio(short) >= 3 * best_ratio(long)


def test_sglang_s_best_splits_are_recorded_and_differ_as_much(short, long):
    recorded = json.loads(curve.RECORDED.read_text())["hit_rates"]
    assert list(recorded) == list(curve.FAMILIES)
    many, few = recorded.values()
    assert (best_ratio(many), best_ratio(few)) == (best_ratio(short), best_ratio(long))


def test_the_curve_is_printed_and_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(curve, "FAMILIES", {"200 short sessions": SHORT})
    curve.main(["--figure", str(tmp_path / "curve.png")])
    assert "200 short sessions, here" in capsys.readouterr().out
    assert (tmp_path / "curve.png").stat().st_size > 0


@pytest.mark.skipif(importlib.util.find_spec("sglang") is not None, reason="SGLang is installed")
def test_without_sglang_recording_says_so_in_one_line():
    run = subprocess.run([sys.executable, record.__file__], capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.count("\n") == 1 and "No module named 'sglang'" in run.stderr
