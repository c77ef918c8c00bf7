"""Traces made of traces: what survives merging, concatenating, scaling and thinning, and the commands."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbmgym.envs.traces.__main__ import main
from hbmgym.envs.traces.classes import CHAT, SWARM
from hbmgym.envs.traces.coding import no_ids
from hbmgym.envs.traces.combine import concatenate, cut, merge, scale, thin
from hbmgym.envs.traces.compose import compose, compose_generated
from hbmgym.envs.traces.episode import LOOPS
from hbmgym.envs.traces.formats.compact import compact_bytes
from hbmgym.envs.traces.load import load_trace
from hbmgym.envs.traces.precedence import gaps_s, needs
from hbmgym.envs.traces.reuse import found_tokens
from hbmgym.envs.traces.scenarios import generate_class
from hbmgym.envs.traces.trace import ID_COLUMNS, ROW_COLUMNS, TraceError

from .test_traces_compose import clocked, library, make

FAST = settings(max_examples=40, deadline=None)
SEEDS = st.integers(0, 2**32 - 1)
LOADS = st.floats(0.05, 20.0)
CLOCKED = ("open-loop", "generated")


def small(seed: int, kind: str = "open-loop", tag: int = 0, ids: bool = True):
    """Up to nine sessions, some of them sub-agents of others or of sub-agents, some rows in none; `output_tokens` are
    unique and more than `tag`, so that rows can be told apart wherever they go."""
    rng = np.random.default_rng(seed)
    starter, source, rows = [], [], []
    for session in range(rng.integers(1, 10)):
        above = int(rng.integers(session)) if session and rng.random() < 0.5 else -1
        begin_s = rng.uniform(0.0, 50.0) if above < 0 else rng.choice([row[0] for row in rows if row[1] == above]) + 0.5
        prompt = [0, 1, 10 + (above if above >= 0 else session), 1000 * (session + 1)]
        starter.append(above)
        source.append(session if above < 0 else source[above])
        for turn in range(rng.integers(1, 5)):
            rows.append((begin_s, session, turn, prompt))
            begin_s += rng.uniform(0.4, 30.0)
            prompt = [*prompt, 1000 * (session + 1) + turn + 1]
    if kind != "session-library":
        rows += [(rng.uniform(0.0, 99.0), -1, 0, [0, 500_000 + n]) for n in range(rng.integers(3))]
        rows.sort(key=lambda row: row[0])
    place = {(session, turn): n for n, (_, session, turn, _) in enumerate(rows)}
    parent = [place[s, t - 1] if s >= 0 and t else -1 for _, s, t, _ in rows]
    known = rng.random(len(rows)) < 0.5
    trace = make(
        [row[0] for row in rows],
        [row[3] for row in rows],
        [row[1] for row in rows],
        parent,
        kind="open-loop" if kind == "generated" else kind,
        turn=np.array([row[2] for row in rows]),
        gap_s=np.where(known & (np.array(parent) >= 0), rng.uniform(0.0, 20.0, len(rows)), np.nan),
        output_tokens=tag + 1 + rng.permutation(len(rows)),
        service_s=np.where(rng.random(len(rows)) < 0.5, rng.uniform(0.1, 3.0, len(rows)), np.nan),
        s_source_id=np.array(source),
        s_parent_session=np.array(starter),
    )
    trace = replace(trace, name=f"small-{tag}")
    if kind == "generated":
        trace = replace(trace, trace_kind="generated", span_s=float(trace.arrival_s[-1]) + 1.0)
    return trace if ids else replace(trace, block_size=0, **no_ids(len(trace)))


def tags(trace):
    return trace.output_tokens.tolist()


def by_tag(trace, values):
    return dict(zip(tags(trace), np.asarray(values).tolist(), strict=True))


def links(trace, before, after):
    return {(tags(trace)[one], tags(trace)[other]) for one, other in zip(before, after, strict=True)}


def waits(trace):
    return links(trace, *needs(trace))


def parents(trace):
    rows = np.flatnonzero(trace.parent >= 0)
    return links(trace, trace.parent[rows], rows)


def sharing(trace, of=None):
    """For every row the ids of its prompt, each named by the rows (all, or those `of` tags) that hold it."""
    held = {tag: trace.blocks(row).tolist() for row, tag in enumerate(tags(trace)) if of is None or tag in of}
    holders = {}
    for tag, ids in held.items():
        for block in ids:
            holders.setdefault(block, set()).add(tag)
    return {tag: [sorted(holders[block]) for block in ids] for tag, ids in held.items()}


def assert_same(one, other):
    assert (one.trace_kind, one.block_size, one.span_s) == (other.trace_kind, other.block_size, other.span_s)
    for name in (*ROW_COLUMNS, *ID_COLUMNS, "s_source_id", "s_parent_session"):
        first, second = getattr(one, name), getattr(other, name)
        assert (first is None) == (second is None), name
        if first is not None:
            assert first.dtype == second.dtype and first.tobytes() == second.tobytes(), name


def assert_reads_back(trace, tmp_path_factory):
    """Through a file, which checks it as it checks any other."""
    if trace.trace_kind == "generated":
        trace = replace(trace, trace_kind="open-loop", span_s=None)
    path = tmp_path_factory.mktemp("combined") / "a.npz"
    path.write_bytes(compact_bytes(trace))
    assert_same(load_trace(path), trace)


# --- merge and concatenate


@FAST
@given(SEEDS, st.sampled_from(["open-loop", "generated", "session-library"]), st.integers(2, 4), st.data())
def test_a_merged_trace_holds_all_rows_and_links_and_no_more_sharing(tmp_path_factory, seed, kind, count, data):
    traces = [small(seed + n, kind, 1000 * n) for n in range(count)]
    merged = merge(traces)
    assert_same(merge(data.draw(st.permutations(traces))), merged)
    assert_reads_back(merged, tmp_path_factory)
    assert len(merged) == sum(map(len, traces))
    for fact in (waits, parents):
        assert fact(merged) == set.union(*map(fact, traces))
    assert sharing(merged) == {tag: ids for trace in traces for tag, ids in sharing(trace).items()}
    for name in ("arrival_s", "input_tokens", "turn"):
        assert by_tag(merged, getattr(merged, name)) == {
            tag: value for trace in traces for tag, value in by_tag(trace, getattr(trace, name)).items()
        }
    sessions = [set(merged.session_id[np.isin(merged.output_tokens, trace.output_tokens)]) - {-1} for trace in traces]
    assert sum(map(len, sessions)) == len(set.union(*sessions))
    assert merged.span_s == (max(trace.span_s for trace in traces) if kind == "generated" else None)
    if kind == "session-library":
        assert len(np.unique(merged.s_source_id[merged.session_id])) == sum(
            len(np.unique(trace.s_source_id[trace.session_id])) for trace in traces
        )


@FAST
@given(SEEDS, st.sampled_from(CLOCKED), st.integers(2, 4))
def test_concatenated_traces_follow_one_another_with_all_that_they_hold(tmp_path_factory, seed, kind, count):
    traces = [small(seed + n, kind, 1000 * n) for n in range(count)]
    joined = concatenate(traces)
    assert_reads_back(joined, tmp_path_factory)
    begin_s = 0.0
    for number, trace in enumerate(traces):
        own = joined.output_tokens // 1000 == number
        first_s = trace.arrival_s[0] if kind == "open-loop" else 0.0
        assert np.allclose(joined.arrival_s[own] - begin_s, trace.arrival_s - first_s)
        begin_s += trace.end_s - first_s
    assert (np.diff(joined.output_tokens // 1000) >= 0).all()
    assert len(joined) == sum(map(len, traces))
    assert parents(joined) == set.union(*map(parents, traces))
    assert {pair for pair in waits(joined) if pair[0] // 1000 == pair[1] // 1000} == waits(joined)
    assert waits(joined) == set.union(*map(waits, traces))
    assert sharing(joined) == {tag: ids for trace in traces for tag, ids in sharing(trace).items()}
    if kind == "generated":
        assert joined.span_s == pytest.approx(sum(trace.span_s for trace in traces))


@pytest.mark.parametrize("join", [merge, concatenate])
def test_a_file_and_its_pieces_share_their_ids_but_no_session(join):
    trace = small(3)
    pieces = [trace, thin(trace, 0.6, 1), scale(trace, 2.0)]
    assert 0 < len(pieces[1]) < len(trace)
    joined = join(pieces)
    held = {}
    for row, tag in enumerate(tags(joined)):
        held.setdefault(tag, []).append(joined.blocks(row).tolist())
    assert all(ids == several[0] for several in held.values() for ids in several)
    assert {len(several) for several in held.values()} == {2, 3}
    assert len(np.unique(joined.session_id)) == sum(len(np.unique(piece.session_id)) for piece in pieces) - 2 * (
        -1 in trace.session_id
    )


def test_rows_without_ids_share_nothing_whatever_they_are_merged_with():
    plain, coded = small(1, ids=False), small(2, tag=1000)
    merged = merge([plain, plain, coded])
    assert merged.block_size == coded.block_size
    of_plain = np.flatnonzero(merged.output_tokens <= 1000)
    ids = np.concatenate([merged.blocks(int(row)) for row in of_plain])
    assert len(of_plain) == 2 * len(plain) and len(np.unique(ids)) == len(ids)
    assert sharing(merged, set(tags(coded))) == sharing(coded)
    assert merge([plain, plain]).block_size == 0


def test_rounded_arrivals_are_spread_before_nobody_can_see_it_any_more():
    rounded, exact = clocked(3.0), clocked()
    assert rounded.quantum_s == 3.0
    for made in (merge([rounded, exact]), concatenate([exact, rounded]), scale(rounded, 1.7), thin(rounded, 0.5)):
        steps_s = np.diff(made.arrival_s)
        assert made.quantum_s == 0.0 and (steps_s > 0.0).mean() > 0.99


def test_concatenated_recordings_shift_from_one_to_the_other():
    chat, agent = (generate_class(group, 1, 0.5, 60.0, 540.0) for group in (CHAT, SWARM))
    joined = concatenate([chat, agent])
    assert joined.span_s == 1200.0
    means = [joined.input_tokens[(joined.arrival_s >= at) & (joined.arrival_s < at + 600.0)].mean() for at in (0, 600)]
    assert means == [pytest.approx(trace.input_tokens.mean()) for trace in (chat, agent)]


@pytest.mark.parametrize("loop", LOOPS)
def test_combined_swarms_are_episodes(loop):
    """Chat and swarms merged, half of that, at 1.5 times the rate, after swarms alone: links still close the loop."""
    chat, swarm = (generate_class(group, 1, rate, 60.0, 900.0) for group, rate in ((CHAT, 4.0), (SWARM, 0.8)))
    trace = concatenate([swarm, scale(thin(merge([chat, swarm]), 0.5, 2), 1.5)])
    assert trace.span_s == pytest.approx(960.0 * (1 + 1 / 1.5))
    episode = compose_generated(trace, seed=0, page_tokens=64, warmup_s=60.0, loop=loop)
    rows, agent = episode.rows, trace.s_parent_session[trace.session_id] >= 0
    before, after = episode.needs
    joins = np.unique(after[agent[before] & ~agent[after]])
    assert (rows["needs"][joins] > 1).any() and agent.sum() > 200
    assert (rows["arrival_s"][joins] > trace.span_s / 2).any()
    assert found_tokens(trace).sum() / trace.input_tokens.sum() > 0.5


# --- scale


@FAST
@given(SEEDS, st.sampled_from(CLOCKED), LOADS)
def test_a_scaled_trace_is_the_same_on_a_faster_clock(tmp_path_factory, seed, kind, load):
    trace = small(seed, kind)
    scaled = scale(trace, load)
    assert_reads_back(scaled, tmp_path_factory)
    assert np.allclose(scaled.arrival_s * load, trace.arrival_s)
    for name in ("input_tokens", "output_tokens", "parent", "session_id", "turn", *ID_COLUMNS):
        assert np.array_equal(getattr(scaled, name), getattr(trace, name)), name
    assert scaled.span_s == (None if kind == "open-loop" else trace.span_s / load)
    _before, after = needs(trace)
    assert waits(scaled) == waits(trace)
    turns = (np.bincount(after, minlength=len(trace)) == 1) & (trace.parent >= 0)
    assert np.allclose(gaps_s(scaled)[turns], gaps_s(trace)[turns], atol=1e-4)


@pytest.mark.parametrize("load", [0.7, 3.0])
@pytest.mark.parametrize("loop", LOOPS)
def test_a_scaled_trace_is_what_load_makes_of_it(loop, load):
    trace = clocked()
    arguments = {"part": "all", "seed": 5, "page_tokens": 8, "loop": loop}
    played, scaled = compose(trace, load=load, **arguments), compose(scale(trace, load), **arguments)
    assert len(played.rows) > 300
    for field in played.rows.dtype.names:
        assert np.allclose(played.rows[field], scaled.rows[field], rtol=1e-5), field
    assert np.array_equal(played.refs, scaled.refs)


def test_scaling_by_1_and_keeping_all_change_nothing():
    for trace in (small(1), clocked(3.0), small(2, "generated")):
        assert_same(scale(trace, 1.0), trace)
        assert_same(thin(trace, 1.0, 7), trace)
    assert_same(thin(library(), 1.0), library())


# --- thin


@FAST
@given(SEEDS, st.sampled_from(["open-loop", "generated", "session-library"]), st.floats(0.1, 1.0), SEEDS)
def test_a_thinned_trace_keeps_whole_sessions_with_their_sub_agents(tmp_path_factory, seed, kind, keep, draw):
    trace = small(seed, kind)
    try:
        thinned = thin(trace, keep, draw)
    except TraceError as error:
        assert "sessions is left at keep" in str(error)
        return
    assert_reads_back(thinned, tmp_path_factory)
    kept = set(tags(thinned))
    assert_same(thin(trace, keep, draw), thinned)
    for one, other in waits(trace) | parents(trace):
        assert (one in kept) == (other in kept)
    roots = trace.s_source_id[trace.session_id]
    for root in set(roots[trace.session_id >= 0]):
        assert (
            len({tag in kept for tag in trace.output_tokens[(roots == root) & (trace.session_id >= 0)].tolist()}) == 1
        )
    assert waits(thinned) == {pair for pair in waits(trace) if pair[0] in kept}
    assert parents(thinned) == {pair for pair in parents(trace) if pair[0] in kept}
    assert sharing(thinned) == sharing(trace, kept)
    assert thinned.span_s == trace.span_s
    both = np.isin(trace.output_tokens, thinned.output_tokens)
    for name in ("arrival_s", "input_tokens", "gap_s", "session_id"):
        assert np.array_equal(getattr(thinned, name), getattr(trace, name)[both], equal_nan=True), name
    assert kept <= set(tags(thin(trace, (1.0 + keep) / 2.0, draw))), "more of the same draw"


@pytest.mark.parametrize("keep", [0.2, 0.7])
def test_as_many_sessions_stay_as_asked_for(keep):
    trace = library(2000)
    counts = [len(thin(trace, keep, seed)) / len(trace) for seed in range(5)]
    assert counts == pytest.approx([keep] * 5, abs=4 * (keep * (1 - keep) / 2000) ** 0.5)
    assert len(set(counts)) > 1


# --- what is refused, and the commands


@pytest.mark.parametrize(
    ("make_it", "said"),
    [
        (lambda: merge([small(1)]), "merge takes at least 2 traces, not 1"),
        (lambda: concatenate([]), "concatenate takes at least 2 traces, not 0"),
        (lambda: merge([small(1), library()]), "cannot merge: made is session-library, but small-0 is open-loop"),
        (lambda: concatenate([small(1), small(1, "generated")]), "cannot concatenate: small-0 is generated"),
        (lambda: merge([small(1), replace(small(2), block_size=16)]), "has ids of 16 tokens, but small-0 has ids of 8"),
        (lambda: concatenate([library(), library()]), "made: cannot concatenate a session library: it has no clock"),
        (lambda: scale(library(), 2.0), "made: cannot scale a session library: it has no clock"),
        (lambda: scale(small(1), 0.0), "load is 0.0, expected a finite number > 0"),
        (lambda: scale(small(1), float("nan")), "load is nan"),
        (lambda: thin(small(1), 0.0), "keep is 0.0, expected a number > 0 and <= 1"),
        (lambda: thin(small(1), float("nan")), "keep is nan"),
        (lambda: thin(small(1), 0.5, -1), "seed is -1, expected an integer >= 0"),
        (lambda: thin(library(), 1e-9), "made: none of 30 sessions is left at keep 1e-09"),
    ],
)
def test_what_cannot_be_combined_is_refused_in_one_line(make_it, said):
    with pytest.raises(TraceError, match=said) as refusal:
        make_it()
    assert "\n" not in str(refusal.value)


def save(path, trace):
    path.write_bytes(compact_bytes(trace))
    return str(path)


def test_the_commands_write_what_the_functions_make(tmp_path, capsys):
    a, b = small(1), small(2, tag=1000)
    first, second = save(tmp_path / "a.npz", a), save(tmp_path / "b.npz", b)
    for arguments, expected in (
        (("merge", second, first), merge([a, b])),
        (("concatenate", first, second), concatenate([a, b])),
        (("scale", first, "--load", "2.5"), scale(a, 2.5)),
        (("thin", first, "--keep", "0.5", "--seed", "3"), thin(a, 0.5, 3)),
    ):
        out = tmp_path / f"{arguments[0]}.npz"
        main([*arguments, "--out", str(out)])
        made = load_trace(out)
        assert_same(made, expected)
        assert made.name == arguments[0], "tables call it by its file"
        assert capsys.readouterr().out == f"{out}: {len(expected):,} rows\n"


def test_pieces_of_a_file_know_it_through_files(tmp_path):
    path = save(tmp_path / "a.npz", small(1))
    for seed, name in ((0, "b.npz"), (1, "c.npz")):
        main(["thin", path, "--keep", "0.7", "--seed", str(seed), "--out", str(tmp_path / name)])
    main(["merge", *(str(tmp_path / name) for name in ("b.npz", "c.npz")), "--out", str(tmp_path / "d.npz")])
    merged, own = load_trace(tmp_path / "d.npz"), small(1)
    heads = {int(merged.blocks(row)[0]) for row in range(len(merged))}
    assert len(heads) == len({int(own.blocks(row)[0]) for row in range(len(own))}) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("merge", "a.npz", "--out", "b.npz"), "merge takes at least 2 traces, not 1"),
        (("merge", "a.npz", "nowhere", "--out", "b.npz"), "nowhere: cannot be read: No such file"),
        (("merge", "a.npz", "a.npz"), "--out is missing, expected the name of a new file"),
        (("concatenate", "a.npz", "a.npz", "--out", "a.npz"), "a.npz exists, expected the name of a new file"),
        (("concatenate", "a.npz", "lib.npz", "--out", "b.npz"), "lib is session-library, but a is open-loop"),
        (("scale", "lib.npz", "--load", "2", "--out", "b.npz"), "lib: cannot scale a session library"),
        (("scale", "a.npz", "--load", "-1", "--out", "b.npz"), "load is -1.0, expected a finite number > 0"),
        (("scale", "a.npz", "--load", "1e-300", "--out", "b.npz"), "a:row 0: arrival_s is"),
        (("scale", "a.npz", "--load", "fast", "--out", "b.npz"), "argument --load: invalid float value: 'fast'"),
        (("scale", "a.npz", "a.npz", "--out", "b.npz"), "scale takes one PATH, not 2"),
        (("thin", "a.npz", "--keep", "2", "--out", "b.npz"), "keep is 2.0, expected a number > 0 and <= 1"),
        (("thin", "a.npz", "--keep", "0.5", "--out", "nowhere/b.npz"), "its folder does not exist"),
        (("thin", "broken", "--keep", "0.5", "--out", "b.npz"), "broken: the file is empty"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "a.npz", replace(small(1), name="a"))
    save(tmp_path / "lib.npz", replace(library(), name="lib"))
    (tmp_path / "broken").write_text("")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(SystemExit) as leaving:
        main(list(arguments))
    printed = capsys.readouterr()
    assert leaving.value.code == 2
    assert said in printed.err and printed.err.count("\n") == 1 and printed.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == before, "nothing is left half-written"


def test_a_file_that_says_its_ids_are_from_nowhere_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    with np.load(save(path, small(1))) as archive:
        columns = dict(archive)
    meta = json.loads(str(columns.pop("meta"))) | {"id_file": 7}
    np.savez(path, meta=np.array(json.dumps(meta)), **columns)
    with pytest.raises(TraceError, match="meta id_file is 7, expected a text"):
        load_trace(path)


@FAST
@given(SEEDS, st.floats(0.0, 60.0), st.floats(0.1, 60.0))
def test_a_cut_keeps_what_arrives_in_it_as_it_was(seed, from_s, length_s):
    trace = small(seed)
    since_s = trace.arrival_s - trace.arrival_s[0]
    kept = np.flatnonzero((since_s >= from_s) & (since_s < from_s + length_s))
    if not len(kept):
        with pytest.raises(TraceError, match="nothing arrives"):
            cut(trace, from_s, from_s + length_s)
        return
    found = cut(trace, from_s, from_s + length_s)
    for name in ("arrival_s", "input_tokens", "output_tokens"):
        assert (getattr(found, name) == getattr(trace, name)[kept]).all()
    whole = {tuple(trace.blocks(int(row)).tolist()) for row in kept}
    assert {tuple(found.blocks(row).tolist()) for row in range(len(found))} == whole, "ids stay, so what is shared does"
    parents = trace.parent[kept]
    assert ((found.parent >= 0) <= (parents >= 0)).all()


def test_a_cut_of_everything_is_the_trace():
    trace = small(1)
    found = cut(trace, 0.0, float("inf"))
    assert (found.digest, found.id_file) == (trace.digest, trace.file_digest)


@pytest.mark.parametrize(("from_s", "to_s"), [(5.0, 5.0), (9.0, 1.0), (float("nan"), 1.0)])
def test_a_stretch_of_no_length_is_refused(from_s, to_s):
    with pytest.raises(TraceError, match="expected an end after the start"):
        cut(small(1), from_s, to_s)


def test_a_session_library_cannot_be_cut():
    with pytest.raises(TraceError, match="cannot cut a session library"):
        cut(small(1, kind="session-library"), 0.0, 1.0)


def test_the_command_cuts(tmp_path, capsys):
    source, out = tmp_path / "whole.npz", tmp_path / "part.npz"
    trace = small(3)
    source.write_bytes(compact_bytes(trace))
    main(["cut", str(source), "--from-s", "0", "--to-s", "20", "--out", str(out)])
    assert f"{len(load_trace(out)):,} rows" in capsys.readouterr().out
    assert len(load_trace(out)) == int((trace.arrival_s - trace.arrival_s[0] < 20.0).sum())
