"""Preemption by copying out: what goes to host memory, what comes back, and what that costs (preemption=offload)."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbmgym.envs.serving.config import Policies, ServingConfig
from hbmgym.envs.serving.core import Core
from hbmgym.envs.serving.gpus import find_gpu
from hbmgym.envs.serving.state import DEADLINE, FINISHED
from tests.envs.episodes import PLAIN_ENGINE, Ask, crowds, make_episode, small_configs
from tests.envs.test_engine_naive import compare, many_examples

PAGE = 64
CONFIG = ServingConfig(
    model="qwen3.5-4b", hbm_gib=1.0, prefill_budget=256, window_s=1.0, ttft_slo_floor_s=10.0, engine=PLAIN_ENGINE,
    policies=Policies(preemption="offload"),
)  # fmt: skip
LAYOUT = Core(CONFIG).layout
MOST_SLOTS = 0.0  # 20 slots and 20 pages
PAIR = [Ask(0.0, 512, 200, ["a"] * 8), Ask(0.001, 512, 300, ["b"] * 8)]
"""Both grow to 10 of the 20 pages; then the second one goes, whose prompt of 8 pages stays cached for a while."""


def start(asks, **settings) -> Core:
    core = Core(dataclasses.replace(CONFIG, **settings), check=True)
    core.reset(make_episode(asks), MOST_SLOTS)
    return core


def play(asks, **settings) -> Core:
    core = start(asks, **settings)
    for _ in range(2000):
        if core.done:
            return core
        core.run_window()
    pytest.fail("2000 windows were not enough")


RECOMPUTE = {"policies": Policies()}


def test_all_goes_out_and_what_is_not_resident_comes_back():
    core = play(PAIR)
    assert core.requests.preemptions.tolist() == [0, 1] and np.all(core.requests.status == FINISHED)
    assert core.counters.offloads == 1
    assert core.counters.offloaded_bytes == 10 * LAYOUT.page_bytes + LAYOUT.slot_bytes
    # All 8 pages of its prompt are resident when it returns, and so the 2 pages behind them are copied.
    assert core.counters.restored_bytes == 2 * LAYOUT.page_bytes + LAYOUT.slot_bytes
    assert core.counters.host_bytes == 0


def test_one_token_is_prefilled_on_return_instead_of_all_that_is_lost():
    core, recomputed = play(PAIR), play(PAIR, **RECOMPUTE)
    assert core.counters.recomputed_tokens == 1
    assert 64 < recomputed.counters.recomputed_tokens <= 129
    assert core.requests.generated.tolist() == recomputed.requests.generated.tolist() == [200, 300]


def test_the_engine_waits_for_both_copies():
    core, recomputed = play(PAIR), play(PAIR, **RECOMPUTE)
    size = core.counters.offloaded_bytes
    assert core.cost.host_copy_s_per_byte == 1 / find_gpu("h200").pcie
    # The first request goes on alone, after the copy.
    late_s = core.requests.ended_s[0] - recomputed.requests.ended_s[0]
    assert late_s == pytest.approx(size / find_gpu("h200").pcie, rel=1e-9)


def test_where_host_memory_is_full_a_request_recomputes():
    full = play(PAIR, host_gib=(10 * LAYOUT.page_bytes + LAYOUT.slot_bytes - 1) / 2**30)
    assert full.requests.tobytes() == play(PAIR, **RECOMPUTE).requests.tobytes()
    assert full.counters.offloads == full.counters.offloaded_bytes == 0
    just = play(PAIR, host_gib=(10 * LAYOUT.page_bytes + LAYOUT.slot_bytes) / 2**30)
    assert just.counters.offloads == 1


def test_whoever_gives_up_frees_host_memory():
    core = play([PAIR[0], Ask(0.001, 512, 700)], ttft_slo_floor_s=0.02, deadline_slos=3.0)
    assert core.requests.reject_reason.tolist() == [0, DEADLINE] and core.counters.offloads == 1
    assert core.counters.host_bytes == core.counters.restored_bytes == 0


@many_examples
@given(config=small_configs(), episode=crowds(), host_gib=st.sampled_from([0.06, 0.15, 5.0]), share=st.floats(0, 0.3))
def test_the_naive_engine_agrees_while_many_are_preempted(config, episode, host_gib, share):
    policies = dataclasses.replace(config.policies, preemption="offload")
    config = dataclasses.replace(config, policies=policies, host_gib=host_gib, slots_per_request=1, hbm_gib=0.5)
    compare(config, episode, [share])
