import math

import pytest

from hbmgym.controllers.balance import BalanceController, BalanceParameters
from hbmgym.controllers.base import HOLD
from hbmgym.controllers.demand import balanced_share

from .records import LAYOUT, SETUP, served

WINDOW = -math.expm1(-SETUP.window_s / 10.0)


def started(**parameters: float) -> BalanceController:
    controller = BalanceController(BalanceParameters(**parameters))
    controller.reset(SETUP)
    return controller


def first_window(requests: float, tokens: float, kv_share: float = 0.5):
    """The record after a first window in which so many requests of so many tokens arrived."""
    per_s = requests / SETUP.window_s
    return served(kv_share, arrivals_per_s=per_s, prompt_tokens_per_s_10s=WINDOW * per_s * tokens)


def test_sglang_s_worked_example():
    """#32763: token_equiv 4080, S = 4, L = 9216: r = 1.8."""
    share = balanced_share(9216, 13.8e3, 4, 4080 * 13.8e3)
    assert (1.0 - share) / share == pytest.approx(1.8, abs=0.05)


def test_the_ratio_is_set_for_the_mean_length_once_it_is_known():
    balanced = balanced_share(3000, SETUP.kv_token_bytes, SETUP.slots_per_request, LAYOUT.slot_bytes)
    assert started().act(first_window(199, 3000)) is HOLD
    assert started().act(first_window(200, 3000)).kv_share == pytest.approx(balanced)


def test_all_requests_count_alike_however_old():
    controller = started(measured_requests=1, ratio_change=1.0)
    controller.act(first_window(100, 1000))
    before = WINDOW * 100 * 1000 / SETUP.window_s
    after = before + WINDOW * (300 * 5000 / SETUP.window_s - before)
    record = served(0.5, arrivals_per_s=300 / SETUP.window_s, prompt_tokens_per_s_10s=after)
    length = (100 * 1000 + 300 * 5000) / 400
    balanced = balanced_share(length, SETUP.kv_token_bytes, SETUP.slots_per_request, LAYOUT.slot_bytes)
    assert controller.act(record).kv_share == pytest.approx(balanced)


@pytest.mark.parametrize(("slots", "holds"), [(40, True), (44, True), (60, False), (30, False)])
def test_a_small_change_is_not_worth_a_restart(slots, holds):
    share = LAYOUT.share(40)
    tokens = share / (1.0 - share) * SETUP.slots_per_request * LAYOUT.slot_bytes / SETUP.kv_token_bytes
    decision = started().act(first_window(200, tokens, LAYOUT.share(slots)))
    assert (decision is HOLD) == holds


def test_extreme_lengths_stay_within_the_bounds():
    assert started().act(first_window(200, 1e9)).kv_share == SETUP.kv_share_bounds[1]
    assert started().act(first_window(200, 1e-3)).kv_share == SETUP.kv_share_bounds[0]


@pytest.mark.parametrize("parameters", [{"measured_requests": 0}, {"ratio_change": 0.9}, {"ratio_change": math.inf}])
def test_impossible_parameters_are_refused(parameters):
    with pytest.raises(ValueError, match=r"sglang-balance: .* expected"):
        BalanceParameters(**parameters)
