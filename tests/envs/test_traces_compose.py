"""Composition: splits, seeds, warm-up, load, jitter, session libraries."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from hbmgym.envs.traces.coding import encode
from hbmgym.envs.traces.compose import compose
from hbmgym.envs.traces.load import load_trace
from hbmgym.envs.traces.seeds import SeedError, part_of_seed, seeds_for
from hbmgym.envs.traces.split import families, part_bounds, sources, split
from hbmgym.envs.traces.trace import TraceError
from hbmgym.envs.traces.validate import build_trace

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "traces" / "train"
FIRST_SEED = {"train": 0, "validation": 10_000, "test": 11_000, "all": 5}


def make(arrival_s, ids, session, parent, kind="open-loop", clock="", **more):
    rows = len(arrival_s)
    columns = {
        "arrival_s": np.array(arrival_s, float),
        "input_tokens": np.array([8 * len(row) for row in ids]),
        "output_tokens": np.full(rows, 4),
        "session_id": np.array(session),
        "turn": np.zeros(rows, int),
        "parent": np.array(parent),
        "gap_s": np.full(rows, np.nan),
        "service_s": np.full(rows, np.nan),
        "kind": np.zeros(rows, int),
        **encode(ids),
        **more,
    }
    where = "made:{}".format
    return build_trace(columns, name="made", kind=kind, block_size=8, path="made", where=where, clock=clock)


def clocked(step_s=None, rows=3000, span_s=3000.0):
    """Sessions of three turns, interleaved; with `step_s` arrivals are rounded down to buckets."""
    arrival_s = np.sort(np.random.default_rng(1).uniform(0, span_s, rows))
    if step_s:
        # Every third row is off by a millisecond, as published buckets are.
        arrival_s = np.maximum(0.0, np.floor(arrival_s / step_s) * step_s - 0.001 * (np.arange(rows) % 3 == 0))
        arrival_s.sort()
    session = np.arange(rows) % 50 + 50 * (np.arange(rows) // 150)
    turn = np.arange(rows) % 150 // 50
    ids = [[1000 * s + j for j in range(2 + 2 * t)] for s, t in zip(session, turn, strict=True)]
    parent = np.where(turn > 0, np.arange(rows) - 50, -1)
    clock = "Mooncake" if step_s else ""
    return make(arrival_s, ids, session, parent, clock=clock, output_tokens=np.arange(1, rows + 1))


def library(sessions=30, families_of=1):
    """Sessions of four turns, 100 s apart but for one idle hour; neighbours may share half of their ids."""
    arrival, ids, session, parent = [], [], [], []
    for s in range(sessions):
        for turn, offset in enumerate((0.0, 100.0, 3700.0, 3800.0)):
            stem = [10**6 + 100 * (s // families_of) + j for j in range(4)] if families_of > 1 else []
            ids.append(stem + [100 * s + j for j in range(2 + turn)])
            arrival.append(offset)
            session.append(s)
            parent.append(len(arrival) - 2 if turn else -1)
    return make(arrival, ids, session, parent, kind="session-library")


def recording(*agents: tuple[float, ...], main=(0.0, 50.0, 90.0, 800.0), **columns):
    """A recording of a session with rows at `main` and of its sub-agents with theirs; every row is served for .3 s."""
    sessions = [main, *agents]
    session = np.repeat(np.arange(len(sessions)), [len(times) for times in sessions])
    parent = np.where(np.diff(session, prepend=-1) == 0, np.arange(len(session)) - 1, -1)
    return make(
        np.concatenate(sessions),
        [[row] for row in range(len(session))],
        session,
        parent,
        kind="session-library",
        s_source_id=np.full(len(sessions), 7),
        s_parent_session=np.array([-1] + [0] * len(agents)),
        **columns,
    )


def check_causal(episode):
    rows = episode.rows
    before, after = episode.needs
    assert (before < after).all()
    assert (rows["arrival_s"][before] <= rows["arrival_s"][after]).all()
    assert (np.diff(rows["arrival_s"]) >= 0).all()
    assert rows["arrival_s"][0] >= 0
    assert rows["arrival_s"][-1] < episode.horizon_s
    assert ((rows["arrival_s"] >= episode.warmup_s) == rows["measured"]).all()
    ends = rows["ref_off"] + rows["known_ids"]
    assert ends.max(initial=0) <= len(episode.refs)
    assert np.unique(episode.refs).tolist() == list(range(episode.id_count))


def same(one, other):
    return np.array_equal(one.rows, other.rows) and np.array_equal(one.refs, other.refs)


@pytest.mark.parametrize("part", ["train", "validation", "test", "all"])
@pytest.mark.parametrize("step_s", [None, 3.0])
def test_clocked_episode_is_causal_and_repeatable(part, step_s):
    trace = clocked(step_s)
    seed = FIRST_SEED[part]
    episode = compose(trace, part=part, seed=seed, page_tokens=8)
    check_causal(episode)
    assert same(episode, compose(trace, part=part, seed=seed, page_tokens=8))
    assert not same(episode, compose(trace, part=part, seed=seed + 1, page_tokens=8))


@pytest.mark.parametrize("make_trace", [clocked, lambda: clocked(3.0), library, lambda: library(30, 3)])
def test_parts_are_disjoint_and_complete(make_trace):
    trace = make_trace()
    parts = [split(trace, part) for part in ("train", "validation", "test")]
    assert np.sort(np.concatenate(parts)).tolist() == split(trace, "all").tolist() == list(range(len(trace)))
    assert [len(rows) / len(trace) for rows in parts] == pytest.approx([0.6, 0.2, 0.2], abs=0.05)


@pytest.mark.parametrize("part", ["train", "validation", "test"])
@pytest.mark.parametrize("step_s", [None, 3.0])
def test_measured_rows_belong_to_the_part_and_warm_up_lies_before_it(part, step_s):
    trace = clocked(step_s)
    for seed in range(FIRST_SEED[part], FIRST_SEED[part] + 20):
        rows = compose(trace, part=part, seed=seed, page_tokens=8).rows
        number = rows["output_tokens"] - 1
        assert np.isin(number[rows["measured"] == 1], split(trace, part)).all()
        assert number.tolist() == list(range(number[0], split(trace, part)[-1] + 1))


def test_measured_part_is_the_slice_but_for_the_start_offset():
    trace = clocked()
    start_s, end_s = part_bounds(trace, "test")
    episode = compose(trace, part="test", seed=11_003, page_tokens=8)
    measured_s = episode.horizon_s - episode.warmup_s
    assert episode.warmup_s == pytest.approx(300.0)
    assert 0.9 * (end_s - start_s) <= measured_s <= end_s - start_s
    assert episode.rows["measured"].sum() <= len(split(trace, "test"))
    # The episode ends where the slice ends, whatever the seed.
    shift_s = end_s - episode.horizon_s
    assert np.isin(np.round(episode.rows["arrival_s"] + shift_s, 6), np.round(trace.arrival_s, 6)).all()
    assert episode.rows["arrival_s"][0] < 5.0


def test_first_part_warms_up_inside_itself():
    trace = clocked()
    start_s, end_s = part_bounds(trace, "train")
    episode = compose(trace, part="train", seed=0, page_tokens=8, warmup_s=200.0)
    assert episode.warmup_s == 200.0
    assert episode.horizon_s <= end_s - start_s
    assert (episode.rows["measured"] == 0).any()


def test_load_divides_arrival_times_and_keeps_the_order():
    trace = clocked()
    slow = compose(trace, part="all", seed=1, page_tokens=8, warmup_s=0.0)
    fast = compose(trace, part="all", seed=1, page_tokens=8, warmup_s=0.0, load=2.0)
    assert np.allclose(slow.rows["arrival_s"], 2.0 * fast.rows["arrival_s"])
    assert np.array_equal(slow.needs, fast.needs)
    assert fast.rate_per_s == pytest.approx(2.0 * slow.rate_per_s)


def test_too_short_a_part_names_numbers_and_remedy():
    with pytest.raises(TraceError, match=r"'test' measures 180 s at load 3, expected at least 300 s \(load <= 1.8"):
        compose(clocked(), part="test", seed=11_000, page_tokens=8, load=3.0)


@pytest.mark.parametrize("load", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_load_is_refused(load):
    with pytest.raises(TraceError, match="load is"):
        compose(clocked(), part="all", seed=0, page_tokens=8, load=load)


def test_jitter_removes_ties_and_depends_on_the_seed():
    trace = clocked(3.0)
    one, other = (compose(trace, part="train", seed=seed, page_tokens=8).rows["arrival_s"] for seed in (0, 1))
    assert len(np.unique(one)) == len(one)
    assert not np.isin(one, other).any()


@pytest.mark.parametrize("part", ["train", "validation", "test", "all"])
def test_library_episode_is_causal_and_repeatable(part):
    trace = library()
    seed = FIRST_SEED[part]
    episode = compose(trace, part=part, seed=seed, page_tokens=8)
    check_causal(episode)
    assert same(episode, compose(trace, part=part, seed=seed, page_tokens=8))
    assert (episode.warmup_s, episode.horizon_s) == (300.0, 2100.0)


def test_the_classes_of_recorded_rows_are_their_kinds():
    trace = dataclasses.replace(library(), kind=(np.arange(len(library())) % 3).astype(np.uint8))
    episode = compose(trace, part="all", seed=5, page_tokens=8)
    followed = np.flatnonzero(episode.rows["needs"])
    assert set(episode.traffic_class[followed].tolist()) == {0, 1, 2}
    assert len(episode.traffic_class) == len(episode.rows)


def test_library_clips_idle_gaps_and_scales_starts_with_load():
    episode = compose(library(), part="all", seed=5, page_tokens=8)
    before, after = episode.needs
    waits = episode.rows["arrival_s"][after] - episode.rows["arrival_s"][before]
    assert np.unique(np.round(waits, 3)).tolist() == [100.0, 600.3]
    starts = [(compose(library(), part="all", seed=5, page_tokens=8, load=x).rows["needs"] == 0).sum() for x in (1, 8)]
    assert starts[1] > 4 * starts[0]


def test_repeated_sessions_share_nothing_with_their_first_play():
    episode = compose(library(6), part="all", seed=5, page_tokens=8, load=10.0)
    first = episode.rows["needs"] == 0
    heads = episode.refs[episode.rows["ref_off"][first]]
    assert len(heads) > 6
    assert len(np.unique(heads)) == len(heads)


def test_families_stay_together():
    trace = library(30, 3)
    assert families(trace) == [[3 * n, 3 * n + 1, 3 * n + 2] for n in range(10)]
    parts = {part: set(sources(trace)[split(trace, part)].tolist()) for part in ("train", "validation", "test")}
    for family in families(trace):
        assert sum(set(family) <= members for members in parts.values()) == 1


def test_library_part_without_sources_is_refused():
    with pytest.raises(TraceError, match="part 'test' has 0 sources"):
        compose(library(1), part="test", seed=11_000, page_tokens=8)


def test_seed_ranges_are_enforced():
    assert [part_of_seed(seed) for seed in (0, 9_999, 10_000, 11_999, 12_000)] == [
        "train", "train", "validation", "test", "final",
    ]  # fmt: skip
    assert seeds_for("test", 3) == [11_000, 11_001, 11_002]
    with pytest.raises(SeedError, match=r"1001 seeds of part 'test' were asked for, expected 0..1000"):
        seeds_for("test", 1001)
    with pytest.raises(SeedError, match="part is 'all'"):
        seeds_for("all", 1)
    with pytest.raises(SeedError, match="seed is -1"):
        part_of_seed(-1)
    for part, seed in (("train", 10_000), ("test", 12_000), ("validation", 0), ("all", 12_000)):
        with pytest.raises(SeedError, match=f"seed is {seed}"):
            compose(clocked(), part=part, seed=seed, page_tokens=8)


def test_recorded_traces_have_no_final_part():
    for trace in (clocked(), library()):
        with pytest.raises(TraceError, match="part is 'final'"):
            compose(trace, part="final", seed=12_000, page_tokens=8)


PUBLIC = ["agentic_claude_code_weka", "mooncake_conversation", "azure2023_conv", "lmcache_miniswe"]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_trace_composes(name):
    path = SHARED / f"{name}.train.npz"
    if not path.is_file():
        pytest.skip("public traces are not beside the repository")
    trace = load_trace(path)
    for part, seed in FIRST_SEED.items():
        check_causal(compose(trace, part=part, seed=seed, page_tokens=64))
