import math

import pytest

from hbmgym.controllers.base import HOLD
from hbmgym.controllers.demand import DemandController, DemandParameters, balanced_share

from .records import LAYOUT, SETUP, served


def decide(standard_errors=2.0, **fields: float):
    """What it asks for when very many requests arrive, unless `fields` say otherwise."""
    controller = DemandController(DemandParameters(standard_errors))
    controller.reset(SETUP)
    return controller.act(served(**{"arrivals_per_s_100s": 1e9, **fields}))


def test_balanced_share_lets_both_pools_hold_the_same_number_of_requests():
    share, budget = balanced_share(4000, 16384, 2, 9e6), 1e12
    assert share * budget / (4000 * 16384) == pytest.approx((1 - share) * budget / (2 * 9e6))


def test_the_share_follows_tokens_per_request():
    slots_bytes = SETUP.slots_per_request * LAYOUT.slot_bytes
    kv_bytes = 3000 * SETUP.kv_token_bytes
    share = decide(kv_share=0.2, tokens_per_request_100s=3000, tokens_per_request_10s=9).kv_share
    assert share == pytest.approx(kv_bytes / (kv_bytes + slots_bytes))


def tokens_for(share: float) -> float:
    return share / (1 - share) * SETUP.slots_per_request * LAYOUT.slot_bytes / SETUP.kv_token_bytes


def test_less_than_a_slot_of_change_is_a_hold():
    share = LAYOUT.share(40) + 0.9 * LAYOUT.share_step
    tokens = tokens_for(share)
    assert decide(kv_share=LAYOUT.share(40), tokens_per_request_100s=tokens) is HOLD
    assert decide(kv_share=LAYOUT.share(42), tokens_per_request_100s=tokens).kv_share == pytest.approx(share)


def test_nothing_known_is_a_hold():
    assert decide() is HOLD
    assert decide(tokens_per_request_100s=3000, arrivals_per_s_100s=0.0) is HOLD


@pytest.mark.parametrize(("off", "moves"), [(1.9, False), (2.1, True)])
def test_what_may_be_chance_is_a_hold(off, moves):
    share = 0.4
    error = share * (1 - share) / math.sqrt(100 * 0.25)  # 25 requests in 100 s
    now = LAYOUT.share(LAYOUT.slots(share + off * error))
    fields = {"kv_share": now, "arrivals_per_s_100s": 0.25, "tokens_per_request_100s": tokens_for(share)}
    assert abs(now - share - off * error) < 0.1 * error
    assert (decide(**fields).kv_share is not None) == moves
    assert decide(standard_errors=0.0, **fields).kv_share is not None


@pytest.mark.parametrize("bad", [-1.0, math.inf, math.nan])
def test_bad_parameters_are_named(bad):
    with pytest.raises(ValueError, match="demand: standard_errors"):
        DemandParameters(bad)


def test_extreme_lengths_stay_within_the_bounds():
    assert decide(tokens_per_request_100s=1e12).kv_share == SETUP.kv_share_bounds[1]
    assert decide(tokens_per_request_100s=1e-6).kv_share == SETUP.kv_share_bounds[0]
