"""`python eval/sensitivity.py`: what is varied, what is kept, and what is refused."""

import json
from pathlib import Path

import pytest

from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.serving.core import cost_of, setup_hash
from hbmgym.envs.serving.cost_model import iteration_s
from hbmgym.eval import sensitivity
from hbmgym.eval.sensitivities.variations import BASE, variations

from .traffic import HBM_GIB, MODEL, write_trace


@pytest.fixture
def arguments(tmp_path) -> list[str]:
    trace = write_trace(tmp_path / "own.jsonl")
    return [
        *("--trace", str(trace), "--model", MODEL, "--hbm-gib", str(HBM_GIB), "--jobs", "1", "--no-progress"),
        *("--seeds", "1", "--loads", "1", "--only", BASE, "--controllers", "demand", "--out", str(tmp_path / "out")),
    ]


def test_every_variation_is_another_setup_with_a_name_of_its_own(tmp_path):
    found = variations(ServingConfig(), tmp_path)
    assert found[0].name == BASE and found[0].config == ServingConfig()
    assert len({variation.name for variation in found}) == len(found)
    assert len({setup_hash(variation.config) for variation in found}) == len(found)


@pytest.mark.parametrize("what", ["compute", "HBM", "state reads", "prefill scan", "prefill factor", "time per layer"])
def test_a_constant_that_is_doubled_takes_longer_and_one_that_is_halved_less(what, tmp_path):
    costs = {variation.name: cost_of(variation.config) for variation in variations(ServingConfig(), tmp_path)}
    names = (f"{what} x0.5", BASE, f"{what} x2")
    shorter, base, longer = (iteration_s(costs[name], 16, 16 * 8192, 4096, 4096 * 2048.0) for name in names)
    assert shorter < base < longer


def test_floors_are_of_a_whole_iteration(tmp_path):
    floors = [v for v in variations(ServingConfig(), tmp_path) if v.name.startswith("prefill floor")]
    assert [float(cost_of(v.config).floor_s) for v in floors] == pytest.approx([0.0, 0.025, 0.05, 0.12])


def test_what_has_been_measured_is_kept(arguments, tmp_path, monkeypatch, capsys):
    sensitivity.main(arguments)
    first = capsys.readouterr().out
    kept = (tmp_path / "out" / "base-1.json").read_text()
    monkeypatch.setattr(sensitivity, "_measure", lambda *_: pytest.fail("measured again"))
    sensitivity.main(arguments)
    assert capsys.readouterr().out == first
    assert (tmp_path / "out" / "base-1.json").read_text() == kept
    (result,) = json.loads(kept)["results"]
    assert sensitivity.ranking(result)[0] in ("demand", "best static") and "demand" in first


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as leaving:
        sensitivity.main(arguments)
    printed = capsys.readouterr()
    assert leaving.value.code == 2 and printed.err.count("\n") == 1, printed.err
    return printed.err


def test_results_of_other_settings_are_not_overwritten(arguments, tmp_path, capsys):
    sensitivity.main(arguments)
    path: Path = tmp_path / "out" / "base-1.json"
    kept = path.read_text()
    capsys.readouterr()
    assert "is of other settings: name another --out" in refused([*arguments, "--seeds", "2"], capsys)
    assert path.read_text() == kept


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (("--loads", "1,much"), "--loads is '1,much'"),
        (("--only", "gravity"), "--only 'gravity' fits none of: base, compute x0.5"),
        (("--seeds", "0"), "--seeds 0"),
        (("--controllers", "magic"), "magic"),
        (("--out", ""), "--out is missing"),
    ],
)
def test_a_bad_flag_is_one_line(arguments, changes, named, capsys):
    assert named in refused([*arguments, *changes], capsys)
