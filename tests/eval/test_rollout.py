"""One episode under one controller leaves a cell of plain numbers, whoever executes the moves."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from hbmgym.controllers.base import PRICES, Decision, Setup
from hbmgym.controllers.demand import DemandController
from hbmgym.controllers.registry import make_controller
from hbmgym.controllers.static import StaticController
from hbmgym.envs.serving.config import Policies
from hbmgym.envs.serving.core import Core, setup_hash
from hbmgym.envs.serving.state import ACTION_NAMES
from hbmgym.eval.rollout import cell_hash, evaluate, last_s, run_episode
from hbmgym.memory_backend.migration import MigrateOnFailure
from hbmgym.memory_backend.pricing import PricedAdmission

from .traffic import CHAT, CONFIG, MIX

FIELDS = {
    *("controller", "trace", "seed", "loop", "model", "budget_bytes", "mapped_chunks", "requests"),
    *(
        "ttft_mean_s",
        "ttft_p50_s",
        "ttft_p99_s",
        "tpot_p99_s",
        "slo_goodput_per_s",
        "slo_violation_rate",
        "cost",
        "token_cost",
    ),
    *(
        "hit_rate",
        "preemptions",
        "oom_requests",
        "rejected",
        "unfinished",
        "unserved_tokens",
        "worst_class_unserved",
        "bytes_migrated",
        "moves_per_hour",
        "gib_migrated_per_hour",
    ),
    *("recomputed_tokens", "snapshots_saved", "snapshots_skipped"),
    *("kv_share_mean", "kv_share_min", "kv_share_max", "concurrency_cap_mean", "concurrency_cap_min"),
    *("policies", "setup_hash", "cell_hash"),
}
SEEDS = (10_000, 10_001)


def cells(name: str, workload=MIX, config=CONFIG, **arguments):
    core = Core(config, **arguments)
    episodes = [workload.episode("validation", seed) for seed in SEEDS]
    rollouts = evaluate(make_controller(name), core, episodes)
    core.close()
    return [rollout.cell for rollout in rollouts]


def test_a_cell_has_exactly_the_promised_fields():
    cell = cells("demand")[0]
    assert set(cell) == FIELDS
    assert (cell["controller"], cell["trace"], cell["seed"]) == ("demand", "mix-shift", 10_000)
    assert (cell["model"], cell["budget_bytes"]) == (CONFIG.model, CONFIG.budget_bytes)
    assert cell["mapped_chunks"] * 2 * 2**20 == CONFIG.budget_bytes


@pytest.mark.parametrize(
    ("policies", "more"),
    [
        (Policies(pin="ttl"), {"pins", "pins_used", "pins_given_up"}),
        (Policies(preemption="offload"), {"offloads", "offloaded_bytes", "restored_bytes"}),
    ],
)
def test_a_policy_for_sessions_counts_what_it_did(policies, more):
    cell = cells("static-0.3", config=dataclasses.replace(CONFIG, policies=policies, pin_price=0.0))[0]
    assert set(cell) == FIELDS | more and all(cell[name] >= 0 for name in more)
    assert cell.get("pins") != 0, "chat has sessions that go on"


def test_settings_count_in_a_setup_only_where_they_act():
    plain, dear = (dataclasses.replace(CONFIG, pin_price=price, host_gib=10 * price) for price in (1.0, 2.0))
    assert setup_hash(plain) == setup_hash(dear)
    for policies in (Policies(pin="ttl"), Policies(preemption="offload")):
        one, other = (setup_hash(dataclasses.replace(config, policies=policies)) for config in (plain, dear))
        assert one != other != setup_hash(plain)


def test_a_cell_survives_json():
    cell = cells("demand")[0]
    assert json.loads(json.dumps(cell, allow_nan=False)) == cell


def test_one_seed_gives_one_cell():
    assert cells("demand") == cells("demand")


def test_another_seed_gives_another_cell():
    first, second = cells("demand")
    assert first["cost"] != second["cost"]
    assert first["cell_hash"] != second["cell_hash"]


def test_checks_change_nothing():
    assert cells("demand", check=True) == cells("demand")


class Swing:
    """Gives KV little and much in turns."""

    name = "swing"
    fixed_share = None

    def reset(self, setup: Setup) -> None:
        self.windows = 0

    def act(self, telemetry: np.record) -> Decision:
        self.windows += 1
        return Decision((0.6, 0.85)[self.windows % 2])


def test_host_memory_gives_the_cell_of_accounting():
    episode = CHAT.episode("validation", 10_000).until(60.0, 0.0)
    config = dataclasses.replace(CONFIG, hbm_gib=0.4)
    rollouts = []
    for backend in ("host", "accounting"):
        core = Core(config, backend=backend, check=True)
        rollouts.append(run_episode(Swing(), core, episode))
        core.close()
    assert rollouts[0].cell == rollouts[1].cell
    assert rollouts[0].history == rollouts[1].history
    assert rollouts[0].cell["bytes_migrated"] > 0


def test_moves_are_windows_after_which_another_split_is_asked_for():
    core = Core(CONFIG)
    found = run_episode(Swing(), core, CHAT.episode("validation", 10_000).until(60.0, 0.0))
    hours = found.history["time_s"][-1] / 3600
    requested = found.history["kv_share_requested"]
    moves = sum(a != b for a, b in itertools.pairwise(requested))
    assert found.cell["moves_per_hour"] == pytest.approx(moves / hours) and moves > 0
    assert found.cell["gib_migrated_per_hour"] == pytest.approx(found.cell["bytes_migrated"] / 2**30 / hours)


def test_all_controllers_meet_the_same_case():
    one, other = cells("static-0.3"), cells("threshold")
    for key in ("cell_hash", "setup_hash", "budget_bytes", "requests"):
        assert [cell[key] for cell in one] == [cell[key] for cell in other]


def test_a_case_is_its_setup_and_all_that_arrives():
    episode = MIX.episode("validation", 10_000)
    louder = dataclasses.replace(MIX, load=1.1).episode("validation", 10_000)
    assert cell_hash("a", episode) != cell_hash("b", episode)
    assert cell_hash("a", episode) != cell_hash("a", louder)


def test_a_case_covers_the_loop_and_who_waits_for_whom():
    opened, closed = (dataclasses.replace(CHAT, loop=loop).episode("validation", 10_000) for loop in ("open", "closed"))
    rows = opened.rows.copy()
    other = dataclasses.replace(opened, rows=rows, followers=opened.followers[::-1].copy())
    longer_gaps = closed.rows.copy()
    longer_gaps.gap_s += 1.0
    cases = (
        opened,
        closed,
        other,
        dataclasses.replace(opened, loop="closed"),
        dataclasses.replace(closed, rows=longer_gaps),
    )
    assert len({cell_hash("a", episode) for episode in cases}) == len(cases)


def test_a_closed_loop_comes_to_its_end_and_measures_the_same_rows_for_all():
    workload = dataclasses.replace(MIX, loop="closed", load=2.0)
    one, other = (cells(name, workload) for name in ("static-0.3", "demand"))
    for key in ("loop", "cell_hash", "setup_hash", "requests"):
        assert [cell[key] for cell in one] == [cell[key] for cell in other]
    assert one[0]["loop"] == "closed" and one[0]["cost"] != other[0]["cost"]


class Patient:
    """Counts the windows."""

    name = "patient"
    fixed_share = None

    def reset(self, setup: Setup) -> None:
        self.windows = 0

    def act(self, telemetry: np.record) -> Decision:
        self.windows += 1
        return Decision(None)


def test_a_closed_loop_that_does_not_end_is_cut_at_twenty_horizons_and_what_was_never_sent_costs_the_most():
    episode = dataclasses.replace(MIX, loop="closed").episode("validation", 10_000).until(200.0, 0.0)
    rows = episode.rows.copy()
    rows.gap_s[rows.needs > 0] = 3000.0
    core, controller = Core(CONFIG), Patient()
    cell = run_episode(controller, core, dataclasses.replace(episode, rows=rows)).cell
    assert core.now_s >= last_s(episode) == 20.0 * 200.0
    assert controller.windows == 800
    unsent = np.isnan(core.requests["arrival_s"]).sum()
    assert 0 < unsent < len(rows) == cell["requests"]
    assert cell["cost"] >= 10.0 * unsent / len(rows)


def test_the_window_is_part_of_the_setup():
    slower = dataclasses.replace(CONFIG, window_s=10.0)
    assert cells("static-0.5")[0]["setup_hash"] != cells("static-0.5", config=slower)[0]["setup_hash"]


def test_a_static_controller_keeps_its_share_and_moves_nothing():
    core = Core(CONFIG)
    rollout = run_episode(StaticController(0.4), core, MIX.episode("validation", 10_000))
    share = core.layout.share(core.layout.slots(0.4))
    assert set(rollout.history["kv_share_effective"]) == {share}
    assert rollout.cell["kv_share_min"] == rollout.cell["kv_share_max"] == share
    assert rollout.cell["kv_share_mean"] == pytest.approx(share)
    assert rollout.cell["bytes_migrated"] == 0
    cap = core.layout.slots(0.4) // CONFIG.slots_per_request
    assert rollout.cell["concurrency_cap_mean"] == rollout.cell["concurrency_cap_min"] == cap


def test_a_static_controller_leaves_chunks_where_shortages_moved_them():
    migrating = dataclasses.replace(CONFIG, policies=Policies(on_shortage="migrate"))
    cell = cells("static-0.9", dataclasses.replace(CHAT, load=4.0), migrating)[0]
    assert cell["bytes_migrated"] > 0
    assert cell["kv_share_max"] < 0.7, "the shortages were over before the measured part"


@pytest.mark.parametrize("on_shortage", ["evict", "migrate", "float", "float-lru", "priced"])
def test_the_settings_of_a_shortage_rule_are_part_of_the_setup_where_they_act(on_shortage):
    plain = dataclasses.replace(CONFIG, policies=Policies(on_shortage=on_shortage))
    others = {"migrate": MigrateOnFailure(chunks=32), "priced": PricedAdmission(max_deferrals=7)}
    for rule, settings in others.items():
        changed = dataclasses.replace(plain, **{rule: settings})
        assert (setup_hash(changed) != setup_hash(plain)) == (on_shortage == rule)


def test_the_measured_shares_leave_the_warm_up_out():
    rollout = run_episode(DemandController(), Core(CONFIG), MIX.episode("validation", 10_000))
    pairs = zip(rollout.history["time_s"], rollout.history["kv_share_effective"], strict=True)
    measured = [share for time_s, share in pairs if 300.0 < time_s <= 1800.0 + CONFIG.window_s]
    assert (rollout.cell["kv_share_min"], rollout.cell["kv_share_max"]) == (min(measured), max(measured))
    assert min(measured) < max(measured)


def test_an_episode_runs_until_everything_has_ended_and_tells_every_window():
    core, times = Core(CONFIG), []
    rollout = run_episode(
        DemandController(), core, MIX.episode("validation", 10_000), lambda record: times.append(float(record.time_s))
    )
    assert core.done
    assert times == rollout.history["time_s"]
    assert {len(values) for values in rollout.history.values()} == {len(times)}


def test_wall_clock_figures_are_beside_the_cell():
    rollout = evaluate(DemandController(), Core(CONFIG), [CHAT.episode("validation", 10_000)])[0]
    assert rollout.timing["wall_s"] > 0.0
    assert 0.0 < rollout.timing["decision_us_p50"] <= rollout.timing["decision_us_p99"]
    assert not set(rollout.cell) & {"wall_s", "decision_us_p50", "decision_us_p99"}


def test_prices_reach_the_admitter_and_its_choices_the_cell():
    class Named(DemandController):
        """Leaves the split alone and names its prices."""

        def act(self, telemetry: np.record) -> Decision:
            return Decision(prices=np.array([(0.5, 1e-20, 0.25)], PRICES).view(np.recarray)[0])

    core = Core(dataclasses.replace(CONFIG, policies=Policies(on_shortage="priced")))
    cell = run_episode(Named(), core, MIX.episode("validation", 10_000)).cell
    assert (core.counters.curvature, core.counters.deferral_weight) == (1e-20, 0.25)
    assert cell["own_free"] > 0 < cell["own_evict"] + cell["cross_free"] + cell["cross_evict"]
    assert sum(cell[name] for name in ACTION_NAMES) == sum(core.actions.values())
    assert 0 <= cell["price_ratio_log2"] < len(core.price_ratios)
