import pytest

from hbmgym.controllers.base import HOLD
from hbmgym.controllers.static import SGLANG_RATIO, StaticController

from .records import SETUP, served


def test_a_static_starts_at_its_share_and_holds():
    controller = StaticController(0.25)
    controller.reset(SETUP)
    assert controller.act(served(0.8)) is controller.act(served(0.3)) is HOLD
    assert (controller.name, controller.fixed_share) == ("static-0.250", 0.25)


@pytest.mark.parametrize(("ratio", "kv_share"), [(SGLANG_RATIO, 1 / 1.9), (0.0, 1.0), (1.0, 0.5), (3.0, 0.25)])
def test_sglang_ratio_is_state_bytes_over_kv_bytes(ratio, kv_share):
    controller = StaticController.from_sglang_ratio(ratio)
    assert controller.fixed_share == pytest.approx(kv_share)
    assert controller.name == f"sglang-{ratio:g}"


@pytest.mark.parametrize("kv_share", [-0.1, 1.1, float("nan")])
def test_a_share_outside_zero_to_one_is_refused(kv_share):
    with pytest.raises(ValueError, match="from 0 to 1"):
        StaticController(kv_share)


@pytest.mark.parametrize("ratio", [-1.0, float("inf"), float("nan")])
def test_a_negative_or_infinite_ratio_is_refused(ratio):
    with pytest.raises(ValueError, match="at least 0"):
        StaticController.from_sglang_ratio(ratio)
