import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbmgym.controllers.base import TELEMETRY
from hbmgym.controllers.observation import OBSERVATION_NAMES, OBSERVATION_SIZE, observe

from .records import AMOUNTS, LAYOUT, record, served

ANY_RECORD = st.fixed_dictionaries({}, optional=dict.fromkeys(TELEMETRY.names, AMOUNTS))


def seen(**fields: float) -> dict[str, float]:
    return dict(zip(OBSERVATION_NAMES, observe(served(**fields)).tolist(), strict=True))


@settings(deadline=None)  # the first call compiles
@given(ANY_RECORD)
def test_every_entry_is_bounded(fields):
    observation = observe(record(**fields))
    assert observation.dtype == np.float32
    assert observation.shape == (OBSERVATION_SIZE,)
    assert (np.abs(observation) <= 1.0).all()


@pytest.mark.parametrize("value", [0.0, 1e300, np.inf, np.nan, -1.0])
def test_extreme_records_are_bounded_too(value):
    with np.errstate(all="ignore"):
        observation = observe(record(**dict.fromkeys(TELEMETRY.names, value)))
    assert (np.abs(observation) <= 1.0).all()


@settings(deadline=None)  # the first call compiles
@given(ANY_RECORD)
def test_equal_records_look_equal(fields):
    assert observe(record(**fields)).tobytes() == observe(record(**fields)).tobytes()


def test_the_clock_is_not_seen():
    assert (observe(served(time_s=0.0)) == observe(served(time_s=1e6))).all()


def test_every_entry_says_something():
    rng = np.random.default_rng(1)
    looks = []
    for _ in range(300):
        telemetry = record(**dict(zip(TELEMETRY.names, rng.lognormal(0, 3, len(TELEMETRY)), strict=True)))
        telemetry["budget_bytes"] *= 2**35
        looks.append(observe(telemetry))
    spread = np.ptp(looks, axis=0)
    assert [name for name, width in zip(OBSERVATION_NAMES, spread, strict=True) if width == 0] == []


def test_names_are_unique():
    assert len(set(OBSERVATION_NAMES)) == OBSERVATION_SIZE


def test_shares_and_pools_are_fractions():
    low, high = LAYOUT.share_bounds
    look = seen(kv_share=high, kv_live=10, kv_capacity=40, ssm_cached=3, ssm_capacity=4)
    assert look["kv_share_requested"] == pytest.approx(2 * high - 1)
    assert look["kv_share_position"] == 1.0
    assert seen(kv_share=low)["kv_share_position"] == -1.0
    assert (look["kv_live"], look["ssm_cached"]) == (0.25, 0.75)


def test_demand_is_compared_with_the_effective_share():
    look = seen(kv_share_effective=0.25, kv_demand_10s=0.75, kv_demand_100s=0.125)
    assert (look["kv_demand_10s"], look["kv_demand_gap_10s"], look["kv_demand_gap_100s"]) == (0.5, 0.5, -0.125)


def test_no_demand_yet_is_no_gap():
    look = seen(kv_share_effective=0.75)
    assert (look["kv_demand_10s"], look["kv_demand_gap_10s"], look["kv_demand_gap_100s"]) == (0.5, 0.0, 0.0)


def test_logarithms_of_rates_have_the_sign_of_the_change():
    look = seen(arrivals_per_s=10, arrivals_per_s_10s=2, arrivals_per_s_100s=4)
    assert look["arrivals_now"] == pytest.approx(np.log(51 / 11) / 3)
    assert look["arrivals_trend"] == pytest.approx(np.log(21 / 41) / 3)


def test_ages_are_squashed_and_losses_are_relative():
    look = seen(
        oldest_wait_over_slo=3.0, prompt_tokens_per_s_10s=400, kv_loss_tokens_per_s=100, ssm_loss_tokens_per_s=300
    )
    assert (look["oldest_wait"], look["kv_loss"], look["ssm_loss"]) == (0.75, 0.5, 0.75)
