import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbmgym.controllers.helm.controller import HelmController
from hbmgym.controllers.helm.parameters import HelmParameters

from .records import LAYOUT, SETUP, served, served_records
from .test_registry import constant_policy

ALONE = {"bursts": False, "least_strange": 0.0}


def started(action: float = 0.0, **parameters: float) -> HelmController:
    controller = HelmController(constant_policy(action), HelmParameters(**{**ALONE, **parameters}))
    controller.reset(SETUP)
    return controller


@settings(deadline=None, max_examples=50)  # the first call compiles
@given(
    st.lists(served_records(), min_size=1, max_size=12),
    st.floats(1e-3, 1.0),
    st.floats(0.0, 10.0),
    st.integers(1, 3),
)
def test_residual_gate_and_trim_keep_their_bounds(records, bound, learn_per_s, interval_windows):
    controller = started(
        most_residual=bound, learn_per_s=learn_per_s, interval_windows=interval_windows, forced_part=0.5
    )
    p, before = controller.parameters, 0.0
    for record in records:
        controller.act(record)
        residual = controller.value("residual")
        assert abs(residual) <= bound
        assert 0.0 <= controller.value("gate") <= 1.0
        assert abs(controller.value("trim")) <= p.most_trim
        # Growth and leak of a window, and the half that a revert takes.
        leak = 1.0 - math.exp(-SETUP.window_s / p.leak_s)
        limit = learn_per_s * SETUP.window_s * p.most_gap + leak * abs(before)
        assert abs(residual - before) <= limit + 1e-12 or abs(residual) <= 0.5 * (abs(before) + limit) + 1e-12
        before = residual


def test_without_a_price_the_base_is_left_alone():
    controller = started(0.5)
    share = LAYOUT.share(50)
    for k in range(3):
        assert controller.act(served(share)).kv_share == pytest.approx(share + 0.05 * (k + 1), abs=1e-15)
    assert controller.value("residual") == 0.0


@pytest.mark.parametrize(("pool", "sign"), [("kv", 1.0), ("ssm", -1.0)])
@pytest.mark.parametrize("field", ["{}_gain_5pct", "blocked_{}_fraction"])
def test_the_residual_goes_to_the_pool_that_is_short(pool, sign, field):
    controller = started(learn_per_s=0.01, trim_probe=0.0)
    controller.act(served(0.5, **{field.format(pool): 0.1}))
    averaged = 1.0 - math.exp(-SETUP.window_s / controller.parameters.price_average_s)
    assert controller.value(f"{pool}_price") == pytest.approx(0.1 * averaged)
    assert controller.value("residual") == pytest.approx(sign * 0.01 * SETUP.window_s * 0.1 * averaged)


def test_an_action_is_the_base_s_plus_the_gated_residual():
    controller = started(0.2, gate_start=0.5, most_residual=0.3, learn_per_s=9.0)
    share = LAYOUT.share(50)
    decision = controller.act(served(share, blocked_kv_fraction=1.0))
    assert controller.value("residual") == 0.3
    assert decision.kv_share == pytest.approx(share + 0.1 * (0.2 + 0.5 * 0.3))


def test_what_was_learned_leaks():
    controller = started(learn_per_s=9.0)
    controller.act(served(0.5, blocked_kv_fraction=1.0))
    for _ in range(400):
        controller.act(served(0.5))
    assert abs(controller.value("residual")) < 1e-6


def run_with_costs(controller: HelmController, windows: int, cost) -> None:
    """`cost(controller)` is what a request of the coming window costs."""
    share = LAYOUT.share(50)
    for k in range(windows):
        arrivals = 10.0 + k % 3
        fields = {"arrivals_per_s": arrivals / SETUP.window_s, "cost": arrivals * cost(controller)}
        controller.act(served(share, blocked_kv_fraction=0.2, **fields))


def noise(controller: HelmController) -> float:
    return 0.05 * math.sin(controller.value("draws") + 7.0 * controller.value("windows"))


def test_a_residual_that_harms_is_reverted():
    controller = started(seed=3)
    # 20 % dearer in full, in proportion to what the gate lets through.
    run_with_costs(controller, 12_000, lambda c: 1.0 + noise(c) + (0.0 if c.value("forced") else 0.2 * c.value("gate")))
    assert controller.value("comparisons") > 40
    assert controller.value("gate") < 0.5


def test_a_residual_that_never_ceases_to_harm_is_shut_out():
    controller = started(seed=3)
    run_with_costs(controller, 12_000, lambda c: 1.0 + noise(c) + (0.0 if c.value("forced") else 0.2))
    assert controller.value("gate") < 1e-3


@pytest.mark.parametrize("gain", [0.0, 0.2])
def test_a_residual_that_does_not_harm_gets_the_whole_gate(gain):
    controller = started(seed=3, gate_start=0.1)
    run_with_costs(controller, 6_000, lambda c: 1.0 + noise(c) - (0.0 if c.value("forced") else gain))
    assert controller.value("comparisons") > 20
    assert controller.value("gate") == 1.0


def test_forced_intervals_are_the_base_s_own():
    controller = started(0.1, forced_part=0.5, learn_per_s=9.0)
    share, forced = LAYOUT.share(50), 0
    for _ in range(400):
        before = controller.value("wanted") or share
        controller.act(served(share, blocked_kv_fraction=1.0, arrivals_per_s=1.0, cost=5.0))
        if controller.value("forced"):
            forced += 1
            high = LAYOUT.share_bounds[1]
            assert controller.value("wanted") == min(before + 0.1 * controller.value("base"), high)
    assert 80 < forced < 200


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_trim_goes_where_requests_cost_less(sign):
    controller = started()

    def cost(c: HelmController) -> float:
        weight = c.value("trim") + c.parameters.trim_probe * c.value("direction")
        return 2.0 - sign * weight + noise(c)

    run_with_costs(controller, 3_000, cost)
    assert sign * controller.value("trim") > 0.7


def test_windows_without_arrivals_teach_nothing():
    controller = started(forced_part=0.5)
    for _ in range(400):
        controller.act(served(0.5))
    assert controller.value("trim") == 0.0 == controller.value("comparisons")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e308])
def test_broken_telemetry_leaves_the_state_finite(value):
    controller = started()
    names = ("kv_gain_5pct", "ssm_gain_5pct", "blocked_kv_fraction", "cost", "arrivals_per_s")
    for name in names:
        for _ in range(20):
            controller.act(served(0.5, **{name: value}))
    for name in ("residual", "gate", "trim", "kv_price", "ssm_price", "wanted"):
        assert math.isfinite(controller.value(name))


@pytest.mark.parametrize(
    ("field", "value"),
    [("most_residual", 2.0), ("leak_s", 0), ("forced_part", 0.9), ("seed", 0), ("hold_s", math.nan)],
)
def test_impossible_parameters_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"^helm: {field} is {value}, expected") as error:
        HelmParameters(**{field: value})
    assert "\n" not in str(error.value)
