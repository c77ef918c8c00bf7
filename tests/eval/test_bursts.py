import itertools
import statistics

import pytest

from hbmgym.controllers.helm.controller import HelmController
from hbmgym.controllers.helm.parameters import HelmParameters
from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.serving.core import Core
from hbmgym.envs.traces.arrivals import Bursts
from hbmgym.envs.traces.scenarios import SCENARIOS, phase_schedule
from hbmgym.envs.workload import open_workloads
from hbmgym.eval.bursts import (
    GRACE_S,
    Detection,
    OracleBursts,
    judge_alarms,
    main,
    measure_detection,
    measure_worth,
    true_bursts,
)
from hbmgym.eval.rollout import run_episode


@pytest.mark.parametrize("seed", [10_000, 10_003])
def test_bursts_are_those_of_the_schedule(seed):
    schedule = phase_schedule("mix-burst", seed, 1800.0)
    assert true_bursts("mix-burst", seed, 1800.0) == [(begin, end) for begin, end, kind in schedule if kind == 1]
    pieces = [(begin, end) for begin, end, _ in phase_schedule("burst", seed, 1800.0)]
    assert true_bursts("burst", seed, 1800.0) in (pieces[::2], pieces[1::2])


def test_bursts_are_when_most_arrives():
    pattern = SCENARIOS["burst"].pattern
    assert isinstance(pattern, Bursts) and pattern.factors[1] > pattern.factors[0]
    episode = open_workloads(ServingConfig(), scenarios=("burst",))[0].episode("validation", 10_000)
    bursts = true_bursts("burst", 10_000, episode.horizon_s)
    times = episode.rows["arrival_s"]
    inside = sum(((times >= begin) & (times < end)).sum() for begin, end in bursts)
    length = sum(end - begin for begin, end in bursts)
    assert inside / length > 3.0 * (len(times) - inside) / (episode.horizon_s - length)


def test_other_scenarios_have_none():
    assert true_bursts("steady-chat", 10_000, 1800.0) == []


def test_alarms_are_found_missed_late_or_false():
    bursts = [(100.0, 160.0), (300.0, 330.0), (500.0, 530.0), (990.0, 1100.0)]
    alarms = [110.0, 150.0, 200.0, 330.0 + GRACE_S - 1.0, 700.0, 1050.0]
    found = judge_alarms(alarms, bursts, 0.0, 1000.0)
    calm_s = 1000.0 - (60.0 + 30.0 + 30.0 + 10.0) - 3 * GRACE_S
    assert found == Detection((10.0, 44.0, 60.0), 1, 2, calm_s)
    assert found.false_alarms_per_h == pytest.approx(2 * 3600.0 / calm_s)
    assert judge_alarms(alarms, bursts, 400.0, 600.0) == Detection((), 1, 0, 170.0 - GRACE_S)


def test_time_that_two_bursts_cover_is_left_out_once():
    near = [(100.0, 160.0), (160.0 + GRACE_S / 3, 200.0)]
    assert judge_alarms([], near, 0.0, 1000.0).calm_s == 1000.0 - (100.0 + GRACE_S)
    within = [(100.0, 160.0), (110.0, 120.0), (165.0, 170.0)]
    assert judge_alarms([], within, 50.0, 165.0).calm_s == 50.0


def test_the_detector_finds_bursts_of_arrivals():
    found = measure_detection("burst", [10_000, 10_001])
    assert len(found.delays_s) > found.missed
    assert statistics.median(found.delays_s) < 20.0


def test_an_oracle_is_told_every_burst_at_once():
    core = Core(ServingConfig())
    episode = open_workloads(ServingConfig(), scenarios=("burst",))[0].episode("validation", 10_000)
    bursts = true_bursts("burst", 10_000, episode.horizon_s)
    inner = HelmController(None, HelmParameters(cooldown_s=0.0, longest_s=1e6))
    seen = []

    def note(_) -> None:
        seen.append((core.now_s, inner.burst_state == "burst"))

    run_episode(OracleBursts(inner, bursts), core, episode, on_window=note)
    # A decision is taken at the end of the window before.
    for (before_s, _), (_, burst) in itertools.pairwise(seen):
        assert burst == any(begin <= before_s < end for begin, end in bursts)


def test_the_layer_is_worth_something_to_a_split_that_would_not_move():
    worth = measure_worth("mix-burst", range(10_000, 10_005), None)
    assert worth["told"][0] != worth["found"][0] < 0.0
    calm = measure_worth("steady-code", [10_000], None)
    assert [own.value for own in calm.values()] == [0.0, 0.0]


def test_unknown_scenarios_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--scenarios", "burst,storm"])
    error = capsys.readouterr().err
    assert "scenario is 'storm', expected one of" in error and error.count("\n") == 1
