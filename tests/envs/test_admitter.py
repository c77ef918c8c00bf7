"""What HiMA's Admitter chooses (on_shortage=priced), on a few requests whose prices can be worked out by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbmgym.controllers.base import PRICES
from hbmgym.envs.serving.config import Policies, ServingConfig
from hbmgym.envs.serving.core import Core
from hbmgym.envs.serving.state import FINISHED, state_at
from hbmgym.memory_backend.eviction import ORDERS, eviction_order, look_away, look_further, turn_epoch
from hbmgym.memory_backend.jit import kernel
from hbmgym.memory_backend.oplog import KV
from hbmgym.memory_backend.pools import NONE
from hbmgym.memory_backend.prefix_cache import evict_page, evict_snapshot
from hbmgym.memory_backend.pricing import PricedAdmission
from tests.envs.episodes import Ask, make_episode, small_configs, small_episodes
from tests.envs.test_shortage import (
    CONFIG,
    LAYOUT,
    MOST_PAGES,
    MOST_SLOTS,
    PAGE,
    TOY,
    chunks_between,
    finish,
    run_until,
    shifting_traffic,
    start,
)

AT_ONCE = PricedAdmission(deferral_weight=1e6)
PATIENT = PricedAdmission(deferral_weight=0.0, max_deferrals=10**6)


def play(asks, kv_share, priced=AT_ONCE, rule="priced", **settings) -> Core:
    return finish(start(rule, asks, kv_share, priced=priced, **settings))


def prices(curvature=0.0, deferral_weight=0.0) -> np.record:
    return np.array([(0.0, curvature, deferral_weight)], PRICES).view(np.recarray)[0]


def taken(core: Core) -> dict[str, int]:
    return {name: count for name, count in core.actions.items() if count}


def test_what_is_free_is_taken_whatever_waiting_would_cost():
    core = play([Ask(0.0, 64, 100), Ask(0.1, 64, 1)], LAYOUT.share(4), PATIENT)
    assert taken(core) == {"own_free": 2} and core.requests[1].admitted_s < core.requests[0].ended_s
    assert core.price_ratios.sum() == 0, "nothing had a price"


def test_a_full_pool_gets_the_free_chunks_of_the_other_one():
    asks = [Ask(0.0, 64, 100), Ask(0.1, 64, 1)]
    core = play(asks, MOST_PAGES)
    ample = play(asks, LAYOUT.share(4), rule="evict")
    assert taken(core) == {"own_free": 1, "cross_free": 1}
    assert core.moved_chunks == chunks_between(2, 4)
    delay_s = core.requests[1].first_token_s - ample.requests[1].first_token_s
    assert delay_s == pytest.approx(core.moved_chunks * CONFIG.chunk_move_s, rel=1e-9)


def test_what_moves_is_a_whole_slot_and_all_of_it_is_charged():
    asks = [Ask(0.0, 700, 20), Ask(0.05, 600, 1)]  # together a page more than there is
    core = play(asks, MOST_SLOTS)
    ample = play(asks, LAYOUT.share(19), rule="evict")
    assert taken(core) == {"own_free": 1, "cross_free": 1} and core.moved_chunks == chunks_between(19, 20) > 1
    delay_s = core.requests[1].first_token_s - ample.requests[1].first_token_s
    assert delay_s == pytest.approx(core.moved_chunks * CONFIG.chunk_move_s, rel=1e-9)


def test_cold_blocks_of_the_full_pool_go_before_hot_ones_of_the_other():
    # Each leaves a state and a page behind that.
    prompts = [Ask(0.5 * i, PAGE + 1, PAGE, [i, "out"]) for i in range(9)]
    core = play([*prompts, Ask(6.0, 3 * PAGE, 1)], MOST_SLOTS)
    assert core.actions["own_evict"] > 0 and core.moved_chunks == 0
    assert core.memory.kv.meta.evictions > 0 == core.memory.ssm.meta.evictions


# Seven slots: two hold what is cached of A and B, four are running; a third one or the filler has the last.
A, B = Ask(0.0, 5 * PAGE + 1, 1, ["A"] * 5), Ask(0.1, 5 * PAGE + 1, 1, ["B"] * 5)
LAST = [Ask(1.0, 64, 300), Ask(1.001, 64, 300), Ask(1.5, 64, 1)]


def with_filler(content) -> Core:
    """The filler's 310 pages, if they have ids, are most of what is cached when the last one lacks slots."""
    core = start("priced", [A, B, Ask(0.2, 310 * PAGE + 1, 1, content), *LAST], LAYOUT.share(7), priced=AT_ONCE)
    return run_until(core, lambda c: c.now_s > 1.6)


def test_what_the_other_pool_would_lose_decides():
    """With its loss left out, moving chunks would be cheaper both times than A's and B's states."""
    cold, hot = with_filler([]), with_filler(["filler"] * 310)
    assert cold.actions["cross_free"] == 1 and cold.moved_chunks > 0
    assert hot.actions["own_evict"] == 1 and hot.moved_chunks == 0
    assert cold.memory.ssm.meta.cached == 2 and hot.memory.ssm.meta.evictions == 2


def test_who_lacks_both_waits():
    asks = [Ask(0.0, 180 * PAGE, 100), Ask(0.01, 180 * PAGE, 100), Ask(0.5, 100 * PAGE, 1)]
    core = play(asks, LAYOUT.share(4))
    assert core.requests[2].admitted_s == min(core.requests["ended_s"][:2])
    assert core.actions["no_choice"] > 0 == core.moved_chunks


def test_dearer_deferral_means_fewer_deferrals():
    deferred = [
        play(shifting_traffic(), 0.8, PricedAdmission(deferral_weight=weight, max_deferrals=50), **TOY).actions["defer"]
        for weight in (0.0, 1e-4, 1e-3, 1e-2, 1.0)
    ]
    assert deferred == sorted(deferred, reverse=True)
    assert deferred[0] > 0 == deferred[-1]


@pytest.mark.parametrize(("deferrals", "waits"), [(1, False), (10**6, True)])
def test_deferring_has_an_end(deferrals, waits):
    asks = [Ask(0.0, 64, 300), Ask(0.1, 64, 1), *(Ask(0.12 + 0.01 * i, 64, 1) for i in range(5))]
    core = play(asks, MOST_PAGES, PricedAdmission(deferral_weight=0.0, max_deferrals=deferrals))
    assert (core.requests[1].admitted_s >= core.requests[0].ended_s) == waits
    assert waits or core.requests["deferrals"].max() == 1


@pytest.mark.parametrize(("chunk_move_s", "waits"), [(1e-3, True), (1e-5, False)])
def test_a_deferral_costs_what_it_lasts(chunk_move_s, waits):
    """One who waits loses the busy seconds per finished request, here some 4 to 20 ms; 50 chunks would have to move."""
    asks = [*(Ask(0.02 * i, 64, 1) for i in range(5)), Ask(0.1, 64, 100), Ask(0.12, 64, 1)]
    core = play(asks, MOST_PAGES, PricedAdmission(max_deferrals=9), chunk_move_s=chunk_move_s)
    assert (core.actions["defer"] > 0, core.actions["cross_free"] > 0) == (waits, not waits)


def test_nobody_is_deferred_where_nothing_runs():
    asks = [Ask(0.0, PAGE + 1, 1, ["a"]), Ask(1.0, 60 * PAGE, 1)]
    core = play(asks, MOST_SLOTS, PATIENT)
    assert core.requests[1].admitted_s == 1.0


def test_arrivals_may_end_a_deferral():
    # Moving two slots costs 3.75 ms: more than one or two requests that wait for a while, less than three.
    asks = [Ask(0.0, 64, 400), *(Ask(0.1 * i, 64, 1) for i in range(1, 4))]
    core = play(asks, MOST_PAGES, PricedAdmission(deferral_weight=1.5e-3, max_deferrals=10**6))
    assert 0.3 <= core.requests[1].admitted_s < 0.35 < core.requests[0].ended_s


def test_a_request_that_outgrows_its_pool_gets_chunks():
    core = play([Ask(0.0, 16 * PAGE, 3000), Ask(0.2, 60 * PAGE, 1)], MOST_SLOTS)
    assert core.requests[1].admitted_s == pytest.approx(0.2, abs=0.02)
    assert core.requests["status"].tolist() == [FINISHED] * 2 and core.counters.preemptions == 0
    assert core.memory.kv.meta.capacity >= 16 + 2999 // PAGE


def test_a_move_waits_for_a_requested_split_that_is_under_way():
    core = start("priced", [Ask(0.0, 64, 400), Ask(0.1, 64, 1)], MOST_PAGES, priced=AT_ONCE, chunk_move_s=0.005)
    core.run_window()
    core.request_split(LAYOUT.share(4))
    finish(core)
    assert core.moved_chunks == chunks_between(2, 4), "nothing but what was asked for"
    assert core.actions["cross_free"] == 0


@pytest.mark.parametrize(("mode", "waits"), [("shadow", True), ("none", False)])
def test_curvature_makes_free_bytes_dear_to_move(mode, waits):
    core = start(
        "priced", [Ask(0.0, 64, 100), Ask(0.1, 64, 1)], MOST_PAGES, priced=PricedAdmission(mode, max_deferrals=4)
    )
    core.set_prices(prices(curvature=1e-14, deferral_weight=0.1))
    finish(core)
    assert (core.requests[1].admitted_s >= core.requests[0].ended_s) == waits


def test_without_a_shadow_price_nothing_that_is_published_counts():
    def actions(mode, *published):
        core = start(
            "priced",
            shifting_traffic(),
            0.8,
            priced=PricedAdmission(mode, deferral_weight=1e-3, max_deferrals=4),
            **TOY,
        )
        for price in published:
            core.set_prices(price)
        finish(core)
        return taken(core), core.requests["admitted_s"].tolist()

    dear = prices(curvature=1e-14, deferral_weight=1e-6)
    assert actions("none", dear) == actions("none") == actions("shadow")
    assert actions("shadow", dear) != actions("shadow")


def test_a_controllers_deferral_weight_replaces_the_default():
    asks, patient = [Ask(0.0, 64, 100), Ask(0.1, 64, 1)], PricedAdmission(deferral_weight=1e6, max_deferrals=4)
    assert play(asks, MOST_PAGES, patient).actions["defer"] == 0
    core = start("priced", asks, MOST_PAGES, priced=patient)
    core.set_prices(prices(deferral_weight=1e-6))
    assert finish(core).actions["defer"] > 0


@pytest.mark.parametrize("wrong", [{"curvature": -1.0}, {"curvature": np.nan}, {"deferral_weight": np.inf}])
def test_wrong_prices_are_refused(wrong):
    core = start("priced", [], MOST_PAGES)
    with pytest.raises(ValueError, match="expected a finite number >= 0"):
        core.set_prices(prices(**wrong))


@kernel
def look_at(table, of_kv, count, found):
    memory = state_at(table).memory
    pool = memory.kv if of_kv else memory.ssm
    for i in range(count):
        found[i] = look_further(pool)
    look_away(pool)


@kernel
def evict(table, of_kv, count, found):
    memory = state_at(table).memory
    pool = memory.kv if of_kv else memory.ssm
    for i in range(count):
        found[i] = NONE
        for entry in range(len(pool.entries)):
            pool.entries[entry].generation &= 0
        if of_kv:
            evict_page(memory)
        else:
            evict_snapshot(memory)
        for entry in range(len(pool.entries)):
            if pool.entries[entry].generation > 0:
                found[i] = entry


@kernel
def value_anew(table):
    memory = state_at(table).memory
    turn_epoch(memory.kv)
    turn_epoch(memory.ssm)


@pytest.mark.parametrize("eviction", ORDERS)
@pytest.mark.parametrize("pool", ["kv", "ssm"])
def test_who_is_looked_at_is_who_goes_and_a_look_changes_nothing(eviction, pool):
    asks = [
        Ask(0.1 * i, (3 + i % 5) * PAGE + 1, 1 + 70 * (i % 2), [i % 4] * 2 + [i % 7] * (1 + i % 5)) for i in range(24)
    ]
    config = ServingConfig(
        model="qwen3.5-4b", hbm_gib=1.0, prefill_budget=1024, eviction_epoch_s=2.0, policies=Policies(eviction)
    )
    core = Core(config, check=True)
    core.reset(make_episode(asks), LAYOUT.share(12))
    finish(core)
    count = int(getattr(core.memory, pool).meta.cached)
    assert count > 5
    look_then_evict(core, pool, count)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(small_configs(), small_episodes(), st.floats(0, 1), st.integers(0, 60), st.integers(0, 2**32 - 1))
def test_a_look_while_requests_run_finds_who_goes(config, episode, share, count, seed):
    """Some pages are live, some continued by several, and nobody can match others; between looks blocks go and come.

    Hits are drawn, so that the pages of a chain are not all worth more, or all less, than those of another.
    """
    core = Core(config, check=True)
    core.reset(episode, share)
    rng = np.random.default_rng(seed)
    while not core.done:
        core.run_window()
        for pool in ("kv", "ssm"):
            ranks = getattr(core.memory, pool).ranks
            ranks["hits"] = rng.integers(0, 4, len(ranks))
        value_anew(core._table.address)
        for pool in ("kv", "ssm"):
            look_then_evict(core, pool, count)


def look_then_evict(core, pool, count):
    """Look at some, then at all, then evict as many as are there but `count` at most."""
    blocks = getattr(core.memory, pool)
    of_kv, cached, before = blocks.meta.pool == KV, int(blocks.meta.cached), eviction_order(blocks)
    some, every, gone = (np.full(length, NONE) for length in (count, cached + 2, min(count, cached)))
    for found in (some, every):
        look_at(core._table.address, of_kv, len(found), found)
        core.check()
        assert eviction_order(blocks) == before
    assert NONE not in every[:cached] and len(set(every.tolist())) == cached + 1, "each once, then none"
    evict(core._table.address, of_kv, len(gone), gone)
    assert gone.tolist() == every[: len(gone)].tolist() == some[: len(gone)].tolist()
