"""Where episodes come from, and what cannot be opened."""

import dataclasses

import numpy as np
import pytest

from hbmgym.envs import calibration
from hbmgym.envs.calibration import remember_rate
from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.traces.classes import CHAT
from hbmgym.envs.traces.episode import LOOPS
from hbmgym.envs.traces.seeds import SeedError
from hbmgym.envs.traces.trace import TraceError
from hbmgym.envs.workload import ScenarioWorkload, Workload, open_workloads

from ..eval.traffic import write_trace
from .test_traces_compose import SHARED

CONFIG = ServingConfig(model="qwen3.5-4b", hbm_gib=1.0)
RATES = {"chat": 0.4}


def equal(one, other) -> bool:
    return np.array_equal(one.rows, other.rows) and np.array_equal(one.refs, other.refs)


@pytest.fixture
def chat_rate(tmp_path, monkeypatch):
    """steady-chat at 2 requests per second is calibrated for CONFIG."""
    monkeypatch.setattr(calibration, "SHIPPED", tmp_path / "rates.json")
    remember_rate(calibration.SHIPPED, CHAT, CONFIG, 2.0)


@pytest.fixture
def workloads(tmp_path, chat_rate) -> list[Workload]:
    trace = write_trace(tmp_path / "own.jsonl")
    return open_workloads(CONFIG, scenarios=["steady-chat"], traces=[trace])


def test_scenarios_come_before_traces_and_all_have_names(workloads):
    assert [workload.name for workload in workloads] == ["steady-chat", "own"]


def test_one_seed_gives_one_episode(workloads):
    for workload in workloads:
        first, second = (workload.episode("validation", 10_000) for _ in range(2))
        assert equal(first, second)
        assert not equal(first, workload.episode("validation", 10_001))
        assert (first.name, first.seed) == (workload.name, 10_000)


def test_a_seed_of_another_part_is_refused(workloads):
    for workload in workloads:
        with pytest.raises(SeedError):
            workload.episode("validation", 0)


def test_load_multiplies_the_rate():
    once = ScenarioWorkload("steady-chat", RATES, 1.0, 64)
    twice = dataclasses.replace(once, load=2.0)
    rates = [np.mean([one.episode("train", seed).rate_per_s for seed in range(8)]) for one in (once, twice)]
    assert rates[1] == pytest.approx(2 * rates[0], rel=0.15)


def test_a_scenario_offers_the_calibrated_rate_times_the_load_factor(workloads):
    scenario = workloads[0]
    assert isinstance(scenario, ScenarioWorkload)
    assert scenario.rates == {"chat": pytest.approx(0.85 * 2.0)}


def test_an_unknown_scenario_is_refused_before_anything_is_calibrated(capsys):
    with pytest.raises(TraceError, match="expected one of mix-shift, "):
        open_workloads(dataclasses.replace(CONFIG, hbm_gib=1.5), scenarios=["mix-shift", "nowhere"])
    assert "calibrating" not in capsys.readouterr().err


def test_the_loop_goes_to_every_episode(tmp_path, chat_rate):
    path = SHARED / "mooncake_conversation.train.npz"
    traces = [path] if path.is_file() else []
    for loop in LOOPS:
        workloads = open_workloads(CONFIG, scenarios=["steady-chat"], traces=traces, loop=loop)
        assert {workload.episode("validation", 10_000).loop for workload in workloads} == {loop}


def test_an_unknown_loop_is_refused():
    with pytest.raises(ValueError, match="loop is 'half', expected one of: open, closed"):
        open_workloads(CONFIG, scenarios=["steady-chat"], loop="half")


def test_two_workloads_of_one_name_are_refused(tmp_path):
    path = write_trace(tmp_path / "own.jsonl")
    (tmp_path / "other").mkdir()
    same = write_trace(tmp_path / "other" / "own.jsonl")
    for arguments in ({"traces": [path, same]}, {"scenarios": ["steady-chat", "steady-chat"]}):
        with pytest.raises(ValueError, match="given twice"):
            open_workloads(CONFIG, **arguments)


def test_a_missing_trace_is_refused_before_anything_is_calibrated(tmp_path, capsys):
    with pytest.raises(TraceError, match="cannot be read"):
        open_workloads(CONFIG, scenarios=["mix-shift"], traces=[tmp_path / "none.jsonl"])
    assert "calibrating" not in capsys.readouterr().err
