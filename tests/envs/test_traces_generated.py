"""Generated sessions and scenarios."""

import time

import numpy as np
import pytest

from hbmgym.envs.traces.classes import BOOK, CHAT
from hbmgym.envs.traces.compose import compose, compose_generated
from hbmgym.envs.traces.distributions import GeometricTurns, LogNormal, Mixture
from hbmgym.envs.traces.generators import sessions
from hbmgym.envs.traces.pages import output_id_fraction
from hbmgym.envs.traces.scenarios import generate
from hbmgym.envs.traces.seeds import SeedError
from hbmgym.envs.traces.session_class import SessionClass
from hbmgym.envs.traces.trace import ROW_COLUMNS, TraceError
from hbmgym.envs.traces.validate import build_trace

RATES = {"mix-shift": {"chat": 4.0, "document": 0.5}, "steady-chat": {"chat": 4.0}}
ID_NAMES = ("h_ref", "h_lcp", "r_off", "r_start", "r_len")


def small_class(**more):
    tokens = LogNormal(4.0, 0.5, 500)
    return SessionClass(
        "small", tokens, Mixture(((1.0, tokens),)), tokens, LogNormal(1.0, 0.5), GeometricTurns(3.0, 6), **more
    )


@pytest.mark.parametrize("name", list(RATES))
def test_generated_trace_passes_the_checks_of_every_loader(name):
    trace = generate(name, 1, RATES[name])
    columns = {key: getattr(trace, key) for key in (*ROW_COLUMNS, *ID_NAMES)}
    checked = build_trace(columns, name=name, kind="open-loop", block_size=64, path=name, where=str)
    assert checked.notices == ()
    assert checked.block_counts.tolist() == (trace.input_tokens // 64).tolist()
    assert trace.arrival_s[-1] < trace.span_s


def test_an_episode_knows_which_class_each_of_its_rows_is_of():
    """Documents are shared and hundreds of pages long, a chat's turns a few."""
    trace = generate("mix-shift", 1, RATES["mix-shift"])
    episode = compose_generated(trace, seed=1, page_tokens=64)
    assert np.array_equal(episode.traffic_class, trace.traffic_class)
    prompts = [np.median(episode.rows["input_tokens"][episode.traffic_class == number]) for number in (0, 1)]
    assert max(prompts) > 5 * min(prompts)
    sessions_of = [set(trace.session_id[trace.traffic_class == number].tolist()) for number in (0, 1)]
    assert not sessions_of[0] & sessions_of[1]
    short = episode.until(600.0, 300.0)
    assert np.array_equal(short.traffic_class, episode.traffic_class[: len(short.rows)])


def test_later_turn_continues_the_previous_one():
    trace = generate("steady-chat", 3, RATES["steady-chat"])
    rows = np.flatnonzero(trace.parent >= 0)
    before = trace.parent[rows]
    added = trace.input_tokens[rows] - trace.input_tokens[before] - trace.output_tokens[before]
    assert (added >= 1).all()
    assert (trace.turn[rows] == trace.turn[before] + 1).all()
    assert (trace.session_id[rows] == trace.session_id[before]).all()
    served = 0.2 + 0.025 * trace.output_tokens[before]
    wait_s = trace.arrival_s[rows] - trace.arrival_s[before] - served
    assert np.allclose(wait_s, trace.gap_s[rows], rtol=1e-5, atol=1e-4)
    for row in rows[:50]:
        parent = trace.blocks(int(trace.parent[row]))
        assert (trace.blocks(int(row))[: len(parent)] == parent).all()


def test_sessions_share_the_system_prompt_and_nothing_else():
    trace = sessions(
        [(small_class(system_tokens=200), np.arange(20.0)), (small_class(system_tokens=70), np.arange(5.0))],
        np.random.default_rng(0),
        name="made",
        span_s=1e4,
    )
    heads = [trace.blocks(int(row)) for row in np.flatnonzero(trace.turn == 0)]
    leading = {tuple(ids[:1].tolist()) for ids in heads}
    assert len(leading) == 2
    tails = np.concatenate([ids[3:] if ids[0] == heads[0][0] else ids[1:] for ids in heads])
    own, counts = np.unique(tails, return_counts=True)
    assert len(own)
    # The class with one shared block keeps none of the other's three.
    assert counts.max() == 1


def test_composed_scenario_knows_the_ids_of_outputs_that_later_turns_repeat():
    trace = generate("steady-chat", 4, RATES["steady-chat"])
    episode = compose_generated(trace, seed=4, page_tokens=64)
    assert (episode.rows["known_ids"] == (trace.input_tokens + trace.output_tokens) // 64).all()
    before, after = episode.needs
    assert (before == trace.parent[after]).all() and (episode.rows["needs"] == (trace.parent >= 0)).all()
    assert 0.5 < output_id_fraction(episode) < 1.0
    assert (episode.warmup_s, episode.horizon_s) == (300.0, 2100.0)


def test_generation_is_a_pure_function_of_its_arguments():
    one, other, third = (generate("mix-shift", seed, RATES["mix-shift"]) for seed in (5, 5, 6))
    for name in (*ROW_COLUMNS, *ID_NAMES):
        assert np.array_equal(getattr(one, name), getattr(other, name), equal_nan=name in ("gap_s", "service_s"))
    assert len(one) != len(third) or (one.arrival_s != third.arrival_s).any()


def test_class_rate_is_the_request_rate():
    trace = generate("steady-chat", 7, {"chat": 5.0}, warmup_s=1000.0, measured_s=20_000.0)
    assert (trace.arrival_s >= 1000.0).sum() / 20_000.0 == pytest.approx(5.0, rel=0.03)
    doubled = generate("steady-chat", 7, {"chat": 5.0}, load=2.0, warmup_s=1000.0, measured_s=20_000.0)
    assert len(doubled) / len(trace) == pytest.approx(2.0, rel=0.05)


def test_mix_shift_alternates_its_classes_in_phases():
    trace = generate("mix-shift", 8, {"chat": 20.0, "document": 2.0}, warmup_s=0.0, measured_s=3000.0)
    first = trace.turn == 0
    document = trace.input_tokens[first] > 4096
    switches_s = trace.arrival_s[first][1:][np.diff(document.astype(int)) != 0]
    lengths_s = np.diff(switches_s)
    assert len(lengths_s) > 5
    assert (lengths_s > 220).all()
    assert (lengths_s < 380).all()


def test_mean_turns_accounts_for_the_cap():
    turns = BOOK.turns.draw(np.random.default_rng(0), 400_000)
    assert BOOK.mean_requests == pytest.approx(turns.mean(), rel=0.01)
    assert CHAT.mean_requests < CHAT.turns.uncapped


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("quiet", 0, {"chat": 1.0}), "scenario is 'quiet'"),
        (("steady-chat", 0, {}), "class_rates has"),
        (("steady-chat", 0, {"chat": 1.0, "document": 1.0}), "class_rates has"),
        (("steady-chat", 0, {"chat": -1.0}), "rate of chat is -1.0"),
        (("steady-chat", 0, {"chat": 1.0}, float("nan")), "load is nan"),
        (("steady-chat", 0, {"chat": 1.0}, 1.0, -5.0), "warmup_s is -5.0"),
        (("steady-chat", 0, {"chat": 1.0}, 1.0, 0.0, 0.0), "measured_s is 0.0"),
        (("steady-chat", 0, {"chat": 1e-9}), "0 rows arrive"),
    ],
)
def test_bad_arguments_are_one_line(arguments, expected):
    with pytest.raises(TraceError, match=expected):
        generate(*arguments)


def test_seeds_outside_every_range_are_refused():
    with pytest.raises(SeedError, match="seed is -1"):
        generate("steady-chat", -1, {"chat": 1.0})
    trace = generate("steady-chat", 12_000, {"chat": 1.0})
    assert compose_generated(trace, seed=12_000, page_tokens=64).seed == 12_000


def test_generated_and_recorded_traces_have_their_own_entrance():
    trace = generate("steady-chat", 0, {"chat": 1.0})
    with pytest.raises(TraceError, match="trace is generated"):
        compose(trace, part="train", seed=0, page_tokens=64)
    with pytest.raises(TraceError, match="warmup_s is 9000"):
        compose_generated(trace, seed=0, page_tokens=64, warmup_s=9000.0)


def test_reset_of_a_large_episode_is_quick():
    rates = {"chat": 36.0, "document": 2.0}
    compose_generated(generate("mix-shift", 0, rates), seed=0, page_tokens=64)
    begin = time.perf_counter()
    episode = compose_generated(generate("mix-shift", 1, rates), seed=1, page_tokens=64)
    assert len(episode.rows) > 25_000
    # Ten times what it takes, so that a busy machine does not fail the test.
    assert time.perf_counter() - begin < 0.5
