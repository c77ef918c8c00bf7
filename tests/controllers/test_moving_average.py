import math

import numpy as np
import pytest

from hbmgym.controllers.base import HOLD
from hbmgym.controllers.demand import balanced_share
from hbmgym.controllers.moving_average import MovingAverageController, MovingAverageParameters

from .records import LAYOUT, SETUP, served

LONG = 5000.0
READY = {"min_sampled_kv_caches": 100, "cooldown_secs": 0.0}


class Traffic:
    """Records of windows in which requests of equal length arrive."""

    def __init__(self) -> None:
        self.time_s = self.average = 0.0

    def window(self, requests: float, tokens: float, kv_share: float = 0.3) -> np.record:
        self.time_s += SETUP.window_s
        per_s = requests / SETUP.window_s
        self.average += -math.expm1(-SETUP.window_s / 10.0) * (per_s * tokens - self.average)
        return served(kv_share, time_s=self.time_s, arrivals_per_s=per_s, prompt_tokens_per_s_10s=self.average)


def started(**parameters: float) -> MovingAverageController:
    controller = MovingAverageController(MovingAverageParameters(**parameters))
    controller.reset(SETUP)
    return controller


def balanced(tokens: float) -> float:
    """So many tokens in whole pages to one state, the way TensorRT-LLM turns a length into a ratio."""
    pages = math.ceil(tokens * SETUP.kv_token_bytes / LAYOUT.page_bytes)
    return balanced_share(pages, LAYOUT.page_bytes, 1, LAYOUT.slot_bytes)


def test_tensorrt_llm_s_defaults():
    defaults = MovingAverageParameters()
    assert (defaults.moving_average_decay, defaults.min_sampled_kv_caches, defaults.target_ratio_update_interval) == (
        0.9999,
        2000,
        100,
    )
    assert (defaults.cooldown_secs, defaults.ratio_threshold) == (120.0, 1.25)


def test_nothing_moves_before_two_thousand_requests():
    controller, traffic = started(), Traffic()
    decisions = [controller.act(traffic.window(50, LONG)) for _ in range(45)]
    assert decisions.index(next(d for d in decisions if d is not HOLD)) == 39
    assert decisions[39].kv_share == pytest.approx(balanced(LONG))


def test_the_length_is_a_root_of_mean_squares():
    controller, traffic = started(moving_average_decay=1 - 1e-12, **READY), Traffic()
    assert controller.act(traffic.window(50, 1000)) is HOLD
    decision = controller.act(traffic.window(50, 7000))
    assert decision.kv_share == pytest.approx(balanced(math.sqrt((1000**2 + 7000**2) / 2)), rel=1e-3)


def test_many_requests_at_once_are_so_many_updates():
    decay = 0.9
    controller, traffic = (
        started(moving_average_decay=decay, min_sampled_kv_caches=0, target_ratio_update_interval=1, cooldown_secs=0.0),
        Traffic(),
    )
    mean = weight = 0.0
    for requests, tokens in ((3, 4000.0), (2, 8000.0)):
        decision = controller.act(traffic.window(requests, tokens))
        for _ in range(requests):  # as TensorRT-LLM's MovingAverage.update does it
            weight = 1.0 + decay * weight
            mean += (tokens**2 - mean) / weight
        assert decision.kv_share == pytest.approx(balanced(math.sqrt(mean)))


def test_a_small_mismatch_is_left_alone():
    for factor, holds in ((1.2, True), (1.3, False)):
        controller, traffic = started(**READY), Traffic()
        share = balanced(600) / factor
        assert (controller.act(traffic.window(100, 600, share)) is HOLD) == holds


def test_the_smaller_pool_counts_too():
    """.95 of .9 is little for KV, and half of what the slots have."""
    controller, traffic = started(**READY), Traffic()
    tokens = 19.0 * LAYOUT.slot_bytes / SETUP.kv_token_bytes
    assert controller.act(traffic.window(100, tokens, 0.90)).kv_share == pytest.approx(0.95)


def test_moves_lie_the_cooldown_apart():
    controller, traffic = started(min_sampled_kv_caches=0), Traffic()
    moved = [traffic.time_s for _ in range(80) if controller.act(traffic.window(100, LONG)) is not HOLD]
    assert moved == [120.0, 240.0, 360.0]


@pytest.mark.parametrize(
    "parameters",
    [
        {"moving_average_decay": 1.0},
        {"min_sampled_kv_caches": -1},
        {"target_ratio_update_interval": 0},
        {"cooldown_secs": -1},
        {"ratio_threshold": 1},
    ],
)
def test_impossible_parameters_are_refused(parameters):
    with pytest.raises(ValueError, match="moving-average: "):
        MovingAverageParameters(**parameters)
