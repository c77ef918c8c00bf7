"""CoreVecEnv: Stable-Baselines3's view of several environments, stepped in a loop."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

Env = gym.Env[np.ndarray, np.ndarray]
Step = tuple[np.ndarray, SupportsFloat, bool, bool, dict[str, Any]]


class CoreVecEnv(VecEnv):
    """Steps environments with flat observations one after the other and starts their next episode at an end.

    As Stable-Baselines3 expects: `reset` returns observations only, and `infos[i]` has "TimeLimit.truncated" always and
    "terminal_observation" at an end, so that PPO bootstraps at the horizon. Arrays that are returned are never reused.

    With `threads` above 1 that many environments step at a time, with equal results. Kernels release the GIL, so this
    pays on idle processor cores (1.6 times the steps per second on two) and gains nothing on busy ones.
    """

    def __init__(self, envs: Sequence[Env], *, threads: int = 1) -> None:
        if threads < 1:
            raise ValueError(f"threads is {threads}, expected an integer >= 1")
        self.envs = list(envs)  # first: VecEnv asks for render_mode while it is constructed
        if not len({id(env.unwrapped) for env in self.envs}) == len(self.envs) > 0:
            raise ValueError("envs has none, or the same environment twice: give different ones")
        super().__init__(len(self.envs), self.envs[0].observation_space, self.envs[0].action_space)
        self._threads = min(threads, len(self.envs))
        self._pool = ThreadPoolExecutor(self._threads) if self._threads > 1 else None

    def reset(self) -> np.ndarray:
        """Start every environment; float32, shape (num_envs, observation size). Uses up the seeds of `seed`."""
        observations = []
        for index, env in enumerate(self.envs):
            options = self._options[index] or None
            observation, self.reset_infos[index] = env.reset(seed=self._seeds[index], options=options)
            observations.append(observation)
        self._reset_seeds()
        self._reset_options()
        return np.stack(observations)

    def step_async(self, actions: np.ndarray) -> None:
        """Remember the actions, shape (num_envs, action size)."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """(observations, rewards, dones, infos) of one window; the observation of a done one is its next episode's."""
        steps = self._step_all()
        observations = np.stack([step[0] for step in steps])
        rewards = np.array([float(step[1]) for step in steps], np.float32)
        dones = np.array([terminated or truncated for _, _, terminated, truncated, _ in steps])
        infos = [step[4] for step in steps]
        for info, (_, _, terminated, truncated, _) in zip(infos, steps, strict=True):
            info["TimeLimit.truncated"] = truncated and not terminated
        for index in np.flatnonzero(dones):
            infos[index]["terminal_observation"] = steps[index][0]
            observations[index], self.reset_infos[index] = self.envs[index].reset()
        return observations, rewards, dones, infos

    def _step_all(self) -> list[Step]:
        if self._pool is None:
            return self._step_every(1, 0)
        # Few large tasks: handing one over costs about a tenth of a step.
        tasks = [self._pool.submit(self._step_every, self._threads, first) for first in range(self._threads)]
        results = [task.result() for task in tasks]
        return [results[index % self._threads][index // self._threads] for index in range(self.num_envs)]

    def _step_every(self, stride: int, first: int) -> list[Step]:
        pairs = zip(self.envs[first::stride], self._actions[first::stride], strict=True)
        return [env.step(action) for env, action in pairs]

    def close(self) -> None:
        """Close every environment and end the threads; idempotent."""
        if self._pool is not None:
            self._pool.shutdown()
        for env in self.envs:
            env.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        """One uint8 image (height, width, 3) per environment; for render_mode rgb_array."""
        return [env.render() for env in self.envs]  # type: ignore[misc]

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """The attribute of the chosen environments (None: of all), wherever it is between wrapper and core."""
        return [env.get_wrapper_attr(attr_name) for env in self._chosen(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set the attribute of the chosen environments where it exists, else of the outermost wrapper."""
        for env in self._chosen(indices):
            env.set_wrapper_attr(attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        """Call the method of the chosen environments."""
        return [env.get_wrapper_attr(method_name)(*args, **kwargs) for env in self._chosen(indices)]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """Whether the chosen environments are wrapped in `wrapper_class`."""
        return [is_wrapped(env, wrapper_class) for env in self._chosen(indices)]

    def _chosen(self, indices: VecEnvIndices) -> list[Env]:
        return [self.envs[index] for index in self._get_indices(indices)]
