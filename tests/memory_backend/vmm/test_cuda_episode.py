"""An episode of the environment with its bytes on a GPU is the episode without bytes."""

from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import hbmgym  # noqa: F401  (registers the environments)
from hbmgym.envs.traces.episode import Episode
from hbmgym.envs.traces.seeds import Part
from tests.envs.episodes import Ask, make_episode
from tests.memory_backend.vmm.logs import open_or_skip

WINDOWS = 40


@dataclass(frozen=True)
class Documents:
    """Questions about a few documents, faster than a small GPU can keep all of them."""

    name: str = "documents"

    def episode(self, part: Part, seed: int) -> Episode:
        rng = np.random.default_rng(seed)
        arrivals = np.sort(rng.uniform(0.0, 12.0, 60))
        return make_episode([self._question(rng, arrival_s) for arrival_s in arrivals.tolist()])

    def _question(self, rng: np.random.Generator, arrival_s: float) -> Ask:
        document, pages = int(rng.integers(6)), int(rng.integers(4, 20))
        return Ask(arrival_s, pages * 64 + int(rng.integers(64)), int(rng.integers(2, 200)), [document] * pages)


def episode(backend: str) -> tuple[list[np.ndarray], list[Any], int, int]:
    """(observations, rewards and infos, chunks moved, stamps read back) of an episode whose split swings."""
    serving = {"model": "qwen3.5-4b", "hbm_gib": 0.3, "prefill_budget": 256, "window_s": 0.3}
    env = gym.make("hbmgym/HbmPartitionAbsolute-v0", workload=Documents(), serving=serving, backend=backend, check=True)
    observation, info = env.reset(seed=1)
    observations, rest = [observation], [info]
    for window in range(WINDOWS):
        observation, *more = env.step(np.array([0.5 if window // 4 % 2 else -0.5], np.float32))
        observations.append(observation)
        rest.append(more)
    vmm = env.unwrapped.core.vmm  # type: ignore[attr-defined]
    assert vmm is not None and vmm.name == backend
    vmm.check()
    counts = vmm.chunks_moved, vmm.stamps_checked
    env.close()
    return observations, rest, *counts


@pytest.mark.gpu
def test_an_episode_is_the_same_as_without_bytes_and_its_stamps_read_back() -> None:
    open_or_skip("cuda").close()
    plain, real = episode("accounting"), episode("cuda")
    np.testing.assert_array_equal(plain[0], real[0])
    assert plain[1:] == real[1:]
    assert real[2] >= 100 and real[3] >= 100
