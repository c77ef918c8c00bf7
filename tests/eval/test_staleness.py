"""How many snapshots are stale."""

import dataclasses

import numpy as np

from hbmgym.envs.serving.config import Policies
from hbmgym.envs.serving.core import Core
from hbmgym.eval.staleness import count_stale, measure_staleness, parents_of
from hbmgym.memory_backend.pools import NONE
from tests.envs.episodes import SMALL_PAGE, Ask, make_episode
from tests.envs.test_eviction_orders import SMALL

KEEPING = dataclasses.replace(SMALL, policies=Policies(retention="all"))


def turn(at_s, pages, session):
    return Ask(at_s, pages * SMALL_PAGE + 1, 2, [session] * pages)


EPISODE = make_episode([turn(0.0, 2, "a"), turn(1.0, 4, "a"), turn(2.0, 6, "a"), turn(3.0, 3, "b")], SMALL_PAGE)


def test_the_parent_of_a_page_id_is_the_page_before_it():
    parents = parents_of(EPISODE)
    first, last = EPISODE.rows[2], EPISODE.rows[3]
    path = EPISODE.refs[first.ref_off : first.ref_off + 6]
    assert parents[path].tolist() == [NONE, *path[:-1].tolist()]
    assert parents[EPISODE.refs[last.ref_off]] == NONE


def test_a_snapshot_is_stale_once_a_deeper_one_of_its_prefix_is_there():
    core = Core(KEEPING)
    core.reset(EPISODE, 0.3)
    stale = []
    for _ in range(8):
        core.run_window()
        stale.append(count_stale(core.memory, parents_of(EPISODE)))
    assert stale[1] == (0, 1)  # the first turn's
    assert stale[3] == (1, 2)  # and the second's
    assert stale[-1] == (2, 4)  # session b's is fresh


def test_none_is_stale_where_the_latest_alone_stay():
    core = Core(SMALL)
    core.reset(EPISODE, 0.3)
    for _ in range(8):
        core.run_window()
    assert count_stale(core.memory, parents_of(EPISODE)) == (0, 2)


def test_staleness_of_an_episode_without_a_measured_window_is_unknown():
    assert np.isnan(measure_staleness(SMALL, EPISODE, "static-0.3").of_slots)
