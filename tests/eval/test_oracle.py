"""The hindsight references."""

import itertools

import numpy as np
import pytest

from hbmgym.controllers.base import TELEMETRY
from hbmgym.controllers.static import StaticController
from hbmgym.envs.serving.core import Core
from hbmgym.envs.traces.scenarios import phase_schedule
from hbmgym.eval.oracle import (
    ScheduleOracle,
    arrival_costs,
    best_path,
    cheapest_path,
    coordinate_descent,
    dynamic_candidates,
    dynamic_oracle,
    phase_oracle,
)
from hbmgym.eval.rollout import run_episode
from hbmgym.eval.statics import WORST_CLASS

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
    shares = (0.2, 0.8)
    oracle = phase_oracle("mix-shift", shares, 10_000, 1800.0)
    oracle.reset(Core(CONFIG).setup)
    telemetry = np.zeros(1, TELEMETRY).view(np.recarray)[0]
    for begin_s, end_s, group in schedule:
        for time_s in (begin_s, end_s - CONFIG.window_s):
            telemetry.time_s = time_s
            assert oracle.act(telemetry).kv_share == shares[group]
    telemetry.time_s = 5000.0
    assert oracle.act(telemetry).kv_share == shares[schedule[-1][2]]


def test_the_phase_oracle_moves_at_phase_edges_only():
    episode = MIX.episode("validation", 10_000)
    oracle = phase_oracle("mix-shift", (0.2, 0.8), 10_000, episode.horizon_s)
    requested = run_episode(oracle, Core(CONFIG), episode).history["kv_share_requested"]
    changes = sum(a != b for a, b in itertools.pairwise(requested))
    assert changes == len(phase_schedule("mix-shift", 10_000, episode.horizon_s)) - 1


def test_the_cheapest_path_is_that_of_brute_force():
    rng = np.random.default_rng(0)
    for segments, choices in ((1, 3), (2, 4), (5, 3), (6, 2)):
        for price in (0.0, 0.2, 5.0):
            costs = rng.random((segments, choices))
            places = rng.random(choices)
            move = price * np.abs(np.subtract.outer(places, places))

            def total(path, costs=costs, move=move):
                stays = sum(costs[w, choice] for w, choice in enumerate(path))
                return stays + sum(move[a, b] for a, b in itertools.pairwise(path))

            path, least = cheapest_path(costs, move)
            assert least == pytest.approx(min(map(total, itertools.product(range(choices), repeat=segments))))
            assert total(path) == pytest.approx(least)


def test_a_path_that_pays_dearly_for_moving_never_moves():
    costs = np.array([[1.0, 0.0], [0.0, 1.1], [0.0, 1.0]])
    assert cheapest_path(costs, np.array([[0.0, 9.0], [9.0, 0.0]]))[0] == [0, 0, 0]
    assert cheapest_path(costs, np.zeros((2, 2)))[0] == [1, 0, 0]


def test_the_costs_of_arrivals_sum_to_the_cost_of_the_episode():
    episode, core = MIX.episode("validation", 10_000), Core(CONFIG)
    cell = run_episode(StaticController(0.5), core, episode).cell
    assert arrival_costs(core, episode).sum() == pytest.approx(cell["cost"])


def test_the_dynamic_oracle_holds_one_share_where_one_is_best_everywhere():
    episode = MIX.episode("validation", 10_000)
    costs = np.array([np.full(len(episode.rows), 0.1), np.full(len(episode.rows), 0.2)])
    (only,) = dynamic_candidates(
        episode, [0.3, 0.6], costs, np.zeros(2)
    )  # the best static share, which no other path beats
    core = Core(CONFIG)
    only.reset(core.setup)
    assert only.act(core.reset(episode)).kv_share == 0.3


def test_the_share_that_the_dynamic_oracle_may_hold_is_one_that_serves():
    episode = MIX.episode("validation", 10_000)
    costs = np.array([np.full(len(episode.rows), 0.1), np.full(len(episode.rows), 0.2)])
    held, refusing = dynamic_candidates(episode, [0.3, 0.6], costs, np.array([0.5, 0.0]))
    core = Core(CONFIG)
    for oracle, share in ((held, 0.6), (refusing, 0.3)):
        oracle.reset(core.setup)
        assert oracle.act(core.reset(episode)).kv_share == share


def test_the_best_replay_is_the_cheapest_candidate():
    episode, core, shares = MIX.episode("validation", 10_000), Core(CONFIG), [0.2, 0.5, 0.8]
    statics = []
    for share in shares:
        unserved = run_episode(StaticController(share), core, episode).cell[WORST_CLASS]
        statics.append((arrival_costs(core, episode), unserved))
    figures = [np.array(column) for column in zip(*statics, strict=True)]
    found = run_episode(best_path(core, episode, shares, *figures), core, episode).cell["cost"]
    alone = run_episode(dynamic_oracle(core, episode, shares), core, episode).cell["cost"]
    assert alone == found
    replays = [run_episode(o, core, episode).cell["cost"] for o in dynamic_candidates(episode, shares, *figures)]
    assert len(replays) > 1
    assert found == min(replays)


def test_a_schedule_changes_its_share_when_most_of_the_next_window_belongs_to_it():
    oracle = ScheduleOracle("by hand", [0.0, 103.0], [0.3, 0.6])
    oracle.reset(Core(CONFIG).setup)
    telemetry = np.zeros(1, TELEMETRY).view(np.recarray)[0]
    asked = {}
    for time_s in (0.0, 95.0, 100.0, 105.0):
        telemetry.time_s = time_s
        asked[time_s] = oracle.act(telemetry).kv_share
    assert asked == {0.0: 0.3, 95.0: 0.3, 100.0: 0.3, 105.0: 0.6}
