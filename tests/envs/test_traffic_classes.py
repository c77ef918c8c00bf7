"""Classes of traffic against the fits that they state, and patterns of arrival."""

import dataclasses
import itertools

import numpy as np
import pytest

from hbmgym.envs.traces import classes
from hbmgym.envs.traces.arrivals import Bursts, Diurnal, MixBursts, Phases, Steady, Trend, draw_starts_s
from hbmgym.envs.traces.compose import compose_generated
from hbmgym.envs.traces.distributions import (
    GeometricTurns,
    LogNormal,
    LogNormalTurns,
    Mixture,
    OneTurn,
    Quantiles,
    SingleOrMoreTurns,
    TabledTurns,
    kolmogorov_smirnov,
)
from hbmgym.envs.traces.document_class import DocumentClass
from hbmgym.envs.traces.generators import NO_ROW
from hbmgym.envs.traces.scenarios import SCENARIOS, generate, phase_schedule
from hbmgym.envs.traces.session_class import Compaction, SessionClass
from hbmgym.envs.traces.swarm_class import SubAgent, SwarmClass
from hbmgym.envs.traces.validate import build_trace

CLASSES = {group.name: group for scenario in SCENARIOS.values() for group in scenario.classes}
SESSIONS = [group for group in CLASSES.values() if isinstance(group, SessionClass)]
MANY = 20_000
REJECTED_AT_1_PERCENT = 1.63 / np.sqrt(MANY)
"""Critical value of the Kolmogorov-Smirnov distance; rounded and clipped values stay below it more often."""


def by_name(group):
    return group.name


def distributions_of(group):
    """Of a class and of the sub-agents in it."""
    found = {}
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        if isinstance(value, SubAgent):
            found |= distributions_of(value)
        elif hasattr(value, "cdf"):
            found[f"{type(group).__name__}.{field.name}"] = value
    return found


@pytest.mark.parametrize("group", CLASSES.values(), ids=by_name)
def test_draws_follow_the_stated_distributions(group):
    rng = np.random.default_rng(1)
    for field, distribution in distributions_of(group).items():
        assert kolmogorov_smirnov(distribution.draw(rng, MANY), distribution) < REJECTED_AT_1_PERCENT, field


@pytest.mark.parametrize("group", CLASSES.values(), ids=by_name)
def test_a_distribution_shifted_by_a_tenth_is_told_apart(group):
    values = group.output.draw(np.random.default_rng(2), MANY)
    assert kolmogorov_smirnov(1.1 * values, group.output) > REJECTED_AT_1_PERCENT


def quantiles(distribution, *probabilities):
    return np.quantile(distribution.draw(np.random.default_rng(3), 100_000), probabilities)


def test_the_fits_lie_within_40_percent_of_the_quantiles_of_the_traces_they_name():
    near = {"rel": 0.4}
    assert quantiles(classes.SHORT_CHAT.first_prompt, 0.5, 0.95) == pytest.approx([25, 794], **near)
    assert quantiles(classes.ASSISTANT.first_prompt, 0.25, 0.5, 0.9) == pytest.approx([397, 1024, 4076], rel=0.05)
    assert quantiles(classes.ASSISTANT.output, 0.5, 0.95) == pytest.approx([129, 451], **near)
    assert quantiles(classes.CONVERSATION.first_prompt, 0.5) == pytest.approx([6449], rel=0.05)
    assert quantiles(classes.CONVERSATION.gap_s, 0.5, 0.9) == pytest.approx([123, 429], **near)
    assert classes.CONVERSATION.turns.mean == pytest.approx(1.47, rel=0.05)
    assert quantiles(classes.DOCUMENTS.document, 0.5, 0.9) == pytest.approx([23_000, 41_000], **near)
    assert quantiles(classes.DOCUMENTS.question, 0.5, 0.95) == pytest.approx([437, 1384], **near)
    assert quantiles(classes.DOCUMENTS.output, 0.5, 0.95) == pytest.approx([10, 221], **near)
    assert quantiles(classes.DOCUMENTS.questions.lognormal, 0.5, 0.9) == pytest.approx([6, 11], rel=0.05)
    assert quantiles(classes.DOCUMENTS.between_s, 0.5, 0.9) == pytest.approx([95, 297], rel=0.05)
    assert quantiles(classes.CODE.first_prompt, 0.5) == pytest.approx([1469], **near)
    assert quantiles(classes.CODE.output, 0.5, 0.95) == pytest.approx([13, 90], **near)
    assert quantiles(classes.AGENT.later_text, 0.5, 0.9) == pytest.approx([721, 4328], **near)
    assert quantiles(classes.AGENT.output, 0.5, 0.9) == pytest.approx([218, 909], **near)
    assert quantiles(classes.AGENT.turns.lognormal, 0.5, 0.9) == pytest.approx([47, 152], **near)


@pytest.mark.parametrize(
    "turns",
    [
        GeometricTurns(4.0, 6),
        SingleOrMoreTurns(0.7, 3.0, 9),
        LogNormalTurns(LogNormal(2.0, 1.0, 40)),
        OneTurn(),
        TabledTurns((0.5, 0.2, 0.3)),
    ],
    ids=lambda turns: type(turns).__name__,
)
def test_the_stated_mean_of_turns_is_that_of_the_draws(turns):
    drawn = turns.draw(np.random.default_rng(4), 400_000)
    assert drawn.min() >= 1
    assert turns.mean == pytest.approx(drawn.mean(), rel=0.01)


def test_a_mixture_and_a_table_of_quantiles_have_the_distribution_functions_that_they_say():
    mixture = Mixture(((0.25, LogNormal(0.0, 0.1)), (0.75, LogNormal(5.0, 0.1))))
    assert mixture.cdf(np.array([10.0]))[0] == pytest.approx(0.25)
    table = Quantiles(((0.0, 1.0), (0.5, 10.0), (1.0, 1000.0)))
    assert table.cdf(np.array([0.5, 10.0, 100.0, 2000.0])) == pytest.approx([0.0, 0.5, 0.75, 1.0])


# --- what classes make of their draws


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_scenario_is_a_valid_trace_that_composes_and_is_a_function_of_its_seed(name):
    rates = {group.name: 1.0 for group in SCENARIOS[name].classes}
    trace, again, other = (generate(name, seed, rates, 1.0, 60.0, 240.0) for seed in (7, 7, 8))
    columns = {field: getattr(trace, field) for field in trace.__dataclass_fields__}
    del columns["traffic_class"]  # what no recorded trace has
    given = {key: value for key, value in columns.items() if isinstance(value, np.ndarray)}
    checked = build_trace(given, name=name, kind="open-loop", block_size=64, path=name, where=str)
    assert checked.notices == ()
    assert checked.block_counts.tolist() == (trace.input_tokens // 64).tolist()
    assert np.array_equal(trace.arrival_s, again.arrival_s) and np.array_equal(trace.r_start, again.r_start)
    assert not np.array_equal(trace.arrival_s, other.arrival_s)
    assert len(compose_generated(trace, seed=7, page_tokens=64, warmup_s=60.0).rows) == len(trace)


def draw(group, starts_s, span_s, seed=5):
    return group.draw(np.asarray(starts_s, np.float64), np.random.default_rng(seed), span_s, 64)


def test_questions_repeat_their_document_and_nothing_of_each_other():
    rows = draw(classes.DOCUMENTS, [0.0, 50.0], 1e9)
    brings = rows.source == NO_ROW
    assert brings.sum() == 2 and len(rows) > 4
    assert (rows.repeated[brings] == 0).all()
    later = np.flatnonzero(~brings)
    assert (rows.repeated[later] * 64 <= rows.input_tokens[later]).all()
    assert len(set(rows.repeated[later].tolist())) <= 2  # one length per document
    assert (rows.parent == NO_ROW).all()


def test_a_session_that_began_before_time_0_shows_up_with_all_that_it_had_said():
    whole = draw(classes.AGENT, [0.0] * 20, 1e9)
    later = draw(classes.AGENT, [-300.0] * 20, 1e9)
    assert 0 < len(later) < len(whole)
    dropped = len(whole) - len(later)
    first = np.flatnonzero(later.parent == NO_ROW)
    assert (later.source[first] == NO_ROW).all()
    assert later.turn[first].max() > 0
    assert sorted(later.input_tokens.tolist()) == sorted(whole.input_tokens[whole.arrival_s >= 300.0].tolist())
    assert dropped == (whole.arrival_s < 300.0).sum()


def test_traffic_of_sessions_that_last_long_is_in_full_swing_at_time_0():
    span_s, counts = 4000.0, []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        starts_s = draw_starts_s([(-classes.AGENT.lead_s, span_s, 1.0)], 0.01, rng)
        counts.append(np.histogram(classes.AGENT.draw(starts_s, rng, span_s, 64).arrival_s, 2, (0.0, span_s))[0])
    early, late = np.sum(counts, axis=0)
    assert early == pytest.approx(late, rel=0.15)


def test_compaction_keeps_prompts_below_the_cap_and_begins_anew_after_the_system_prompt():
    tokens = LogNormal(7.0, 0.3)
    group = SessionClass(
        "compacted", tokens, tokens, tokens, LogNormal(0.0, 0.1), GeometricTurns(40.0, 60), system_tokens=640,
        compaction=Compaction(0.0, LogNormal(-1.0, 0.1), 10_000),
    )  # fmt: skip
    rows = draw(group, np.arange(20.0), 1e9)
    assert rows.input_tokens.max() <= 10_000
    anew = (rows.turn > 0) & (rows.source == NO_ROW)
    assert anew.any()
    assert (rows.repeated[anew] == 10).all()
    assert (rows.parent[anew] == np.flatnonzero(anew) - 1).all()
    assert (rows.input_tokens[anew] < rows.input_tokens[np.flatnonzero(anew) - 1]).all()


def test_an_edited_turn_repeats_the_prompt_up_to_the_question_that_it_takes_back():
    group = dataclasses.replace(classes.CHAT, turns=GeometricTurns(12.0, 20), edited=0.5)
    rows = draw(group, np.arange(50.0), 1e9)
    parent = rows.parent
    before = np.where(parent >= 0, rows.input_tokens[parent], 0)
    edited = (parent >= 0) & (rows.repeated < before // 64)
    assert edited[rows.turn > 1].mean() == pytest.approx(0.5, abs=0.1)
    assert not edited[rows.turn == 1].any(), "the first question stays"
    # Once more by hand: a turn's own text is its prompt without what stood before it.
    text, kept = dict.fromkeys(np.flatnonzero(parent < 0).tolist()), {}
    for row in np.flatnonzero(parent >= 0).tolist():
        last = parent[row]
        kept[row] = rows.input_tokens[last] - text[last] if edited[row] else before[row] + rows.output_tokens[last]
        text[row] = rows.input_tokens[row] - kept[row]
        assert text[row] > 0
        if edited[row]:
            assert rows.repeated[row] == min(kept[row] // 64, before[row] // 64 - 1)


# --- patterns


def start_counts(pattern, rate_per_s, span_s, bin_s, seed=0, classes=1):
    rng = np.random.default_rng(seed)
    pieces = pattern.pieces(classes, rng, 0.0, span_s)
    return [np.histogram(draw_starts_s(own, rate_per_s, rng), int(span_s / bin_s), (0.0, span_s))[0] for own in pieces]


def test_steady_classes_share_the_load_equally():
    first, second = start_counts(Steady(), 2.0, 50_000.0, 50_000.0, classes=2)
    assert (first[0], second[0]) == pytest.approx((50_000, 50_000), rel=0.02)


def test_bursts_have_the_index_of_dispersion_of_the_azure_code_trace():
    bursts = Bursts(low=1.02, high=8.77, burst_s=60.0, calm_s=240.0)
    assert bursts.index_of_dispersion(2.57, 60.0) == pytest.approx(155, rel=0.02)
    (counts,) = start_counts(bursts, 2.57, 3_000_000.0, 60.0)
    assert counts.mean() / 60.0 == pytest.approx(2.57, rel=0.03)
    assert counts.var() / counts.mean() == pytest.approx(155, rel=0.05)


def test_a_trend_ends_at_the_full_rate_and_drifts_from_one_class_to_the_other():
    first, second = start_counts(Trend(growth=(4.0,)), 50.0, 6000.0, 600.0, classes=2)
    total = first + second
    assert total[-1] / total[0] == pytest.approx(4.0**0.9, rel=0.05)
    share = second / total
    assert sorted((share[0], share[-1])) == pytest.approx([0.23, 0.77], abs=0.02)


def test_a_diurnal_day_has_its_peak_at_the_full_rate():
    (counts,) = start_counts(Diurnal(amplitude=0.5, day_s=1000.0), 100.0, 3000.0, 50.0)
    assert counts.max() / 50.0 == pytest.approx(100.0, rel=0.05)
    assert counts.max() / counts.min() == pytest.approx(3.0, rel=0.1)


def test_mix_bursts_and_phases_let_one_class_alone_arrive_at_a_time():
    for pattern in (MixBursts(30.0, 120.0, 100.0), Phases(30.0, 60.0)):
        pieces = pattern.pieces(2, np.random.default_rng(1), 0.0, 5000.0)
        merged = sorted(piece for own in pieces for piece in own)
        assert merged[0][0] == 0.0 and merged[-1][1] == 5000.0
        assert all(before[1] == after[0] for before, after in itertools.pairwise(merged))


def test_the_schedule_of_phases_is_that_of_the_traffic():
    schedule = phase_schedule("shift-documents", 10_000, 1800.0)
    trace = generate("shift-documents", 10_000, {"short-chat": 20.0, "documents": 2.0}, 1.0, 300.0, 1500.0)
    assert schedule[0][0] == 0.0 and schedule[-1][1] == 1800.0
    brings_document = (trace.h_ref < 0) & (trace.input_tokens > 8000)
    chat = [(begin, end) for begin, end, group in schedule if group == 0]
    begun = trace.arrival_s[brings_document]
    # Documents are asked about long after their phase, but first asked about within it.
    inside = sum(((begun >= begin + 60.0) & (begun < end - 60.0)).sum() for begin, end in chat)
    assert inside < 0.25 * len(begun)


def test_documents_and_swarms_are_classes_of_their_own():
    assert isinstance(CLASSES["documents"], DocumentClass) and isinstance(CLASSES["swarm"], SwarmClass)
    assert len(SESSIONS) == len(CLASSES) - 2
