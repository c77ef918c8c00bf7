import itertools
import math

import numpy as np
import pytest

from hbmgym.controllers.helm.controller import HelmController
from hbmgym.controllers.helm.parameters import HelmParameters

from .records import LAYOUT, SETUP, record, served
from .test_registry import constant_policy

WINDOW_S = SETUP.window_s


class Arrivals:
    """Telemetry of windows in which so many requests arrive."""

    def __init__(self) -> None:
        self._record = record(window_s=WINDOW_S, kv_share_requested=LAYOUT.share(50))

    def window(self, count: float) -> np.record:
        """After `count` arrivals in a window."""
        self._record["arrivals_per_s"] = count / WINDOW_S
        return self._record


def started(**parameters: float) -> HelmController:
    always = {"most_residual": 0.0, "least_strange": 0.0}
    controller = HelmController(constant_policy(0.0), HelmParameters(**{**always, **parameters}))
    controller.reset(SETUP)
    return controller


def states(controller: HelmController, counts) -> list[str]:
    arrivals, found = Arrivals(), []
    for count in counts:
        controller.act(arrivals.window(count))
        found.append(controller.burst_state)
    return found


def plain_states(counts, p: HelmParameters) -> tuple[list[str], list[float]]:
    """Page's test and the three states, as docs/helm.md says them."""
    slow, seen_s, cusum, state, since_s, quiet_s, normal = 0.0, 0.0, 0.0, "normal", 0.0, 0.0, 0.0
    found, sums = [], []
    for count in counts:
        z = math.log((1 + count) / (1 + normal * WINDOW_S)) * math.sqrt((1 + normal * WINDOW_S) / p.dispersion)
        z = max(-p.most_z, min(p.most_z, z)) if seen_s >= p.settle_s else 0.0
        cusum = max(0.0, min(p.cusum_alarm, cusum + z - p.cusum_slack))
        seen_s += WINDOW_S
        since_s += WINDOW_S
        before = state
        if state == "burst":
            quiet_s = 0.0 if z > p.cusum_slack else quiet_s + WINDOW_S
            if (z <= p.cusum_slack and quiet_s >= p.hold_s) or since_s >= p.longest_s:
                state = "recover"
        elif state == "recover" and since_s >= p.cooldown_s:
            state = "normal"
        elif state == "normal" and cusum >= p.cusum_alarm:
            state = "burst"
        if state != before:
            since_s = quiet_s = cusum = 0.0
        slow += (1 - math.exp(-WINDOW_S / 100)) * (count / WINDOW_S - slow)
        if state != "burst":
            normal = slow / (1 - math.exp(-seen_s / 100))
        found.append(state)
        sums.append(cusum)
    return found, sums


@pytest.mark.parametrize("rate_per_s", [0.3, 2.0, 20.0])
@pytest.mark.parametrize("parameters", [{}, {"dispersion": 2.0, "cusum_alarm": 5.0, "hold_s": 0.0, "longest_s": 60.0}])
def test_the_kernel_equals_a_plain_cusum(rate_per_s, parameters):
    rng = np.random.default_rng(4)
    factors = np.repeat(rng.choice([0.3, 1.0, 1.0, 4.0], 60), rng.integers(3, 30, 60))
    counts = rng.poisson(rate_per_s * WINDOW_S * factors)
    controller = started(**parameters)
    expected, sums = plain_states(counts, controller.parameters)
    arrivals = Arrivals()
    for count, state, cusum in zip(counts, expected, sums, strict=True):
        controller.act(arrivals.window(count))
        assert controller.value("cusum") == pytest.approx(cusum, abs=1e-9)
        assert controller.burst_state == state
    assert set(expected) == {"normal", "burst", "recover"}


def alarms(found: list[str]) -> int:
    return sum(b == "burst" != a for a, b in itertools.pairwise(found))


@pytest.mark.parametrize("rate_per_s", [0.2, 1.0, 5.0, 50.0])
def test_steady_poisson_traffic_raises_less_than_an_alarm_in_a_hundred_hours(rate_per_s):
    hours = 100
    counts = np.random.default_rng(11).poisson(rate_per_s * WINDOW_S, int(hours * 3600 / WINDOW_S))
    assert alarms(states(started(), counts)) < hours / 100


@pytest.mark.parametrize(
    ("rate_per_s", "factor", "windows"), [(0.5, 6.0, 5), (2.0, 3.0, 5), (10.0, 2.0, 4), (10.0, 8.0, 3)]
)
def test_a_burst_is_found_within_seconds(rate_per_s, factor, windows):
    rng = np.random.default_rng(5)
    delays = []
    for _ in range(40):
        calm = rng.poisson(rate_per_s * WINDOW_S, 60)
        found = states(started(), [*calm, *rng.poisson(factor * rate_per_s * WINDOW_S, 24)])
        assert "burst" in found[60:]
        delays.append(found[60:].index("burst") + 1)
    assert np.median(delays) <= windows


def test_a_burst_holds_is_recovered_from_and_forgotten():
    found = states(started(hold_s=20.0, cooldown_s=30.0), [10] * 40 + [50] * 8 + [10] * 40)
    first = found.index("burst")
    assert 40 <= first <= 43
    # The fourth quiet window is the end; then comes the cool-down.
    assert found[first:58] == ["burst"] * (51 - first) + ["recover"] * 6 + ["normal"]


def test_what_does_not_end_is_the_new_normal():
    found = states(started(), [10] * 40 + [50] * 200)
    assert alarms(found) == 1 and found[-1] == "normal"


def test_nothing_is_said_before_normal_is_known():
    assert set(states(started(settle_s=60.0), [0] * 6 + [100] * 6)) == {"normal"}


def test_a_restart_of_the_engine_is_no_burst(tmp_path):
    before, after = started(), started()
    states(before, [10] * 100)
    before.save(tmp_path / "state.npz")
    after.restore(tmp_path / "state.npz")
    assert set(states(after, [10] * 100)) == {"normal"}


def test_an_oracle_decides_where_there_is_one():
    controller, arrivals = started(cooldown_s=0.0), Arrivals()
    found = []
    for told in (False, True, True, False, None):
        controller.tell_burst(told)
        controller.act(arrivals.window(10))
        found.append(controller.burst_state)
    assert found == ["normal", "burst", "burst", "recover", "normal"]


def test_a_burst_moves_memory_to_the_pool_that_is_short():
    controller = started(burst_gain=2.0, most_burst=0.5, trim_probe=0.0)
    share = LAYOUT.share(50)
    controller.act(served(share))
    controller.tell_burst(True)
    assert controller.act(served(share, blocked_kv_fraction=0.1)).kv_share == pytest.approx(share + 0.1 * 0.2)
    assert controller.act(served(share, blocked_ssm_fraction=1.0)).kv_share == pytest.approx(share + 0.02 - 0.05)


def test_refill_takes_no_more_than_its_part_of_the_bandwidth():
    controller = HelmController(constant_policy(1.0), HelmParameters(refill_part=1e-4, least_strange=0.0))
    controller.reset(SETUP)
    share = LAYOUT.share(90)
    controller.tell_burst(True)
    controller.act(served(share))
    controller.tell_burst(False)
    chunks_per_s = 1e-4 / SETUP.chunk_move_s
    cap = chunks_per_s * WINDOW_S / LAYOUT.chunks
    assert cap < 0.1
    for _ in range(5):
        before = controller.value("wanted")
        controller.act(served(share, blocked_kv_fraction=1.0))
        assert controller.burst_state == "recover"
        assert abs(controller.value("wanted") - before) == pytest.approx(cap)


@pytest.mark.parametrize("freeze", [False, True])
def test_the_learner_can_be_frozen_in_a_burst(freeze):
    controller = HelmController(constant_policy(0.0), HelmParameters(freeze_in_burst=freeze, least_strange=0.0))
    controller.reset(SETUP)
    controller.tell_burst(True)
    controller.act(served(0.5, blocked_kv_fraction=1.0))
    assert (controller.value("residual") == 0.0) == freeze
    controller.tell_burst(False)
    controller.act(served(0.5, blocked_kv_fraction=1.0))
    assert controller.value("residual") > 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_broken_counts_leave_the_detector_alive(value):
    controller, arrivals = started(), Arrivals()
    for count in [10.0] * 20:
        controller.act(arrivals.window(count))
    broken = record(window_s=WINDOW_S, kv_share_requested=0.5, arrivals_per_s=value)
    controller.act(broken)
    assert math.isfinite(controller.value("cusum"))
    assert alarms(states(controller, [10] * 100 + [60] * 10)) >= 1
