import pytest

from hbmgym.controllers.base import HOLD
from hbmgym.controllers.gradient import GradientController, GradientParameters

from .records import LAYOUT, SETUP, served

SHARE = LAYOUT.share(50)
CREDIT = 0.1


def grown(ghost: float = 0.1, **fields: float) -> float:
    """Share that KV is to gain."""
    controller = GradientController(GradientParameters(ghost=ghost, credit_per_s=CREDIT, max_step=0.2))
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


def test_the_ghost_list_is_one_of_telemetry_s_steps():
    assert grown(ghost=0.02, kv_gain_2pct=0.1) > 0.0 == grown(ghost=0.02, kv_gain_20pct=0.1)


def test_a_step_has_a_largest_size():
    assert grown(kv_gain_10pct=9.0) == pytest.approx(0.2)


def test_small_credits_add_up_to_a_slot():
    controller = GradientController()
    controller.reset(SETUP)
    hit = served(SHARE, kv_gain_10pct=0.01)  # .005 of kv_share; a slot and a chunk are .011
    assert [controller.act(hit).kv_share for _ in range(3)] == [None, None, pytest.approx(SHARE + 0.015)]


def test_a_move_on_its_way_is_awaited():
    controller = GradientController()
    controller.reset(SETUP)
    assert controller.act(served(SHARE, kv_gain_10pct=0.2, moving_chunks=1)) is HOLD


@pytest.mark.parametrize(("field", "value"), [("ghost", 0.03), ("credit_per_s", 0.0), ("max_step", 1.5)])
def test_impossible_parameters_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"gradient: {field} is {value}, expected"):
        GradientParameters(**{field: value})
