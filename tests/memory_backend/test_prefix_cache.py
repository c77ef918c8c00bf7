"""What a request finds again: pages leave leaf first, snapshots leave with their page, reuse needs both."""

import dataclasses

import numpy as np
import pytest

from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.serving.core import Core
from hbmgym.memory_backend.eviction import eviction_order
from hbmgym.memory_backend.pools import NONE
from tests.envs.episodes import Ask, make_episode

PAGE = 64
CONFIG = ServingConfig(model="qwen3.5-4b", hbm_gib=1.0, prefill_budget=256, window_s=1.0, ttft_slo_floor_s=100.0)
FEW_PAGES = 0.0  # 20 pages, 20 slots


def play(asks, kv_share=FEW_PAGES, **settings) -> Core:
    core = Core(dataclasses.replace(CONFIG, **settings), check=True)
    core.reset(make_episode(asks), kv_share)
    for _ in range(200):
        core.run_window()
        if core.done:
            return core
    pytest.fail("the requests did not end")


def few_slots(slots: int) -> float:
    return Core(CONFIG).layout.share(slots)


def resident(core, row) -> list[int]:
    """Which of the row's pages are in the cache."""
    trace = core.episode.rows[row]
    ids = core.episode.refs[trace.ref_off : trace.ref_off + trace.known_ids]
    return [j for j, i in enumerate(ids) if core.memory.ids[i].page != NONE]


def snapshots(core, row) -> list[int]:
    """After which of the row's pages, counted from 1, a snapshot lies."""
    trace = core.episode.rows[row]
    ids = core.episode.refs[trace.ref_off : trace.ref_off + trace.known_ids]
    return [j + 1 for j, i in enumerate(ids) if core.memory.ids[i].snapshot != NONE]


def test_a_finished_prompt_stays_with_a_snapshot_at_its_last_boundary():
    core = play([Ask(0.0, 10 * PAGE + 5, 3, ["a"] * 10)])
    assert resident(core, 0) == list(range(10)) and snapshots(core, 0) == [10]
    assert core.memory.kv.meta.live == core.memory.ssm.meta.live == 0


def test_pages_are_evicted_from_the_end_of_a_prefix():
    core = play([Ask(0.0, 10 * PAGE, 1, ["a"] * 10), Ask(1.0, 14 * PAGE, 1)])
    assert resident(core, 0) == list(range(6))
    assert core.memory.kv.meta.evictions == 4


def test_a_snapshot_leaves_with_the_page_it_ends():
    core = play([Ask(0.0, 10 * PAGE, 1, ["a"] * 10), Ask(1.0, 11 * PAGE, 1)])
    assert resident(core, 0) == list(range(9)) and snapshots(core, 0) == []
    assert core.memory.ssm.meta.evictions == 1


def test_the_prefix_used_least_recently_is_evicted_first():
    asks = [
        Ask(0.0, 6 * PAGE, 1, ["a"] * 6),
        Ask(1.0, 6 * PAGE, 1, ["b"] * 6),
        Ask(2.0, 6 * PAGE + 1, 1, ["a"] * 6),
        Ask(3.0, 13 * PAGE, 1),
    ]
    core = play(asks)
    assert core.requests.reused_tokens[2] == 6 * PAGE
    assert resident(core, 0) == list(range(6)) and resident(core, 1) == [0]


def test_a_shared_beginning_outlives_both_ends():
    asks = [
        Ask(0.0, 7 * PAGE, 1, ["document"] * 4 + ["a"] * 3),
        Ask(1.0, 7 * PAGE, 1, ["document"] * 4 + ["b"] * 3),
        Ask(2.0, 15 * PAGE, 1),
    ]
    core = play(asks)
    assert resident(core, 0) == list(range(4)), "the first end was used least recently"
    assert resident(core, 1) == list(range(5))


def test_pages_without_a_snapshot_are_loaded_but_not_reused():
    asks = [Ask(0.0, 8 * PAGE, 1, ["a"] * 8), Ask(1.0, 5 * PAGE, 1, ["a"] * 4)]
    core = play(asks)
    assert core.requests.reused_tokens[1] == 0
    assert core.counters.ssm_loss_tokens == 4 * PAGE and core.counters.kv_loss_tokens == 0


def test_evicted_pages_are_booked_as_lost_to_the_kv_pool():
    core = play([Ask(0.0, 10 * PAGE, 1, ["a"] * 10), Ask(1.0, 14 * PAGE, 1), Ask(2.0, 10 * PAGE, 1, ["a"] * 10)])
    # The last prompt token is computed again in any case, so 9 pages could have been found and 6 were.
    assert core.counters.kv_loss_tokens == 3 * PAGE
    assert core.counters.ssm_loss_tokens == 6 * PAGE


def test_snapshots_are_evicted_in_order_of_use_and_leave_their_pages():
    asks = [
        Ask(0.0, 2 * PAGE, 1, ["a"] * 2),
        Ask(1.0, 2 * PAGE, 1, ["b"] * 2),
        Ask(2.0, 2 * PAGE + 1, 1, ["a"] * 2),
        Ask(3.0, 2 * PAGE, 1, ["c"] * 2),
    ]
    core = play(asks, few_slots(4))
    # Two slots are the request's own: two snapshots fit.
    assert [snapshots(core, row) for row in (0, 1, 3)] == [[2], [], [2]]
    assert resident(core, 1) == [0, 1]


def test_with_every_slot_live_the_snapshot_of_the_prompt_goes_to_the_reserved_slot():
    core = play([Ask(0.0, 2 * PAGE, 1, ["a"] * 2)], few_slots(2))
    assert snapshots(core, 0) == [2]
    assert (core.counters.saved_snapshots, core.counters.skipped_snapshots) == (1, 0)


def test_with_one_slot_and_nothing_free_the_snapshot_is_skipped_and_counted():
    core = play([Ask(0.0, 2 * PAGE, 1, ["a"] * 2)], 1.0, slots_per_request=1)
    assert snapshots(core, 0) == []
    assert (core.counters.saved_snapshots, core.counters.skipped_snapshots) == (0, 1)


def test_a_request_that_needs_every_slot_goes_on_in_the_slot_of_its_snapshot():
    core = play([Ask(0.0, 2 * PAGE, 1, ["a"] * 2), Ask(1.0, 2 * PAGE + 1, 1, ["a"] * 2)], few_slots(2))
    assert core.requests.reused_tokens[1] == 2 * PAGE
    assert core.memory.ssm.meta.evictions == 0
    assert snapshots(core, 0) == [], "its state has gone on"


def test_a_decode_snapshot_replaces_the_one_before_it():
    known = ["a"] * 2 + ["out"] * 9
    core = play([Ask(0.0, 2 * PAGE, 9 * PAGE + 1, known)])
    assert snapshots(core, 0) == [2, 10], "after 256 and 512 tokens, of which the later one is kept"


def test_prompts_computed_side_by_side_end_as_one_copy():
    core = play([Ask(0.0, 4 * PAGE, 5, ["a"] * 4), Ask(0.0, 4 * PAGE, 5, ["a"] * 4)], 0.5, prefill_budget=1024)
    assert np.count_nonzero(core.memory.kv.entries.key != NONE) == 4 and core.memory.ssm.meta.cached == 1
    assert np.all(core.requests.reused_tokens == 0)


@pytest.mark.parametrize("named", [4, 7, 9])
def test_pages_that_have_ids_stay_cached_and_others_are_free_at_once(named):
    core = play([Ask(0.0, 4 * PAGE, 5 * PAGE + 1, ["a"] * named)])
    kv, evictable = core.memory.kv, eviction_order(core.memory.kv)
    assert (kv.meta.cached, kv.meta.live) == (named, 0)
    assert kv.entries.key[evictable].tolist() == core.episode.refs[:named][::-1].tolist(), "deepest first"
