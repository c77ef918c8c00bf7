"""OnlinePpo: as exported while nothing has been learned, updated from what the engine tells, and saved weights again
after a reset."""

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO

from hbmgym.controllers.observation import OBSERVATION_SIZE, observe
from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.serving.core import Core
from hbmgym.eval.rollout import run_episode
from hbmgym.train.actor import AVERAGED, SEEN, actor_layers
from hbmgym.train.domains import Domain, Reference
from hbmgym.train.learn import make_envs, make_model
from hbmgym.train.online import WINDOWS, OnlinePpo
from hbmgym.train.options import TrainOptions

from ..controllers.records import SETUP, served
from ..eval.traffic import HBM_GIB, MIX, MODEL

CONFIG = ServingConfig(model=MODEL, hbm_gib=HBM_GIB)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    domain = Domain(CONFIG, (MIX,), "train", (0,), {MIX.name: Reference(0.5, 0.5, 0.0)})
    options = TrainOptions(model=MODEL, hbm_gib=HBM_GIB, n_steps=64, batch_size=64)
    model = make_model(options, make_envs(options, [domain]))
    setattr(model, AVERAGED, [(matrix + 0.01, bias) for matrix, bias in actor_layers(model)])
    setattr(model, SEEN, (np.full(OBSERVATION_SIZE, -0.5, np.float32), np.full(OBSERVATION_SIZE, 0.5, np.float32)))
    path = tmp_path_factory.mktemp("online") / "model_1.zip"
    model.save(path)
    return path


def weights(controller: OnlinePpo) -> list[np.ndarray]:
    return [matrix for matrix, _ in actor_layers(controller._model)]


def test_it_begins_with_the_weights_that_training_exports(checkpoint):
    controller = OnlinePpo(checkpoint)
    controller.reset(SETUP)
    exported = [matrix for matrix, _ in getattr(PPO.load(checkpoint), AVERAGED)]
    for own, matrix in zip(weights(controller), exported, strict=True):
        np.testing.assert_allclose(own, matrix, rtol=1e-6)


def test_it_learns_after_so_many_windows_and_forgets_at_reset(checkpoint):
    controller = OnlinePpo(checkpoint)
    controller.reset(SETUP)
    before = weights(controller)
    for k in range(WINDOWS + 1):
        assert all(map(np.array_equal, before, weights(controller)))
        controller.act(served(arrivals_per_s=1.0, cost=4.0 + k % 3))
    assert not any(map(np.array_equal, before, weights(controller)))
    controller.reset(SETUP)
    assert all(map(np.array_equal, before, weights(controller)))


def test_it_learns_what_saves_cost(checkpoint):
    """Actions above 0 make the next window cheaper, those below 0 dearer."""
    controller = OnlinePpo(checkpoint, learning_rate=1e-3)
    controller.reset(SETUP)
    observation = torch.as_tensor(observe(served())).reshape(1, -1)

    def mean_action() -> float:
        return controller._model.policy.get_distribution(observation).distribution.mean.item()

    before, action = mean_action(), 0.0
    for _ in range(20 * WINDOWS):
        controller.act(served(arrivals_per_s=1.0, cost=5.0 * (1.0 - action)))
        action = float(np.clip(controller._last[1][0, 0], -1.0, 1.0))
    assert mean_action() > before + 0.1


def test_an_episode_under_it_is_one_of_any_controller(checkpoint):
    core, episode = Core(CONFIG), MIX.episode("validation", 10_000).until(600.0, 0.0)
    cells = [run_episode(OnlinePpo(checkpoint, seed=3), core, episode).cell for _ in range(2)]
    assert cells[0] == cells[1] and cells[0]["requests"] > 0
    other = run_episode(OnlinePpo(checkpoint, seed=4), core, episode).cell
    assert other["kv_share_mean"] != cells[0]["kv_share_mean"]


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_rewards_are_told_by_the_mean_of_the_last_windows(checkpoint, broken):
    controller = OnlinePpo(checkpoint)
    controller.reset(SETUP)
    costs = [broken, 4.0, 2.0, broken, 0.0, 1e9]
    controller.act(served(arrivals_per_s=1.0, cost=7.0))  # of the window before the first action
    for cost in costs:
        controller.act(served(arrivals_per_s=1.0, cost=cost))
    rewards = controller._buffer.rewards[: len(costs), 0]
    # Means 4, 3, 2; the last one is a quarter of 1e9, of which the reward is -3.
    assert rewards == pytest.approx(0.1 * np.array([0.0, 0.0, 1.0 - 2.0 / 3.0, 0.0, 1.0, -3.0]), abs=1e-6)
    assert controller._buffer.episode_starts[: len(costs), 0].tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_it_sees_what_the_exported_policy_sees(checkpoint):
    controller = OnlinePpo(checkpoint)
    controller.reset(SETUP)
    controller.act(served())
    observation = controller._last[0][0]
    np.testing.assert_array_equal(observation, np.clip(observe(served()), -0.5, 0.5))
    assert (np.abs(observe(served())) > 0.5).any()
