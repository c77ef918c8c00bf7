"""Who of those that wait goes first under each order of admission, and who is let in at all."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbmgym.envs.serving.config import Policies
from hbmgym.envs.serving.core import Core
from hbmgym.envs.serving.forecast import expected_length, note_length
from hbmgym.envs.serving.queueing import AGEING, LPM_LIMIT
from hbmgym.envs.serving.state import DEADLINE, FINISHED, HISTORY, PREFILLING, REJECTED, state_at
from hbmgym.memory_backend.jit import kernel
from tests.envs import naive_orders
from tests.envs.episodes import SMALL_PAGE, Ask, make_episode, small_configs, small_episodes
from tests.envs.test_engine import CONFIG, PAGE, TIGHT, TIGHT_SHARE, changed, play, slots_share, start
from tests.envs.test_engine_properties import play as play_under
from tests.envs.test_engine_properties import some_examples

BUSY = Ask(0.0, PAGE, 400)
PATIENT = changed(ttft_slo_floor_s=1000.0, slots_per_request=1)


def ordered(admission, config=PATIENT, **settings):
    policies = dataclasses.replace(config.policies, admission=admission)
    return dataclasses.replace(config, policies=policies, **settings)


def one_at_a_time(config) -> float:
    """The share of a split on which one request runs."""
    return slots_share(config, config.slots_per_request)


def by_admission(core) -> list[int]:
    return np.argsort(core.requests["admitted_s"], kind="stable").tolist()


# --- longest prefix match


def test_lpm_takes_the_longest_reusable_prefix_first_and_of_equals_the_oldest():
    asks = [
        Ask(0.0, 4 * PAGE, 1, ["a"] * 4),
        Ask(0.2, 8 * PAGE, 1, ["a", "a", "a", "a", *["b"] * 4]),
        Ask(0.4, PAGE, 400),
        Ask(0.5, 2 * PAGE, 1),
        Ask(0.51, 5 * PAGE, 1, ["a"] * 4),
        Ask(0.52, 9 * PAGE, 1, ["a", "a", "a", "a", *["b"] * 4]),
        Ask(0.53, 5 * PAGE, 1, ["a"] * 4),
        Ask(0.54, 2 * PAGE, 1),
    ]
    config = ordered("lpm", slots_per_request=3)
    config = dataclasses.replace(config, policies=dataclasses.replace(config.policies, retention="all"))
    share = slots_share(config, 5)  # one request runs, beside two snapshots
    core = play(asks, config, share)
    reused = core.requests["reused_tokens"]
    assert reused[5] > reused[4] == reused[6] > 0
    assert by_admission(core) == [0, 1, 2, 5, 4, 6, 3, 7]
    assert by_admission(play(asks, ordered("fcfs", config), share)) == list(range(8))


def test_lpm_is_first_come_first_served_while_too_many_wait():
    config = ordered("lpm", slots_per_request=2)
    share = slots_share(config, 3)  # one request runs, beside one snapshot

    def first_of(waiting):
        asks = [Ask(0.0, 4 * PAGE, 1, ["a"] * 4), Ask(0.2, PAGE, 200)]
        asks += [Ask(0.3, PAGE, 1)] * (waiting - 1)
        return by_admission(play([*asks, Ask(0.4, 5 * PAGE, 1, ["a"] * 4)], config, share))[2]

    assert first_of(LPM_LIMIT + 1) == 2
    assert first_of(LPM_LIMIT) == LPM_LIMIT + 1


# --- least slack first


def test_slo_starts_first_whoever_has_to_start_soonest():
    asks = [BUSY, Ask(0.01, 400 * PAGE, 1), Ask(0.02, PAGE, 1), Ask(0.03, 100 * PAGE, 1)]
    config = ordered("slo", changed(slots_per_request=1, ttft_slo_floor_s=2.0))
    share = one_at_a_time(config)
    assert by_admission(play(asks, config, share)) == [0, 2, 3, 1]
    assert by_admission(play(asks, ordered("fcfs", config), share)) == [0, 1, 2, 3]


def test_who_cannot_meet_its_slo_any_more_lets_those_pass_that_can_until_it_has_aged():
    config = ordered("slo", changed(slots_per_request=1, ttft_slo_floor_s=0.2))
    blocker = Ask(0.0, PAGE, 150)
    core = play([blocker, Ask(0.01, PAGE, 1), Ask(0.5, PAGE, 1)], config, one_at_a_time(config))
    ended_s, slo_s = core.requests["ended_s"][0], core.requests["ttft_slo_s"][1]
    assert 0.01 + slo_s < ended_s < 0.01 + AGEING * config.deadline_slos * slo_s and ended_s > 0.5
    assert by_admission(core) == [0, 2, 1]
    longer = dataclasses.replace(blocker, output_tokens=330)
    core = play([longer, Ask(0.01, PAGE, 1), Ask(1.09, PAGE, 1)], config, one_at_a_time(config))
    assert core.requests["ended_s"][0] > 0.01 + AGEING * config.deadline_slos * slo_s
    assert by_admission(core) == [0, 1, 2]


@some_examples
@given(config=small_configs(), episode=small_episodes(24, loops=["closed"]), share=st.floats(0, 1))
def test_who_has_aged_is_admitted_before_all_that_arrive_later(config, episode, share):
    config = dataclasses.replace(ordered("slo", config), max_long_prefills=0)
    core, _ = play_under(config, episode, [share], check=True)
    requests, rows = core.requests, episode.rows
    aged_s = requests.arrival_s + AGEING * config.deadline_slos * requests.ttft_slo_s
    pages = -(-(rows.input_tokens + rows.output_tokens - 1) // SMALL_PAGE)
    is_small = pages <= core.layout.pages(core.layout.slots(share))  # larger ones wait aside
    waited_until_s = np.where(np.isnan(requests.admitted_s), requests.ended_s, requests.admitted_s)
    for other in np.flatnonzero(~np.isnan(requests.admitted_s)):
        at_s = requests.admitted_s[other]
        is_older = requests.arrival_s < requests.arrival_s[other]
        passed_over = is_older & is_small & (aged_s <= at_s) & (waited_until_s > at_s)
        assert not passed_over.any(), (other, np.flatnonzero(passed_over))


@pytest.mark.parametrize(("order", "is_served"), [("slo", True), ("lpm", False)])
def test_a_request_that_all_others_pass_is_served_by_slo_once_it_has_aged(order, is_served):
    config = ordered(order, changed(slots_per_request=2, ttft_slo_floor_s=0.5))
    session = [Ask(0.03 * i, 2 * PAGE, 12, ["a"]) for i in range(400)]
    stranger = Ask(3.01, 2 * PAGE, 1)
    asks = sorted([*session, stranger], key=lambda ask: ask.arrival_s)
    request = play(asks, config, slots_share(config, 3)).requests[asks.index(stranger)]
    assert (request.status == FINISHED) == is_served
    if is_served:
        aged_s = AGEING * config.deadline_slos * request.ttft_slo_s
        assert aged_s < request.admitted_s - request.arrival_s < aged_s + 0.3


@pytest.mark.parametrize("order", ["lpm", "slo"])
def test_behind_a_blocked_head_too_everybody_gives_up_at_the_deadline(order):
    config = ordered(order, changed(slots_per_request=1, ttft_slo_floor_s=0.2))
    core = play(
        [Ask(0.0, PAGE, 1000), *[Ask(0.1 + 0.05 * i, PAGE, 1) for i in range(4)]], config, one_at_a_time(config)
    )
    late = core.requests[1:]
    assert np.all(late["status"] == REJECTED) and np.all(late["reject_reason"] == DEADLINE)
    waited_s = late["ended_s"] - late["arrival_s"] - config.deadline_slos * late["ttft_slo_s"]
    assert np.all((waited_s >= 0) & (waited_s < 0.02))


# --- the forecast


@kernel
def learn(table, tokens):
    note_length(state_at(table), tokens)


@kernel
def expect(table, row, generated):
    return expected_length(state_at(table), row, generated)


def test_expected_lengths_are_those_of_the_window_in_plain_python():
    core = start([Ask(0.0, PAGE, 77)], ordered("past-future"))
    orders = naive_orders.Orders(type("Engine", (), {"config": core.config}))
    rng = np.random.default_rng(0)
    for count, tokens in enumerate(rng.integers(1, 60, 2 * HISTORY + 50)):
        for generated in (0, 1, 30, 58, 59, 100):
            job = type("Job", (), {"output": 77, "generated": generated})
            assert expect(core._table.address, 0, generated) == orders.expected(job), (count, generated)
        learn(core._table.address, int(tokens))
        orders.lengths.append(int(tokens))


ANSWERS = [Ask(0.02 * i, 5 * PAGE, 5 * PAGE) for i in range(40)]


def test_past_future_keeps_those_out_that_would_be_preempted():
    preemptions = {}
    for order in ("fcfs", "past-future"):
        core = play(ANSWERS, ordered(order, TIGHT, ttft_slo_floor_s=1000.0), TIGHT_SHARE)
        assert np.all(core.requests["status"] == FINISHED)
        preemptions[order] = int(core.counters.preemptions)
    assert preemptions["fcfs"] > 10
    assert preemptions["past-future"] == 0


def test_past_future_does_not_know_how_long_an_answer_will_be_that_has_not_ended():
    short = [Ask(0.001 * i, PAGE, 40) for i in range(naive_orders.ENOUGH + 2)]
    config = ordered("past-future", TIGHT, ttft_slo_floor_s=1000.0)

    def times(tokens):
        rest = [Ask(2.0 + 0.01 * i, 4 * PAGE, tokens if i == 1 else 200) for i in range(8)]
        return play([*short, *rest], config, TIGHT_SHARE).requests

    few, many = times(150), times(800)
    row = len(short) + 1
    until_s = few["ended_s"][row]
    before = few["admitted_s"] < until_s
    assert 2 < np.count_nonzero(before[len(short) :]) < 8, "some are let in beside it, some wait"
    assert np.array_equal(few["admitted_s"][before], many["admitted_s"][before])
    assert np.all(many["admitted_s"][~before] >= until_s)


# --- bounds on long prefills


LONG, SHORT = 60 * PAGE, PAGE


def most_long_prefills(most: int) -> int:
    """At the ends of short windows, of three long prompts and short ones that came with them."""
    config = changed(long_prefill_tokens=256, max_long_prefills=most, window_s=0.005)
    core = start([Ask(0.0, LONG, 1), Ask(0.0, LONG, 1), Ask(0.0, LONG, 1), Ask(0.001, SHORT, 1)], config)
    seen = 0
    while not core.done:
        core.run_window()
        seen = max(seen, int(np.count_nonzero(core.requests["status"][:3] == PREFILLING)))
    return seen


def test_so_many_long_prompts_prefill_at_once_as_may():
    assert [most_long_prefills(most) for most in (0, 1, 2)] == [3, 1, 2]


def test_shorter_prompts_pass_long_ones_that_wait_for_another():
    asks = [Ask(0.0, LONG, 1), Ask(0.001, LONG, 1), Ask(0.002, SHORT, 1), Ask(0.002, SHORT, 1)]
    bounded = play(asks, changed(long_prefill_tokens=512, max_long_prefills=1)).requests
    free = play(asks, changed(long_prefill_tokens=512)).requests
    assert bounded["admitted_s"][2:].max() < bounded["admitted_s"][1]
    assert bounded["first_token_s"][2:].max() < 0.5 * free["first_token_s"][2:].min()
    assert np.all(bounded["status"] == FINISHED)


# --- everywhere


@pytest.mark.parametrize("order", ["lpm", "slo", "past-future"])
def test_who_was_preempted_goes_before_all_that_wait(order):
    asks = [Ask(0.001 * i, 320, 400) for i in range(6)]
    core = Core(ordered(order, TIGHT, window_s=0.02, ttft_slo_floor_s=10.0))
    core.reset(make_episode(asks, PAGE), TIGHT_SHARE)
    preempted = 0
    while not core.done:
        before = core.requests.copy()
        core.run_window()
        for row in np.flatnonzero((before["preemptions"] > 0) & np.isin(before["status"], (2,))):
            preempted += 1
            if core.requests["status"][row] == before["status"][row]:
                started = np.isnan(before["admitted_s"]) & ~np.isnan(core.requests["admitted_s"])
                assert not started.any(), "a newcomer passed a preempted request"
    assert preempted > 0 or order == "past-future"


def test_a_forecast_and_a_price_do_not_both_decide():
    with pytest.raises(ValueError, match="choose one of them"):
        Policies(admission="past-future", on_shortage="priced")


def test_without_a_threshold_no_prompt_is_long():
    with pytest.raises(ValueError, match="set long_prefill_tokens"):
        dataclasses.replace(CONFIG, max_long_prefills=1)
