"""Which snapshots of a path stay: rules on conversations of a few turns."""

import dataclasses

import pytest

from hbmgym.envs.serving.config import Policies, ServingConfig
from hbmgym.envs.serving.retention import Retention
from hbmgym.memory_backend.pools import NONE
from tests.envs.episodes import PLAIN_ENGINE, Ask
from tests.envs.test_engine import play

PAGE = 64
ROOMY = ServingConfig(model="qwen3.5-4b", hbm_gib=4.0, prefill_budget=4096, engine=PLAIN_ENGINE, ttft_slo_floor_s=100.0)


def serve(asks, retention, **settings):
    return play(asks, dataclasses.replace(ROOMY, policies=Policies(retention=retention), **settings))


def turn(at_s, *content, answer=1):
    """A prompt of whole pages and one token more; `content`: (label, pages) one after the other."""
    labels = [label for label, pages in content for _ in range(pages)]
    return Ask(at_s, len(labels) * PAGE + 1, answer, labels)


def snapshots(core, row):
    """Depths on the row's path."""
    trace = core.episode.rows[row]
    path = core.episode.refs[trace.ref_off : trace.ref_off + trace.known_ids]
    return [depth for depth, page_id in enumerate(path, 1) if core.memory.ids.snapshot[page_id] != NONE]


TURNS = [turn(0.0, ("a", 10)), turn(5.0, ("a", 10), ("b", 10)), turn(10.0, ("a", 10), ("b", 10), ("c", 10))]


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        ("all", [10, 20, 30]),
        ("latest", [30]),
        ("path-cap-1", [30]),
        ("path-cap-2", [20, 30]),
        ("path-cap-3", [10, 20, 30]),
        ("interval-512", [8, 16, 24, 30]),
        ("interval-1000", [16, 30]),
    ],
)
def test_a_growing_conversation_keeps(retention, kept):
    core = serve(TURNS, retention)
    assert snapshots(core, 2) == kept
    assert core.requests.reused_tokens.tolist() == [0, 10 * PAGE, 20 * PAGE], "each turn resumes from the one before"


def test_what_is_dropped_is_no_loss_of_a_pool_and_costs_no_eviction():
    core = serve([*TURNS, turn(15.0, ("a", 10), ("other", 5))], "latest")
    assert core.memory.ssm.meta.evictions == 0
    assert core.requests.reused_tokens[3] == 0, "a branch off an early turn finds its pages, but no state"
    assert core.counters.ssm_loss_tokens == 10 * PAGE
    assert core.memory.ids.state_lost.max() == 0 and core._state.marginal.sum() == 0.0


def test_a_branch_makes_a_junction_that_later_turns_keep():
    fork = [turn(0.0, ("a", 10), ("b", 5)), turn(5.0, ("a", 10), ("c", 5)), turn(10.0, ("a", 10), ("d", 5))]
    core = serve(fork, "latest")
    assert core.requests.reused_tokens.tolist() == [0, 0, 10 * PAGE], (
        "the first to branch off pays, and saves the state"
    )
    assert snapshots(core, 1) == [10, 15]
    assert snapshots(core, 0) == [10, 15]


def test_a_client_that_rewrites_its_last_turn_finds_nothing_under_latest():
    edited = [*TURNS[:2], turn(10.0, ("a", 10), ("rewritten", 10))]
    assert serve(edited, "latest").requests.reused_tokens[2] == 0
    for retention in ("all", "path-cap-2"):
        assert serve(edited, retention).requests.reused_tokens[2] == 10 * PAGE
    assert serve(edited, "interval-512").requests.reused_tokens[2] == 8 * PAGE


def test_what_was_decoded_last_stays_beside_the_prompts_boundary():
    long_answer = Ask(0.0, 10 * PAGE + 1, 600, ["a"] * 19)
    core = serve([long_answer], "latest")
    assert snapshots(core, 0) == [10, 18]


def test_optimal_learns_where_prompts_part():
    """Every prompt repeats the first 20 of 30 pages of the one before it, which no turn's boundary marks."""
    asks = [turn(5.0 * k, *((f"step {j}", 20) for j in range(k)), (f"tail {k}", 10)) for k in range(1, 7)]
    learnt, latest = (serve(asks, name).requests.reused_tokens.tolist() for name in ("optimal-2", "latest"))
    assert sum(learnt) > sum(latest)


def test_an_interval_may_end_chunks_or_not():
    for snapshots_end_chunks in (True, False):
        engine = dataclasses.replace(PLAIN_ENGINE, snapshots_end_chunks=snapshots_end_chunks)
        assert snapshots(serve(TURNS[:1], "interval-256", engine=engine), 0) == [4, 8, 10]


@pytest.mark.parametrize(
    "text", ["", "none", "interval", "interval-", "interval-0", "interval-x", "path-cap-0", "optimal-65"]
)
def test_a_wrong_name_or_number_is_named(text):
    with pytest.raises(ValueError, match="policy retention is"):
        Retention.parse(text)
