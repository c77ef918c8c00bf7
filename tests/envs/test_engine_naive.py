"""The kernels against the naive engine: same order of events, same memory, times to 1e-9."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hbmgym.controllers.base import PRICES
from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.serving.core import Core
from hbmgym.envs.serving.state import REJECT_NAMES, STATUS_NAMES
from hbmgym.memory_backend.eviction import eviction_order
from hbmgym.memory_backend.pools import NONE, Pool
from tests.envs.episodes import PADDED_PAGE, Ask, make_episode, padded_configs, small_configs, small_episodes
from tests.envs.naive_engine import Blocks, NaiveEngine

COUNTS = ("iterations", "preemptions", "recomputed_tokens", "skipped_snapshots", "saved_snapshots", "admitted_tokens",
          "reused_tokens", "kv_loss_tokens", "ssm_loss_tokens", "met", "missed")  # fmt: skip
TIMES = ("admitted_s", "first_token_s", "ended_s")


many_examples = settings(
    max_examples=200,
    derandomize=True,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow],
)


def close(found, expected):
    return math.isclose(found, expected, rel_tol=1e-9, abs_tol=1e-12)


def assert_same_pool(pool: Pool, blocks: Blocks, order):
    assert pool.meta.chunks == blocks.chunks
    assert (pool.meta.live, pool.meta.limit) == (len(blocks.pins), blocks.limit)
    expected = [(name[1] if name[0] == "id" else NONE, blocks.at[name]) for name in order]
    entries = pool.entries[eviction_order(pool)]
    assert list(zip(entries.key.tolist(), entries.block.tolist(), strict=True)) == expected
    assert set(np.flatnonzero(pool.entry_at != NONE)) == set(blocks.at.values())


def assert_same_telemetry(found: np.record, expected: dict[str, float]):
    assert set(expected) == set(found.dtype.names)
    for name, value in expected.items():
        assert isclose(found[name], value), (name, found[name], value)


def isclose(found, expected):
    # Times differ by 1e-15, and windows may be as short as 1e-9 s.
    return math.isclose(found, expected, rel_tol=1e-6, abs_tol=1e-9)


def assert_same(core: Core, naive: NaiveEngine):
    assert close(core.now_s, naive.now_s)
    for name in COUNTS:
        assert core.counters[name] == getattr(naive.totals, name), name
    assert core.actions == naive.totals.actions
    pins = core.counters.pins, core.counters.pins_used, core.counters.pins_given_up
    assert pins == (naive.pins.taken, naive.pins.used, naive.pins.given_up)
    assert close(core.counters.pin_ends_s, naive.pins.next_end_s())
    copies = core.counters.offloads, core.counters.offloaded_bytes, core.counters.restored_bytes
    assert copies == (naive.host.copies, naive.host.bytes_out, naive.host.bytes_back)
    assert core.counters.host_bytes == naive.host.used
    assert core.price_ratios.sum() == len(naive.totals.ratios)
    assert close(core.counters.busy_s, naive.totals.busy_s)
    assert close(core.counters.blocked_kv_s, naive.totals.blocked_s["kv"])
    assert close(core.counters.blocked_ssm_s, naive.totals.blocked_s["ssm"])
    assert_same_telemetry(core.telemetry, naive.telemetry.close_window())
    split = core.memory.split
    assert (split.moved_chunks, split.relocated_bytes) == (naive.totals.moved_chunks, naive.totals.relocated_bytes)
    assert close(split.tick_s, naive.tick_s)
    found = (core.requests[field].tolist() for field in ("status", "reject_reason", "preemptions", "reused_tokens"))
    for job, status, reason, *counts in zip(naive.jobs, *found, strict=True):
        assert (STATUS_NAMES[status], REJECT_NAMES[reason]) == (job.status, job.reason), job
        assert counts == [job.preemptions, job.reused], job
    times = np.column_stack([core.requests[field] for field in TIMES])
    expected = np.array([[getattr(job, field) for field in TIMES] for job in naive.jobs], float)  # None becomes NaN
    np.testing.assert_allclose(times, expected, rtol=1e-9, atol=1e-12)
    assert_same_pool(core.memory.kv, naive.kv, naive.eviction_order(naive.kv))
    assert_same_pool(core.memory.ssm, naive.ssm, naive.eviction_order(naive.ssm))


def compare(config, episode, shares, curvature=0.0, most_windows=3000):
    """Run both under `shares`: the first at the start, then one a window until they run out."""
    core = Core(config, check=True)
    core.reset(episode, shares[0])
    naive = NaiveEngine(core, episode, shares[0])
    if naive.deferral_weight is not None:
        core.set_prices(np.array([(0.0, curvature, naive.deferral_weight)], PRICES).view(np.recarray)[0])
        naive.curvature = curvature
    shares = iter(shares[1:])
    for window in range(1, most_windows):
        core.run_window()
        naive.advance(window * config.window_s)
        assert_same(core, naive)
        if core.done:
            return naive
        share = next(shares, None)
        if share is not None:
            core.request_split(share)
            naive.request_split(share)
    pytest.fail(f"{most_windows} windows were not enough")


@many_examples
@given(config=small_configs(), episode=small_episodes(), share=st.floats(0, 1))
def test_skipping_decode_iterations_equals_stepping_through_them(config, episode, share):
    compare(config, episode, [share])


@many_examples
@given(
    config=small_configs(),
    episode=small_episodes(),
    shares=st.lists(st.floats(0, 1), min_size=2, max_size=12),
    curvature=st.sampled_from([0.0, 1e-18]),
)
def test_the_naive_engine_agrees_while_the_split_changes(config, episode, shares, curvature):
    compare(config, episode, shares, curvature)


@settings(many_examples, max_examples=100)
@given(config=padded_configs(), episode=small_episodes(page_tokens=PADDED_PAGE), share=st.floats(0, 1))
def test_the_naive_engine_agrees_on_one_padded_pool(config, episode, share):
    compare(config, episode, [share])


def test_the_naive_engine_agrees_over_an_idle_night():
    evening = [Ask(i * 1.3, 640 + 64 * i, 1 + 9 * i, [f"user {i % 3}"] * 10) for i in range(9)]
    morning = [dataclasses.replace(ask, arrival_s=ask.arrival_s + 8 * 3600.0) for ask in evening]
    config = ServingConfig(model="qwen3.5-4b", hbm_gib=0.4, window_s=10.0)
    compare(config, make_episode(evening + morning), [0.4])
