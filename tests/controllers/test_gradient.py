import pytest

from hbmgym.controllers.base import HOLD
from hbmgym.controllers.gradient import GradientController, GradientParameters

from .records import LAYOUT, SETUP, served

SHARE = LAYOUT.share(50)
CREDIT, WEIGHT, DEMAND = 0.1, 0.5, 0.02
SHORT = {"kv_gain_10pct": 0.1, "ssm_gain_10pct": 0.1}


def grown(ghost: float = 0.1, tail: float = 0.2, **fields: float) -> float:
    """Share that KV is to gain in a window."""
    parameters = GradientParameters(ghost, tail, CREDIT, tail_weight=WEIGHT, demand_per_s=DEMAND, max_step_per_s=0.04)
    controller = GradientController(parameters)
    controller.reset(SETUP)
    share = controller.act(served(SHARE, **fields)).kv_share
    return 0.0 if share is None else share - SHARE


def test_seconds_that_a_ghost_list_would_have_saved_earn_memory():
    assert grown(kv_gain_10pct=0.1) == pytest.approx(CREDIT * 0.1 * SETUP.window_s)
    assert grown(ssm_gain_10pct=0.1) == pytest.approx(-CREDIT * 0.1 * SETUP.window_s)


def test_what_one_pool_earns_the_other_one_pays():
    assert grown(kv_gain_10pct=0.1, ssm_gain_10pct=0.1) == 0.0
    assert grown(kv_gain_10pct=0.15, ssm_gain_10pct=0.05) == pytest.approx(grown(kv_gain_10pct=0.1))


def test_waiting_for_a_pool_earns_like_recomputing():
    assert grown(blocked_ssm_fraction=0.1) == grown(ssm_gain_10pct=0.1)
    assert grown(blocked_kv_fraction=0.06, kv_gain_10pct=0.04) == pytest.approx(grown(kv_gain_10pct=0.1))


def test_a_pool_that_would_lose_by_shrinking_earns_like_one_that_would_gain_by_growing():
    assert grown(kv_cost_20pct=0.2) == pytest.approx(WEIGHT * grown(kv_gain_10pct=0.2))
    assert grown(ssm_cost_20pct=0.2) == pytest.approx(WEIGHT * grown(ssm_gain_10pct=0.2))
    assert grown(kv_gain_10pct=0.1, ssm_cost_20pct=0.1 / WEIGHT) == 0.0


def test_ghost_list_and_tail_are_each_one_of_telemetry_s_steps():
    assert grown(ghost=0.02, kv_gain_2pct=0.1) > 0.0 == grown(ghost=0.02, kv_gain_20pct=0.1)
    assert grown(tail=0.05, kv_cost_5pct=0.1) > 0.0 == grown(tail=0.05, kv_cost_20pct=0.1)


def test_the_split_is_pulled_to_the_one_that_arrivals_ask_for():
    assert grown(kv_demand_10s=SHARE + 0.2, **SHORT) == pytest.approx(DEMAND * SETUP.window_s * 0.2)
    assert grown(kv_demand_10s=SHARE - 0.2, **SHORT) == pytest.approx(-DEMAND * SETUP.window_s * 0.2)


def test_nothing_pulls_before_the_first_arrival():
    assert grown(kv_demand_10s=0.0, **SHORT) == 0.0


def test_demand_pulls_nothing_where_memory_is_worth_nothing_to_either_pool():
    assert grown(kv_demand_10s=SHARE + 0.2) == 0.0


def test_a_step_has_a_largest_size():
    assert grown(kv_gain_10pct=9.0) == pytest.approx(0.04 * SETUP.window_s)


def test_small_credits_add_up_to_a_slot():
    controller = GradientController(GradientParameters(credit_per_s=CREDIT))
    controller.reset(SETUP)
    hit = served(SHARE, kv_gain_10pct=0.01)  # .005 of kv_share; a slot and a chunk are .011
    assert [controller.act(hit).kv_share for _ in range(3)] == [None, None, pytest.approx(SHARE + 0.015)]


def test_a_move_on_its_way_is_awaited():
    controller = GradientController()
    controller.reset(SETUP)
    assert controller.act(served(SHARE, kv_gain_10pct=0.2, moving_chunks=1)) is HOLD


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ghost", 0.03),
        ("tail", 0.0),
        ("credit_per_s", 0.0),
        ("tail_weight", -0.1),
        ("demand_per_s", float("nan")),
        ("max_step_per_s", 1.5),
    ],
)
def test_impossible_parameters_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"gradient: {field} is {value}, expected"):
        GradientParameters(**{field: value})
