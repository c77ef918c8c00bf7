"""OnlinePpo: PPO that goes on learning while it decides, from what a live engine tells; an ablation.

It explores with the noise that training ended with, and what that costs is part of what the episode costs.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import ActorCriticPolicy
from tqdm import tqdm

from hbmgym.controllers.actions import Steps
from hbmgym.controllers.base import Decision, Setup
from hbmgym.controllers.observation import OBSERVATION_SIZE, observe
from hbmgym.envs.serving.core import Core
from hbmgym.eval.regrets.cases import SaneCase
from hbmgym.eval.rollout import run_episode
from hbmgym.processes import Workers
from hbmgym.train.actor import AVERAGED, SEEN, actor_linears
from hbmgym.train.collect import for_learning

WINDOWS = 60
"""Between two updates: five minutes."""
EPOCHS = 5
LEARNING_RATE = 1e-4
AVERAGE_WINDOWS = 20
"""Over which the cost is averaged that a reward is measured by, its own window included; a plain mean before."""


class OnlinePpo:
    """A model that train/ppo.py saved, as a controller that updates it every WINDOWS decisions.

    The reward is that of training, but for its reference, which only hindsight knows: in its place stands the mean cost
    of the last AVERAGE_WINDOWS. `reset` brings the saved model back, which must be one of incremental actions.
    """

    name = "ppo-online"
    fixed_share: float | None = None

    def __init__(self, checkpoint: Path, seed: int = 0, learning_rate: float = LEARNING_RATE) -> None:
        self._checkpoint = checkpoint
        self._seed = seed
        self._learning_rate = learning_rate
        self._steps = Steps()

    def reset(self, setup: Setup) -> None:
        """Forget what was learned online."""
        torch.set_num_threads(1)
        self._model = model = PPO.load(self._checkpoint, device="cpu")
        model.set_random_seed(self._seed)
        model.set_logger(Logger(None, []))
        model.batch_size, model.n_epochs = WINDOWS, EPOCHS
        model.lr_schedule = lambda _: self._learning_rate
        self._policy = _average(model)
        self._range = getattr(model, SEEN)  # as an exported policy, which has not seen more either
        spaces = model.observation_space, model.action_space
        self._buffer = model.rollout_buffer = RolloutBuffer(
            WINDOWS, *spaces, device="cpu", gae_lambda=model.gae_lambda, gamma=model.gamma, n_envs=1
        )
        self._buffer.reset()
        self._steps.reset(setup)
        self._last: tuple[np.ndarray, np.ndarray, torch.Tensor, torch.Tensor] | None = None
        self._has_begun = False
        self._mean_cost = self._windows = 0.0

    def act(self, telemetry: np.record) -> Decision:
        """An action with its noise; the reward of the one before is booked, and after WINDOWS of them comes an
        update."""
        observation = np.clip(observe(telemetry), *self._range).reshape(1, OBSERVATION_SIZE)
        with torch.no_grad():
            action, value, log_probability = self._policy(torch.as_tensor(observation))
        if self._last is not None:
            self._book(float(telemetry["cost"]), value)
        chosen = action.numpy()
        self._last = observation, chosen, value, log_probability
        return self._steps.decide(float(np.clip(chosen[0, 0], -1.0, 1.0)), telemetry)

    def _book(self, cost: float, next_value: torch.Tensor) -> None:
        assert self._last is not None
        observation, action, value, log_probability = self._last
        reward = for_learning(np.array([self._reward(cost)]))
        start = np.array([not self._has_begun])
        self._has_begun = True
        self._buffer.add(observation, action, reward, start, value, log_probability)
        if self._buffer.full:
            self._buffer.compute_returns_and_advantage(next_value, np.array([False]))
            self._model.train()
            self._policy.set_training_mode(False)
            self._buffer.reset()

    def _reward(self, cost: float) -> float:
        """By how much less than a window's mean this one costs, relative to it; 0 while nothing has cost anything."""
        if not math.isfinite(cost):
            return 0.0
        self._windows += 1.0
        self._mean_cost += (cost - self._mean_cost) / min(self._windows, AVERAGE_WINDOWS)
        return 1.0 - cost / self._mean_cost if self._mean_cost > 0.0 else 0.0


def _average(model: PPO) -> ActorCriticPolicy:
    """The model's policy, its actor with the averaged weights, which are those that training exports."""
    policy = model.policy
    assert isinstance(policy, ActorCriticPolicy)
    for layer, (matrix, bias) in zip(actor_linears(model), getattr(model, AVERAGED), strict=True):
        layer.weight.data.copy_(torch.as_tensor(matrix))
        layer.bias.data.copy_(torch.as_tensor(bias))
    policy.set_training_mode(False)
    return policy


def live_costs(
    checkpoints: Sequence[Path],
    cases: Sequence[SaneCase],
    seeds: Sequence[int],
    learning_rate: float,
    jobs: int,
    progress: bool,
) -> np.ndarray:
    """float64 (checkpoints, cases): mean cost of the seeds' validation episodes, each begun with the saved model."""
    tasks = [(path, case, tuple(seeds), learning_rate) for path in checkpoints for case in cases]
    with Workers(jobs) as workers:
        costs = workers.map(_live_cost, tasks, lambda task: f"{task[0]} on {task[1].traffic.name}")
        watched = tqdm(costs, total=len(tasks), desc="online", disable=not progress, leave=False)
        return np.reshape(list(watched), (len(checkpoints), len(cases)))


def _live_cost(task: tuple[Path, SaneCase, tuple[int, ...], float]) -> float:
    checkpoint, case, seeds, learning_rate = task
    core, workload = Core(case.traffic.platform.config), case.traffic.workload()
    controllers = [OnlinePpo(checkpoint, seed, learning_rate) for seed in seeds]
    episodes = [workload.episode("validation", seed) for seed in seeds]
    rollouts = [run_episode(own, core, episode) for own, episode in zip(controllers, episodes, strict=True)]
    return float(np.mean([rollout.cell["cost"] for rollout in rollouts]))
