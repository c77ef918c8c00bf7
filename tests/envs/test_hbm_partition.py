"""The environment keeps Gymnasium's and Stable-Baselines3's contracts, and its own spec sheet."""

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env as check_gymnasium
from stable_baselines3.common.env_checker import check_env as check_sb3

import hbmgym  # noqa: F401  (registers the environments)
from hbmgym.controllers.observation import OBSERVATION_TABLE
from hbmgym.envs.hbm_partition import HbmPartitionEnv, serving_config
from hbmgym.envs.registration import ENVIRONMENTS
from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.serving.core import Core
from hbmgym.envs.serving.engines import ENGINE_PROFILES
from hbmgym.envs.serving.state import DOES_NOT_FIT
from hbmgym.envs.traces.episode import ROW, Episode
from hbmgym.envs.traces.seeds import Part
from hbmgym.memory_backend.migration import MigrateOnFailure
from hbmgym.memory_backend.pricing import PricedAdmission
from tests.envs.episodes import Ask, make_episode

PAGE_TOKENS = 64
SERVING = {"window_s": 4.0, "hbm_gib": 8.0}
HORIZON_S, WARMUP_S = 41.0, 8.0
IDS = sorted(ENVIRONMENTS)


@dataclass(frozen=True)
class TinyWorkload:
    """Independent requests, about `rate_per_s` of them; the seed decides arrivals and lengths."""

    rate_per_s: float = 3.0
    name: str = "tiny"

    def episode(self, part: Part, seed: int) -> Episode:
        rng = np.random.default_rng(seed)
        rows = np.zeros(int(self.rate_per_s * HORIZON_S), ROW).view(np.recarray)
        rows.arrival_s = np.sort(rng.uniform(0.0, HORIZON_S, len(rows)))
        rows.input_tokens = rng.integers(500, 8000, len(rows))
        rows.output_tokens = rng.integers(10, 300, len(rows))
        rows.prompt_ids = rows.known_ids = rows.input_tokens // PAGE_TOKENS
        rows.ref_off = np.concatenate([[0], np.cumsum(rows.known_ids)[:-1]])
        rows.measured = rows.arrival_s >= WARMUP_S
        pages = int(rows.known_ids.sum())
        refs = np.arange(pages, dtype=np.int32)
        return Episode(self.name, seed, rows, refs, pages, PAGE_TOKENS, WARMUP_S, HORIZON_S)


def make(name: str = IDS[0], **arguments: Any) -> gym.Env[np.ndarray, np.ndarray]:
    return gym.make(name, **{"workload": TinyWorkload(), "serving": SERVING, **arguments})


def action(value: float) -> np.ndarray:
    return np.array([value], np.float32)


@pytest.fixture
def env() -> Iterator[HbmPartitionEnv]:
    environment = HbmPartitionEnv(workload=TinyWorkload(), serving=SERVING, check=True)
    yield environment
    environment.close()


def rollout(
    env: gym.Env[np.ndarray, np.ndarray], seed: int, *, hold: bool = False
) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]:
    observation, info = env.reset(seed=seed)
    rng = np.random.default_rng(seed)
    observations, rewards, infos, truncated = [observation], [], [info], False
    while not truncated:
        observation, reward, _, truncated, info = env.step(action(0.0 if hold else rng.uniform(-1, 1)))
        observations.append(observation)
        rewards.append(reward)
        infos.append(info)
    return np.array(observations), np.array(rewards), infos


@pytest.mark.parametrize("name", IDS)
def test_gymnasium_finds_no_fault(name: str) -> None:
    check_gymnasium(make(name).unwrapped)


@pytest.mark.parametrize("name", IDS)
def test_sb3_finds_no_fault(name: str) -> None:
    check_sb3(make(name).unwrapped)


@pytest.mark.parametrize("name", IDS)
def test_equal_seeds_give_equal_rollouts(name: str) -> None:
    first, second, other = rollout(make(name), 3), rollout(make(name), 3), rollout(make(name), 4)
    assert np.array_equal(first[0], second[0])
    assert np.array_equal(first[1], second[1])
    assert first[2] == second[2]
    assert not np.array_equal(first[1], other[1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="host memory needs Linux")
def test_the_backend_changes_no_result() -> None:
    small = {**SERVING, "hbm_gib": 0.5}
    expected = rollout(make(serving=small), 1)
    actual = rollout(make(serving=small, backend="host"), 1)
    assert np.array_equal(expected[1], actual[1])
    assert expected[2] == actual[2]


def test_an_episode_is_truncated_at_the_first_window_end_past_the_horizon(env: HbmPartitionEnv) -> None:
    _, rewards, infos = rollout(env, 0)
    assert len(rewards) == 11  # ceil(41 s / 4 s)
    assert infos[-1]["time_s"] >= HORIZON_S


class OddWorkload(TinyWorkload):
    """Its horizon is 12 windows of 1.2 s; in floats 12 x 1.2 is less."""

    def episode(self, part: Part, seed: int) -> Episode:
        return super().episode(part, seed).until(14.4, WARMUP_S)


@pytest.mark.parametrize("references", [None, {"tiny": (0.5, 1.0)}])
def test_every_window_has_a_reference_where_floats_round(references: dict[str, tuple[float, float]] | None) -> None:
    odd = make(workload=OddWorkload(), serving={**SERVING, "window_s": 1.2}, references=references)
    assert len(rollout(odd, 0)[1]) == 13


def test_info_has_the_same_json_types_at_every_step(env: HbmPartitionEnv) -> None:
    _, _, infos = rollout(env, 0)
    types = [{key: type(value) for key, value in info.items()} for info in infos]
    assert all(row == types[0] for row in types)
    assert set(types[0].values()) == {bool, int, float}


def test_the_reward_is_zero_in_the_warm_up_and_what_cost_leaves_of_1_after(env: HbmPartitionEnv) -> None:
    _, rewards, infos = rollout(env, 0)
    expected_arrivals = env.episode.rate_per_s * SERVING["window_s"]
    assert [info["warmup"] for info in infos[:4]] == [True, True, True, False]
    for reward, info in zip(rewards, infos[1:], strict=True):
        assert reward == (0.0 if info["warmup"] else pytest.approx(1.0 - info["cost"] / expected_arrivals))
    assert len(set(rewards)) > 3


def test_a_reference_is_a_fixed_split_on_the_same_episode() -> None:
    """Held at the reference's own share, the environment earns nothing; elsewhere the difference of the costs."""
    share, name = 0.3, TinyWorkload.name
    env = make(references={name: (share, 0.5)}, serving={**SERVING, "initial_kv_share": share}).unwrapped
    held, plain = [rollout(e, 0, hold=True) for e in (env, make(serving={**SERVING, "initial_kv_share": 0.99}))]
    assert not held[1].any()
    expected_arrivals = env.episode.rate_per_s * SERVING["window_s"]
    away = rollout(make(references={name: (share, 0.5)}, serving={**SERVING, "initial_kv_share": 0.99}), 0, hold=True)
    for reward, mine, reference in zip(away[1], plain[2][1:], held[2][1:], strict=True):
        gain = (reference["cost"] - mine["cost"]) / (0.5 * expected_arrivals)
        assert reward == (0.0 if mine["warmup"] else pytest.approx(gain))
    assert away[1].any()


class LargeDocument(TinyWorkload):
    """One of its requests outgrows the KV pool of small shares, though not the budget."""

    row = 70

    def episode(self, part: Part, seed: int) -> Episode:
        episode = super().episode(part, seed)
        episode.rows.input_tokens[self.row] = 60_000
        return episode


def test_a_reference_turns_away_what_its_split_can_never_hold() -> None:
    """A fixed split has no other to wait for, so the request costs 10 in the window in which it arrives."""
    share, row = 0.1, LargeDocument.row
    env = HbmPartitionEnv(workload=LargeDocument(), serving=SERVING, references={"tiny": (share, 1.0)})
    _, rewards, infos = rollout(env, 0, hold=True)
    fixed = Core(env.core.config)
    fixed.reset(env.episode, share, (share, share))
    costs = [float(fixed.run_window().cost) for _ in rewards]
    large = fixed.requests[row]
    assert (large.reject_reason, large.ended_s) == (DOES_NOT_FIT, large.arrival_s) and large.arrival_s > WARMUP_S
    expected_arrivals = env.episode.rate_per_s * SERVING["window_s"]
    for reward, info, cost in zip(rewards, infos[1:], costs, strict=True):
        assert reward == (0.0 if info["warmup"] else pytest.approx((cost - info["cost"]) / expected_arrivals))
    assert env.core.requests[row].reject_reason != DOES_NOT_FIT, "elsewhere it waits for a larger pool"


@pytest.mark.parametrize("reference", [(0.5, 0.0), (1.5, 1.0), (0.5,)])
def test_a_wrong_reference_is_refused(reference: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"reference of tiny is {reference}")):
        make(references={"tiny": reference})
    with pytest.raises(ValueError, match="workload of references is 'other'"):
        make(references={"other": (0.5, 1.0)})


def test_an_action_below_one_slot_holds_and_repeated_ones_add_up(env: HbmPartitionEnv) -> None:
    _, info = env.reset(seed=0)
    start = info["kv_share_requested"]
    half_a_slot = action(0.5 * env.core.layout.share_step / 0.1)
    shares = [env.step(half_a_slot)[4]["kv_share_requested"] for _ in range(4)]
    assert shares[0] == start
    assert shares[-1] > start


def test_an_increment_is_a_fiftieth_of_the_action_per_second_and_stays_within_the_bounds(env: HbmPartitionEnv) -> None:
    _, info = env.reset(seed=0)
    step = env.core.layout.share_step
    wanted = info["kv_share_requested"] - 0.5 * 0.02 * SERVING["window_s"]
    assert env.step(action(-0.5))[4]["kv_share_requested"] == pytest.approx(wanted, abs=step)
    for _ in range(10):
        lowest = env.step(action(-1.0))[4]["kv_share_requested"]
    assert lowest == env.core.layout.share_bounds[0]


def test_absolute_actions_span_the_bounds() -> None:
    env = make("hbmgym/HbmPartitionAbsolute-v0")
    env.reset(seed=0)
    low, high = env.unwrapped.core.layout.share_bounds  # type: ignore[attr-defined]
    shares = [env.step(action(value))[4]["kv_share_requested"] for value in (-1.0, 1.0, 0.0)]
    assert shares[:2] == [low, high]
    assert shares[2] == pytest.approx((low + high) / 2, abs=0.02)


class OneLongPrompt:
    """Short prompts that keep the engine busy, and in their midst one that needs most of the memory."""

    name = "one long prompt"
    long = Ask(3.0, 420 * PAGE_TOKENS, 64)

    def episode(self, part: Part, seed: int) -> Episode:
        short = [Ask(0.2 * k, 500, 200) for k in range(100)]
        return make_episode(sorted([*short, self.long], key=lambda ask: ask.arrival_s))


def test_no_action_keeps_out_what_the_machine_holds_and_small_shares_come_back_after_it() -> None:
    serving = {"model": "qwen3.5-4b", "hbm_gib": 1.0, "window_s": 0.5, "ttft_slo_floor_s": 5.0}
    env = make(workload=OneLongPrompt(), serving=serving)
    env.reset(seed=0)
    core, ended, shares = env.unwrapped.core, False, []  # type: ignore[attr-defined]
    while not ended:
        _, _, _, ended, info = env.step(np.array([-1.0], np.float32))
        shares.append(info["kv_share_requested"])
    assert not core.requests["reject_reason"].any()
    assert core.requests[core.episode.rows["input_tokens"].argmax()].first_token_s < 3.0 + 5.0
    low = core.layout.share_bounds[0]
    assert max(shares) > 0.8 and shares[-1] == low, "after the long prompt"


def test_an_action_that_is_not_a_number_is_refused(env: HbmPartitionEnv) -> None:
    env.reset(seed=0)
    with pytest.raises(ValueError, match="action is nan"):
        env.step(action(float("nan")))


def test_a_step_outside_of_an_episode_asks_for_a_reset(env: HbmPartitionEnv) -> None:
    with pytest.raises(ResetNeeded, match="call reset"):
        env.step(action(0.0))
    rollout(env, 0)
    with pytest.raises(ResetNeeded, match="call reset"):
        env.step(action(0.0))
    with pytest.raises(ValueError, match="seed"):
        env.reset(options={"episode_seed": 10_000})
    with pytest.raises(ResetNeeded, match="call reset"):
        env.step(action(0.0))
    env.reset(seed=0)
    env.step(action(0.0))


def test_reset_takes_the_episode_seed_it_is_given(env: HbmPartitionEnv) -> None:
    env.reset(seed=0, options={"episode_seed": 17})
    assert env.episode.seed == 17


def test_drawn_episode_seeds_belong_to_the_part() -> None:
    env = HbmPartitionEnv(workload=TinyWorkload(), serving=SERVING, part="validation")
    env.reset(seed=0)
    assert 10_000 <= env.episode.seed < 11_000


@pytest.mark.parametrize("options", [{"episode_seed": 11_000}, {"colour": "red"}])
def test_reset_refuses_foreign_seeds_and_unknown_options(env: HbmPartitionEnv, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        env.reset(seed=0, options=options)


def test_the_loop_may_be_closed() -> None:
    env = HbmPartitionEnv(scenario="steady-chat", loop="closed")
    env.reset(seed=0)
    arrivals = sum(env.step(np.zeros(1, np.float32))[4]["arrivals"] for _ in range(20))
    assert env.episode.loop == "closed" and 0 < arrivals == env.core.counters.received
    env.close()


def test_a_part_of_the_episode_may_be_skipped(env: HbmPartitionEnv) -> None:
    env.reset(seed=0, options={"episode_seed": 3})
    hold = np.zeros(1, np.float32)
    whole = [env.step(hold)]
    while not whole[-1][3]:
        whole.append(env.step(hold))
    observation, _ = env.reset(seed=0, options={"episode_seed": 3, "skip": 0.75})
    skipped = int(0.75 * len(whole))
    assert np.array_equal(observation, whole[skipped - 1][0])
    rest = [env.step(hold) for _ in range(len(whole) - skipped)]
    assert [step[1:] for step in rest] == [step[1:] for step in whole[skipped:]] and rest[-1][3]
    with pytest.raises(ValueError, match="skip is 1"):
        env.reset(options={"skip": 1.0})


def test_of_several_workloads_each_reset_draws_one() -> None:
    workloads = [TinyWorkload(name="first"), TinyWorkload(name="second")]
    env = HbmPartitionEnv(workload=workloads, serving=SERVING)
    env.reset(seed=0)
    names = {env.reset() and env.episode.name for _ in range(10)}
    assert names == {"first", "second"}


def test_the_initial_share_is_random_on_request() -> None:
    env = HbmPartitionEnv(workload=TinyWorkload(), serving=SERVING, randomise_initial_share=True)
    shares = {env.reset(seed=seed)[1]["kv_share_effective"] for seed in range(4)}
    assert len(shares) == 4


@pytest.mark.parametrize(
    "arguments",
    [
        {"serving": {"hbm_gb": 8.0}},
        {"serving": {"window_s": "5"}},
        {"serving": {"policies": {"colour": "red"}}},
        {"serving": {"engine": {"prefill": "later"}}},
        {"serving": {"engine": {"colour": 1.0}}},
        {"serving": {"engine": {"layer_s": -1.0}}},
        {"serving": {"engine": {"request_s": "0"}}},
        {"serving": {"engine": {"snapshots_end_chunks": 1}}},
        {"serving": {"engine": 3}},
        {"serving": {"receive_interval": 0}},
        {"serving": {"migrate": {"low": 0.5}}},
        {"serving": {"migrate": {"chunks": "16"}}},
        {"serving": {"priced": {"price_mode": "free"}}},
        {"serving": {"priced": {"horizon_s": 0.0}}},
        {"serving": {"priced": {"deferral_weight": -1.0}}},
        {"serving": {"priced": {"deferral_weight": "dear"}}},
        {"serving": {"priced": {"max_deferrals": -1}}},
        {"serving": {"slots_per_request": 9}},
        {"part": "trian"},
        {"backend": "gpu"},
        {"render_mode": "human"},
    ],
)
def test_wrong_arguments_are_named_in_one_line(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as error:
        HbmPartitionEnv(workload=TinyWorkload(), **arguments)
    assert "expected" in str(error.value)
    assert "\n" not in str(error.value)


def test_serving_fields_may_come_from_json() -> None:
    assert serving_config(json.loads('{"window_s": 5, "policies": {"eviction": "lru"}}')) == serving_config({})


def test_serving_fields_survive_being_taken_apart() -> None:
    config = ServingConfig(
        engine=dataclasses.replace(ENGINE_PROFILES["sglang-eager"], request_s=0.25),
        migrate=MigrateOnFailure(high=0.4),
        priced=PricedAdmission(price_mode="none"),
    )
    assert serving_config(json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize("name", IDS)
def test_the_spec_survives_json(name: str) -> None:
    spec = gym.spec(name)
    spec.kwargs.update(part="validation", load=1.2, serving={"hbm_gib": 8.0}, trace=["a.jsonl"], check=True)
    assert gym.envs.registration.EnvSpec.from_json(spec.to_json()).kwargs == spec.kwargs


def test_ansi_shows_one_line() -> None:
    env = make(render_mode="ansi")
    env.reset(seed=0)
    env.step(action(1.0))
    line = env.render()
    assert isinstance(line, str)
    assert "kv_share" in line
    assert "\n" not in line


def test_rgb_array_shows_a_picture_that_changes() -> None:
    env = make(render_mode="rgb_array")
    env.reset(seed=0)
    before = env.render()
    env.step(action(1.0))
    after = env.render()
    assert isinstance(before, np.ndarray) and isinstance(after, np.ndarray)
    assert before.dtype == np.uint8 and before.ndim == 3 and before.shape[2] == 3
    assert not np.array_equal(before, after)


def test_gymnasiums_own_vector_environment_takes_it() -> None:
    arguments = {"workload": TinyWorkload(), "serving": SERVING}
    envs = gym.make_vec(IDS[0], num_envs=2, vectorization_mode="sync", **arguments)
    envs.reset(seed=0)
    steps = [envs.step(np.zeros((2, 1), np.float32)) for _ in range(12)]
    assert steps[10][3].all()
    assert steps[-1][0].shape == (2, len(OBSERVATION_TABLE))
    envs.close()


def test_the_docstring_lists_every_observation() -> None:
    assert all(f"| {name} | {formula} |" in str(HbmPartitionEnv.__doc__) for name, formula in OBSERVATION_TABLE)


def test_an_id_may_name_its_package() -> None:
    assert make(f"hbmgym:{IDS[0]}").spec == make(IDS[0]).spec


def test_importing_the_package_is_cheap() -> None:
    script = "import sys, hbmgym\nassert not {'torch', 'matplotlib', 'numba'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
