"""RolloutPPO: Stable-Baselines3's PPO with rollouts of its own, a kernel call per environment and episode."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from hbmgym.controllers.helm.policy import Policy
from hbmgym.controllers.observation import OBSERVATION_SIZE
from hbmgym.envs.fused import Network
from hbmgym.envs.hbm_partition import HbmPartitionEnv, Stretch
from hbmgym.train.actor import AVERAGED, actor_layers, average
from hbmgym.train.runs import CannotGoOn

REWARD_SCALE = 0.1
LEAST_REWARD = -20.0
"""Returns of some tens, of which a few requests that wait too long make hundreds, are learned slowly."""


def for_learning(rewards: np.ndarray) -> np.ndarray:
    """float32: what PPO learns from, while curves show the rewards as they are."""
    return REWARD_SCALE * np.maximum(rewards.astype(np.float32), LEAST_REWARD)


class Place:
    """An environment in training: where it is, and what it takes to get there again."""

    def __init__(self, env: HbmPartitionEnv) -> None:
        self.env = env
        self.starts = True
        """The next window is the first of its episode."""
        self.episodes: list[dict[str, float]] = []
        """Return and length of those that have ended since they were last looked at."""

    def start(self, seed: int, skip: float) -> None:
        """Begin the first episode after a part `skip` of it."""
        self.env.np_random = np.random.default_rng(seed)
        self._reset(skip)

    def _reset(self, skip: float = 0.0) -> None:
        self._before, self._skip = self.env.np_random.bit_generator.state, skip
        self._actions: list[np.ndarray] = []
        self._return, self.starts = 0.0, True
        self.observation, _ = self.env.reset(options={"skip": skip})

    def run(self, network: Network, noise: np.ndarray) -> list[Stretch]:
        """As many windows as `noise`, float32 (n,), has numbers, episode by episode."""
        parts = []
        while len(noise):
            part = self.env.run_policy(network, noise)
            noise = noise[len(part.actions) :]
            parts.append(part)
            self._add(part)
        return parts

    def _add(self, part: Stretch) -> None:
        self._actions.append(part.actions)
        self._return += float(part.rewards.sum())
        self.observation, self.starts = part.last, False
        if part.truncated:
            self.episodes.append({"r": self._return, "l": sum(map(len, self._actions))})
            self._reset()

    def save(self) -> dict[str, Any]:
        """What `restore` takes: how the present episode was drawn, and what has been done in it."""
        actions = np.concatenate([*self._actions, np.zeros(0, np.float32)])
        return {"before": self._before, "skip": self._skip, "actions": actions}

    def restore(self, saved: dict[str, Any]) -> None:
        """Go to where `save` was called: the episode is drawn again and served again under the same actions."""
        self.env.np_random = np.random.default_rng()
        self.env.np_random.bit_generator.state = saved["before"]
        self._reset(saved["skip"])
        if len(actions := saved["actions"]):
            self._add(self.env.run_policy(_SILENT, actions))


_SILENT = Network(np.zeros(OBSERVATION_SIZE + 1, np.float32), np.array([OBSERVATION_SIZE, 1], np.int64))
"""Whatever it sees, its action is 0, so that noise alone acts."""


class RolloutPPO(PPO):
    """Learns as PPO does, from the same arrays; `learn` goes on where it is, also after `load`.

    Environments are run one after the other, each through its part of the rollout, because not all of them fit into the
    processor's cache; with `threads` above 1 so many at a time. A step of callbacks is a rollout; `parts` among their
    locals has what each environment did. Rewards are those of `for_learning`; inputs that `seen_inputs` (float32, 0 or
    1) hides are 0.
    """

    threads = 1
    seen_inputs = np.ones(OBSERVATION_SIZE, np.float32)
    places: Sequence[Place] = ()
    saved_places: list[dict[str, Any]] | None = None
    saved_randomness: tuple[Any, ...] | None = None

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "PPO",
        reset_num_timesteps: bool = False,
        progress_bar: bool = False,
    ) -> "RolloutPPO":
        """`total_timesteps` more windows, in whole rollouts."""
        assert not reset_num_timesteps, "it goes on, always"
        if not self.places:
            self.places = self._take_places()
        self._look()
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, False, progress_bar)

    def _take_places(self) -> list[Place]:
        assert isinstance(self.env, DummyVecEnv) and self.seed is not None
        places = [Place(cast(HbmPartitionEnv, env.unwrapped)) for env in self.env.envs]
        if self.num_timesteps == 0:
            for i, place in enumerate(places):
                # Else all environments would be in the same part of their episodes in every update.
                place.start(self.seed + i, i / len(places))
            return places
        if self.saved_places is None or self.saved_randomness is None or len(self.saved_places) != len(places):
            raise CannotGoOn("its checkpoint is of an older version, which did not say where its environments were")
        for place, saved in zip(places, self.saved_places, strict=True):
            place.restore(saved)
        torch.set_rng_state(torch.from_numpy(self.saved_randomness[0]))
        np.random.set_state(self.saved_randomness[1])
        return places

    def _look(self) -> None:
        self._last_obs = self.seen_inputs * np.stack([place.observation for place in self.places])
        self._last_episode_starts = np.array([place.starts for place in self.places])

    def save(self, *arguments: Any, **named: Any) -> None:
        """Also where the environments are and what random numbers come next, unless `learn` was never called."""
        if self.places:
            self.saved_places = [place.save() for place in self.places]
            self.saved_randomness = torch.get_rng_state().numpy(), np.random.get_state()
        super().save(*arguments, **named)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "places", "threads"]

    def train(self) -> None:
        """An update, which enters the average that is judged and exported."""
        super().train()
        updates = self._n_updates // self.n_epochs
        setattr(self, AVERAGED, average(getattr(self, AVERAGED, None), actor_layers(self), updates))

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """Fill the buffer as SB3's own loop would, but for the rounding of actions, values and log-probabilities."""
        self.policy.set_training_mode(False)
        rollout_buffer.reset()
        callback.on_rollout_start()
        noise = self._draw_noise(n_rollout_steps)
        layers = actor_layers(self)
        policy = Policy.from_layers([(layers[0][0] * self.seen_inputs, layers[0][1]), *layers[1:]])
        parts = self._run_all(Network(policy.packed, policy.sizes), noise)
        for i, (place, own) in enumerate(zip(self.places, parts, strict=True)):
            self._write(rollout_buffer, i, own)
            assert self.ep_info_buffer is not None
            self.ep_info_buffer.extend(place.episodes)
            place.episodes = []
        self._look()
        self._write_values(rollout_buffer, parts)
        self.num_timesteps += n_rollout_steps * env.num_envs
        callback.update_locals(locals())
        go_on = callback.on_step()
        callback.on_rollout_end()
        return go_on

    def _draw_noise(self, steps: int) -> np.ndarray:
        with torch.no_grad():
            spread = torch.exp(self.policy.log_std)
            noise: np.ndarray = (spread * torch.randn(steps, self.n_envs)).numpy()
        return noise

    def _run_all(self, network: Network, noise: np.ndarray) -> list[list[Stretch]]:
        own = [np.ascontiguousarray(column) for column in noise.T]
        if self.threads == 1:
            return [place.run(network, column) for place, column in zip(self.places, own, strict=True)]
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(lambda place, column: place.run(network, column), self.places, own))

    def _write(self, buffer: RolloutBuffer, i: int, parts: Sequence[Stretch]) -> None:
        """All but values and log-probabilities of one environment."""
        buffer.observations[:, i] = self.seen_inputs * np.concatenate([part.observations for part in parts])
        buffer.actions[:, i, 0] = np.concatenate([part.actions for part in parts])
        buffer.rewards[:, i] = for_learning(np.concatenate([part.rewards for part in parts]))
        assert self._last_episode_starts is not None
        buffer.episode_starts[0, i] = self._last_episode_starts[i]
        for end in _ends(parts):
            if end + 1 < len(buffer.episode_starts):
                buffer.episode_starts[end + 1, i] = 1.0

    def _write_values(self, buffer: RolloutBuffer, parts: Sequence[Sequence[Stretch]]) -> None:
        """Values and log-probabilities of the whole rollout at once; at a horizon the value of what would have come."""
        last = [part.last for own in parts for part in own if part.truncated]
        ends = [(end, i) for i, own in enumerate(parts) for end in _ends(own)]
        ahead = np.concatenate([self._last_obs, self.seen_inputs * np.reshape(last, (-1, OBSERVATION_SIZE))])
        shape = buffer.values.shape
        with torch.no_grad():
            observations = torch.from_numpy(buffer.observations.reshape(-1, OBSERVATION_SIZE))
            actions = torch.from_numpy(buffer.actions.reshape(-1, 1))
            values, log_probs, _ = self.policy.evaluate_actions(observations, actions)
            values_ahead = self.policy.predict_values(torch.from_numpy(ahead.astype(np.float32)))
        buffer.values[:], buffer.log_probs[:] = values.numpy().reshape(shape), log_probs.numpy().reshape(shape)
        for (end, i), value in zip(ends, values_ahead[self.n_envs :].numpy()[:, 0], strict=True):
            buffer.rewards[end, i] += self.gamma * value
        buffer.pos, buffer.full = len(buffer.values), True
        assert self._last_episode_starts is not None
        buffer.compute_returns_and_advantage(values_ahead[: self.n_envs], self._last_episode_starts)


def _ends(parts: Sequence[Stretch]) -> list[int]:
    """The last windows of episodes, counted from the rollout's first."""
    lengths = np.cumsum([len(part.actions) for part in parts])
    return [int(length) - 1 for length, part in zip(lengths, parts, strict=True) if part.truncated]
