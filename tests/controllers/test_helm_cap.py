"""The cap on concurrency: when it decides, where it goes, and what it is worth."""

import dataclasses
import functools
import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbmgym.controllers.actions import Steps
from hbmgym.controllers.base import TELEMETRY
from hbmgym.controllers.helm.controller import HelmController
from hbmgym.controllers.helm.parameters import HelmParameters
from hbmgym.envs.platforms import find_platform
from hbmgym.envs.serving.core import Core
from hbmgym.envs.workload import open_workloads
from hbmgym.eval.rollout import run_episode

from .records import LAYOUT, SETUP, served, served_records
from .test_registry import constant_policy

ALONE = HelmParameters(most_residual=0.0, bursts=False, cap_running=0.0)
"""Whatever runs, the cap may fall."""
SLOTS = SETUP.slots_per_request
# Ten requests in a window, of 100 tokens each; nothing waits.
CALM = {"arrivals_per_s": 2.0, "prompt_tokens_per_s_10s": 200.0, "running": 10.0}
BALANCED = {"ttft_over_slo_10s": 0.15, "tpot_over_slo_10s": 0.2}


def started(action: float = 0.0, **parameters: float) -> HelmController:
    controller = HelmController(constant_policy(action), dataclasses.replace(ALONE, **parameters))
    controller.reset(SETUP)
    return controller


def capping(**fields: float) -> HelmController:
    """A controller whose cap decides, after `fields`; at first for all ten that run."""
    controller = started()
    for _ in range(int(ALONE.reuse_least_s / SETUP.window_s)):
        controller.act(served(0.5, **CALM, **BALANCED | fields))
    assert is_on(controller)
    return controller


def is_on(controller: HelmController) -> bool:
    return controller.value("cap") == controller.value("cap")


def share_of(requests: int) -> float:
    return 1.0 - requests * SLOTS * LAYOUT.share_step


def test_it_decides_after_enough_requests_and_seconds_without_reuse():
    controller, found = started(), []
    for _ in range(30):
        controller.act(served(0.5, **CALM))
        found.append(is_on(controller))
    assert found == [False] * 29 + [True]
    controller, found = started(), []
    for _ in range(40):
        controller.act(served(0.5, **CALM | {"arrivals_per_s": 0.12}))
        found.append(is_on(controller))
    # .6 requests in a window: the twentieth comes in the thirty-fourth.
    assert found.index(True) == 33


@pytest.mark.parametrize(
    "reused",
    [{"hit_rate_10s": 0.02}, {"kv_loss_tokens_per_s": 4.0}, {"ssm_loss_tokens_per_s": 4.0}],
    ids=lambda fields: next(iter(fields)),
)
def test_what_is_or_could_be_reused_keeps_it_off_and_turns_it_off(reused):
    never = started()
    for _ in range(400):
        never.act(served(0.5, **CALM, **reused))
        assert not is_on(never)
    controller, windows = capping(), 0
    while is_on(controller):
        assert controller.value("reuse") <= ALONE.reuse_again
        controller.act(served(0.5, **CALM, **reused))
        windows += 1
    # Half of the reuse there is, as an average over 200 requests.
    assert windows in range(13, 18)


def test_between_the_two_thresholds_it_stays_as_it_was():
    between = 0.5 * (ALONE.no_reuse + ALONE.reuse_again)
    off, on = started(), capping()
    for _ in range(300):
        for controller in (off, on):
            controller.act(served(0.5, **CALM, hit_rate_10s=between))
    assert not is_on(off) and is_on(on)


def test_the_share_is_that_of_whole_requests():
    controller = capping()
    assert controller.value("cap") == pytest.approx(10.0)
    assert controller.value("wanted") == pytest.approx(share_of(10))
    for _ in range(200):
        share = controller.act(served(0.5, **CALM, ttft_over_slo_10s=0.1, tpot_over_slo_10s=0.5)).kv_share
        requests = math.floor(controller.value("cap") + 0.5)
        assert controller.value("wanted") == pytest.approx(share_of(requests))
        if share is not None:
            assert LAYOUT.slots(share) == requests * SLOTS


def test_the_base_does_not_decide_meanwhile_and_goes_on_from_there():
    controller = started(1.0)
    for _ in range(60):
        controller.act(served(0.5, **CALM, **BALANCED))
    assert controller.value("wanted") == pytest.approx(share_of(10))
    share = None
    while is_on(controller):
        share = controller.act(served(0.5, **CALM, **BALANCED, hit_rate_10s=1.0)).kv_share
    assert share == pytest.approx(min(share_of(10) + 0.1, LAYOUT.share_bounds[1]))


def test_tpot_above_ttft_lowers_the_cap_and_the_other_way_raises_it():
    controller = capping()
    caps = [controller.value("cap")]
    for _ in range(10):
        controller.act(served(0.5, **CALM, ttft_over_slo_10s=0.1, tpot_over_slo_10s=0.9))
        caps.append(controller.value("cap"))
    falls = [b / a for a, b in itertools.pairwise(caps)]
    assert falls == pytest.approx([math.exp(-ALONE.cap_down_per_s * SETUP.window_s)] * 10)
    low = controller.value("cap")
    controller.act(served(0.5, **CALM, ttft_over_slo_10s=0.9, tpot_over_slo_10s=0.1))
    assert controller.value("cap") / low == pytest.approx(math.exp(ALONE.cap_up_per_s * SETUP.window_s))


def test_a_larger_imbalance_moves_it_further():
    found = []
    for tpot in (0.05, 0.1, 0.2, 0.3, 0.5):
        controller = capping()
        controller.act(served(0.5, **CALM, ttft_over_slo_10s=0.2, tpot_over_slo_10s=tpot))
        found.append(controller.value("cap"))
    assert sorted(found, reverse=True) == found and found[0] > 10.0 > found[-1]


def test_it_leaves_room_for_twice_what_runs():
    """Where decoding needs its batch, a lower cap lowers no TPOT but lets the queue grow (azure2023_conv)."""
    controller = started(cap_running=2.0)
    for k in range(400):
        running = 4.0 + 2.0 * (k % 2)
        controller.act(served(0.5, **CALM | {"running": running, "ttft_over_slo_10s": 0.01, "tpot_over_slo_10s": 0.9}))
    assert controller.value("cap") == pytest.approx(10.0, abs=0.2)
    controller.act(served(0.5, **CALM | {"running": 1e9}))  # more than have slots
    assert controller.value("cap") < 2.0 * (5.0 + 50.0 * SETUP.window_s / 100.0)


def test_a_jump_of_the_queue_opens_it_at_once():
    jump = {"running": 10.0, "waiting": 40.0, "mean_wait_over_slo": 0.5}
    controller = capping()
    controller.act(served(0.5, **CALM | BALANCED | jump))
    assert controller.value("cap") == pytest.approx(10.0 + ALONE.cap_opening * 40.0)
    for calm in ({"waiting": 15.0}, {"mean_wait_over_slo": 0.1}):
        controller = capping()
        controller.act(served(0.5, **CALM | BALANCED | jump | calm))
        assert controller.value("cap") == pytest.approx(10.0)


def test_it_opens_no_further_than_there_is_room_for_prompts():
    controller = capping()
    tokens = 2000.0
    jump = {"waiting": 1000.0, "mean_wait_over_slo": 5.0, "tokens_per_request_100s": tokens}
    controller.act(served(0.5, **CALM | BALANCED | jump))
    bytes_each = SLOTS * LAYOUT.slot_bytes + tokens * SETUP.kv_token_bytes
    assert controller.value("cap") == pytest.approx(LAYOUT.budget_bytes / bytes_each)


@settings(deadline=None, max_examples=50)  # the first call compiles
@given(st.lists(served_records(), min_size=1, max_size=12))
def test_cap_and_share_keep_their_bounds(records):
    controller = capping()
    low, high = SETUP.kv_share_bounds
    for record in records:
        share = controller.act(record).kv_share
        assert share is None or low <= share <= high
        assert low <= controller.value("wanted") <= high
        assert 0.0 <= controller.value("reuse") <= 1.0
        if is_on(controller):
            assert 1.0 <= controller.value("cap") <= LAYOUT.budget_bytes / (SLOTS * LAYOUT.slot_bytes)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, 1e308])
def test_broken_telemetry_is_survived(value):
    for name in TELEMETRY.names:
        controller = capping()
        for _ in range(5):
            controller.act(served(0.5, **CALM | BALANCED | {name: value}))
        for state in ("reuse", "wanted", "asked"):
            assert math.isfinite(controller.value(state)), name
        assert not math.isinf(controller.value("cap")), name
        for _ in range(400):
            controller.act(served(0.5, **CALM, **BALANCED))
        assert is_on(controller) and LAYOUT.slots(controller.value("wanted")) >= SLOTS, name


def test_a_restored_controller_goes_on_with_its_cap(tmp_path):
    whole, second = capping(), started()
    whole.act(served(share_of(10), **CALM, ttft_over_slo_10s=0.1, tpot_over_slo_10s=0.9))
    whole.save(tmp_path / "state.npz")
    second.restore(tmp_path / "state.npz")
    for k in range(100):
        record = served(share_of(10), **CALM, ttft_over_slo_10s=0.1, tpot_over_slo_10s=0.2 + 0.01 * k)
        record["kv_share_requested"] = whole.value("asked")
        assert whole.act(record) == second.act(record)
    assert is_on(second) and second.value("cap") == whole.value("cap") < 10.0


def test_without_it_the_base_decides_to_the_bit():
    controller, steps = started(0.03125, caps=False), Steps()
    steps.reset(SETUP)
    for _ in range(100):
        record = served(0.5, **CALM, **BALANCED)
        assert controller.act(record) == steps.decide(controller.value("base"), record)
    assert not is_on(controller)


@functools.cache
def costs(scenario: str, platform: str, load: float = 1.0, floor_s: float = 0.05) -> tuple[float, float, bool]:
    """Of a short training episode without and with the layer, and whether the layer decided at its end."""
    config = find_platform(platform).config
    core, found, controller = Core(dataclasses.replace(config, tpot_slo_floor_s=floor_s)), [], started()
    episode = open_workloads(config, scenarios=(scenario,), load=load)[0].episode("train", 0).until(900.0, 300.0)
    for caps in (False, True):
        controller = HelmController(constant_policy(0.0), dataclasses.replace(ALONE, caps=caps))
        found.append(run_episode(controller, core, episode).cell)
    same = {**found[0], "controller": ""} == {**found[1], "controller": ""}
    assert same != is_on(controller)
    return found[0]["cost"], found[1]["cost"], is_on(controller)


@pytest.mark.parametrize("scenario", ["steady-code", "inelastic"])
def test_where_nothing_is_reused_requests_cost_less_with_it_if_tokens_have_to_come_fast(scenario):
    without, with_it, on = costs(scenario, "qwen3-next-80b-a3b@h200", load=0.6, floor_s=1e-6)
    assert on and with_it < 0.9 * without


@pytest.mark.parametrize("scenario", ["steady-code", "inelastic"])
def test_where_tokens_have_time_it_gains_nothing(scenario):
    without, with_it, on = costs(scenario, "qwen3-next-80b-a3b@h200")
    assert on and with_it == pytest.approx(without, rel=0.02)


@pytest.mark.parametrize("scenario", ["mix-shift", "steady-assistant", "trend", "steady-documents"])
def test_where_there_is_reuse_nothing_changes(scenario):
    without, with_it, on = costs(scenario, "qwen3-next-80b-a3b@h200")
    assert not on and with_it == without
