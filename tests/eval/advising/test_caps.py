"""How many requests run at once, and what bounds them."""

import pytest

from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.serving.core import cost_of, make_layout
from hbmgym.envs.serving.cost_model import iteration_s, tpot_reference_s
from hbmgym.eval.advising.caps import MOST, Caps, Demand, caps_at, most_decoding, slots_for

CONFIG = ServingConfig()
LAYOUT = make_layout(CONFIG)


def test_the_state_cache_caps_what_was_asked_for():
    """SGLang issue 38846: 47 states at 5 per request run 9 of 32."""
    caps = caps_at(LAYOUT, 47, CONFIG.page_tokens, Demand(5, 1000.0), decoding=MOST, told=32)
    assert (caps.admitted, caps.binding) == (9, "slots")


def test_long_requests_are_bound_by_pages():
    slots = LAYOUT.max_slots // 2
    caps = caps_at(LAYOUT, slots, CONFIG.page_tokens, Demand(1, 100_000.0), decoding=MOST)
    assert caps.binding == "pages"
    assert caps.admitted == LAYOUT.pages(slots) * CONFIG.page_tokens // 100_000


@pytest.mark.parametrize(
    ("told", "binding", "admitted"), [(None, "pages", 30), (20, "max_running_requests", 20), (64, "pages", 30)]
)
def test_the_least_bound_binds(told, binding, admitted):
    caps = Caps(slots=40, pages=30, time_per_token=25, max_running_requests=told)
    assert (caps.binding, caps.admitted, caps.holds) == (binding, admitted, min(admitted, 25))


@pytest.mark.parametrize("context", [500.0, 8_000.0, 60_000.0])
def test_one_more_would_miss_the_slo(context):
    cost = cost_of(CONFIG)
    slo_s = 2.0 * tpot_reference_s(cost)
    most = most_decoding(cost, context, slo_s)
    assert 0 < most < MOST
    assert iteration_s(cost, most, most * context, 0, 0.0) <= slo_s
    assert iteration_s(cost, most + 1, (most + 1) * context, 0, 0.0) > slo_s


def test_what_nobody_meets_and_what_everybody_meets():
    assert most_decoding(cost_of(CONFIG), 1000.0, 1e-9) == 0
    assert most_decoding(cost_of(CONFIG), 1000.0, 1e9) == MOST


def test_a_chunk_s_end_takes_a_slot_more_than_the_requests_hold():
    """SGLang issue 37066."""
    assert slots_for(16, 5) == 81
