"""The floor under every controller: the KV pool holds the largest request that the engine has."""

import copy
import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbmgym.controllers.base import HOLD, Decision
from hbmgym.controllers.floor import Floored, ShareFloor, floored
from hbmgym.controllers.helm.policy import Policy
from hbmgym.controllers.helm.variants import make_variant, shipped_policy
from hbmgym.controllers.registry import KNOWN_CONTROLLERS, MOVING_CONTROLLERS, make_controller
from hbmgym.controllers.static import StaticController
from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.serving.core import Core
from hbmgym.envs.serving.state import FINISHED
from hbmgym.eval.rollout import run_episode
from tests.envs.episodes import Ask, make_episode

from .records import LAYOUT, SETUP, served

LOW, HIGH = LAYOUT.share_bounds
START = LAYOUT.share(60)
MOST_PAGES = LAYOUT.pages(LAYOUT.min_slots)


class Scripted:
    """Asks for what it is told."""

    name = "scripted"
    fixed_share = None

    def __init__(self, *shares):
        self.parameters = "its own"
        self._decisions = iter([HOLD if share is None else Decision(share) for share in shares])

    def reset(self, setup):
        pass

    def act(self, telemetry):
        return next(self._decisions)


def answers(*windows):
    """What a floored controller asks for; each window is (asked for, pages needed), and takes effect at once."""
    controller = floored(Scripted(*(asked for asked, _ in windows)))
    controller.reset(SETUP)
    share, found = START, []
    for _, pages in windows:
        decision = controller.act(served(share, kv_needed=pages))
        share = share if decision.kv_share is None else decision.kv_share
        found.append(decision.kv_share)
    return found


def holds(share, pages):
    return LAYOUT.pages(LAYOUT.slots(share)) >= pages


def test_a_share_that_holds_what_is_needed_passes_as_it_is():
    assert answers((0.4, 0), (0.6, 100), (None, 100)) == [0.4, 0.6, None]


def test_a_share_that_does_not_is_raised_no_further_than_it_takes_and_comes_back():
    raised, kept, lowered, after = answers((0.3, 800), (None, 800), (0.35, 0), (None, 0))
    assert holds(raised, 800) and not holds(LAYOUT.share(LAYOUT.slots(raised) + 1), 800)
    assert (kept, lowered, after) == (None, 0.35, None)


def test_a_controller_that_holds_is_raised_too_and_returns_to_where_it_was():
    assert answers((None, 0), (None, 900), (None, 0), (None, 0))[2:] == [START, None]
    assert answers((0.4, 0), (None, 900), (None, 0))[2] == 0.4


@given(share=st.floats(LOW, HIGH), pages=st.floats(0, 2 * MOST_PAGES) | st.sampled_from([np.nan, np.inf, -1.0]))
def test_what_is_asked_for_lies_within_the_bounds_and_holds_what_any_split_can(share, pages):
    floor = ShareFloor()
    floor.reset(LAYOUT, SETUP.kv_share_bounds, START)
    found = floor.raised(share, served(START, kv_needed=pages))
    found = START if found is None else found
    assert LOW <= found <= HIGH and found >= share
    assert holds(found, min(pages, MOST_PAGES)) or not pages > 0.0


def test_who_keeps_one_split_has_no_floor_and_nobody_has_two():
    static = StaticController(0.5)
    assert floored(static) is static
    moving = floored(Scripted())
    assert floored(moving) is moving
    assert (moving.name, moving.parameters) == ("scripted", "its own")
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = moving.no_such_thing


def test_it_can_be_copied():
    controller = copy.deepcopy(make_controller("demand"))
    assert (controller.name, controller.parameters) == ("demand", make_controller("demand").parameters)


def test_every_controller_that_is_made_by_name_and_may_move_has_a_floor():
    names = [*MOVING_CONTROLLERS, *(name for name in KNOWN_CONTROLLERS if name.startswith("helm") and ":" not in name)]
    assert all(isinstance(make_controller(name), Floored) for name in [*names, "gradient:tuned", "convex:tuned"])


def test_the_split_that_an_idle_engine_took_goes_back_when_nobody_needs_it():
    config = ServingConfig(model="qwen3.5-4b", hbm_gib=1.0, window_s=5.0)
    core = Core(config)
    low = core.layout.share_bounds[0]
    episode = make_episode([Ask(7.0, 300 * 64, 2), *(Ask(30.0 + k, 500, 20) for k in range(20))])
    rollout = run_episode(Scripted(low, *[None] * 2000), core, episode)
    shares = rollout.history["kv_share_requested"]
    assert rollout.cell["rejected"] == 0 and max(shares) > 0.5 > low
    assert shares[-1] == low, "though it came and ended within one window"


SMALL = ServingConfig(model="qwen3.5-4b", hbm_gib=1.0, window_s=0.5, ttft_slo_floor_s=5.0)
BUSY = [Ask(0.2 * k, 500, 200) for k in range(100)]
LONG = Ask(5.0, 420 * 64, 64)  # fits from a share of .86 on


def _for_windows_of(window_s: float) -> Policy:
    """The shipped policy, as if it had been trained on such windows."""
    policy = shipped_policy()
    header = dataclasses.replace(policy.header, windows_s=(window_s, window_s))
    return Policy.from_layers(policy.layers, header, (policy.low, policy.high))


@pytest.mark.parametrize("name", [*MOVING_CONTROLLERS, "helm", "helm-static-residual"])
def test_every_controller_serves_a_request_that_the_machine_holds_while_the_engine_is_busy(name):
    asks = sorted([*BUSY, LONG], key=lambda ask: ask.arrival_s)
    core = Core(SMALL, check=True)
    controller = make_variant("helm", _for_windows_of(SMALL.window_s)) if name == "helm" else make_controller(name)
    cell = run_episode(controller, core, make_episode(asks)).cell
    assert (cell["rejected"], cell["unfinished"], cell["unserved_tokens"]) == (0, 0, 0.0)
    assert set(core.requests["status"]) == {FINISHED}
    long = core.requests[asks.index(LONG)]
    assert long.admitted_s - long.arrival_s < 4.0, "some windows, the chunks' way, and those that hold the slots"
