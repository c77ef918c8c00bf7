"""What a finished turn keeps, for how long, and who makes it give way (pin=ttl)."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbmgym.envs.serving.config import Policies, ServingConfig
from hbmgym.envs.serving.core import Core
from hbmgym.envs.serving.cost_model import recovery_s
from hbmgym.envs.serving.pins import BIN_FACTOR, FIRST_BIN_S, MOST_SHARE
from hbmgym.envs.serving.state import FINISHED, PINS, THINK_BINS
from hbmgym.memory_backend.pools import NONE, SESSION
from tests.envs.episodes import PLAIN_ENGINE, Ask, long_sessions, make_episode, small_configs
from tests.envs.test_engine_naive import compare, many_examples
from tests.envs.test_engine_properties import some_examples
from tests.envs.test_shortage import finish, run_until

PAGE = 64
CONFIG = ServingConfig(
    model="qwen3.5-4b", hbm_gib=1.0, prefill_budget=1024, window_s=0.1, ttft_slo_floor_s=100.0, engine=PLAIN_ENGINE,
    policies=Policies(pin="ttl"), pin_price=0.0,
)  # fmt: skip
THINK_S, BIN_S = 0.3, 0.4
MOST_PAGES, MOST_SLOTS = 1.0, 0.0


def session(name, gaps_s, first_row=0, pages=10):
    """One turn and one more after each gap; every turn adds a page to the one before, and is answered in one token."""
    asks = [Ask(0.0, pages * PAGE, 1, [name] * pages)]
    for turn, gap_s in enumerate(gaps_s, start=1):
        content = [name] * (pages + turn)
        asks.append(Ask(0.0, len(content) * PAGE, 1, content, needs=[first_row + turn - 1], gap_s=gap_s))
    return asks


def start(asks, kv_share=0.5, **settings) -> Core:
    core = Core(dataclasses.replace(CONFIG, **settings), check=True)
    core.reset(make_episode(asks, loop="closed"), kv_share)
    return core


def pinned_rows(core: Core) -> list[int]:
    return sorted(core._state.heaps[PINS, : core._state.heap_sizes[PINS]].tolist())


def slots_share(slots) -> float:
    return Core(CONFIG).layout.share(slots)


# --- for how long


def test_nothing_is_kept_before_somebody_went_on_from_a_turn():
    core = start(session("a", [THINK_S]))
    run_until(core, lambda c: c.counters.finished == 1)
    assert (core.counters.turns, core.counters.pins) == (1, 0)
    finish(core)
    assert (core.counters.turns, core.counters.pins) == (2, 1)


def test_a_turn_is_kept_for_the_think_times_seen_and_used_by_the_next():
    core = finish(start(session("a", [THINK_S, THINK_S, 5.0])))
    # 300 ms lie in the bin that ends at 400 ms. After 5 s the pin has ended, and the next one is for those too.
    assert core.counters.pins == 3 and core.counters.pins_used == 1
    assert core.requests.pin_ends_s[2] == pytest.approx(core.requests.ended_s[2] + BIN_S, rel=1e-12)
    assert core.counters.pin_ends_s == pytest.approx(core.requests.ended_s[3] + 16 * BIN_S, rel=1e-12)
    assert core.requests.reused_tokens.tolist() == [0, 10 * PAGE, 11 * PAGE, 12 * PAGE]


@pytest.mark.parametrize("waiting", [0, 1])
def test_it_is_kept_if_the_chance_of_use_is_worth_the_memory(waiting):
    """With room for one running request, whoever comes during the second turn waits."""
    asks = session("a", [THINK_S])
    asks += [Ask(0.0, 5 * PAGE, 1, ["b"] * 5, needs=[0], gap_s=THINK_S + 1e-4)] * waiting
    share_of_budget = (11 * Core(CONFIG).layout.page_bytes + Core(CONFIG).layout.slot_bytes) / 2**30
    gain_s = recovery_s(Core(CONFIG).cost, 0, 11)
    even = gain_s * 0.5 / (share_of_budget * (1 + waiting) * BIN_S)
    for price, pins in ((0.999 * even, 1), (1.001 * even, 0)):
        core = start(asks, slots_share(3), pin_price=price)
        run_until(core, lambda c: c.requests.status[1] == FINISHED)
        assert core.requests.left_pages[1] == 11
        assert (core.requests.pin_ends_s[1] > 0) == bool(pins)


def test_times_between_turns_are_counted_up_to_three_minutes():
    longest_s = FIRST_BIN_S * BIN_FACTOR ** (THINK_BINS - 1)
    core = start(session("a", [0.0, 0.05 - 1e-6, 0.0500001, longest_s * 1.001]), pin_price=1e9)
    finish(core)
    assert core._state.think_times.sum() == 3
    assert core._state.think_times[:2].tolist() == [2, 1]
    assert core.counters.turns == 5


# --- who makes it give way


def test_pins_look_like_what_is_cached_and_not_like_requests_that_run():
    core = run_until(start(session("a", [THINK_S])), lambda c: c.done)
    assert (core.memory.kv.meta.live, core.memory.ssm.meta.live) == (11, 1)
    telemetry = core.telemetry
    assert (telemetry.kv_live, telemetry.kv_cached) == (0, 11)
    assert (telemetry.ssm_live, telemetry.running) == (0, 0) and telemetry.ssm_cached >= 1
    assert telemetry.kv_live + telemetry.kv_cached + telemetry.kv_free == telemetry.kv_capacity


def test_the_head_gets_in_where_nothing_runs():
    asks = [*session("a", [THINK_S]), Ask(0.0, PAGE, 1, ["b"], needs=[1], gap_s=0.1)]
    core = finish(start(asks, slots_share(2)))
    assert core.counters.pins_given_up == 1
    assert core.requests.admitted_s[2] == core.requests.arrival_s[2]


def test_the_head_waits_for_a_pin_to_end_while_something_runs():
    asks = [
        *session("a", [THINK_S]),
        Ask(0.0, PAGE, 400, ["b"], needs=[1], gap_s=0.01),
        Ask(0.0, PAGE, 1, ["c"], needs=[1], gap_s=0.02),
    ]
    core = finish(start(asks, slots_share(4)))
    pin_ends_s, admitted_s = core.requests.pin_ends_s[1], core.requests.admitted_s[3]
    assert core.requests.arrival_s[3] < pin_ends_s <= admitted_s < core.requests.ended_s[2]
    assert admitted_s < pin_ends_s + 0.05 and core.counters.pins_given_up == 0


def test_a_request_that_grows_takes_what_is_kept_before_anybody_is_preempted():
    pages, most = 8, 20
    asks = [
        *session("a", [5.0], pages=pages - 1),
        Ask(0.0, 4 * PAGE, 4 * PAGE, ["b"] * 4, needs=[1], gap_s=0.01),
        Ask(0.0, 4 * PAGE, 5 * PAGE, ["c"] * 4, needs=[1], gap_s=0.02),
    ]
    core = start(asks, MOST_SLOTS, prefill_budget=1024)
    assert core.memory.kv.meta.capacity == most
    run_until(core, lambda c: c.requests.status[1] == FINISHED)
    assert core.memory.kv.meta.live >= pages
    finish(core)
    assert (core.counters.pins_given_up >= 1, core.counters.preemptions) == (True, 0)
    assert np.all(core.requests.status == FINISHED)


@pytest.mark.parametrize("to_share", [MOST_PAGES, MOST_SLOTS])
def test_a_split_does_not_wait_for_what_is_kept(to_share):
    """Ten sessions keep ten slots and a hundred pages while one request runs for long."""
    asks = session("a", [THINK_S])
    for i in range(10):
        asks.append(Ask(0.0, 10 * PAGE, 1, [i] * 10, needs=[1], gap_s=0.01 + 1e-3 * i))
    asks.append(Ask(0.0, PAGE, 2000, ["long"], needs=[1], gap_s=0.05))
    core = start(asks, slots_share(14), window_s=0.02)
    run_until(core, lambda c: c.counters.finished == 12)
    assert core.counters.decoding == 1 and len(pinned_rows(core)) >= 7
    core.request_split(to_share)
    run_until(core, lambda c: c.telemetry.kv_share_effective == c.telemetry.kv_share_requested, 30)
    assert core.counters.decoding == 1 and core.counters.pins_given_up > 0


def test_the_pin_that_ends_first_goes_first_when_there_are_too_many():
    asks = session("a", [THINK_S])
    asks += [Ask(0.0, 10 * PAGE, 1, [i] * 10, needs=[1], gap_s=0.01 * (i + 1)) for i in range(6)]
    core = finish(start(asks, slots_share(9)))
    assert core.memory.ssm.meta.limit // MOST_SHARE == 4
    assert pinned_rows(core) == [4, 5, 6, 7] and core.counters.pins_given_up == 3


def test_off_nothing_is_counted_or_kept():
    core = finish(start(session("a", [THINK_S, THINK_S]), policies=Policies()))
    assert (core.counters.turns, core.counters.pins, core.memory.kv.meta.live) == (0, 0, 0)
    assert core._state.think_times.sum() == 0


# --- on any traffic


@many_examples
@given(config=small_configs(), episode=long_sessions(), shares=st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_the_naive_engine_agrees_on_long_sessions(config, episode, shares):
    compare(dataclasses.replace(config, policies=dataclasses.replace(config.policies, pin="ttl")), episode, shares)


@some_examples
@given(config=small_configs(), episode=long_sessions(), shares=st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_what_is_kept_is_resident_bounded_and_never_kept_beyond_its_time(config, episode, shares):
    config = dataclasses.replace(config, policies=dataclasses.replace(config.policies, pin="ttl"))
    core = Core(config, check=True)
    core.reset(episode, shares[0])
    longest_s = FIRST_BIN_S * BIN_FACTOR ** (THINK_BINS - 1)
    for share in itertools.chain(shares[1:], itertools.repeat(None, 3000)):
        core.run_window()
        kept_pages = 0
        for row in pinned_rows(core):
            request, first = core.requests[row], core.episode.rows[row].ref_off
            assert core.now_s < request.pin_ends_s <= (request.ended_s + longest_s) * (1 + 1e-9)
            ids = core.episode.refs[first : first + request.left_pages]
            pages, snapshot = core.memory.ids["page"][ids], core.memory.ids["snapshot"][ids[-1]]
            assert np.all(pages != NONE) and np.all(core.memory.kv.entries["pins"][pages] >= SESSION)
            assert core.memory.ssm.entries["pins"][snapshot] == SESSION
            kept_pages += len(ids)
        kv, ssm = core.memory.kv.meta, core.memory.ssm.meta
        assert kept_pages == core.counters.pinned_pages <= kv.limit // MOST_SHARE
        assert len(pinned_rows(core)) <= ssm.limit // MOST_SHARE
        assert not kept_pages or (kv.live <= kv.limit and ssm.live <= ssm.limit)
        if core.counters.prefilling + core.counters.decoding == 0:
            assert core.telemetry.kv_live == core.telemetry.ssm_live == 0
        if core.done:
            return
        if share is not None:
            core.request_split(share)
    pytest.fail("the episode did not end")


@some_examples
@given(config=small_configs(), episode=long_sessions(loops=["open"]), share=st.floats(0, 1), part=st.floats(0.2, 0.8))
def test_what_is_kept_does_not_depend_on_what_has_not_come_yet(config, episode, share, part):
    config = dataclasses.replace(config, policies=dataclasses.replace(config.policies, pin="ttl"))
    end_s = part * episode.horizon_s
    whole, short = Core(config), Core(config)
    for core, own in ((whole, episode), (short, episode.until(end_s, 0.0))):
        core.reset(own, share)
    while max(whole.now_s, short.now_s) < end_s:
        count = len(short.requests)
        names = ("status", "left_pages", "pin_ends_s", "admitted_s", "ended_s", "reused_tokens")
        for name in names:
            assert np.array_equal(whole.requests[name][:count], short.requests[name][:count], equal_nan=True), name
        for name in ("pins", "pins_used", "pins_given_up", "pin_ends_s", "pinned_pages", "turns"):
            assert whole.counters[name] == short.counters[name], name
        whole.run_window()
        short.run_window()
