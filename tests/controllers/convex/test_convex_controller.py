import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbmgym.controllers.convex.controller import ConvexController, ConvexParameters

from ..records import LAYOUT, SETUP, served, served_records

SHARE = LAYOUT.share(50)
KV_GAINS = {f"kv_gain_{step}pct": step / 100 for step in (2, 5, 10, 20)}  # 1 s/s for a whole budget more
SSM_GAINS = {f"ssm_gain_{step}pct": step / 100 for step in (2, 5, 10, 20)}


def decide(windows=20, window_s=5.0, share=SHARE, parameters=None, **fields):
    """The last decision of a controller that sees the same for so many windows and does not wait between moves."""
    controller = ConvexController(dataclasses.replace(parameters or ConvexParameters(), cooldown_s=0.0))
    controller.reset(SETUP)
    for window in range(1, windows + 1):
        decision = controller.act(served(share, **{"window_s": window_s, "time_s": window * window_s, **fields}))
    return decision


def test_bytes_go_where_they_save_most():
    assert decide(**KV_GAINS).kv_share > SHARE > decide(**SSM_GAINS).kv_share


def test_what_the_giver_would_lose_counts():
    loss = {f"ssm_cost_{step}pct": 2 * step / 100 for step in (2, 5, 10, 20)}
    assert decide(**KV_GAINS, **loss).kv_share is None
    little = {f"ssm_cost_{step}pct": 0.1 * step / 100 for step in (2, 5, 10)} | {"ssm_cost_20pct": 0.5}
    share = decide(**KV_GAINS, **little).kv_share
    assert share == pytest.approx(SHARE + 0.1, abs=LAYOUT.share_step), "the last tenth is worth more where it is"


def test_nothing_moves_for_less_than_a_move_costs():
    worth = ConvexParameters().move_s_per_budget / ConvexParameters().horizon_s
    for factor, moves in ((0.9, False), (1.2, True)):
        gains = {name: factor * worth * gain for name, gain in KV_GAINS.items()}
        gains |= {name.replace("gain", "cost"): gain for name, gain in gains.items()}  # as concave as can be
        assert (decide(windows=100, **gains).kv_share is not None) == moves
    assert decide(**KV_GAINS, parameters=ConvexParameters(move_s_per_budget=1e6)).kv_share is None
    assert decide().kv_share is None, "an idle engine"


@pytest.mark.parametrize("rate", [0.05, 0.4, 2.0])
def test_windows_of_any_length_lead_to_the_same(rate):
    gains = {name: rate * gain for name, gain in KV_GAINS.items()}
    load = {"running": 8.0, "arrivals_per_s": 2.0, "finished_per_s": 1.5, "kv_live": 200.0, "busy_fraction": 0.5}
    short, long = (decide(int(60 / tau), tau, **gains, **load) for tau in (1.0, 30.0))
    assert short.kv_share == long.kv_share
    for name in short.prices.dtype.names:
        assert short.prices[name] == pytest.approx(long.prices[name], rel=1e-9)


def test_the_wait_between_moves_is_in_seconds():
    def moves(window_s):
        controller = ConvexController(ConvexParameters(cooldown_s=30.0, most_cooldowns=1.0))
        controller.reset(SETUP)
        times, share = [], LAYOUT.share(80)
        for window in range(1, int(120 / window_s) + 1):
            now_s = window * window_s
            decision = controller.act(served(share, window_s=window_s, time_s=now_s, **KV_GAINS))
            if decision.kv_share is not None:
                share = decision.kv_share
                times.append(now_s)
        return times

    assert all(np.diff(moves(w)).min() == 30.0 for w in (1.0, 5.0, 30.0))


def test_moves_that_do_not_help_wait_longer():
    controller = ConvexController(ConvexParameters(cooldown_s=10.0, most_cooldowns=4.0))
    controller.reset(SETUP)
    times = []
    for now_s in range(5, 400, 5):  # the split never follows, and nothing gets better
        if controller.act(served(SHARE, time_s=now_s, **KV_GAINS)).kv_share is not None:
            times.append(now_s)
    waits = np.diff(times)
    assert waits[0] == 20.0 and waits[-1] == 40.0 and waits.max() == 40.0


def test_live_bytes_stay():
    live = LAYOUT.slots(SHARE) - 4
    share = decide(**KV_GAINS, ssm_live=live, ssm_cached=4).kv_share
    assert share is None or (1 - share) * LAYOUT.budget_bytes >= live * LAYOUT.slot_bytes


def test_while_chunks_move_nothing_new_is_asked_for():
    assert decide(**KV_GAINS, moving_chunks=1).kv_share is None


def test_requests_that_find_no_slot_are_worth_slots():
    load = {"running": 30.0, "arrivals_per_s": 3.0, "finished_per_s": 3.0, "kv_live": 60.0}
    few = LAYOUT.share(60)  # 30 requests at once, for an offered load of 30
    assert decide(share=few, ssm_live=56, **load).kv_share < few
    assert decide(share=few, ssm_live=56, **load, parameters=ConvexParameters(blocked_s=0.0)).kv_share is None


def test_prices_are_per_byte_and_second():
    both = {name: 0.3 * gain for name, gain in (KV_GAINS | SSM_GAINS).items()}
    costs = {name.replace("gain", "cost"): gain for name, gain in both.items()}
    prices = decide(200, **both, **costs, finished_per_s=2.0, busy_fraction=0.5).prices
    assert prices["shadow_price"] == pytest.approx(0.3 / LAYOUT.budget_bytes, rel=0.1)
    assert prices["curvature"] == pytest.approx(0.0, abs=1e-3 * 0.3 / LAYOUT.budget_bytes**2)
    assert prices["deferral_weight"] == pytest.approx(0.25)


@settings(deadline=None, max_examples=50)
@given(telemetries=st.lists(served_records(), min_size=1, max_size=6))
def test_what_is_asked_for_can_be_realised_and_prices_are_numbers(telemetries):
    controller = ConvexController()
    controller.reset(SETUP)
    for telemetry in telemetries:
        decision = controller.act(telemetry)
        assert decision.kv_share is None or decision.kv_share == LAYOUT.share(LAYOUT.slots(decision.kv_share))
        assert all(math.isfinite(decision.prices[name]) for name in decision.prices.dtype.names)


@pytest.mark.parametrize("bad", [{"average_s": 0.0}, {"horizon_s": -1.0}, {"margin": math.nan}])
def test_bad_parameters_are_named(bad):
    with pytest.raises(ValueError, match=f"convex: .*{next(iter(bad))}"):
        ConvexParameters(**bad)


@pytest.mark.parametrize("seed", [0, 234])
def test_curvature_is_never_below_zero(seed):
    """Rounding must not bend a straight line upwards: an engine refuses such a price."""
    controller = ConvexController()
    controller.reset(SETUP)
    rng = np.random.default_rng(seed)
    scaled = rng.random() < 0.5
    for window in range(1, 30):
        fields = {}
        for name in ("kv_gain", "kv_cost", "ssm_gain", "ssm_cost"):
            steps = rng.exponential(1, 4) * (rng.random(4) < 0.4) if rng.random() < 0.5 else np.zeros(4)
            for percent, worth in zip((2, 5, 10, 20), np.cumsum(steps), strict=True):
                fields[f"{name}_{percent}pct"] = worth * 10.0 ** rng.uniform(-12, 0) if scaled else worth
        share = LAYOUT.share(int(rng.integers(5, 100)))
        assert controller.act(served(share, time_s=5.0 * window, **fields)).prices["curvature"] >= 0.0
