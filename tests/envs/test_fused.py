"""A policy that runs in one kernel sees, does and earns what stepping the environment does, to the last bit."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from gymnasium.error import ResetNeeded

from hbmgym.controllers.helm.policy import Header, Policy
from hbmgym.controllers.observation import OBSERVATION_SIZE
from hbmgym.envs.fused import Network
from hbmgym.envs.hbm_partition import HbmPartitionEnv, serving_config
from hbmgym.envs.serving.config import Policies
from hbmgym.envs.serving.core import Core

from .test_hbm_partition import SERVING, OddWorkload, OneLongPrompt, TinyWorkload, action

REFERENCES = {"tiny": (0.4, 0.7)}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "incremental": {},
    "absolute": {"absolute": True},
    "reference": {"references": REFERENCES, "randomise_initial_share": True},
    "windows that round": {"workload": OddWorkload(), "serving": {**SERVING, "window_s": 1.2}},
    "checked": {"check": True},
    "migrate": {"serving": {**SERVING, "policies": Policies(on_shortage="migrate")}},
    "one pool": {"serving": {**SERVING, "policies": Policies(on_shortage="float")}},
    "floor": {
        "workload": OneLongPrompt(),
        "serving": {"model": "qwen3.5-4b", "hbm_gib": 1.0, "window_s": 0.5, "ttft_slo_floor_s": 5.0},
    },
}


def make(arguments: dict[str, Any]) -> HbmPartitionEnv:
    return HbmPartitionEnv(**{"workload": TinyWorkload(), "serving": SERVING, **arguments})


def make_policy() -> Policy:
    rng = np.random.default_rng(5)
    sizes = (OBSERVATION_SIZE, 16, 16, 1)
    layers = [(rng.normal(0, 0.3, (out, into)), rng.normal(0, 0.1, out)) for into, out in itertools.pairwise(sizes)]
    return Policy.from_layers(layers, Header())


def network(policy: Policy) -> Network:
    return Network(policy.packed, policy.sizes)


def step_through(env: HbmPartitionEnv, policy: Policy, noise: np.ndarray, first: np.ndarray) -> dict[str, np.ndarray]:
    """What `run_policy` returns, from `step`."""
    seen, actions, rewards, infos, observation, truncated = [], [], [], [], first, False
    for own in noise:
        chosen = np.float32(policy.mean(observation)) + own
        seen.append(observation)
        actions.append(chosen)
        observation, reward, _, truncated, info = env.step(np.clip(action(chosen), -1.0, 1.0))
        rewards.append(reward)
        infos.append(info)
        if truncated:
            break
    return {
        "observations": np.array(seen),
        "actions": np.array(actions),
        "rewards": np.array(rewards),
        "warmup": np.array([info["warmup"] for info in infos]),
        "cost": np.array([info["cost"] for info in infos]),
        "kv_share_requested": np.array([info["kv_share_requested"] for info in infos]),
        "last": observation,
        "truncated": np.array(truncated),
    }


@pytest.mark.parametrize("case", ARGUMENTS)
def test_a_kernel_of_many_windows_gives_the_arrays_that_stepping_gives(case):
    stepped, fused = make(ARGUMENTS[case]), make(ARGUMENTS[case])
    policy, rng = make_policy(), np.random.default_rng(1)
    first = [env.reset(seed=3)[0] for env in (stepped, fused)]
    assert np.array_equal(*first)
    ended, windows = False, 0
    while not ended:
        noise = rng.normal(0, 0.5, 8).astype(np.float32)
        expected = step_through(stepped, policy, noise, first[0])
        found = fused.run_policy(network(policy), noise)
        actual = {
            **{name: found.telemetry[name] for name in ("cost", "kv_share_requested")},
            **{name: np.array(getattr(found, name)) for name in expected if hasattr(found, name)},
        }
        assert actual.keys() == expected.keys()
        for name, array in expected.items():
            assert np.array_equal(actual[name], array), name
        first[0], ended, windows = expected["last"], bool(expected["truncated"]), windows + len(expected["rewards"])
    assert windows % 8, "the episode ends within the noise"
    assert stepped.core.requests.tobytes() == fused.core.requests.tobytes()
    assert stepped.core.moved_chunks == fused.core.moved_chunks
    if case != "one pool":
        assert fused.core.moved_chunks > 0


def test_outside_of_an_episode_it_asks_for_a_reset():
    env, noise = make({}), np.zeros(40, np.float32)
    with pytest.raises(ResetNeeded, match="call reset"):
        env.run_policy(network(make_policy()), noise)
    env.reset(seed=0)
    assert env.run_policy(network(make_policy()), noise).truncated
    with pytest.raises(ResetNeeded, match="call reset"):
        env.run_policy(network(make_policy()), noise)


def test_an_action_that_is_not_a_number_is_refused():
    env = make({})
    env.reset(seed=0)
    with pytest.raises(ValueError, match="action is nan"):
        env.run_policy(network(make_policy()), np.array([0.0, np.nan], np.float32))


def test_references_are_run_once_for_environments_that_share_them():
    known: dict[tuple[str, int, float], np.ndarray] = {}
    first, second = (make({"references": REFERENCES, "episode_seeds": [4], "reference_costs": known}) for _ in range(2))
    first.reset(seed=0)
    ((key, costs),) = known.items()
    assert key == ("tiny", 4, 0.4) and costs.any()
    alone = make({"references": REFERENCES, "episode_seeds": [4]})
    alone.reset(seed=0)
    second.reset(seed=0)
    assert len(known) == 1
    assert second.step(action(0.3))[1] == alone.step(action(0.3))[1]
    known[key] = costs + 1.0
    second.reset(seed=0)
    alone.reset(seed=0)
    rewards = np.array([[env.step(action(0.0))[1] for env in (second, alone)] for _ in range(4)])
    assert rewards[-1, 0] > rewards[-1, 1], "what is known is not run again"


class RareWorkload(TinyWorkload):
    """Two of three seeds have nothing that is measured."""

    def episode(self, part, seed):
        episode = super().episode(part, seed)
        rows = episode.rows.copy()
        rows["measured"] = 0 if seed % 3 else rows["measured"]
        rows.flags.writeable = False
        return dataclasses.replace(episode, rows=rows.view(np.recarray))


def test_rare_traffic_draws_the_next_seed():
    env = make({"workload": RareWorkload()})
    seeds = []
    for seed in range(12):
        env.reset(seed=seed)
        seeds.append(env.episode.seed)
    assert all(seed % 3 == 0 for seed in seeds) and len(set(seeds)) > 6
    with pytest.raises(ValueError, match="seed 1 has no measured arrivals"):
        env.reset(options={"episode_seed": 1})
    with pytest.raises(ValueError, match="no measured arrivals"):
        make({"workload": RareWorkload(), "episode_seeds": [1, 2]}).reset(seed=0)


def test_episodes_are_drawn_from_the_seeds_given():
    env = make({"episode_seeds": [5, 8]})
    seeds = set()
    for _ in range(12):
        env.reset()
        seeds.add(env.episode.seed)
    assert seeds == {5, 8}
    for wrong, said in (([10_000], "seed is 10000"), ([], "episode_seeds is empty")):
        with pytest.raises(ValueError, match=said):
            make({"episode_seeds": wrong})


@pytest.mark.parametrize("check", [False, True])
def test_windows_under_one_split_are_those_of_run_window(check):
    episode = TinyWorkload().episode("train", 0)
    cores = [Core(serving_config(SERVING), check=check) for _ in range(2)]
    for core in cores:
        core.reset(episode, 0.6)
    alone = [cores[0].run_window().copy() for _ in range(12)]
    together = [*cores[1].run_windows(5), *cores[1].run_windows(0), *cores[1].run_windows(7)]
    assert [record.tobytes() for record in together] == [record.tobytes() for record in alone]
    assert cores[0].requests.tobytes() == cores[1].requests.tobytes()


@pytest.mark.parametrize("share", [float("nan"), float("inf")])
def test_a_share_that_is_not_a_number_is_refused(share):
    core = Core(serving_config(SERVING))
    core.reset(TinyWorkload().episode("train", 0))
    with pytest.raises(ValueError, match=f"kv_share is {share}"):
        core.request_split(share)
