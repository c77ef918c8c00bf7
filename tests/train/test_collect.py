"""Rollouts of one kernel per environment are those of Stable-Baselines3's own loop over the same environments."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper, VecMonitor
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from hbmgym.controllers.observation import OBSERVATION_GROUPS, OBSERVATION_NAMES
from hbmgym.envs.hbm_partition import HbmPartitionEnv
from hbmgym.train.collect import RolloutPPO, for_learning
from hbmgym.train.learn import make_model
from hbmgym.train.options import TrainOptions

from ..envs.test_hbm_partition import SERVING, TinyWorkload

ENVS, STEPS = 3, 8
"""An episode has 11 windows, so that some end within a rollout and one with it."""


def make_envs() -> DummyVecEnv:
    def make() -> HbmPartitionEnv:
        return HbmPartitionEnv(workload=TinyWorkload(), serving=SERVING, references={"tiny": (0.4, 0.7)})

    return DummyVecEnv([make] * ENVS)


def make(blind: tuple[str, ...] = (), seed: int = 3) -> RolloutPPO:
    options = TrainOptions(n_envs=ENVS, n_steps=STEPS, batch_size=12, n_epochs=2, blind=blind, seed=seed)
    return make_model(options, make_envs())


class AsLearned(VecEnvWrapper):
    """Rewards as PPO learns from, inputs of `seen` alone."""

    def __init__(self, venv: Any, seen: np.ndarray) -> None:
        super().__init__(venv)
        self.seen = seen

    def reset(self) -> np.ndarray:
        return self.seen * self.venv.reset()

    def step_wait(self) -> VecEnvStepReturn:
        observations, rewards, dones, infos = self.venv.step_wait()
        for info in infos:
            if "terminal_observation" in info:
                info["terminal_observation"] = self.seen * info["terminal_observation"]
        return self.seen * observations, for_learning(rewards), dones, infos


class Copies(BaseCallback):
    """Of the buffer, before an update shuffles it."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[dict[str, np.ndarray]] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        names = ("observations", "actions", "rewards", "episode_starts", "values", "log_probs", "advantages", "returns")
        self.buffers.append({name: getattr(self.model.rollout_buffer, name).copy() for name in names})


def step_by_step(model: RolloutPPO, actions: Iterator[np.ndarray]) -> PPO:
    """SB3's PPO with the same weights, which steps the environments; its actions are given."""
    monitor = VecMonitor(make_envs())
    monitor.set_options([{"skip": i / ENVS} for i in range(ENVS)])
    policy = model.policy.state_dict()
    stock = PPO(
        "MlpPolicy",
        AsLearned(monitor, model.seen_inputs),
        n_steps=STEPS,
        batch_size=12,
        gamma=model.gamma,
        gae_lambda=model.gae_lambda,
        policy_kwargs=model.policy_kwargs,
        seed=3,
        device="cpu",
    )
    stock.policy.load_state_dict(policy)

    def act(observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        chosen = torch.from_numpy(next(actions))
        values, log_probs, _ = stock.policy.evaluate_actions(observations, chosen)
        return chosen, values, log_probs

    stock.policy.forward = act  # type: ignore[method-assign]
    stock.train = lambda: None  # type: ignore[method-assign]
    return stock


@pytest.mark.parametrize("blind", [(), ("marginals", "demand")])
def test_rollouts_are_those_of_stepping_the_environments(blind, monkeypatch):
    monkeypatch.setattr(RolloutPPO, "train", lambda self: None)
    model, fused, stepped = make(blind), Copies(), Copies()
    model.learn(3 * ENVS * STEPS, CallbackList([fused]))
    actions = (action for buffer in fused.buffers for action in buffer["actions"])
    stock = step_by_step(model, actions)
    stock.learn(3 * ENVS * STEPS, CallbackList([stepped]))
    starts = np.concatenate([buffer["episode_starts"] for buffer in fused.buffers])
    assert starts.sum() >= 2 * ENVS and starts[STEPS].any(), "episodes end within a rollout, and one with it"
    for own, expected in zip(fused.buffers, stepped.buffers, strict=True):
        for name in ("observations", "actions", "episode_starts"):
            assert np.array_equal(own[name], expected[name]), name
        for name in ("rewards", "values", "log_probs", "advantages", "returns"):  # with values of other batches
            np.testing.assert_allclose(own[name], expected[name], rtol=2e-5, atol=2e-6, err_msg=name)
    inner = ~np.roll(starts.astype(bool), -1, axis=0)[:-1]
    rewards = [np.concatenate([buffer["rewards"] for buffer in copies.buffers]) for copies in (fused, stepped)]
    assert np.array_equal(rewards[0][:-1][inner], rewards[1][:-1][inner]), "but for the bootstrap at a horizon"
    assert rewards[0].any()
    episodes = [sorted((ended["l"], ended["r"]) for ended in ppo.ep_info_buffer) for ppo in (model, stock)]
    np.testing.assert_allclose(*episodes, rtol=1e-5, atol=1e-5)  # which the monitor adds up in single precision


def test_actions_are_those_of_torch_with_the_noise_that_was_drawn(monkeypatch):
    monkeypatch.setattr(RolloutPPO, "train", lambda self: None)
    model, copies = make(), Copies()
    state = torch.get_rng_state()
    model.learn(ENVS * STEPS, copies)
    torch.set_rng_state(state)
    noise = torch.exp(model.policy.log_std.detach()) * torch.randn(STEPS, ENVS)
    seen = torch.from_numpy(copies.buffers[0]["observations"])
    with torch.no_grad():
        means = model.policy.get_distribution(seen.reshape(STEPS * ENVS, -1)).distribution.mean.reshape(STEPS, ENVS)
    np.testing.assert_allclose(copies.buffers[0]["actions"][:, :, 0], (means + noise).numpy(), atol=2e-6)


def test_inputs_that_are_hidden_are_zero_and_all_others_are_seen():
    model, copies = make(("marginals",)), Copies()
    model.learn(ENVS * STEPS, copies)
    hidden = {name for name, _ in OBSERVATION_GROUPS["marginals"]}
    seen = np.array([name not in hidden for name in OBSERVATION_NAMES])
    observations = copies.buffers[0]["observations"]
    assert not observations[:, :, ~seen].any() and observations[:, :, seen].any(axis=(0, 1)).sum() > 30


def test_threads_change_no_array():
    buffers = []
    for threads in (1, 2):
        model, copies = make(), Copies()
        model.threads = threads
        model.learn(2 * ENVS * STEPS, copies)
        buffers.append(copies.buffers)
    for one, two in zip(*buffers, strict=True):
        assert all(np.array_equal(one[name], two[name]) for name in one)


def test_environments_begin_at_different_places_and_with_different_episodes():
    model = make()
    model.learn(ENVS * STEPS)
    assert len({place.env.episode.seed for place in model.places}) == ENVS
    first = [place._skip for place in make_places()]
    assert first == [i / ENVS for i in range(ENVS)]


def make_places() -> Any:
    return make()._take_places()


def test_a_model_that_was_loaded_goes_on_where_it_was_saved(tmp_path):
    whole, copies = make(), Copies()
    whole.learn(2 * ENVS * STEPS, copies)
    whole.save(tmp_path / "model.zip")
    whole.learn(2 * ENVS * STEPS, copies)
    again, resumed = RolloutPPO.load(tmp_path / "model.zip", env=make_envs(), device="cpu"), Copies()
    again.learn(2 * ENVS * STEPS, resumed)
    for own, expected in zip(resumed.buffers, copies.buffers[2:], strict=True):
        assert all(np.array_equal(own[name], expected[name]) for name in own)
    assert list(again.ep_info_buffer) == list(whole.ep_info_buffer)
