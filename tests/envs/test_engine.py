"""The rules on a few requests whose times can be added up by hand."""

import dataclasses
import itertools

import numpy as np
import pytest

from hbmgym.envs.serving.config import Policies, ServingConfig
from hbmgym.envs.serving.core import Core
from hbmgym.envs.serving.cost_model import cold_prefill_s, iteration_s
from hbmgym.envs.serving.state import DEADLINE, DOES_NOT_FIT, FINISHED, REJECTED
from hbmgym.memory_backend.pools import NONE
from tests.envs.episodes import PLAIN_ENGINE, Ask, make_episode

PAGE = 64
CONFIG = ServingConfig(model="qwen3.5-4b", hbm_gib=1.0, prefill_budget=1024, window_s=1.0, engine=PLAIN_ENGINE)
EXACT = {"rel": 1e-12, "abs": 0.0}


def changed(**settings) -> ServingConfig:
    return dataclasses.replace(CONFIG, **settings)


def with_engine(config=CONFIG, **settings) -> ServingConfig:
    """The configuration under the plain engine with other settings."""
    return dataclasses.replace(config, engine=dataclasses.replace(PLAIN_ENGINE, **settings))


def start(asks, config=CONFIG, kv_share=0.5, share_bounds=None, check=True, loop="open") -> Core:
    core = Core(config, check=check)
    core.reset(make_episode(asks, config.page_tokens, loop), kv_share, share_bounds)
    return core


def finish(core: Core, most_windows=2000) -> Core:
    for _ in range(most_windows):
        if core.done:
            return core
        core.run_window()
    pytest.fail(f"{most_windows} windows were not enough")


def play(asks, config=CONFIG, kv_share=0.5, share_bounds=None, loop="open") -> Core:
    return finish(start(asks, config, kv_share, share_bounds, loop=loop))


def decode_s(core, contexts) -> float:
    """Seconds of iterations in which one request decodes with `contexts` tokens in the cache."""
    return sum(iteration_s(core.cost, 1, context, 0, 0.0) for context in contexts)


def slots_share(core_or_config, slots) -> float:
    """The share of the split with `slots` slots."""
    return Core(core_or_config).layout.share(slots)


# --- times


def test_a_cold_prompt_takes_its_cold_prefill_time():
    core = play([Ask(0.5, 40 * PAGE, 1, ["a"] * 40)])
    request = core.requests[0]
    assert request.admitted_s == 0.5
    assert request.first_token_s - 0.5 == pytest.approx(cold_prefill_s(core.cost, 40 * PAGE), **EXACT)
    assert request.ended_s == request.first_token_s


def test_the_snapshot_before_a_broken_last_page_costs_one_slot_copy():
    core = play([Ask(0.0, 1000, 1, ["a"] * 15)])
    expected = cold_prefill_s(core.cost, 1000) + core.cost.slot_copy_s
    assert core.requests[0].first_token_s == pytest.approx(expected, **EXACT)


def test_a_bound_on_long_prefills_lets_short_prompts_through():
    asks = [Ask(0.0, 200 * PAGE, 1), Ask(0.001, PAGE, 1), Ask(0.002, PAGE, 1)]
    first_token_s = {}
    for bound in (0, 256):
        core = play(asks, changed(long_prefill_tokens=bound))
        first_token_s[bound] = core.requests["first_token_s"].tolist()
    assert first_token_s[0] == sorted(first_token_s[0]), "one behind the other"
    assert first_token_s[256][1] == first_token_s[256][2] < 0.2 * first_token_s[256][0]


def test_a_prompt_without_ids_is_not_cut_and_saves_nothing():
    core = play([Ask(0.0, 1000, 1)])
    expected = iteration_s(core.cost, 0, 0, 1000, 1000 * 500.0)
    assert core.requests[0].first_token_s == pytest.approx(expected, **EXACT)
    assert core.counters.saved_snapshots == 0 and np.all(core.memory.kv.entries.key == NONE)


def test_decoding_adds_one_token_per_iteration_to_the_context():
    core = play([Ask(0.0, 640, 5)])
    request = core.requests[0]
    expected = decode_s(core, range(640, 644))
    assert request.ended_s - request.first_token_s == pytest.approx(expected, **EXACT)
    assert core.counters.iterations == 5


def test_a_request_of_one_token_ends_with_its_prefill():
    core = play([Ask(0.0, 640, 1)])
    assert core.counters.iterations == 1 and core.counters.tpots == 0
    assert (core.counters.met, core.counters.missed) == (1, 0)


def test_prefill_and_decoding_share_an_iteration():
    second_s = 0.5 * cold_prefill_s(Core(CONFIG).cost, 640)
    core = play([Ask(0.0, 640, 3), Ask(second_s, 640, 1)])
    cost, cold = core.cost, cold_prefill_s(core.cost, 640)
    both = cold + iteration_s(cost, 1, 640, 640, 640 * 320.0)
    assert core.requests[1].first_token_s == pytest.approx(both, **EXACT)
    assert core.requests[0].ended_s == pytest.approx(both + decode_s(core, [641]), **EXACT)


def test_an_iteration_never_prefills_more_than_the_budget():
    core = play([Ask(0.0, 640, 1), Ask(0.0, 640, 1)])
    cost = core.cost
    # 640 tokens of the first and 384 of the second, then the other 256 of the second.
    first = iteration_s(cost, 0, 0, 1024, 640 * 320.0 + 384 * 192.0)
    second = iteration_s(cost, 0, 0, 256, 256 * (384 + 128.0))
    assert core.requests[0].first_token_s == pytest.approx(first, **EXACT)
    assert core.requests[1].first_token_s == pytest.approx(first + second, **EXACT)


def test_copies_that_end_while_nothing_runs_are_not_charged_to_the_next_request():
    core = play([Ask(0.0, 640, 1, ["a"] * 10), Ask(0.7, 640, 1, ["b"] * 10)])
    assert core.counters.saved_snapshots == 2
    assert core.requests[1].first_token_s - 0.7 == pytest.approx(cold_prefill_s(core.cost, 640), **EXACT)


def test_slo_misses_count_the_wait_and_each_request_once():
    core = play([Ask(0.0, 640, 200), Ask(0.0, 640, 1)], changed(ttft_slo_floor_s=1e-4), slots_share(CONFIG, 2))
    assert (core.counters.met, core.counters.missed) == (1, 1)
    assert core.requests["missed"].tolist() == [0, 1]


# --- what an engine's profile decides


def test_a_request_reaches_the_queue_some_time_after_its_arrival_and_its_ttft_counts_all_of_it():
    core = play([Ask(0.5, 640, 1), Ask(2.0, 640, 1)], with_engine(request_s=0.25))
    requests, prefill_s = core.requests, iteration_s(core.cost, 0, 0, 640, 640 * 320.0)
    assert (requests["arrival_s"].tolist(), requests["admitted_s"].tolist()) == ([0.5, 2.0], [0.75, 2.25])
    assert requests["first_token_s"] == pytest.approx(requests["admitted_s"] + prefill_s, **EXACT)
    assert core.counters.ttft_over_slo == pytest.approx(2 * (0.25 + prefill_s) / requests[0].ttft_slo_s, rel=1e-9)


def test_a_row_whose_needs_end_before_it_reaches_the_queue_is_not_held():
    asks = [Ask(0.0, 640, 50), Ask(0.01, 640, 1, needs=[0]), Ask(0.5, 640, 1, needs=[0])]
    core = play(asks, with_engine(request_s=0.25))
    first, held, later = core.requests
    assert 0.26 < first.ended_s < 0.75
    assert (held.admitted_s, later.admitted_s) == (first.ended_s, 0.75), "who is held is at the engine already"


def test_in_a_closed_loop_a_turn_reaches_the_queue_some_time_after_its_gap():
    asks = [Ask(0.0, 640, 1), Ask(0.1, 640, 1, needs=[0], gap_s=0.5)]
    core = play(asks, with_engine(request_s=0.25), loop="closed")
    first, second = core.requests
    assert second.arrival_s == first.ended_s + 0.5 and second.admitted_s == second.arrival_s + 0.25


def test_where_prefill_is_exclusive_nobody_decodes_beside_it():
    config = with_engine(prefill="exclusive")
    core = start([Ask(0.0, 640, 3), Ask(1e-6, 640, 1)], config)
    prefill_s = iteration_s(core.cost, 0, 0, 640, 640 * 320.0)
    finish(core)
    assert core.requests[1].first_token_s == pytest.approx(2 * prefill_s, **EXACT)
    assert core.requests[0].ended_s == pytest.approx(2 * prefill_s + decode_s(core, [640, 641]), **EXACT)
    assert core.counters.iterations == 2, "of those that decode"


@pytest.mark.parametrize(("interval", "decoded"), [(1, 3), (2, 4), (10, 10)])
def test_while_requests_decode_a_new_row_is_seen_every_so_many_iterations(interval, decoded):
    cost = Core(CONFIG).cost
    first_token_s, step_s = cold_prefill_s(cost, 640), iteration_s(cost, 1, 640, 0, 0.0)
    asks = [Ask(0.0, 640, 300), Ask(first_token_s + 2.5 * step_s, 64, 1)]
    core = play(asks, changed(receive_interval=interval))
    expected = first_token_s + decode_s(core, range(640, 640 + decoded))
    assert core.requests[1].admitted_s == pytest.approx(expected, **EXACT)


def test_after_an_iteration_with_prefill_and_where_nobody_decodes_a_new_row_is_seen_at_once():
    cost = Core(CONFIG).cost
    first_token_s = cold_prefill_s(cost, 640)
    during_s = first_token_s + 0.5 * iteration_s(cost, 1, 640, 640, 640 * 320.0)
    asks = [Ask(0.0, 640, 100), Ask(0.5 * first_token_s, 640, 1), Ask(during_s, 640, 1), Ask(9.0, 640, 1)]
    first, second, third, last = play(asks, changed(receive_interval=1000)).requests
    assert first.first_token_s == second.admitted_s < second.first_token_s == third.admitted_s < first.ended_s
    assert first.ended_s < last.admitted_s == 9.0


def test_a_row_behind_a_blocked_head_is_seen_when_the_engine_looks():
    config = changed(receive_interval=10, slots_per_request=1)
    cost, share = Core(config).cost, slots_share(config, 3)
    first_token_s = iteration_s(cost, 0, 0, 192, 3 * 64 * 32.0)
    late = [Ask(first_token_s + iteration * iteration_s(cost, 3, 192, 0, 0.0), 64, 1) for iteration in (5, 15)]
    core = play([Ask(0.0, 64, 26), Ask(0.0, 64, 26), Ask(0.0, 64, 300), *late], config, share)
    # They are seen at the 10th and 20th decode iteration, so both are there when two slots come free at the 25th.
    freed_s = core.requests["ended_s"][0]
    assert core.requests["admitted_s"][3:].tolist() == [freed_s, freed_s] < core.requests["ended_s"][2:3].tolist()


def test_a_snapshot_on_the_way_does_not_end_a_chunk_where_kernels_save_it():
    core = play([Ask(0.0, 1000, 1, ["a"] * 15), Ask(1.0, 1001, 1, ["a"] * 15)], with_engine(snapshots_end_chunks=False))
    assert core.requests[0].first_token_s == pytest.approx(iteration_s(core.cost, 0, 0, 1000, 1000 * 500.0), **EXACT)
    assert core.requests["reused_tokens"].tolist() == [0, 960]


def test_branch_and_last_boundary_are_both_saved_by_the_chunk_that_passes_them():
    asks = [Ask(float(i), 612, 1, ["document"] * 8 + [f"question {i % 2}"]) for i in range(4)]
    core = play(asks, with_engine(snapshots_end_chunks=False))
    assert core.requests["reused_tokens"].tolist() == [0, 0, 576, 576]
    second_s = iteration_s(core.cost, 0, 0, 612, 612 * 306.0)
    assert core.requests[1].first_token_s - 1.0 == pytest.approx(second_s, rel=1e-9)
    assert core.counters.saved_snapshots == 3, "one of the first, and two of the second"


@pytest.mark.parametrize("snapshots_end_chunks", [True, False])
def test_a_branch_at_the_last_boundary_is_saved_once(snapshots_end_chunks):
    asks = [Ask(0.0, 650, 1, ["a"] * 10), Ask(1.0, 586, 1, ["a"] * 9)]
    # In the slot that the request reserved, as it has all there are: one that is there already would only be refreshed.
    core = play(asks, with_engine(snapshots_end_chunks=snapshots_end_chunks), slots_share(CONFIG, 2))
    assert core.counters.saved_snapshots == 2 and core.counters.ssm_loss_tokens == 576


def test_the_floor_of_prefill_spares_what_a_graph_has_captured():
    config = with_engine(prefill_floor_s=0.01, graph_tokens=100)
    core = play([Ask(0.0, 100, 1), Ask(1.0, 101, 1)], config)
    floor_s = float(core.cost.iteration_s + core.cost.floor_s)
    assert core.requests[0].first_token_s < 0.1 * floor_s
    assert core.requests[1].first_token_s - 1.0 == pytest.approx(floor_s, rel=1e-9)


# --- reuse and snapshots


def test_a_second_turn_reuses_down_to_the_end_of_the_first_prompt():
    first = ["a"] * 10 + ["out"] * 2
    core = play([Ask(0.0, 640, 130, first), Ask(2.0, 870, 1, [*first, "b"], needs=[0])])
    assert core.requests[1].reused_tokens == 640
    assert core.counters.ssm_loss_tokens == 128, "two generated pages are resident, but no snapshot ends there"


def test_a_long_answer_leaves_a_snapshot_every_256_tokens():
    first = ["a"] * 10 + ["out"] * 4
    core = play([Ask(0.0, 640, 300, first), Ask(2.0, 1000, 1, [*first, "b"], needs=[0])])
    assert core.requests[1].reused_tokens == 640 + 256
    assert core.requests[0].ended_s - core.requests[0].first_token_s == pytest.approx(
        decode_s(core, range(640, 939)) + 2 * core.cost.slot_copy_s, **EXACT
    )


def test_an_answer_of_255_tokens_leaves_no_snapshot_of_its_own():
    first = ["a"] * 10 + ["out"] * 3
    core = play([Ask(0.0, 640, 255, first), Ask(2.0, 1000, 1, [*first, "b"], needs=[0])])
    assert core.requests[1].reused_tokens == 640


def test_the_second_question_about_a_document_saves_the_branch_that_the_third_reuses():
    asks = [Ask(float(i), 612, 1, ["document"] * 8 + [f"question {i}"]) for i in range(3)]
    core = play(asks)
    assert core.requests["reused_tokens"].tolist() == [0, 0, 512]
    assert core.counters.ssm_loss_tokens == 512


def test_the_last_prompt_token_is_always_recomputed():
    core = play([Ask(0.0, 640, 1, ["a"] * 10), Ask(1.0, 640, 1, ["a"] * 10), Ask(2.0, 641, 1, ["a"] * 10)])
    # Nothing ends in a snapshot but page 10; the second request saves the branch at page 9.
    assert core.requests["reused_tokens"].tolist() == [0, 0, 640]


def test_reuse_without_a_snapshot_is_impossible():
    core = play([Ask(0.0, 640, 1, ["a"] * 9), Ask(1.0, 640, 1, ["a"] * 4)], changed(slots_per_request=1), 1.0)
    assert core.counters.skipped_snapshots > 0
    assert core.requests["reused_tokens"].tolist() == [0, 0]


def test_a_prompt_whose_ids_end_early_leaves_a_snapshot_where_they_end():
    core = play([Ask(0.0, 900, 1, ["a"] * 8), Ask(1.0, 900, 1, ["a"] * 8)])
    assert core.requests["reused_tokens"].tolist() == [0, 512]


@pytest.mark.parametrize("prefill_budget", [64, 100, 1024])
def test_chunk_size_never_changes_reuse(prefill_budget):
    asks = [Ask(float(i), 612 + 10 * i, 100, ["document"] * 8 + [f"question {i % 2}"]) for i in range(6)]
    core = play(asks, changed(prefill_budget=prefill_budget))
    assert core.requests["reused_tokens"].tolist() == [0, 0, 576, 512 + 64, 576, 576]


def test_two_prompts_at_once_share_the_pages_that_the_first_publishes():
    asks = [Ask(0.0, 640, 400, ["a"] * 10), Ask(0.0, 640, 400, ["a"] * 10)]
    core = start(asks, changed(window_s=0.3))
    core.run_window()
    decoded = -(-(640 + core.counters.iterations) // PAGE) - 10
    assert core.telemetry.running == 2
    assert 10 + 2 * (decoded - 1) <= core.telemetry.kv_live <= 10 + 2 * decoded


# --- admission, growth, preemption, rejection


TIGHT = changed(prefill_budget=256, ttft_slo_floor_s=10.0)
TIGHT_STEPS = dataclasses.replace(TIGHT, window_s=0.05)
TIGHT_SHARE = 0.0  # 20 slots and 20 pages


def test_requests_that_fit_run_together_and_the_others_wait_in_order():
    asks = [Ask(0.001 * i, 512, 50) for i in range(4)]
    core = play(asks, TIGHT, TIGHT_SHARE)
    admitted, ended = core.requests["admitted_s"], core.requests["ended_s"]
    assert np.all(np.diff(admitted) >= 0)
    assert admitted[1] < ended[0] <= admitted[2] <= admitted[3]
    assert core.counters.blocked_kv_s > 0 and core.counters.blocked_ssm_s == 0


def test_too_few_slots_block_admission():
    core = play([Ask(0.0, 64, 50), Ask(0.0, 64, 50)], CONFIG, slots_share(CONFIG, 3))
    assert core.telemetry.concurrency_cap == 1
    assert core.requests[1].admitted_s == core.requests[0].ended_s
    assert core.counters.blocked_ssm_s == pytest.approx(core.requests[0].ended_s, rel=1e-9)


def test_the_youngest_is_preempted_and_recomputes_only_what_is_not_cached():
    core = play([Ask(0.0, 512, 200, ["a"] * 8), Ask(0.001, 512, 300, ["b"] * 8)], TIGHT, TIGHT_SHARE)
    first, second = core.requests
    assert (first.preemptions, second.preemptions) == (0, 1)
    assert first.status == second.status == FINISHED
    assert first.ended_s < second.ended_s
    # Both grow to 10 of the 20 pages; the 8 pages of the second prompt stay cached beside the 12 of the first.
    assert 64 < core.counters.recomputed_tokens <= 129
    assert second.reused_tokens == 0, "reuse is booked at the first admission"


def test_a_request_is_not_preempted_more_often_than_the_cap():
    asks = [Ask(0.001 * i, 320, 400) for i in range(6)]
    for cap in (0, 1, 3):
        core = play(asks, dataclasses.replace(TIGHT, max_preemptions=cap), TIGHT_SHARE)
        assert core.requests["preemptions"].max() <= cap
        assert core.requests["preemptions"][0] == 0


def test_what_no_split_can_hold_is_rejected_when_it_arrives():
    core = play([Ask(0.0, 640, 500), Ask(0.25, 463 * PAGE + 1, 1), Ask(0.3, 463 * PAGE, 1)], kv_share=1.0)
    assert core.layout.pages(core.layout.min_slots) == 462
    assert core.requests["reject_reason"].tolist() == [0, DOES_NOT_FIT, DOES_NOT_FIT]
    assert core.requests["ended_s"][1:].tolist() == [0.25, 0.3]


def test_the_last_output_token_needs_no_page():
    asks = [Ask(0.0, 461 * PAGE, 65), Ask(0.0, 461 * PAGE, 66)]
    core = play(asks, changed(ttft_slo_floor_s=100.0), kv_share=1.0)
    assert core.requests["status"].tolist() == [FINISHED, REJECTED]


def test_a_static_split_rejects_what_it_cannot_hold():
    share = slots_share(CONFIG, 20)
    asks = [Ask(0.0, 20 * PAGE, 2), Ask(0.0, 20 * PAGE, 1)]
    core = play(asks, TIGHT, share, (share, share))
    assert core.requests["status"].tolist() == [REJECTED, FINISHED]


def test_the_oldest_that_can_no_longer_grow_is_rejected_instead_of_looping():
    core = start([Ask(0.0, 16 * PAGE, 600)], TIGHT_STEPS, slots_share(CONFIG, 10))
    core.run_window()
    assert core.counters.decoding == 1
    core.request_split(TIGHT_SHARE)
    finish(core)
    request = core.requests[0]
    assert (request.status, request.reject_reason) == (REJECTED, DOES_NOT_FIT)
    # It has 20 pages and would need another for the token after 20 x 64.
    assert core.counters.iterations == 4 + 4 * PAGE
    assert core.memory.kv.meta.live == core.memory.ssm.meta.live == 0


LARGE = Ask(0.0, 20 * PAGE, 2)  # one page more than the tight split holds


BUSY = Ask(0.0, 64, 1000)  # decodes for seconds, so that the engine is not idle


def test_who_outgrows_the_pool_lets_those_behind_pass_and_gives_up_at_the_deadline():
    impatient = changed(prefill_budget=256, ttft_slo_floor_s=0.01)
    core = play([BUSY, LARGE, Ask(0.1, 64, 40), Ask(0.2, 64, 1)], impatient, TIGHT_SHARE)
    alone = play([BUSY, Ask(0.1, 64, 40), Ask(0.2, 64, 1)], impatient, TIGHT_SHARE)
    large = core.requests[1]
    assert (large.status, large.reject_reason) == (REJECTED, DEADLINE)
    deadline_s = impatient.deadline_slos * large.ttft_slo_s
    assert deadline_s <= large.ended_s < deadline_s + iteration_s(core.cost, 2, 2000, 256, 256.0 * 256)
    ends = np.delete(core.requests["ended_s"], 1)
    assert ends == pytest.approx(alone.requests["ended_s"], rel=1e-9)


def test_telemetry_tells_who_is_set_aside_and_how_many_pages_would_serve_all():
    core = start([BUSY, dataclasses.replace(LARGE, input_tokens=25 * PAGE), LARGE], TIGHT_STEPS, TIGHT_SHARE)
    telemetry = core.run_window()
    assert (telemetry.waiting, telemetry.aside, telemetry.running) == (2, 2, 1)
    assert telemetry.kv_needed == 26
    assert telemetry.oldest_wait_over_slo == pytest.approx(core.now_s / core.requests[2].ttft_slo_s, **EXACT)
    assert telemetry.blocked_kv_fraction == pytest.approx(1.0, abs=0.2)
    assert telemetry.blocked_ssm_fraction == 0.0


def test_the_pages_needed_are_those_of_the_largest_that_runs_or_heads_the_queue():
    core = start([Ask(0.0, 5 * PAGE, 2 * PAGE + 1), Ask(0.0, 6 * PAGE, 1), Ask(0.0, 9 * PAGE, 1)], TIGHT_STEPS, 1.0)
    assert core.run_window().running == 1, "two slots"
    assert core.telemetry.kv_needed == 7
    finish(core)
    assert core.run_window().kv_needed == 0


@pytest.mark.parametrize("rule", ["migrate", "float", "float-lru", "priced"])
def test_no_pages_are_needed_of_a_controller_where_shortages_move_the_split(rule):
    core = start([BUSY], dataclasses.replace(TIGHT_STEPS, policies=Policies(on_shortage=rule)), TIGHT_SHARE)
    assert core.run_window().running == 1 and core.telemetry.kv_needed == 0


def test_an_idle_engine_takes_the_split_that_serves_those_set_aside():
    core = start([LARGE, dataclasses.replace(LARGE, input_tokens=30 * PAGE)], TIGHT, TIGHT_SHARE)
    finish(core)
    assert set(core.requests["status"]) == {FINISHED}
    moved_s = core.requests["admitted_s"][0]
    assert 0.0 < moved_s == core.moved_chunks * TIGHT.chunk_move_s
    assert core.layout.pages(int(core.memory.split.requested_slots)) >= 31
    assert core.layout.pages(int(core.memory.split.requested_slots) + 1) < 31, "no more than it takes"


def test_an_idle_engine_keeps_a_static_split():
    share = Core(TIGHT).layout.share(Core(TIGHT).layout.max_slots)
    core = play([LARGE], TIGHT, share, (share, share))
    assert (core.requests[0].reject_reason, core.moved_chunks) == (DOES_NOT_FIT, 0)


def test_those_set_aside_go_to_the_head_in_their_old_order_once_the_pool_has_grown():
    first = dataclasses.replace(BUSY, output_tokens=60)
    behind = [Ask(0.02, 17 * PAGE, 60), Ask(0.03, 5 * PAGE, 1), Ask(0.04, 5 * PAGE, 1)]
    core = start([first, LARGE, dataclasses.replace(LARGE, arrival_s=0.01), *behind], TIGHT_STEPS, TIGHT_SHARE)
    core.run_window()
    assert (core.telemetry.waiting, core.telemetry.aside) == (4, 2)
    core.request_split(slots_share(CONFIG, 2))
    finish(core)
    assert set(core.requests["status"]) == {FINISHED}
    assert np.argsort(core.requests["admitted_s"], kind="stable").tolist() == [0, 3, 1, 2, 4, 5]


@pytest.mark.parametrize("request_s", [0.0, 0.05])
def test_a_request_is_given_up_at_the_first_edge_after_its_deadline(request_s):
    config = with_engine(changed(deadline_slos=2.0, ttft_slo_floor_s=0.1), request_s=request_s)
    core = play([Ask(0.0, 64, 400), Ask(0.1, 64, 1)], config, slots_share(CONFIG, 2))
    late = core.requests[1]
    deadline = 0.1 + 2.0 * late.ttft_slo_s
    assert late.reject_reason == DEADLINE
    assert deadline <= late.ended_s < deadline + iteration_s(core.cost, 1, 500, 0, 0.0)
    assert core.counters.missed == 1


def test_a_child_waits_for_its_parent_and_the_wait_counts():
    core = play([Ask(0.0, 640, 100), Ask(0.1, 640, 1, needs=[0]), Ask(0.1, 640, 1)])
    parent, child, other = core.requests
    assert child.admitted_s == parent.ended_s > other.ended_s
    assert child.first_token_s == pytest.approx(parent.ended_s + cold_prefill_s(core.cost, 640), **EXACT)
    assert core.counters.ttft_over_slo == pytest.approx(
        sum((r.first_token_s - a) / r.ttft_slo_s for r, a in zip(core.requests, (0.0, 0.1, 0.1), strict=True))
    )


def test_a_child_of_a_rejected_parent_may_start():
    core = play([Ask(0.0, 600 * PAGE, 1), Ask(0.1, 640, 1, needs=[0])])
    assert core.requests["status"].tolist() == [REJECTED, FINISHED]
    assert core.requests[1].admitted_s == 0.1


@pytest.mark.parametrize("window_s", [0.01, 100.0])
def test_a_released_child_queues_behind_those_that_arrived_while_its_parent_ran(window_s):
    asks = [Ask(0.0, 64, 300), Ask(0.1, 64, 2), Ask(0.2, 64, 2, needs=[0]), Ask(0.3, 64, 2)]
    core = play(asks, changed(window_s=window_s), slots_share(CONFIG, 2))
    assert np.argsort(core.requests["admitted_s"]).tolist() == [0, 1, 3, 2]


def test_a_row_waits_for_all_of_its_needs_and_the_wait_counts():
    asks = [
        Ask(0.0, 640, 100),
        Ask(0.1, 640, 200, needs=[0]),
        Ask(0.2, 640, 2, needs=[0]),
        Ask(0.3, 640, 1, needs=[1, 2]),
    ]
    core = play(asks)
    first, longer, shorter, joined = core.requests
    assert first.ended_s == longer.admitted_s == shorter.admitted_s
    assert joined.admitted_s == longer.ended_s > shorter.ended_s
    assert joined.arrival_s == joined.waits_since_s == 0.3


# --- closed loop


def test_in_a_closed_loop_a_turn_arrives_its_gap_after_the_turn_before():
    core = play([Ask(0.5, 640, 100), Ask(0.6, 640, 1, needs=[0], gap_s=0.25), Ask(0.6, 640, 1)], loop="closed")
    first, second, other = core.requests
    assert second.arrival_s == second.admitted_s == first.ended_s + 0.25
    assert second.first_token_s == pytest.approx(second.arrival_s + cold_prefill_s(core.cost, 640), **EXACT)
    assert other.arrival_s == 0.6
    assert core.counters.ttft_over_slo == pytest.approx(
        sum((request.first_token_s - request.arrival_s) / request.ttft_slo_s for request in core.requests)
    )


def test_in_a_closed_loop_a_join_arrives_its_gap_after_the_last_of_its_needs():
    asks = [
        Ask(0.0, 640, 100),
        Ask(0.1, 640, 50, needs=[0], gap_s=0.25),
        Ask(0.2, 640, 2, needs=[0], gap_s=0.1),
        Ask(0.3, 640, 1, needs=[0, 1, 2], gap_s=0.125),
    ]
    core = play(asks, loop="closed")
    first, agent, _, joined = core.requests
    assert agent.arrival_s == first.ended_s + 0.25
    assert joined.arrival_s == joined.admitted_s == max(core.requests.ended_s[:3]) + 0.125 == agent.ended_s + 0.125


def test_in_a_closed_loop_a_turn_follows_a_rejected_one_too():
    core = play([Ask(0.25, 600 * PAGE, 1), Ask(0.3, 640, 1, needs=[0], gap_s=0.5)], loop="closed")
    assert core.requests["status"].tolist() == [REJECTED, FINISHED]
    assert core.requests["arrival_s"].tolist() == [0.25, 0.75]


@pytest.mark.parametrize("released_s", [0.1, 0.6])
def test_rows_that_arrive_at_one_time_queue_by_row_whether_released_or_fixed(released_s):
    refused, released, fixed = Ask(0.0, 600 * PAGE, 1), Ask(released_s, 64, 9, needs=[0], gap_s=0.5), Ask(0.5, 64, 9)
    asks = [refused, *sorted([released, fixed], key=lambda ask: ask.arrival_s)]
    core = play(asks, kv_share=slots_share(CONFIG, 2), loop="closed")
    assert core.requests["arrival_s"].tolist() == [0.0, 0.5, 0.5]
    assert core.requests["admitted_s"][1] == 0.5 < core.requests["admitted_s"][2]


def test_in_a_closed_loop_the_youngest_is_the_one_that_arrived_last():
    asks = [
        Ask(0.0, 600 * PAGE, 1),
        Ask(0.1, 512, 300, ["b"] * 8, needs=[0], gap_s=0.3125),
        Ask(0.3115, 512, 200, ["a"] * 8),
    ]
    core = play(asks, TIGHT, TIGHT_SHARE, loop="closed")
    assert core.requests["arrival_s"].tolist() == [0.0, 0.3125, 0.3115]
    assert core.requests["preemptions"].tolist() == [0, 1, 0]


def test_in_a_closed_loop_a_row_that_has_not_been_sent_is_told_to_nobody():
    core = start([Ask(0.0, 640, 400), Ask(0.1, 640, 1, needs=[0], gap_s=9.0)], changed(window_s=0.2), loop="closed")
    core.run_window()
    assert (core.telemetry.waiting, core.telemetry.running) == (0, 1)
    while core.counters.finished == 0:
        core.run_window()
    assert core.telemetry.waiting == 0 and core.counters.received == 1 and np.isfinite(core.requests[1].arrival_s)
    finish(core)
    assert core.counters.received == 2


def test_a_held_row_is_told_to_nobody_and_its_age_counts_once_it_is_received():
    core = start([Ask(0.0, 640, 400), Ask(0.1, 640, 1, needs=[0])], changed(window_s=0.2))
    arrivals, costs = [], []
    while core.counters.finished == 0:
        telemetry = core.run_window()
        arrivals.append(telemetry.arrivals_per_s * telemetry.window_s)
        costs.append(telemetry.cost)
        if core.counters.held == 1:
            assert (telemetry.waiting, telemetry.running) == (0, 1)
            assert telemetry.kv_demand_10s == pytest.approx(_demand_of_one(core, 640))
    assert core.requests[1].arrival_s == 0.1 and len(arrivals) > 4
    assert arrivals[0] == pytest.approx(1.0) and sum(arrivals[1:-1]) == 0.0 and arrivals[-1] == pytest.approx(1.0)
    held_s = core.requests[0].ended_s - 0.1
    assert sum(costs[1:-1]) == 0.0 and costs[-1] >= held_s / core.requests[1].ttft_slo_s
    finish(core)
    assert core.counters.received == 2


def _demand_of_one(core, tokens):
    kv_bytes = tokens * core.setup.kv_token_bytes
    return kv_bytes / (kv_bytes + core.setup.slots_per_request * core.layout.slot_bytes)


def test_taking_back_a_shrink_lets_the_blocked_head_in_at_once():
    config = dataclasses.replace(TIGHT, window_s=0.02, chunk_move_s=100.0)
    core = start([Ask(0.0, 4040, 200), Ask(0.1, 640, 1)], config, kv_share=0.5)
    while core.now_s < 0.12:
        core.run_window()
        core.request_split(0.0)
    assert core.telemetry.blocked_kv_fraction > 0
    taken_back_s = core.now_s
    core.request_split(0.5)
    core.run_window()
    assert core.requests[1].admitted_s == taken_back_s


@pytest.mark.parametrize("on_shortage", ["evict", "migrate", "float", "float-lru", "priced"])
def test_five_times_overload_ends_in_bounded_time(on_shortage):
    alone = play([Ask(0.0, 640, 100)])
    gap_s = alone.requests[0].ended_s / 5 / alone.telemetry.concurrency_cap
    asks = [Ask(gap_s * i, 640, 100, [f"user {i % 7}"] * 10) for i in range(400)]
    policies = Policies(on_shortage=on_shortage)
    core = start(asks, changed(ttft_slo_floor_s=0.2, slots_per_request=1, policies=policies), TIGHT_SHARE)
    most_windows = 10 + int(np.ceil(core.episode.horizon_s + 10 * core.requests["ttft_slo_s"].max()))
    finish(core, most_windows)
    assert core.counters.finished > 0 and core.counters.rejected > 0
    assert core.counters.iterations < 400 * 100
    for before, after in itertools.pairwise(core.requests["admitted_s"][core.requests["preemptions"] == 0]):
        assert not after < before, "never preempted requests are admitted in order of arrival"
