"""One policy asks for the same splits in the environment it was trained in and as a controller."""

import itertools

import numpy as np
import pytest

from hbmgym.controllers.helm.policy import Header, Policy
from hbmgym.controllers.helm.ppo import PpoController
from hbmgym.controllers.observation import OBSERVATION_SIZE
from hbmgym.envs.hbm_partition import HbmPartitionEnv
from hbmgym.envs.serving.core import Core
from hbmgym.eval.rollout import run_episode

from .traffic import CONFIG, HBM_GIB, MIX, MODEL


def lively_policy(action_kind: str) -> Policy:
    rng = np.random.default_rng(0)
    sizes = (OBSERVATION_SIZE, 16, 1)
    layers = [(rng.normal(0, 2.0, (n, m)), np.zeros(n)) for m, n in itertools.pairwise(sizes)]
    return Policy.from_layers(layers, Header(action_kind=action_kind))


@pytest.mark.parametrize("action_kind", ["incremental", "absolute"])
def test_both_ask_for_the_same_splits(action_kind):
    policy = lively_policy(action_kind)
    env = HbmPartitionEnv(
        workload=MIX,
        part="validation",
        serving={"model": MODEL, "hbm_gib": HBM_GIB},
        absolute=action_kind == "absolute",
    )
    observation, info = env.reset(options={"episode_seed": 10_000})
    in_environment, truncated = [info], False
    while not truncated:
        action = np.array([policy.action(observation)], np.float32)
        observation, _, _, truncated, info = env.step(action)
        in_environment.append(info)
    history = run_episode(PpoController(policy), Core(CONFIG), MIX.episode("validation", 10_000)).history
    for name in ("kv_share_requested", "kv_share_effective", "waiting", "running"):
        # The environment goes on to the horizon, the evaluation until everything has ended.
        windows = min(len(in_environment) - 1, len(history[name]))
        assert windows > 200
        assert [info[name] for info in in_environment[1 : windows + 1]] == history[name][:windows], name
    assert len(set(history["kv_share_requested"])) > 5
