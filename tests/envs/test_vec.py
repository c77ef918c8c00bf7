"""CoreVecEnv keeps the contract of Stable-Baselines3's vectorised environments."""

from collections.abc import Iterator
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor

from hbmgym.envs.hbm_partition import HbmPartitionEnv
from hbmgym.envs.traces.episode import ROW, Episode
from hbmgym.envs.traces.seeds import Part
from hbmgym.envs.vec import CoreVecEnv

ENVS, WINDOW_S, STEPS = 3, 5.0, 4


@dataclass(frozen=True)
class TinyWorkload:
    """Ten short requests without a shared prefix; the seed decides when they arrive."""

    name: str = "tiny"

    def episode(self, part: Part, seed: int) -> Episode:
        rows = np.zeros(10, ROW).view(np.recarray)
        rows.arrival_s = np.sort(np.random.default_rng(seed).uniform(0.0, STEPS * WINDOW_S, len(rows)))
        rows.input_tokens, rows.output_tokens, rows.measured = 4000, 20, 1
        return Episode(self.name, seed, rows, np.zeros(0, np.int32), 0, 64, 0.0, STEPS * WINDOW_S)


def make_envs(render_mode: str | None = None) -> list[HbmPartitionEnv]:
    serving = {"window_s": WINDOW_S, "hbm_gib": 4.0}
    return [HbmPartitionEnv(workload=TinyWorkload(), serving=serving, render_mode=render_mode) for _ in range(ENVS)]


@pytest.fixture
def venv() -> Iterator[CoreVecEnv]:
    envs = CoreVecEnv(make_envs())
    envs.seed(0)
    yield envs
    envs.close()


def actions(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (ENVS, 1)).astype(np.float32)


def test_reset_returns_observations_only_and_keeps_the_infos(venv: CoreVecEnv) -> None:
    observations = venv.reset()
    assert observations.shape == (ENVS, *(venv.observation_space.shape or ()))
    assert observations.dtype == np.float32
    assert all(info["time_s"] == 0.0 for info in venv.reset_infos)


def test_an_end_hands_over_the_last_observation_and_starts_the_next_episode(venv: CoreVecEnv) -> None:
    first, seeds = venv.reset(), venv_seeds(venv)
    for step in range(STEPS):
        observations, rewards, dones, infos = venv.step(actions(step))
        last = step == STEPS - 1
        assert dones.tolist() == [last] * ENVS
        assert [info["TimeLimit.truncated"] for info in infos] == [last] * ENVS
        assert all(("terminal_observation" in info) == last for info in infos)
        assert rewards.shape == (ENVS,) and rewards.dtype == np.float32
    assert not np.array_equal(infos[0]["terminal_observation"], observations[0])
    assert np.array_equal(observations, first)  # empty caches at the same split
    assert venv_seeds(venv) != seeds


def venv_seeds(venv: CoreVecEnv) -> list[int]:
    return [episode.seed for episode in venv.get_attr("episode")]


@pytest.mark.parametrize("threads", [1, 2])
def test_it_gives_what_sb3s_own_loop_gives(threads: int) -> None:
    expected = DummyVecEnv([lambda env=env: env for env in make_envs()])  # type: ignore[misc]
    actual = CoreVecEnv(make_envs(), threads=threads)
    for envs in (expected, actual):
        envs.seed(5)
    assert np.array_equal(expected.reset(), actual.reset())
    for step in range(2 * STEPS + 1):
        for left, right in zip(expected.step(actions(step))[:3], actual.step(actions(step))[:3], strict=True):
            assert np.array_equal(left, right)
            assert left.dtype == right.dtype
    assert venv_seeds(actual) == [episode.seed for episode in expected.get_attr("episode")]
    actual.close()
    expected.close()


def test_returned_arrays_are_not_written_again(venv: CoreVecEnv) -> None:
    venv.reset()
    observations, rewards, _, infos = venv.step(actions(0))
    before = observations.copy(), rewards.copy(), [dict(info) for info in infos]
    venv.step(actions(1))
    assert np.array_equal(before[0], observations)
    assert np.array_equal(before[1], rewards)
    assert before[2] == infos


def test_a_monitor_sees_episode_returns() -> None:
    envs = VecMonitor(CoreVecEnv(make_envs()))
    envs.reset()
    total = np.zeros(ENVS, np.float32)
    for step in range(STEPS):
        _, rewards, _, infos = envs.step(actions(step))
        total += rewards
    assert [info["episode"]["l"] for info in infos] == [STEPS] * ENVS
    assert [info["episode"]["r"] for info in infos] == pytest.approx(total, abs=1e-5)
    assert total.any()
    envs.close()


def test_options_reach_the_next_reset_only(venv: CoreVecEnv) -> None:
    venv.set_options([{"episode_seed": 7 + index} for index in range(ENVS)])
    venv.reset()
    assert venv_seeds(venv) == [7, 8, 9]
    venv.reset()
    assert venv_seeds(venv) != [7, 8, 9]


def test_attributes_and_methods_of_the_environments_can_be_reached(venv: CoreVecEnv) -> None:
    venv.set_attr("colour", "red", indices=[0, 2])
    assert [hasattr(env, "colour") for env in venv.envs] == [True, False, True]
    assert venv.get_attr("render_mode", indices=1) == [None]
    venv.reset()
    assert len(venv.env_method("reset", seed=3)) == ENVS
    assert venv.env_is_wrapped(gym.wrappers.TimeLimit) == [False] * ENVS


def test_images_are_tiled() -> None:
    venv = CoreVecEnv(make_envs("rgb_array"))
    venv.reset()
    image = venv.render()
    assert image is not None
    assert image.dtype == np.uint8 and image.ndim == 3
    venv.close()


def test_closing_twice_is_allowed() -> None:
    venv = CoreVecEnv(make_envs(), threads=2)
    venv.reset()
    venv.close()
    venv.close()
