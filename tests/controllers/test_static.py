import pytest

from hbmgym.controllers.base import HOLD
from hbmgym.controllers.registry import make_controller
from hbmgym.controllers.static import SGLANG_RATIO, StaticController, static_name
from hbmgym.envs.platforms import find_platform
from hbmgym.envs.serving.core import make_layout

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


@pytest.mark.parametrize("platform", ["qwen3-next-80b-a3b@h200", "jamba-1.5-mini@h200@40", "qwen3.5-4b@rtx3060"])
def test_the_name_of_a_static_split_parses_back_to_the_very_split(platform):
    layout = make_layout(find_platform(platform).config)
    for slots in range(layout.min_slots, layout.max_slots + 1):
        controller = make_controller(static_name(layout.share(slots)))
        assert layout.share(layout.slots(controller.fixed_share)) == layout.share(slots)
        assert controller.name == static_name(layout.share(slots))
    assert (static_name(0.5), static_name(0.25), static_name(0.123456)) == (
        "static-0.500",
        "static-0.250",
        "static-0.123456",
    )
