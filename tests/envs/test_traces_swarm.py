"""Agent swarms: their fit, who waits for whom, what they share, and what the engine makes of them."""

from pathlib import Path

import numpy as np
import pytest

from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.serving.core import Core
from hbmgym.envs.traces.classes import CHAT, SWARM
from hbmgym.envs.traces.compose import compose_generated
from hbmgym.envs.traces.distributions import Mixture, kolmogorov_smirnov
from hbmgym.envs.traces.episode import LOOPS
from hbmgym.envs.traces.generators import NO_ROW, sessions
from hbmgym.envs.traces.load import load_trace
from hbmgym.envs.traces.precedence import gaps_s, needs, recorded_ends_s
from hbmgym.envs.traces.scenarios import generate_class
from tests.envs.episodes import PLAIN_ENGINE

WEKA = Path(__file__).resolve().parents[2] / ".." / "shared" / "traces" / "train" / "agentic_claude_code_weka.train.npz"


@pytest.fixture(scope="module")
def trace():
    """Swarms from their start, all of them, and chats between them."""
    rng = np.random.default_rng(4)
    return sessions([(CHAT, np.arange(30.0)), (SWARM, np.arange(0.0, 900.0, 15.0))], rng, name="made", span_s=1e9)


@pytest.fixture(scope="module")
def rows():
    return SWARM.draw(np.zeros(3000), np.random.default_rng(5), 1e9, 64)


def is_agent(trace):
    return trace.s_parent_session[trace.session_id] >= 0


def first_turns(trace):
    """Of sub-agents."""
    return np.flatnonzero(is_agent(trace) & (trace.parent == NO_ROW))


# --- the fit


def test_a_swarm_has_as_many_requests_as_stated(rows):
    assert len(rows) / 3000 == pytest.approx(SWARM.mean_requests, rel=0.04)


def test_a_swarm_looks_like_the_recordings_it_is_fitted_to(rows):
    """Medians within 15 %, tails within 40 % of what 46 sub-agents and their 11 roots recorded."""
    agent = rows.starter != NO_ROW
    first, later = agent & (rows.turn == 0), agent & (rows.turn > 0)
    last = agent & ~np.isin(np.arange(len(rows)), rows.parent)
    grown = (rows.input_tokens - rows.input_tokens[rows.parent] - rows.output_tokens[rows.parent])[later]
    turns = np.unique(rows.session[agent], return_counts=True)[1]
    forks = rows.turn[~agent & ~np.isin(np.arange(len(rows)), rows.parent)]
    for values, median, p90 in (
        (rows.input_tokens[first], 10_178, 12_536),
        (grown, 2224, 13_066),
        (rows.output_tokens[agent & ~last], 223, 329),
        (rows.output_tokens[last], 2914, 4374),
        (rows.gap_s[later], 4.0, 28.9),
        (turns, 10, 16.5),
        (forks, 2, 5),
    ):
        found = np.quantile(values, (0.5, 0.9))
        assert found[0] == pytest.approx(median, rel=0.15), (median, found)
        assert found[1] == pytest.approx(p90, rel=0.4), (median, found)
    # Its turns are drawn independently, those recorded read most at their start: only the mean is near.
    assert rows.input_tokens[agent].mean() == pytest.approx(43_047, rel=0.15)
    assert len(turns) / forks.sum() == pytest.approx(46 / 28, rel=0.04), "sub-agents per fork"
    assert forks.mean() == pytest.approx(28 / 11, rel=0.04)


def test_the_fit_is_not_rejected_by_the_recordings():
    """Kolmogorov-Smirnov at 1 %, for what is drawn on its own."""
    if not WEKA.is_file():
        pytest.skip("public traces are not beside the repository")
    weka = load_trace(WEKA)
    agent = is_agent(weka)
    later = np.flatnonzero(agent & (weka.parent >= 0))
    last = agent & ~np.isin(np.arange(len(weka)), weka.parent)
    grown = weka.input_tokens[later] - weka.input_tokens[weka.parent[later]] - weka.output_tokens[weka.parent[later]]
    turns = np.unique(weka.session_id[agent], return_counts=True)[1]
    before, after = needs(weka)
    joins = np.unique(after[agent[before] & (weka.parent[after] != before)])
    starts = after[agent[after] & (weka.parent[after] != before)]
    offset_s = gaps_s(weka)[starts]
    for name, values, fit in (
        ("grown", grown, SWARM.agent.later_text),
        ("answer", weka.output_tokens[last], SWARM.agent.answer),
        ("turns", turns, SWARM.agent.turns.lognormal),
        ("join", gaps_s(weka)[joins], SWARM.gap_s),
        ("offset", offset_s[offset_s < 60], SWARM.offset_s),
    ):
        # Values that were rounded to whole numbers are spread over the interval that they stand for.
        spread = values + np.random.default_rng(0).uniform(-0.5, 0.5, len(values)) * (name == "turns")
        assert kolmogorov_smirnov(spread, fit) < 1.63 / np.sqrt(len(values)), name
    assert isinstance(SWARM.agent.gap_s, Mixture)


# --- who waits for whom


def test_sub_agents_need_the_turn_that_forks_them_and_the_next_turn_needs_them_all(trace):
    before, after = needs(trace)
    agent, starter = is_agent(trace), trace.s_parent_session[trace.session_id]
    turns = trace.parent[after] == before
    released, joined = ~turns & agent[after], ~turns & agent[before]
    firsts = first_turns(trace)
    lasts = np.flatnonzero(agent & ~np.isin(np.arange(len(trace)), trace.parent))
    assert sorted(after[released]) == firsts.tolist() and sorted(before[joined]) == lasts.tolist()
    fork = dict(zip(trace.session_id[after[released]].tolist(), before[released].tolist(), strict=True))
    join = dict(zip(trace.session_id[before[joined]].tolist(), after[joined].tolist(), strict=True))
    assert len(fork) > 100
    for session, row in fork.items():
        assert trace.session_id[row] == trace.s_parent_session[session]
        assert trace.parent[join[session]] == row, "the root's very next turn"
    assert set(np.flatnonzero(~agent & (np.bincount(after, minlength=len(trace)) > 1))) == set(join.values())
    assert (starter[~agent] == NO_ROW).all()


def test_the_root_goes_on_a_gap_after_the_last_answer_and_has_them_all_in_its_prompt(trace):
    before, after = needs(trace)
    ends_s = recorded_ends_s(trace)
    last_end_s = np.full(len(trace), -np.inf)
    np.maximum.at(last_end_s, after, ends_s[before])
    follows = last_end_s > -np.inf
    wait_s = trace.arrival_s[follows] - last_end_s[follows]
    assert (wait_s > 0.0).all(), "nobody is early, so an idle engine holds nobody"
    assert np.allclose(gaps_s(trace)[follows], np.minimum(wait_s, 600.0), rtol=1e-5, atol=1e-5)
    agent = is_agent(trace)
    joins = np.unique(after[agent[before] & ~agent[after]])
    answered = np.bincount(after, trace.output_tokens[before], len(trace))
    assert (trace.input_tokens[joins] - trace.input_tokens[trace.parent[joins]] == answered[joins]).all()


def test_all_prompts_of_a_swarm_begin_alike_and_sub_agents_go_ways_of_their_own(trace):
    roots = np.flatnonzero((trace.parent == NO_ROW) & np.isin(trace.session_id, np.unique(trace.s_parent_session)))
    tasks = {}
    for root in roots.tolist():
        session = trace.session_id[root]
        own = trace.blocks(root)
        for row in first_turns(trace)[trace.s_parent_session[trace.session_id[first_turns(trace)]] == session]:
            ids = trace.blocks(int(row))
            shared = np.isin(ids, own)
            assert shared.sum() >= SWARM.system_tokens // 64 and shared[: shared.sum()].all()
            assert tasks.setdefault(session, shared.sum()) == shared.sum(), "the same for all siblings"
            assert (ids[: shared.sum()] == own[: shared.sum()]).all()
    assert len(tasks) == len(roots) == 60
    assert len(set(tasks.values())) > 10, "every swarm has its own task"
    heads = {int(trace.blocks(int(root))[SWARM.system_tokens // 64 - 1]) for root in roots}
    assert len(heads) == 1, "the class shares the system prompt"


def test_a_swarm_that_began_before_time_0_shows_up_with_all_that_it_had_said(rows):
    begun_s = 400.0
    later = SWARM.draw(np.full(3000, -begun_s), np.random.default_rng(5), 1e9, 64)
    kept = rows.arrival_s >= begun_s
    assert sorted(later.input_tokens.tolist()) == sorted(rows.input_tokens[kept].tolist())
    early = later.source < np.arange(len(later))
    brought = later.source != NO_ROW
    assert (later.arrival_s[later.source[brought]] <= later.arrival_s[brought]).all() and not early.all()
    blocks = later.input_tokens // 64
    assert (later.repeated[brought] <= blocks[later.source[brought]]).all()
    swarms = np.where(later.starter == NO_ROW, later.session, later.starter)
    assert (~brought).sum() == len(np.unique(swarms)), "one prompt of each brings what it shares"


# --- in the engine


@pytest.mark.parametrize("loop", LOOPS)
def test_sub_agents_reuse_what_they_share_and_the_root_waits_for_all_of_them(loop):
    trace = generate_class(SWARM, 3, 0.25, 300.0, 1500.0)
    episode = compose_generated(trace, seed=3, page_tokens=64, loop=loop)
    core = Core(ServingConfig(hbm_gib=80.0, tensor_parallel=2, engine=PLAIN_ENGINE))  # so that what is shared stays
    core.reset(episode, 0.8)
    while not core.done:
        core.run_window()
    requests, (before, after) = core.requests, needs(trace)
    assert np.array_equal(np.stack(episode.needs), np.stack((before, after))[:, np.lexsort((after, before))])
    agent = is_agent(trace)
    joins = np.unique(after[agent[before] & ~agent[after]])
    assert len(joins) > 20 and (requests["admitted_s"][after] >= requests["ended_s"][before]).all()
    if loop == "closed":
        last_end_s = np.full(len(trace), -np.inf)
        np.maximum.at(last_end_s, after, requests["ended_s"][before])
        assert np.allclose(requests["arrival_s"][joins], (last_end_s + gaps_s(trace))[joins])

    # Its task's end is a branch, so a swarm's first sub-agent leaves a snapshot there, and its siblings begin at it.
    shared = 64 * trace.h_lcp
    firsts = first_turns(trace)
    firsts = firsts[trace.h_ref[firsts] >= 0]
    starter = trace.s_parent_session[trace.session_id[firsts]]
    by_start = firsts[np.lexsort((requests["admitted_s"][firsts], starter))]
    sibling = np.diff(trace.s_parent_session[trace.session_id[by_start]], prepend=-1) == 0
    after_s = requests["admitted_s"][by_start[1:]] - requests["first_token_s"][by_start[:-1]]
    warm = np.append(False, sibling[1:] & (after_s >= 0.0) & (after_s < 10.0))  # of one fork: nothing is evicted yet
    reused = requests["reused_tokens"][by_start]
    assert warm.sum() >= 10
    assert (reused[warm] == shared[by_start[warm]]).all()
    assert (reused[5:] >= SWARM.system_tokens).all(), "the class's system prompt at least"
