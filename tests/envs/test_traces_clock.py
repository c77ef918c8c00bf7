"""Rounded arrivals: spread where the format is known to round, by no more than that, said so, and not if not wanted."""

import json
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from hbmgym.envs.platforms import PLATFORMS
from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.traces.__main__ import main
from hbmgym.envs.traces.combine import concatenate, merge, scale, thin
from hbmgym.envs.traces.compose import compose
from hbmgym.envs.traces.formats.compact import compact_bytes
from hbmgym.envs.traces.jitter import buckets_of, spread
from hbmgym.envs.traces.load import load_trace
from hbmgym.envs.traces.regime import judge
from hbmgym.envs.traces.split import part_bounds, split
from hbmgym.envs.traces.summary import arrivals_apart
from hbmgym.envs.traces.trace import Trace, TraceError
from hbmgym.envs.workload import open_workloads
from hbmgym.eval import compare
from hbmgym.eval.opportunities.cases import cases

from ..eval.traffic import HBM_GIB, MODEL
from .test_traces_inspect import run

FAST25 = np.array([0.0, 0.0, 3.0, 5.999, 6.0, 15.0])


def polled(rows: int = 3000, seed: int = 0) -> np.ndarray:
    """Arrivals of a Poisson process as a program sees them that looks every 3,050 to 3,056 ms, milliseconds."""
    rng = np.random.default_rng(seed)
    looks_ms = np.cumsum(rng.integers(3050, 3057, rows))
    return looks_ms[np.searchsorted(looks_ms, np.sort(rng.uniform(3050, 1.5 * 1000 * rows, rows)), side="right") - 1]


def mooncake(path: Path, times_ms, **more) -> Path:
    rows = ({"timestamp": float(t), "input_length": 600, "output_length": 5} | more for t in times_ms)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def burstgpt(path: Path, times_s) -> Path:
    rows = "".join(f"{t:g},x,600,5\n" for t in times_s)
    path.write_text("Timestamp,Model,Request tokens,Response tokens\n" + rows)
    return path


def csv(path: Path, times_s) -> Path:
    path.write_text("arrival_s,input_tokens,output_tokens\n" + "".join(f"{t},2000,100\n" for t in times_s))
    return path


def notice_of(trace: Trace) -> str:
    return " ".join(notice for notice in trace.all_notices if "rounded" in notice)


# What was rounded


@pytest.mark.parametrize(
    ("arrival_s", "clock", "width_s"),
    [
        (FAST25, "Mooncake", 3.0),
        (FAST25, "", 0.0),
        (FAST25, "BurstGPT", 0.0),
        ([0, 0, 1, 2, 7], "BurstGPT", 1.0),
        ([0, 0, 1, 2, 7], "Mooncake", 0.0),
        ([0, 0, 1, 2, 7.5], "BurstGPT", 0.0),
        ([0, 1, 2, 3, 4], "BurstGPT", 0.0),
        ([0, 0, 60, 60, 120, 180], "BurstGPT", 0.0),
        ([0, 0, 60, 60, 120, 180], "Mooncake", 0.0),
        ([0, 0, 3600, 7200], "Mooncake", 0.0),
        ([0, 0, 2, 4, 8], "BurstGPT", 0.0),
        ([0, 0, 0], "Mooncake", 0.0),
        ([5], "BurstGPT", 0.0),
        ([27.482, 27.482, 30.535, 33.588, 39.694], "Mooncake", 3.05),
        ([27.482, 27.482, 30.535, 33.588, 38.0], "Mooncake", 0.0),
    ],
)
def test_only_what_a_clock_is_known_to_round_is_taken_for_rounded(arrival_s, clock, width_s):
    arrival_s = np.array(arrival_s, float)
    starts_s, found_s = buckets_of(arrival_s, clock)
    assert found_s == width_s
    assert np.abs(starts_s - arrival_s).max() <= 0.002


@pytest.mark.parametrize(("arrival_s", "width_s"), [(FAST25, 3.0), (polled() / 1e3, 3.05)])
def test_rows_are_spread_within_their_bucket_and_keep_their_order(arrival_s, width_s):
    starts_s, found_s = buckets_of(arrival_s, "Mooncake")
    times_s = spread(arrival_s, "Mooncake", np.random.default_rng(0))
    assert found_s == width_s
    assert (np.diff(times_s) > 0).all()
    assert (times_s >= starts_s).all() and (times_s <= starts_s + width_s).all()


def test_the_first_mooncake_trace_is_as_steady_as_what_its_poll_saw(tmp_path):
    trace = load_trace(mooncake(tmp_path / "a", polled()))
    assert trace.quantum_s == 3.05
    steps_s = np.diff(arrivals_apart(trace))
    assert 0.9 < steps_s.std() / steps_s.mean() < 1.1
    parts = [split(trace, part) for part in ("train", "validation", "test")]
    assert np.concatenate(parts).tolist() == split(trace, "all").tolist() == list(range(len(trace)))
    for part, rows in zip(("train", "validation", "test"), parts, strict=True):
        start_s, end_s = part_bounds(trace, part)
        for seed in range(3):
            times_s = spread(trace.arrival_s, trace.clock, np.random.default_rng(seed))
            assert np.flatnonzero((times_s >= start_s) & (times_s < end_s)).tolist() == rows.tolist()


@pytest.mark.parametrize("step_s", [1.0, 2.0, 3.0, 10.0, 60.0, 3600.0])
def test_waves_of_a_csv_stay_waves(tmp_path, step_s):
    times_s = np.repeat(step_s * np.arange(40), 5)
    trace = load_trace(csv(tmp_path / "a", times_s))
    assert (trace.quantum_s, trace.notices, notice_of(trace)) == (0.0, (), "")
    assert np.array_equal(arrivals_apart(trace), times_s)
    if step_s >= 10.0:
        episode = compose(trace, part="all", seed=0, page_tokens=16, load=0.1)
        assert np.unique(np.diff(episode.rows["arrival_s"]).round(6)).tolist() == [0.0, 10 * step_s]


# Said, and not if not wanted


def rounded(path: Path, seed: int = 0) -> Path:
    return mooncake(path, np.sort(np.random.default_rng(seed).uniform(0, 3e6, 2000)) // 3000 * 3000)


def test_the_step_and_the_rows_are_said(tmp_path):
    trace = load_trace(rounded(tmp_path / "a.jsonl"))
    how = "2,000 arrivals are rounded to 3 s: each is spread over its 3 s, in file order"
    assert notice_of(trace) == f"a: {how} (read with --no-spread they stay as recorded)"
    seconds = load_trace(burstgpt(tmp_path / "b.csv", np.arange(300) // 2))
    assert notice_of(seconds).startswith("b: 300 arrivals are rounded to 1 s: ")


def test_without_spreading_everything_is_as_recorded_and_another_trace(tmp_path):
    path = rounded(tmp_path / "a.jsonl")
    spread_apart, plain = load_trace(path), load_trace(path, spread=False)
    assert plain.quantum_s == 0.0 and notice_of(plain) == ""
    assert np.array_equal(plain.arrival_s, spread_apart.arrival_s)
    assert plain.digest != spread_apart.digest and plain.file_digest == spread_apart.file_digest
    episodes = [compose(trace, part="all", seed=0, page_tokens=16) for trace in (spread_apart, plain)]
    ties = [(np.diff(episode.rows["arrival_s"]) == 0).mean() for episode in episodes]
    assert ties[0] == 0.0 and ties[1] > 0.3


def test_a_workload_and_an_environment_are_told(tmp_path):
    path = rounded(tmp_path / "a.jsonl")
    config = ServingConfig(model=MODEL, hbm_gib=HBM_GIB)
    serving = {"model": MODEL, "hbm_gib": HBM_GIB}
    for wanted in (True, False):
        (workload,) = open_workloads(config, traces=[path], spread=wanted)
        env = gym.make("hbmgym/HbmPartition-v0", trace=str(path), spread=wanted, serving=serving)
        env.reset(seed=0)
        for rows in (workload.episode("train", 0).rows, env.unwrapped.episode.rows):
            assert (np.diff(rows["arrival_s"]) == 0).any() != wanted


@pytest.mark.parametrize("wanted", [True, False])
def test_a_case_of_the_opportunity_map_is_told(tmp_path, wanted):
    path = rounded(tmp_path / "a.jsonl")
    (case,) = cases((), (str(path),), PLATFORMS[:1], wanted)
    rows = case.workload().episode("train", 0).rows
    assert (np.diff(rows["arrival_s"]) == 0).any() != wanted


def test_convert_keeps_what_the_source_was(tmp_path, capsys):
    for name, path in {"m": rounded(tmp_path / "a"), "b": burstgpt(tmp_path / "b", np.arange(300) // 2)}.items():
        main(["convert", str(path), str(tmp_path / f"{name}.npz")])
        assert "spread over" in capsys.readouterr().err
        main(["convert", str(path), str(tmp_path / f"{name}-plain.npz"), "--no-spread"])
        assert "spread over" not in capsys.readouterr().err
        converted, plain = load_trace(tmp_path / f"{name}.npz"), load_trace(tmp_path / f"{name}-plain.npz")
        assert converted.digest == load_trace(path).digest
        assert (plain.quantum_s, plain.digest) == (0.0, load_trace(path, spread=False).digest)
        assert run("inspect", str(tmp_path / f"{name}.npz"), capsys=capsys)["notice"] == converted.all_notices[-1]


def test_a_compact_file_is_taken_as_it_is_unless_it_names_a_source_that_rounds(tmp_path):
    path = csv(tmp_path / "a", np.repeat(3.0 * np.arange(40), 5))
    trace = load_trace(path)
    (tmp_path / "b").write_bytes(compact_bytes(trace))
    assert load_trace(tmp_path / "b").quantum_s == 0.0
    with np.load(tmp_path / "b") as archive:
        members = dict(archive)
    meta = json.loads(str(members.pop("meta")))
    for source, clock, width_s in (("kvcache-ai/Mooncake@1", None, 3.0), ("x", None, 0.0), ("x", "Mooncake", 3.0)):
        changed = {key: value for key, value in meta.items() if key != "clock"} | {"source": source}
        changed |= {"clock": clock} if clock else {}
        with (tmp_path / "c").open("wb") as file:
            np.savez(file, meta=np.array(json.dumps(changed)), **members)
        assert load_trace(tmp_path / "c").quantum_s == width_s
    with (tmp_path / "c").open("wb") as file:
        np.savez(file, meta=np.array(json.dumps(meta | {"clock": "sundial"})), **members)
    with pytest.raises(TraceError, match="meta clock is 'sundial', expected one of Mooncake, BurstGPT, or empty"):
        load_trace(tmp_path / "c")


def test_traces_made_of_rounded_ones_are_spread_for_good_and_say_so(tmp_path):
    one, other = load_trace(rounded(tmp_path / "a")), load_trace(rounded(tmp_path / "b", seed=1))
    for made in (merge([one, other]), concatenate([one, other]), scale(one, 2.0), thin(one, 0.5)):
        assert made.quantum_s == 0.0 and "rounded to 3 s" in " ".join(made.notices)
        assert (np.diff(made.arrival_s) > 0).all()
    plain = replace(one, clock="")
    assert np.array_equal(scale(plain, 2.0).arrival_s, plain.arrival_s / 2.0)
    assert thin(one, 0.5).id_file == one.file_digest == plain.file_digest


def test_compare_says_that_arrivals_are_spread_and_can_leave_them(tmp_path, capsys):
    path = rounded(tmp_path / "a.jsonl")
    arguments = ["--trace", str(path), "--controllers", "static-0.5", "--seeds", "1", "--split", "all", "--jobs", "1"]
    arguments += ["--model", MODEL, "--hbm-gib", str(HBM_GIB), "--no-oracle", "--load", "0.05"]
    compare.main([*arguments, "--out", str(tmp_path / "spread")])
    assert "2,000 arrivals are rounded to 3 s" in capsys.readouterr().err
    compare.main([*arguments, "--no-spread", "--out", str(tmp_path / "plain")])
    assert "rounded" not in capsys.readouterr().err
    hashes = {json.loads((tmp_path / out / "cells.json").read_text())[0]["cell_hash"] for out in ("spread", "plain")}
    assert len(hashes) == 2


# Waves are bursts


@pytest.mark.parametrize("step_s", [2, 3, 5, 6, 10, 12, 15, 20, 30, 60])
@pytest.mark.parametrize("rows", [30, 150])
def test_waves_of_a_step_that_divides_a_minute_are_bursts(step_s, rows):
    arrival_s = np.repeat(float(step_s) * np.arange(2400 // step_s), rows)
    assert judge(arrival_s).name == "Burst"
    assert judge(arrival_s, np.full(len(arrival_s), 2100.0)).name == "Burst"


@pytest.mark.parametrize("rate_per_s", [0.05, 0.5, 2.0, 20.0])
@pytest.mark.parametrize("span_s", [600.0, 3000.0])
def test_a_poisson_process_is_no_wave(rate_per_s, span_s):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        arrival_s = np.sort(rng.uniform(0.0, span_s, rng.poisson(rate_per_s * span_s)))
        regime = judge(arrival_s)
        assert regime is None or regime.bin_s >= 20.0


def test_inspect_calls_waves_bursts(tmp_path, capsys):
    path = csv(tmp_path / "a", np.repeat(10.0 * np.arange(240), 30))
    printed = run("inspect", str(path), capsys=capsys)
    assert printed["load in requests"].startswith("Burst: per 5 s ")
    assert printed["load in tokens"].startswith("Burst: per 5 s ")
