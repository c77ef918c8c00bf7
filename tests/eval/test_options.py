"""The flags that training and comparison share."""

import pytest

from hbmgym.envs.serving.config import ServingConfig
from hbmgym.eval.options import ServingOptions


@pytest.mark.parametrize(
    ("text", "slots"),
    [("2", 2), ("8", 8), ("off", 1), ("no_buffer", 3), ("extra_buffer", 5), ("extra_buffer_lazy", 4)],
)
def test_slots_per_request_is_a_number_or_a_preset_of_sglang(text, slots):
    config = ServingOptions(slots_per_request=text).serving_config()
    assert config.slots_per_request == slots


def test_the_price_mode_reaches_the_admitter():
    assert ServingOptions(price_mode="none").serving_config().priced.price_mode == "none"


def test_without_flags_it_is_the_default_configuration():
    assert ServingOptions().serving_config() == ServingConfig()


def test_a_resize_can_suspend_what_runs():
    assert ServingOptions(transfers="suspend").serving_config().transfers == "suspend"


def test_windows_may_have_another_length():
    assert ServingOptions(window_s=30.0).serving_config().window_s == 30.0
