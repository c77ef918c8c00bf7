"""What every field of Telemetry says of a few requests whose numbers can be added up by hand."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from hbmgym.controllers.telemetry import FAST, MARGINAL_FIELDS, ONCE, TELEMETRY_TABLE, markdown
from hbmgym.envs.serving.core import Core
from hbmgym.envs.serving.cost_model import cold_prefill_s, iteration_s
from hbmgym.envs.serving.state import REJECTED
from tests.envs.episodes import Ask
from tests.envs.test_engine import CONFIG, PAGE, changed, slots_share, start

DOCS = Path(__file__).resolve().parents[2] / "docs" / "telemetry.md"
CACHED = 10 * PAGE  # tokens of the prompt below that end in a snapshot
PROMPT = Ask(0.0, CACHED + 1, 1, ["a"] * 10)
AGAIN = dataclasses.replace(PROMPT, arrival_s=1.5)
STEPS = ("2pct", "5pct", "10pct", "20pct")  # of 512 pages: 10, 26, 51, 102; of 20 slots: 0, 1, 2, 4


def close(expected):
    return pytest.approx(expected, rel=1e-9, abs=1e-12)


def average(grown: Sequence[float], time_s: float, window_s: float = 1.0) -> float:
    """Of windows of one length, the newest last: the older the less it counts."""
    fresh = 1.0 - math.exp(-window_s / time_s)
    ages = range(len(grown) - 1, -1, -1)
    return sum(fresh * math.exp(-age * window_s / time_s) * g / window_s for age, g in zip(ages, grown, strict=True))


def run(core: Core, windows: int) -> np.record:
    for _ in range(windows):
        core.run_window()
    return core.telemetry


def recovery_s(core: Core, tokens: int) -> float:
    return float(tokens * core.cost.prefill_s_per_token + tokens**2 / 2 * core.cost.attention_s_per_pair)


def document(arrival_s: float, name: str, pages: int) -> Ask:
    return Ask(arrival_s, pages * PAGE + 1, 1, [name] * pages)


# --- arrivals and service


def test_arrivals_of_the_window_and_averaged_over_ten_and_a_hundred_seconds():
    core = start([Ask(0.0, 640, 1), Ask(1.3, 1280, 1), Ask(1.6, 3200, 1)])
    assert run(core, 1).arrivals_per_s == 1.0
    telemetry = run(core, 1)
    assert (telemetry.time_s, telemetry.window_s, telemetry.arrivals_per_s) == (2.0, 1.0, 2.0)
    arrivals, tokens = [1, 2], [640, 1280 + 3200]
    kv, slot = core.setup.kv_token_bytes, core.setup.slots_per_request * core.layout.slot_bytes
    for suffix, time_s in (("10s", 10.0), ("100s", 100.0)):
        arrived, asked = average(arrivals, time_s), average(tokens, time_s)
        assert telemetry[f"arrivals_per_s_{suffix}"] == close(arrived)
        assert telemetry[f"prompt_tokens_per_s_{suffix}"] == close(asked)
        assert telemetry[f"tokens_per_request_{suffix}"] == close(asked / arrived)
        assert telemetry[f"kv_demand_{suffix}"] == close(asked * kv / (asked * kv + arrived * slot))
    assert run(core, 1).arrivals_per_s == 0.0


def test_hit_rates_are_ratios_of_tokens_averaged_over_ten_and_a_hundred_seconds():
    core = start([PROMPT, AGAIN])
    assert run(core, 1).hit_rate_10s == 0.0
    telemetry, admitted, reused = run(core, 1), [CACHED + 1, CACHED + 1], [0, CACHED]
    assert telemetry.hit_rate_10s == close(average(reused, 10.0) / average(admitted, 10.0))
    assert telemetry.hit_rate_100s == close(average(reused, 100.0) / average(admitted, 100.0))


def test_service_told_of_one_request_that_meets_its_slos_and_one_that_has_no_room():
    core = start([Ask(0.2, 640, 5), Ask(0.3, 40 * PAGE, 1)], kv_share=0.0, share_bounds=(0.0, 0.0))
    telemetry, request = run(core, 1), core.requests[0]
    assert core.requests[1].status == REJECTED
    ttft = cold_prefill_s(core.cost, 640) / request.ttft_slo_s
    decode_s = sum(iteration_s(core.cost, 1, context, 0, 0.0) for context in range(640, 644))
    tpot = decode_s / 4 / core.setup.tpot_slo_s
    assert telemetry.ttft_over_slo_10s == close(ttft)
    assert telemetry.tpot_over_slo_10s == close(tpot) and tpot > ttft
    assert (telemetry.finished_per_s, telemetry.met, telemetry.missed, telemetry.rejected) == (1.0, 1, 1, 1)
    assert telemetry.cost == close(tpot + 10.0)
    assert telemetry.busy_fraction == close(cold_prefill_s(core.cost, 640) + decode_s)
    telemetry = run(core, 1)
    assert (telemetry.finished_per_s, telemetry.met, telemetry.missed, telemetry.rejected) == (0.0, 0, 0, 0)
    assert (telemetry.cost, telemetry.busy_fraction) == (0.0, 0.0)
    assert telemetry.ttft_over_slo_10s == close(ttft) and telemetry.tpot_over_slo_10s == close(tpot)


def test_those_that_wait_age_and_cost_while_they_do():
    config = changed(window_s=0.5, ttft_slo_floor_s=0.1)
    core = start([Ask(0.0, PAGE, 400), Ask(0.0, PAGE, 1), Ask(0.1, PAGE, 1)], config, slots_share(CONFIG, 2))
    telemetry = run(core, 1)
    assert (telemetry.concurrency_cap, telemetry.running, telemetry.waiting, telemetry.aside) == (1, 1, 2, 0)
    assert telemetry.kv_needed == 8, "463 tokens: the last one is never in the cache"
    first, *waiting = core.requests
    ratios = [(core.now_s - request.arrival_s) / request.ttft_slo_s for request in waiting]
    assert 1.0 < ratios[1] < ratios[0] < 10.0
    assert telemetry.oldest_wait_over_slo == close(ratios[0])
    assert telemetry.mean_wait_over_slo == close(sum(ratios) / 2)
    assert telemetry.cost == close(sum(ratios) + first.first_token_s / first.ttft_slo_s)
    assert telemetry.missed == 2, "both are late by now"


def test_preemptions_are_those_of_the_window():
    asks = [Ask(0.0, 10 * PAGE, 900), Ask(0.01, 9 * PAGE, 900)]
    core = start(asks, kv_share=0.0)
    told = []
    while not core.done:
        told.append(core.run_window().preemptions)
    assert sum(told) == core.requests["preemptions"].sum() > 0 and 0.0 in told


def test_a_head_is_blocked_on_slots_for_as_long_as_it_lacks_them():
    core = start([Ask(0.0, PAGE, 40), Ask(0.0, PAGE, 1)], kv_share=slots_share(CONFIG, 2))
    telemetry = run(core, 1)
    assert telemetry.blocked_ssm_fraction == close(core.requests[0].ended_s) and core.requests[0].ended_s > 0.1
    assert telemetry.blocked_kv_fraction == 0.0


def test_a_head_is_blocked_on_pages_for_as_long_as_it_lacks_them():
    core = start([Ask(0.0, 12 * PAGE, 40), Ask(0.0, 12 * PAGE, 1)], kv_share=0.0)
    telemetry = run(core, 1)
    assert telemetry.kv_capacity == 20 and telemetry.blocked_ssm_fraction == 0.0
    assert telemetry.blocked_kv_fraction == close(core.requests[0].ended_s) and core.requests[0].ended_s > 0.1


# --- memory


def test_the_machine_is_told_as_it_was_set_up():
    core = start([], share_bounds=(0.3, 0.8))
    telemetry = run(core, 1)
    assert (telemetry.budget_bytes, telemetry.slots_per_request) == (2**30, 2)
    # Qwen3.5-4B: 8 of 32 layers with 4 heads of 256 keys and values, in 2 bytes.
    assert telemetry.kv_token_bytes == 8 * 2 * 4 * 256 * 2
    assert telemetry.slot_bytes == core.layout.slot_bytes
    assert (telemetry.kv_share_min, telemetry.kv_share_max) == (0.3, 0.8)


def test_pools_tell_what_runs_what_is_cached_and_what_is_free():
    core = start([PROMPT, Ask(0.5, CACHED, 900)], kv_share=slots_share(CONFIG, 10))
    telemetry = run(core, 1)
    held = -(-(CACHED + core.counters.iterations - core.requests[1].joined_at) // PAGE)
    assert telemetry.kv_capacity == core.layout.pages(10) and telemetry.ssm_capacity == 10
    assert (telemetry.kv_cached, telemetry.ssm_cached) == (10, 1)
    assert telemetry.kv_live == held > 10 and telemetry.ssm_live == 2
    assert telemetry.kv_free == core.layout.pages(10) - 10 - held and telemetry.ssm_free == 10 - 1 - 2
    assert (telemetry.concurrency_cap, telemetry.running) == (5, 1)


def test_a_split_under_way_is_told_until_its_chunks_have_moved():
    core = start([], changed(window_s=0.1, chunk_move_s=0.01), slots_share(CONFIG, 10))
    before, asked = slots_share(CONFIG, 10), slots_share(CONFIG, 4)
    run(core, 1)
    core.request_split(asked)
    chunks = core.layout.kv_chunks(4) - core.layout.kv_chunks(10)
    moved = 0
    while moved < chunks:
        telemetry = run(core, 1)
        moved += telemetry.moved_chunks
        assert telemetry.kv_share_requested == asked
        assert telemetry.kv_share_effective == close(before + moved / core.layout.chunks)
        assert telemetry.moving_chunks == chunks - moved
        assert telemetry.kv_capacity == core.layout.kv_chunks(10) + moved, "a page is a chunk"
    assert core.now_s > 0.2 and moved == chunks and run(core, 1).moved_chunks == 0


def test_what_lies_in_the_way_of_a_split_is_copied():
    # 69 pages: "a" and "b" lie on the lowest 40, the first 29 of "c" above them. 45 pages are to be left, all of "c".
    asks = [document(0.0, "a", 10), document(0.1, "b", 30), document(0.2, "c", 45)]
    core = start(asks, kv_share=slots_share(CONFIG, 18))
    assert run(core, 1).kv_capacity == 69
    core.request_split(slots_share(CONFIG, 19))
    telemetry = run(core, 1)
    assert (telemetry.kv_capacity, telemetry.kv_cached, telemetry.moved_chunks) == (45, 45, 24)
    assert telemetry.relocated_bytes == 24 * core.layout.page_bytes
    assert run(core, 1).relocated_bytes == 0


# --- what is lost, and other sizes


def test_pages_evicted_are_the_kv_pool_s_loss_and_what_more_of_it_would_have_kept():
    # 69 pages hold the prompt's 10 and 40; 41 more make 22 go, and when the prompt comes again another 10.
    core = start([PROMPT, document(0.2, "b", 40), document(0.4, "c", 40), AGAIN], kv_share=slots_share(CONFIG, 18))
    telemetry = run(core, 2)
    assert telemetry.kv_capacity == 69
    assert telemetry.kv_loss_tokens_per_s == close(average([0, CACHED], 10.0))
    assert telemetry.ssm_loss_tokens_per_s == 0.0
    assert telemetry.kv_evictions_per_s == close(average([22, 10], 10.0))
    assert telemetry.ssm_evictions_per_s == close(average([2, 0], 10.0)), "two pages ended in a snapshot"
    # 21 pages went after the one in which the prompt's snapshot lay.
    assert_marginals(core, {f"kv_gain_{step}": [0.0, recovery_s(core, CACHED)] for step in ("5pct", "10pct", "20pct")})


def test_snapshots_evicted_are_the_ssm_pool_s_loss_and_what_more_of_it_would_have_kept():
    # Of 4 slots a request takes 2: the third one evicts the first one's snapshot, the fourth the second's.
    others = [document(0.1 * i, f"b{i}", 10) for i in (1, 2, 3)]
    core = start([PROMPT, *others, AGAIN], kv_share=slots_share(CONFIG, 4))
    telemetry = run(core, 2)
    assert telemetry.ssm_loss_tokens_per_s == close(average([0, CACHED], 10.0))
    assert telemetry.kv_loss_tokens_per_s == 0.0
    assert telemetry.ssm_evictions_per_s == close(average([2, 1], 10.0))
    assert telemetry.kv_evictions_per_s == 0.0
    assert_marginals(core, {f"ssm_gain_{step}": [0.0, recovery_s(core, CACHED)] for step in ("10pct", "20pct")})


def test_what_is_reused_near_to_eviction_is_what_less_of_the_kv_pool_would_cost():
    # 40 pages were used after the prompt's, and its own 9 others; 69 pages could do without 19 and hold the tenth.
    core = start([PROMPT, document(0.2, "b", 40), AGAIN], kv_share=slots_share(CONFIG, 18))
    run(core, 2)
    assert core.requests[2].reused_tokens == CACHED
    assert_marginals(core, {f"kv_cost_{step}": [0.0, recovery_s(core, CACHED)] for step in ("5pct", "10pct", "20pct")})


def test_what_is_reused_near_to_eviction_is_what_less_of_the_ssm_pool_would_cost():
    # 4 slots hold the prompt's snapshot, a later one and two free ones; they could do without 2.
    core = start([PROMPT, document(0.2, "b", 10), AGAIN], kv_share=slots_share(CONFIG, 4))
    run(core, 2)
    assert core.requests[2].reused_tokens == CACHED
    assert_marginals(core, {"ssm_cost_20pct": [0.0, recovery_s(core, CACHED)]})


def assert_marginals(core: Core, grown: dict[str, list[float]]) -> None:
    """What each has grown by in every window; all others are 0. In the window after it averages have fallen."""
    for _ in range(2):
        for pool in ("kv", "ssm"):
            for name in (f"{pool}_{side}_{step}" for side in ("gain", "cost") for step in STEPS):
                of_windows = grown.get(name, [0.0])
                assert core.telemetry[name] == close(average(of_windows, 10.0)), name
                assert core.telemetry[f"{name}_100s"] == close(average(of_windows, 100.0)), name
        core.run_window()
        grown = {name: [*of_windows, 0.0] for name, of_windows in grown.items()}


# --- an idle night


RATIOS = [field.name for field in TELEMETRY_TABLE if " / " in field.source]
NIGHT_S = 8 * 3600.0


def test_after_an_idle_night_rates_are_nothing_and_ratios_are_those_of_the_evening():
    morning = [dataclasses.replace(AGAIN, arrival_s=NIGHT_S + 1.0), document(NIGHT_S + 2.0, "b", 20)]
    asks = [PROMPT, Ask(13.0, 3200, 5, ["b"] * 50), dataclasses.replace(AGAIN, arrival_s=25.0), *morning]
    core = start(asks, changed(window_s=10.0), check=False)
    evening = run(core, 3).copy()
    assert all(evening[name] > 0.0 for name in RATIOS) and evening.hit_rate_10s != evening.hit_rate_100s
    while core.now_s < NIGHT_S:
        values = dict(zip(evening.dtype.names, core.run_window().item(), strict=True))
        assert {name: values[name] for name in RATIOS} == close({name: evening[name] for name in RATIOS}), core.now_s
        denormal = [name for name, value in values.items() if 0.0 < abs(value) < 1e-250]
        assert not denormal, core.now_s
    for field in TELEMETRY_TABLE:
        if field.average == FAST and field.name not in RATIOS:
            assert values[field.name] == 0.0, field.name
    assert 0.0 < values["arrivals_per_s_100s"] < 1e-120, "nothing that anybody would notice"
    # Once requests come again nothing counts but them.
    telemetry, tokens = run(core, 1), CACHED + 1 + 20 * PAGE + 1
    for suffix, time_s in (("10s", 10.0), ("100s", 100.0)):
        assert telemetry[f"arrivals_per_s_{suffix}"] == close(average([2], time_s, 10.0))
        assert telemetry[f"tokens_per_request_{suffix}"] == close(tokens / 2)
        assert telemetry[f"hit_rate_{suffix}"] == close(CACHED / tokens), "under the other page there is no snapshot"


# --- the table


def test_every_field_is_written_in_every_window_but_those_of_the_setup():
    core = start([PROMPT, Ask(0.1, 640, 5), AGAIN])
    run(core, 1)
    for field in TELEMETRY_TABLE:
        if field.average != ONCE:
            core.telemetry[field.name] = math.nan
    telemetry = run(core, 1)
    assert [name for name in telemetry.dtype.names if math.isnan(telemetry[name])] == []


def test_the_page_of_the_fields_is_the_table():
    assert markdown() in DOCS.read_text()


def test_marginal_fields_are_the_last_ones_of_a_record():
    assert tuple(field.name for field in TELEMETRY_TABLE[-len(MARGINAL_FIELDS) :]) == MARGINAL_FIELDS
