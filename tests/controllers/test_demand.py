import pytest

from hbmgym.controllers.base import HOLD
from hbmgym.controllers.demand import DemandController, balanced_share

from .records import LAYOUT, SETUP, served


def decide(**fields: float):
    controller = DemandController()
    controller.reset(SETUP)
    return controller.act(served(**fields))


def test_balanced_share_lets_both_pools_hold_the_same_number_of_requests():
    share, budget = balanced_share(4000, 16384, 2, 9e6), 1e12
    assert share * budget / (4000 * 16384) == pytest.approx((1 - share) * budget / (2 * 9e6))


def test_the_share_follows_tokens_per_request():
    slots_bytes = SETUP.slots_per_request * LAYOUT.slot_bytes
    kv_bytes = 3000 * SETUP.kv_token_bytes
    share = decide(kv_share=0.2, tokens_per_request_100s=3000, tokens_per_request_10s=9).kv_share
    assert share == pytest.approx(kv_bytes / (kv_bytes + slots_bytes))


def test_less_than_a_slot_of_change_is_a_hold():
    slots_bytes = SETUP.slots_per_request * LAYOUT.slot_bytes
    share = LAYOUT.share(40) + 0.9 * LAYOUT.share_step
    tokens = share / (1 - share) * slots_bytes / SETUP.kv_token_bytes
    assert decide(kv_share=LAYOUT.share(40), tokens_per_request_100s=tokens) is HOLD
    assert decide(kv_share=LAYOUT.share(42), tokens_per_request_100s=tokens).kv_share == pytest.approx(share)


def test_nothing_known_is_a_hold():
    assert decide() is HOLD


def test_extreme_lengths_stay_within_the_bounds():
    assert decide(tokens_per_request_100s=1e12).kv_share == SETUP.kv_share_bounds[1]
    assert decide(tokens_per_request_100s=1e-6).kv_share == SETUP.kv_share_bounds[0]
