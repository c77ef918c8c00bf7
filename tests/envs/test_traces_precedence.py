"""Who waits for whom: turns, sub-agents, joins; gaps; closed loops of recorded and generated traces."""

import numpy as np
import pytest

from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.serving.core import Core
from hbmgym.envs.traces.compose import compose, compose_generated
from hbmgym.envs.traces.episode import ROW, link
from hbmgym.envs.traces.load import load_trace
from hbmgym.envs.traces.precedence import MAX_GAP_S, gaps_s, needs, recorded_ends_s
from hbmgym.envs.traces.scenarios import generate
from hbmgym.envs.traces.service import unloaded_service_s
from hbmgym.envs.traces.trace import TraceError

from .test_traces_compose import SHARED, clocked, library, make, recording

NAN = float("nan")
SERVED_S = float(unloaded_service_s(np.array([4]))[0])
"""Of every row that `make` makes."""


def pairs(trace) -> set[tuple[int, int]]:
    return set(zip(*(rows.tolist() for rows in needs(trace)), strict=True))


# --- who waits for whom


def test_a_turn_waits_for_the_turn_before():
    assert pairs(recording()) == {(0, 1), (1, 2), (2, 3)}
    assert pairs(clocked(rows=200, span_s=900.0)) == {(row, row + 50) for row in range(100)}


def test_a_sub_agent_waits_for_the_row_sent_last_and_the_next_row_waits_for_it():
    trace = recording((51.0, 60.0, 70.0))
    assert pairs(trace) == {(0, 1), (1, 2), (2, 3), (4, 5), (5, 6)} | {(1, 4), (6, 2)}


def test_the_next_row_waits_for_all_sub_agents():
    trace = recording((51.0, 60.0), (52.0, 80.0))
    joined = {before for before, after in pairs(trace) if after == 2}
    assert joined == {1, 5, 7}


def test_a_row_that_was_sent_while_a_sub_agent_ran_does_not_wait_for_it():
    assert {(5, 3)} == {pair for pair in pairs(recording((51.0, 95.0))) if pair[0] == 5}


def test_a_sub_agent_that_outlives_its_parent_joins_nothing():
    assert {(3, 4), (4, 5)} <= pairs(recording((801.0, 900.0)))
    assert not {before for before, _ in pairs(recording((801.0, 900.0)))} & {5}


# --- how long after


def test_an_unknown_gap_is_what_the_unloaded_service_leaves_of_the_time_between():
    assert gaps_s(recording(main=(0.0, 10.0, 10.1))).tolist() == pytest.approx([0.0, 10.0 - SERVED_S, 0.0])


def test_a_recorded_service_time_stands_for_the_modelled_one():
    assert gaps_s(recording(main=(0.0, 10.0), service_s=np.array([4.0, 1.0]))).tolist() == [0.0, 6.0]


def test_a_recorded_gap_is_taken_as_it_is_and_none_is_longer_than_ten_minutes():
    gaps = gaps_s(recording(main=(0.0, 10.0, 20.0, 5000.0), gap_s=np.array([NAN, 3.0, 900.0, NAN])))
    assert gaps.tolist() == [0.0, 3.0, MAX_GAP_S, MAX_GAP_S]


def test_a_sub_agent_keeps_its_offset_and_a_join_counts_from_the_last_end():
    trace = recording((51.0, 60.0), (52.0, 80.0), gap_s=np.array([NAN, 7.0, 39.0, NAN, NAN, 1.0, NAN, 1.0]))
    offsets = 51.0 - 50.0 - SERVED_S, 52.0 - 50.0 - SERVED_S
    assert gaps_s(trace)[[4, 6]].tolist() == pytest.approx(offsets)
    assert gaps_s(trace)[2] == pytest.approx(90.0 - 80.0 - SERVED_S)
    assert gaps_s(trace)[1] == 7.0


# --- closed loops


@pytest.mark.parametrize("trace", [clocked(), clocked(3.0), library(), recording((51.0, 60.0, 70.0), (52.0, 80.0))])
def test_a_closed_loop_has_the_rows_of_the_open_one_and_their_gaps(trace):
    arguments = {"part": "all", "seed": 5, "page_tokens": 8, "warmup_s": 0.0, "load": 3.0}
    opened, closed = compose(trace, **arguments), compose(trace, **arguments, loop="closed")
    assert (opened.loop, closed.loop) == ("open", "closed")
    for field in ROW.names:
        assert field == "gap_s" or np.array_equal(opened.rows[field], closed.rows[field]), field
    assert np.array_equal(opened.refs, closed.refs) and np.array_equal(opened.needs, closed.needs)
    assert not opened.rows["gap_s"].any()
    follows = closed.rows["needs"] > 0
    gap_s = closed.rows["gap_s"]
    assert follows.any() and not gap_s[~follows].any()
    assert np.isin(gap_s[follows], gaps_s(trace).astype(np.float32)).all(), "whatever the load"
    assert gap_s.max() > 0.0


def test_a_closed_loop_measures_the_sessions_that_start_after_the_warm_up():
    episode = compose(library(), part="all", seed=5, page_tokens=8, loop="closed", load=2.0)
    rows, (before, after) = episode.rows, episode.needs
    starts = rows["needs"] == 0
    assert np.array_equal(rows["measured"][starts], rows["arrival_s"][starts] >= episode.warmup_s)
    assert np.array_equal(rows["measured"][before], rows["measured"][after])
    late = ~starts & (rows["arrival_s"] >= episode.warmup_s)
    assert 0 < rows["measured"][late].sum() < late.sum()


def test_a_generated_scenario_closes_with_its_gaps():
    trace = generate("mix-shift", 0, {"chat": 0.4, "document": 0.02})
    episode = compose_generated(trace, seed=0, page_tokens=64, loop="closed")
    follows = episode.rows["needs"] > 0
    assert np.array_equal(follows, trace.parent >= 0)
    assert np.array_equal(episode.rows["gap_s"][follows], np.minimum(trace.gap_s[follows], MAX_GAP_S))


def test_a_closed_loop_of_rows_that_follow_nothing_is_refused():
    trace = make(np.arange(900.0), [[row] for row in range(900)], [-1] * 900, [-1] * 900)
    with pytest.raises(TraceError, match="made: loop is 'closed', but no row follows another one"):
        compose(trace, part="all", seed=0, page_tokens=8, loop="closed")


def test_an_episode_that_is_all_warm_up_is_refused():
    trace = make(np.arange(900.0), [[row] for row in range(900)], [0] * 900, range(-1, 899))
    with pytest.raises(TraceError, match=r"0 of the episode's [0-9]+ rows are measured"):
        compose(trace, part="all", seed=0, page_tokens=8, warmup_s=100.0, loop="closed")


@pytest.mark.parametrize("loop", ["open", "closed"])
def test_the_first_part_of_an_episode_is_an_episode(loop):
    whole = compose(library(), part="all", seed=5, page_tokens=8, loop=loop, load=4.0)
    part = whole.until(900.0, 400.0)
    rows, (before, after) = part.rows, part.needs
    assert (part.warmup_s, part.horizon_s, part.loop) == (400.0, 900.0, loop)
    assert rows["arrival_s"].tolist() == [s for s in whole.rows["arrival_s"].tolist() if s < 900.0]
    assert np.array_equal(rows["needs"], whole.rows["needs"][: len(rows)])
    expected = {pair for pair in zip(*(side.tolist() for side in whole.needs), strict=True) if pair[1] < len(rows)}
    assert set(zip(before.tolist(), after.tolist(), strict=True)) == expected
    starts = rows["needs"] == 0
    judged = starts if loop == "closed" else np.full(len(rows), True)
    assert np.array_equal(rows["measured"][judged], rows["arrival_s"][judged] >= 400.0)


def test_a_row_cannot_wait_for_a_later_one():
    with pytest.raises(AssertionError, match="rows before it"):
        link(np.zeros(3, ROW), np.array([2]), np.array([1]))


# --- real recordings


@pytest.fixture(scope="module")
def weka():
    path = SHARED / "agentic_claude_code_weka.train.npz"
    if not path.is_file():
        pytest.skip("public traces are not beside the repository")
    return load_trace(path)


def test_claude_code_sub_agents_are_released_and_joined(weka):
    before, after = needs(weka)
    agent = weka.s_parent_session[weka.session_id] >= 0
    turns = weka.parent[after] == before
    released, joins = ~turns & agent[after], ~turns & agent[before]
    assert (turns.sum(), released.sum(), joins.sum()) == ((weka.parent >= 0).sum(), 46, 44)
    assert len(np.unique(after[joins])) == 28, "sub-agents that run side by side join one row"
    assert (weka.session_id[after[joins]] == weka.s_parent_session[weka.session_id[before[joins]]]).all()
    assert (recorded_ends_s(weka)[before[joins]] <= weka.arrival_s[after[joins]]).all(), "the recording agrees"
    assert np.percentile(gaps_s(weka)[after[released]], [0, 90]) == pytest.approx([0.2, 6.2], abs=0.2)


@pytest.mark.parametrize("loop", ["open", "closed"])
def test_claude_code_parents_wait_for_their_sub_agents(weka, loop):
    episode = compose(weka, part="train", seed=1, page_tokens=64, load=2.0, loop=loop)
    rows, (before, after) = episode.rows, episode.needs
    assert np.count_nonzero(rows["needs"] > 1) == 3
    core = Core(ServingConfig())
    core.reset(episode, 0.8)
    while not core.done:
        core.run_window()
    requests = core.requests
    started = ~np.isnan(requests["admitted_s"][after])
    assert (requests["admitted_s"][after] >= requests["ended_s"][before])[started].all()
    if loop == "closed":
        last_end_s = np.full(len(rows), -np.inf)
        np.maximum.at(last_end_s, after, requests["ended_s"][before])
        follows = rows["needs"] > 0
        assert np.array_equal(requests["arrival_s"][follows], (last_end_s + rows["gap_s"])[follows])
