"""rho: offered rate / completed rate of the best static split under a full queue."""

import dataclasses

import numpy as np
import pytest

from hbmgym.envs.serving.core import make_layout
from hbmgym.eval.load import rho, rho_at, saturated
from tests.envs.episodes import Ask, make_episode

from .traffic import CHAT, CONFIG, MIX

SHARES = (0.2, 0.5, 0.8)


def at_load(load: float, workload=CHAT) -> float:
    return rho(SHARES, dataclasses.replace(workload, load=load).episode("validation", 10_000), CONFIG)


def test_an_idle_engine_has_a_rho_near_zero():
    assert 0.0 < at_load(0.1) < 0.06


def test_rho_grows_with_the_load():
    rhos = [at_load(load) for load in (0.2, 1.0, 5.0)]
    assert rhos == sorted(rhos)
    assert rhos[-1] > 3 * rhos[0]


def test_a_saturated_episode_keeps_rows_and_order():
    episode = MIX.episode("validation", 10_000)
    full = saturated(episode)
    assert np.array_equal(full.rows["input_tokens"], episode.rows["input_tokens"])
    assert full.rows["arrival_s"].max() < episode.horizon_s / 40
    assert np.allclose(full.rows["arrival_s"] * 50.0, episode.rows["arrival_s"])


def test_rho_of_a_closed_loop_is_that_of_the_same_rows_in_an_open_one():
    assert at_load(1.0, dataclasses.replace(CHAT, loop="closed")) == at_load(1.0, CHAT)


def test_rho_is_that_of_the_best_split():
    episode = MIX.episode("validation", 10_000)
    assert rho(SHARES, episode, CONFIG) == min(rho_at(share, episode, CONFIG) for share in SHARES)


def test_a_split_that_rejects_is_never_the_best():
    episode, config = MIX.episode("validation", 10_000), dataclasses.replace(CONFIG, hbm_gib=2.5)
    lowest = make_layout(config).share_bounds[0]
    assert rho_at(lowest, episode, config) == float("inf")
    assert rho((lowest, 0.8), episode, config) == rho_at(0.8, episode, config) < 1.0


def test_what_no_split_can_hold_is_no_part_of_what_is_offered():
    asks = [Ask(10.0 * k, 640, 10) for k in range(20)]
    (too_large,) = [Ask(95.0, 64 * (make_layout(CONFIG).pages(2) + 1), 10)]
    with_it, without = (
        make_episode(sorted(rows, key=lambda ask: ask.arrival_s)) for rows in ([*asks, too_large], asks)
    )
    assert rho_at(0.5, with_it, CONFIG) == pytest.approx(rho_at(0.5, without, CONFIG)) != float("inf")
