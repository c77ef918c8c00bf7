"""Every controller on real episodes: within the engine's invariants, moving where there is something to gain."""

import functools

import pytest

from hbmgym.controllers.helm.ppo import PpoController
from hbmgym.controllers.helm.variants import make_variant
from hbmgym.controllers.registry import MOVING_CONTROLLERS, make_controller
from hbmgym.controllers.static import StaticController
from hbmgym.envs.serving.config import Policies, ServingConfig
from hbmgym.envs.serving.core import Core
from hbmgym.envs.traces.scenarios import SCENARIOS
from hbmgym.envs.workload import ScenarioWorkload, open_workloads
from hbmgym.eval.rollout import Rollout, run_episode
from hbmgym.memory_backend.pricing import PricedAdmission

from .test_registry import constant_policy

# Answer to what arrives, or to nothing: these move where nothing is short as well, `random` without end.
RESTLESS = ("random", "demand")

SMALL = ServingConfig(model="qwen3.5-4b", hbm_gib=1.0)
CROWDED = ScenarioWorkload("mix-shift", {"chat": 0.4, "document": 0.02}, 3.0, SMALL.page_tokens)


@functools.cache
def rollout(spec: str, scenario: str, load: float = 1.0) -> Rollout:
    """One validation episode of `scenario` with default settings."""
    config = ServingConfig()
    episode = open_workloads(config, scenarios=(scenario,), load=load)[0].episode("validation", 10_000)
    return run_episode(make_controller(spec), Core(config), episode)


@pytest.mark.parametrize(
    "controller",
    [
        *map(make_controller, MOVING_CONTROLLERS),
        StaticController(0.5),
        StaticController.from_sglang_ratio(0.9),
        PpoController(constant_policy(0.02)),
        make_variant("helm", constant_policy(0.02)),
        make_variant("helm-freeze", constant_policy(-0.02)),
    ],
    ids=lambda controller: controller.name,
)
def test_an_episode_keeps_every_invariant(controller):
    core = Core(SMALL, check=True)
    cell = run_episode(controller, core, CROWDED.episode("validation", 10_000).until(400.0, 0.0)).cell
    low, high = core.layout.share_bounds
    assert low <= cell["kv_share_min"] <= cell["kv_share_max"] <= high
    assert core.done


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_scenario_keeps_every_invariant_under_every_controller(scenario):
    """A fifth of the traffic on a fortieth of the memory, for 200 s or twenty requests."""
    workload = open_workloads(ServingConfig(), scenarios=(scenario,), load=0.2)[0]
    episode = workload.episode("validation", 10_000)
    episode = episode.until(max(200.0, episode.rows.arrival_s[min(20, len(episode.rows) - 1)] + 1.0), 0.0)
    core = Core(SMALL, check=True)
    for spec in MOVING_CONTROLLERS:
        run_episode(make_controller(spec), core, episode)
        assert core.done and core.counters.received == core.counters.finished + core.counters.rejected


@pytest.mark.parametrize("spec", MOVING_CONTROLLERS)
def test_each_moves_where_traffic_shifts_and_memory_is_short(spec):
    found = rollout(spec, "mix-shift", load=2.5)
    assert found.cell["moves_per_hour"] > 0 and found.cell["bytes_migrated"] > 0


@pytest.mark.parametrize("spec", [spec for spec in MOVING_CONTROLLERS if spec not in RESTLESS])
def test_none_moves_where_memory_lies_idle(spec):
    assert rollout(spec, "idle").cell["moves_per_hour"] == 0


@pytest.mark.parametrize("scenario", ["idle", "inelastic"])
@pytest.mark.parametrize("spec", [spec for spec in MOVING_CONTROLLERS if spec != "random"])
def test_none_thrashes_where_there_is_nothing_to_gain(spec, scenario):
    assert rollout(spec, scenario).cell["moves_per_hour"] <= 15.0, "one in four minutes"


@pytest.mark.parametrize("scenario", ["mix-shift", "steady-documents", "steady-chat"])
def test_the_prices_of_convex_let_the_admitter_choose_each_of_its_five_actions(scenario):
    config = ServingConfig(policies=Policies(on_shortage="priced"), priced=PricedAdmission(max_deferrals=4))
    episode = open_workloads(config, scenarios=(scenario,), load=1.4)[0].episode("validation", 10_000)
    cell = run_episode(make_controller("convex"), Core(config), episode).cell
    counts = [cell[name] for name in ("own_free", "cross_free", "own_evict", "cross_evict", "defer")]
    assert min(counts) / sum(counts) > 0.01 and max(counts) / sum(counts) < 0.7
    assert cell["price_ratio_log2"] <= 4, "the second cheapest is less than 32 times dearer"


@pytest.mark.parametrize("spec", MOVING_CONTROLLERS)
def test_equal_episodes_are_decided_alike(spec):
    config = ServingConfig()
    episode = open_workloads(config)[0].episode("validation", 10_000)
    controller = make_controller(spec)
    core = Core(config)
    again = [run_episode(controller, core, episode).history for _ in range(2)]
    assert again[0] == again[1] == rollout(spec, "mix-shift").history
