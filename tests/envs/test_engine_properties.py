"""What must hold for any traffic, budget and sequence of splits, and what must not matter."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hbmgym.envs.serving.config import Policies, ServingConfig
from hbmgym.envs.serving.core import Core
from hbmgym.envs.serving.metrics import request_costs
from hbmgym.envs.serving.state import FINISHED, REJECTED
from hbmgym.envs.traces.episode import link
from hbmgym.memory_backend.vmm import VmmRefused
from tests.envs.episodes import ENGINES, SMALL_PAGE, Ask, make_episode, small_configs, small_episodes, with_own_pages

TIMES = ("admitted_s", "first_token_s", "ended_s")
SHARES = st.lists(st.floats(0, 1), min_size=1, max_size=12)
MOST_WINDOWS = 20_000
some_examples = settings(
    max_examples=50,
    derandomize=True,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow],
)


def play(config, episode, shares=(0.5,), **options) -> tuple[Core, list[np.record]]:
    """Run to the end, one requested share a window while they last; the core and the Telemetry of every window."""
    core = Core(config, **options)
    telemetry = [core.reset(episode, shares[0]).copy()]
    requested = iter(shares[1:])
    for _ in range(MOST_WINDOWS):
        telemetry.append(core.run_window().copy())
        if core.done:
            return core, telemetry
        if (share := next(requested, None)) is not None:
            core.request_split(share)
    pytest.fail(f"{MOST_WINDOWS} windows were not enough")


def result(core, telemetry) -> tuple[bytes, bytes, bytes]:
    return core.requests.tobytes(), core.counters.tobytes(), b"".join(record.tobytes() for record in telemetry)


@some_examples
@given(config=small_configs(), episode=small_episodes(24), shares=SHARES)
def test_every_request_ends_in_causal_order_with_nothing_lost(config, episode, shares):
    core, telemetry = play(config, episode, shares, check=True)
    rows, requests = episode.rows, core.requests
    finished, rejected = requests.status == FINISHED, requests.status == REJECTED
    assert np.all(finished | rejected)
    assert (core.counters.finished, core.counters.rejected) == (finished.sum(), rejected.sum())
    assert core.counters.met + core.counters.missed == len(rows)
    started = ~np.isnan(requests.admitted_s)
    assert np.all(requests.admitted_s[started] >= requests.arrival_s[started] + config.engine.request_s)
    answered = ~np.isnan(requests.first_token_s)
    assert np.all(requests.first_token_s[answered] > requests.admitted_s[answered])
    assert np.all(requests.ended_s[answered] >= requests.first_token_s[answered])
    assert np.all(requests.ended_s >= requests.arrival_s)
    assert np.all(answered[finished]) and np.all(requests.generated[finished] == rows.output_tokens[finished])
    before, after = episode.needs
    assert np.all(requests.admitted_s[after][started[after]] >= requests.ended_s[before][started[after]])
    assert np.all(requests.reused_tokens[started] < rows.input_tokens[started])
    assert np.all(requests.preemptions <= config.max_preemptions)
    assert core.telemetry.kv_live == core.telemetry.ssm_live == core.counters.host_bytes == 0
    assert core.counters.pinned_pages > 0 or core.memory.kv.meta.live == core.memory.ssm.meta.live == 0
    assert core.mapped_chunks == core.layout.chunks
    assert np.all(np.diff([record.time_s for record in telemetry]) >= 0)
    for name, total in (("met", core.counters.met), ("missed", core.counters.missed)):
        assert sum(record[name] for record in telemetry) == total
    costs = request_costs(rows, requests, core.setup.tpot_slo_s)
    assert sum(record.cost for record in telemetry) == pytest.approx(costs.sum(), rel=1e-9)


@some_examples
@given(
    config=small_configs(), episode=small_episodes(loops=["closed"]), shares=st.tuples(st.floats(0, 1), st.floats(0, 1))
)
def test_in_a_closed_loop_every_row_comes_its_gap_after_what_it_needs_whatever_the_split(config, episode, shares):
    before, after = episode.needs
    for share in shares:
        core, telemetry = play(config, episode, [share], check=True)
        requests = core.requests
        last_end_s = np.full(len(requests), -np.inf)
        np.maximum.at(last_end_s, after, requests.ended_s[before])
        follows = episode.rows.needs > 0
        assert np.all(requests.arrival_s[~follows] == episode.rows.arrival_s[~follows])
        assert np.all(requests.arrival_s[follows] == last_end_s[follows] + episode.rows.gap_s[follows])
        assert core.counters.finished + core.counters.rejected == core.counters.received == len(episode.rows)
        assert sum(round(record.arrivals_per_s * record.window_s) for record in telemetry) == len(episode.rows)


@some_examples
@given(config=small_configs(), episode=small_episodes(), share=st.floats(0, 1), factor=st.floats(0.05, 40))
def test_the_window_length_does_not_change_a_static_split(config, episode, share, factor):
    one, _ = play(config, episode, [share])
    other, _ = play(dataclasses.replace(config, window_s=max(config.window_s * factor, 0.01)), episode, [share])
    for field in ("status", "reject_reason", "preemptions", "missed", "reused_tokens", "generated"):
        assert np.array_equal(one.requests[field], other.requests[field]), field
    for field in TIMES:
        np.testing.assert_allclose(one.requests[field], other.requests[field], rtol=1e-9)
    assert one.counters.iterations == other.counters.iterations


@some_examples
@given(config=small_configs(), episode=small_episodes(), shares=SHARES)
def test_two_runs_and_any_size_of_the_op_log_give_identical_arrays(config, episode, shares):
    expected = result(*play(config, episode, shares))
    assert result(*play(config, episode, shares)) == expected
    for log_capacity in (0, 1, 200_000):
        assert result(*play(config, episode, shares, check=True, log_capacity=log_capacity)) == expected


@settings(parent=some_examples, max_examples=5)
@given(config=small_configs(), episode=small_episodes(), shares=SHARES)
def test_host_memory_gives_the_arrays_of_accounting_and_its_stamps_read_back(config, episode, shares):
    try:
        host = play(config, episode, shares, backend="host", check=True)
    except VmmRefused as refusal:
        pytest.skip(str(refusal))
    assert result(*host) == result(*play(config, episode, shares))
    assert host[0].vmm.stamps_checked > 0 or np.all(np.isnan(host[0].requests.admitted_s))
    host[0].close()


@some_examples
@given(
    episode=small_episodes(16),
    budgets=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    engines=st.tuples(st.sampled_from(ENGINES), st.sampled_from(ENGINES)),
)
def test_neither_chunk_size_nor_engine_changes_what_requests_reuse_one_after_the_other(episode, budgets, engines):
    rows, one_by_one = episode.rows.copy(), np.arange(1, len(episode.rows))
    episode = dataclasses.replace(episode, rows=rows, followers=link(rows, one_by_one - 1, one_by_one))
    config = ServingConfig(model="qwen3.5-4b", hbm_gib=0.5, page_tokens=SMALL_PAGE, ttft_slo_floor_s=1000.0)
    one, other = (
        play(dataclasses.replace(config, prefill_budget=budget, engine=engine), episode)[0]
        for budget, engine in zip(budgets, engines, strict=True)
    )
    assert np.array_equal(one.requests.reused_tokens, other.requests.reused_tokens)


def busy_hour_of_a_small_engine() -> list[list[float]]:
    """Times of a few requests that share, wait, preempt and see the split change, by each rule and order."""
    document = ["document"] * 20
    asks = [
        Ask(
            0.003 * i,
            340 + 40 * (i % 3),
            300 + 30 * (i % 4),
            [*document, i % 4],
            [i - 4] if i > 4 and i % 4 == 3 else [],
        )
        for i in range(24)
    ]
    config = ServingConfig(
        model="qwen3.5-4b", hbm_gib=0.3, page_tokens=SMALL_PAGE, prefill_budget=128, decode_snapshot_tokens=32,
        slots_per_request=1, window_s=0.1, ttft_slo_floor_s=0.1, chunk_move_s=1e-3, pin_price=0.0,
    )  # fmt: skip
    episode = make_episode(with_own_pages(asks, SMALL_PAGE), SMALL_PAGE)
    times, reused, preemptions, pins, offloads = [], 0, 0, 0, 0
    rules = zip(
        ("evict", "migrate", "float", "priced"),
        ("past-future", "slo", "lpm", "fcfs"),
        (ENGINES[0], *ENGINES[2:]),
        (1, 10, 3, 1),
        strict=True,
    )
    for on_shortage, admission, engine, interval in rules:
        policies = Policies(admission=admission, on_shortage=on_shortage, pin="ttl", preemption="offload")
        config = dataclasses.replace(config, policies=policies, engine=engine, receive_interval=interval)
        core, _ = play(config, episode, [0.2, 0.6, 0.1, 0.3], check=True)
        assert core.moved_chunks > 0
        reused += core.counters.reused_tokens
        preemptions += core.counters.preemptions
        pins += core.counters.pins
        offloads += core.counters.offloads
        times += [[float(request[field]) for field in TIMES] for request in core.requests]
    assert min(reused, preemptions, pins, offloads) > 0, (reused, preemptions, pins, offloads)
    return times


def test_kernels_give_the_same_without_the_compiler():
    root = Path(__file__).resolve().parents[2]
    code = f"import json; from {__name__} import busy_hour_of_a_small_engine as play; print(json.dumps(play()))"
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1", "PYTHONPATH": path}
    process = subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    np.testing.assert_allclose(json.loads(process.stdout), busy_hour_of_a_small_engine(), rtol=1e-12)
