"""The hindsight references."""

import itertools

import numpy as np

from hbmgym.controllers.base import TELEMETRY
from hbmgym.envs.serving.core import Core
from hbmgym.envs.traces.scenarios import phase_schedule
from hbmgym.eval.oracle import PhaseOracle, coordinate_descent
from hbmgym.eval.rollout import run_episode

from .traffic import CONFIG, MIX

CHOICES = (0.1, 0.3, 0.5, 0.7, 0.9)


def test_coordinate_descent_finds_the_best_of_a_separable_cost():
    best, least = coordinate_descent(lambda p: abs(p[0] - 0.3) + abs(p[1] - 0.9), (0.5, 0.5), CHOICES)
    assert best == (0.3, 0.9)
    assert least == 0.0


def test_coordinate_descent_never_ends_above_its_start():
    rng = np.random.default_rng(0)
    costs: dict[tuple[float, ...], float] = {}
    start = (0.42, 0.42)
    _, least = coordinate_descent(lambda p: costs.setdefault(p, rng.random()), start, CHOICES)
    assert least == min(costs.values()) <= costs[start]


def test_coordinate_descent_stops_when_a_round_brings_nothing():
    asked = []
    coordinate_descent(lambda p: asked.append(p) or 1.0, (0.5, 0.5), CHOICES, rounds=100)
    assert len(asked) == 1 + 2 * (len(CHOICES) - 1)


def test_the_phase_oracle_asks_for_the_share_of_the_class_that_fills_the_next_window():
    schedule = phase_schedule("mix-shift", 10_000, 1800.0)
    oracle, shares = PhaseOracle("mix-shift", (0.2, 0.8), 1800.0), (0.2, 0.8)
    oracle.see(10_000)
    oracle.reset(Core(CONFIG).setup)
    telemetry = np.zeros(1, TELEMETRY).view(np.recarray)[0]
    for begin_s, end_s, group in schedule:
        for time_s in (begin_s, end_s - CONFIG.window_s):
            telemetry.time_s = time_s
            assert oracle.act(telemetry).kv_share == shares[group]
    telemetry.time_s = 5000.0
    assert oracle.act(telemetry).kv_share is None


def test_the_phase_oracle_moves_at_phase_edges_only():
    episode = MIX.episode("validation", 10_000)
    oracle = PhaseOracle("mix-shift", (0.2, 0.8), episode.horizon_s)
    oracle.see(10_000)
    requested = run_episode(oracle, Core(CONFIG), episode).history["kv_share_requested"]
    changes = sum(a != b for a, b in itertools.pairwise(requested))
    assert changes == len(phase_schedule("mix-shift", 10_000, episode.horizon_s)) - 1
