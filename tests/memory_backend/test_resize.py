"""From the requested to the effective split: what waits, what moves when, and that nothing is lost on the way."""

import dataclasses

import numpy as np
import pytest

from hbmgym.envs.serving.config import Policies, ServingConfig
from hbmgym.envs.serving.core import Core
from hbmgym.envs.serving.shortage import ONE_BUFFER
from hbmgym.envs.serving.state import FINISHED
from hbmgym.memory_backend.resize import RUN_CHUNKS
from tests.envs.episodes import PLAIN_ENGINE, Ask, make_episode

PAGE = 64
CONFIG = ServingConfig(
    model="qwen3.5-4b", hbm_gib=1.0, prefill_budget=1024, window_s=0.01, ttft_slo_floor_s=100.0, chunk_move_s=1e-3,
    engine=PLAIN_ENGINE,
)  # fmt: skip
CHUNKS = 512
KV_HEAVY, SSM_HEAVY = 1.0, 0.0


def start(asks=(), kv_share=KV_HEAVY, **settings) -> Core:
    core = Core(dataclasses.replace(CONFIG, **settings), check=True)
    core.reset(make_episode(asks), kv_share)
    return core


def run_until(core: Core, reached, most_windows=1000) -> float:
    """Windows until `reached(core)`; the time then."""
    for _ in range(most_windows):
        if reached(core):
            return core.now_s
        core.run_window()
    pytest.fail(f"{most_windows} windows were not enough")


def chunks(core) -> tuple[int, int]:
    return int(core.memory.kv.meta.chunks), int(core.memory.ssm.meta.chunks)


def wanted(core, kv_share) -> tuple[int, int]:
    kv = core.layout.kv_chunks(core.layout.slots(kv_share))
    return kv, CHUNKS - kv


def test_chunks_of_an_idle_engine_arrive_run_by_run_after_their_modelled_time():
    core = start()
    start_kv, to_move = chunks(core)[0], chunks(core)[0] - wanted(core, SSM_HEAVY)[0]
    assert to_move > RUN_CHUNKS
    core.request_split(SSM_HEAVY)
    run_s = RUN_CHUNKS * CONFIG.chunk_move_s
    assert run_until(core, lambda c: c.moved_chunks > 0) == pytest.approx(run_s, abs=CONFIG.window_s)
    assert chunks(core) == (start_kv - RUN_CHUNKS, CHUNKS - start_kv + RUN_CHUNKS)
    all_s = to_move * CONFIG.chunk_move_s
    assert run_until(core, lambda c: c.moved_chunks == to_move) == pytest.approx(all_s, abs=CONFIG.window_s)
    assert chunks(core) == wanted(core, SSM_HEAVY)


def test_a_shrinking_pool_hands_out_no_block_above_its_target_at_once():
    core = start()
    core.request_split(0.5)
    kv = core.memory.kv.meta
    assert kv.limit == core.layout.pages(core.layout.slots(0.5)) < kv.capacity


def test_a_growing_pool_gains_capacity_only_when_chunks_arrive():
    core = start()
    before = int(core.memory.ssm.meta.limit)
    core.request_split(SSM_HEAVY)
    assert core.memory.ssm.meta.limit == before
    run_until(core, lambda c: c.moved_chunks > 0)
    assert core.memory.ssm.meta.limit == core.memory.ssm.meta.capacity > before


def cached_pages(count):
    return Ask(0.0, count * PAGE, 1, ["a"] * count)


def test_cached_pages_above_the_target_are_evicted_in_order_and_the_others_relocated():
    core = start([cached_pages(60)])
    run_until(core, lambda c: c.done)
    core.request_split(SSM_HEAVY)
    assert core.memory.kv.meta.cached == core.memory.kv.meta.limit == 20
    run_until(core, lambda c: c.memory.split.tick_s > 1e200)
    assert chunks(core) == wanted(core, SSM_HEAVY)
    assert core.memory.split.relocated_bytes == 0, "pages went to the lowest blocks first"
    assert np.all(core.memory.kv.entry_at[:20] >= 0)


def test_relocation_fills_the_lowest_blocks_and_is_counted():
    # The first prompt's 30 pages lie below those of the second, and leave first.
    core = start([cached_pages(30), Ask(0.1, 15 * PAGE, 1, ["b"] * 15)])
    run_until(core, lambda c: c.done)
    core.request_split(SSM_HEAVY)
    run_until(core, lambda c: c.memory.split.tick_s > 1e200)
    assert np.all(core.memory.kv.entry_at[:20] >= 0)
    assert core.memory.split.relocated_bytes == 15 * core.layout.page_bytes
    assert core.migrated_bytes == core.moved_chunks * core.layout.chunk_bytes + core.memory.split.relocated_bytes


def test_a_shrink_waits_for_live_pages_and_ends_when_their_request_does():
    core = start([Ask(0.0, 100 * PAGE - 63, 60)], chunk_move_s=75e-6)
    core.run_window()
    before = chunks(core)
    core.request_split(SSM_HEAVY)
    core.run_window()
    assert core.requests[0].ended_s != core.requests[0].ended_s, "it still runs"
    assert chunks(core) == before, "the free chunks stay with the request that may grow into them"
    assert core.telemetry.kv_share_requested < core.telemetry.kv_share_effective
    run_until(core, lambda c: c.done)
    run_until(core, lambda c: c.memory.split.tick_s > 1e200)
    assert core.requests[0].status == FINISHED and core.requests[0].preemptions == 0
    assert chunks(core) == wanted(core, SSM_HEAVY)


def test_a_shrink_of_the_slots_never_touches_a_running_request():
    asks = [Ask(0.0, 64, 100) for _ in range(9)]
    core = start(asks, SSM_HEAVY)
    run_until(core, lambda c: c.telemetry.running == 9)
    core.request_split(KV_HEAVY)
    core.run_window()
    assert core.memory.ssm.meta.live == 18 > core.memory.ssm.meta.limit
    run_until(core, lambda c: c.done)
    assert np.all(core.requests.status == FINISHED) and core.counters.preemptions == 0
    run_until(core, lambda c: c.memory.split.tick_s > 1e200)
    assert chunks(core) == wanted(core, KV_HEAVY)


def test_no_request_is_admitted_above_the_target():
    core = start([Ask(0.0, 64, 200), Ask(0.005, 64, 200), Ask(0.05, 64, 1)], SSM_HEAVY)
    run_until(core, lambda c: c.telemetry.running == 2)
    core.request_split(KV_HEAVY)
    run_until(core, lambda c: c.telemetry.blocked_ssm_fraction > 0)
    run_until(core, lambda c: c.done)
    # The target is one request's slots: the third is let in when both others are gone.
    assert core.requests.admitted_s[2] == core.requests.ended_s[:2].max()


def test_a_newer_request_replaces_the_one_under_way():
    core = start()
    core.request_split(SSM_HEAVY)
    core.run_window()
    core.request_split(0.7)
    run_until(core, lambda c: c.memory.split.tick_s > 1e200)
    assert chunks(core) == wanted(core, 0.7)
    assert core.moved_chunks == wanted(core, KV_HEAVY)[0] - wanted(core, 0.7)[0]


def test_taking_a_request_back_before_a_run_arrives_moves_nothing():
    core = start()
    core.request_split(SSM_HEAVY)
    core.run_window()
    core.request_split(KV_HEAVY)
    for _ in range(100):
        core.run_window()
    assert core.moved_chunks == 0 and core.memory.kv.meta.limit == core.memory.kv.meta.capacity


def test_a_reversal_moves_the_chunks_that_arrived_back():
    core = start()
    core.request_split(SSM_HEAVY)
    run_until(core, lambda c: c.moved_chunks > 0)
    core.request_split(KV_HEAVY)
    run_until(core, lambda c: c.memory.split.tick_s > 1e200)
    assert chunks(core) == wanted(core, KV_HEAVY)
    assert core.moved_chunks == 2 * RUN_CHUNKS


def test_the_same_request_again_changes_nothing():
    core = start()
    core.request_split(SSM_HEAVY)
    core.run_window()
    due_s = core.memory.split.tick_s
    core.request_split(SSM_HEAVY)
    assert core.memory.split.tick_s == due_s


def test_shares_beyond_the_bounds_are_clipped():
    core = start(kv_share=0.5)
    core.request_split(7.0)
    run_until(core, lambda c: c.memory.split.tick_s > 1e200)
    assert chunks(core) == wanted(core, KV_HEAVY)


def busy_end_s(transfers, request) -> float:
    core = start([Ask(0.0, 640, 400)], transfers=transfers, chunk_move_s=75e-6)
    core.run_window()
    if request:
        core.request_split(0.5)
    run_until(core, lambda c: c.done)
    return float(core.requests[0].ended_s)


def test_overlapped_moves_cost_a_running_request_nothing():
    assert busy_end_s("overlapped", True) == pytest.approx(busy_end_s("overlapped", False), rel=1e-9)


def test_stalling_moves_cost_a_running_request_their_modelled_time():
    moved = wanted(start(), KV_HEAVY)[0] - wanted(start(), 0.5)[0]
    extra_s = busy_end_s("stall", True) - busy_end_s("stall", False)
    assert extra_s == pytest.approx(moved * 75e-6, rel=1e-9)


def test_where_everything_fits_a_suspension_costs_what_a_stall_does():
    assert busy_end_s("suspend", True) == busy_end_s("stall", True)


def three_running(transfers) -> Core:
    """Six slots are live, and two are asked for."""
    core = start([Ask(0.001 * i, 64, 200) for i in range(3)], SSM_HEAVY, transfers=transfers)
    run_until(core, lambda c: c.telemetry.running == 3)
    core.request_split(KV_HEAVY)
    core.run_window()
    return core


def test_a_stalled_resize_waits_for_running_requests():
    core = three_running("stall")
    assert core.memory.ssm.meta.live == 6 and chunks(core) != wanted(core, KV_HEAVY)
    assert core.counters.preemptions == 0


def test_a_suspended_resize_preempts_the_youngest_until_the_others_fit():
    core = three_running("suspend")
    assert chunks(core) == wanted(core, KV_HEAVY) and core.memory.ssm.meta.live == 2
    assert core.requests["preemptions"].tolist() == [0, 1, 1]
    run_until(core, lambda c: c.done)
    assert np.all(core.requests["status"] == FINISHED)
    assert np.all(np.diff(core.requests["ended_s"]) > 0), "one after the other, oldest first"


def test_a_suspended_resize_never_preempts_the_oldest():
    core = start([Ask(0.0, 300 * PAGE, 400)], KV_HEAVY, transfers="suspend")
    run_until(core, lambda c: c.telemetry.running == 1)
    core.request_split(SSM_HEAVY)
    core.run_window()
    assert core.counters.preemptions == 0 and chunks(core) == wanted(core, KV_HEAVY), "its pages give no chunk away"
    run_until(core, lambda c: c.done)
    assert core.requests[0].status == FINISHED


def test_an_unknown_way_to_move_chunks_is_refused():
    with pytest.raises(ValueError, match="transfers is 'never', expected one of: overlapped, stall, suspend"):
        ServingConfig(transfers="never")


@pytest.mark.parametrize("rule", ONE_BUFFER)
def test_one_pool_has_no_transfers_to_choose(rule):
    with pytest.raises(ValueError, match=f"transfers is 'suspend', but on_shortage={rule} is one pool without a split"):
        ServingConfig(transfers="suspend", policies=Policies(on_shortage=rule))


def test_copies_of_a_run_delay_the_next_one():
    # The 300 pages of the first prompt leave first; the 15 of the second, above them, are copied down.
    core = start([cached_pages(300), Ask(0.1, 15 * PAGE, 1, ["b"] * 15)])
    run_until(core, lambda c: c.done)
    to_move = chunks(core)[0] - wanted(core, SSM_HEAVY)[0]
    asked_s = core.now_s
    core.request_split(SSM_HEAVY)
    run_until(core, lambda c: c.moved_chunks > 0)
    assert core.memory.split.relocated_bytes == 15 * core.layout.page_bytes
    copy_s = 15 * core.layout.page_bytes * core.cost.block_copy_s_per_byte
    assert core.memory.split.tick_s == pytest.approx(asked_s + copy_s + to_move * CONFIG.chunk_move_s, rel=1e-12)
