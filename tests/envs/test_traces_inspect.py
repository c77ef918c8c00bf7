"""`python -m hbmgym.envs.traces`: what it prints and draws, and that converting loses nothing."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from hbmgym.envs.traces.__main__ import main
from hbmgym.envs.traces.coding import encode
from hbmgym.envs.traces.formats.compact import compact_bytes
from hbmgym.envs.traces.load import load_trace
from hbmgym.envs.traces.regime import load_per_bin, regime_of
from hbmgym.envs.traces.reuse import found_tokens
from hbmgym.envs.traces.scenarios import generate
from hbmgym.envs.traces.trace import Trace, TraceError
from hbmgym.envs.traces.validate import build_trace

PUBLIC = Path(__file__).resolve().parents[2] / ".." / "shared" / "traces" / "train"
PNG = b"\x89PNG"


def mooncake_lines(rows: int, step_ms: int = 1000, **more) -> str:
    """Row n continues row n - 1 by a block, ten rows at a time; every tenth is empty where `more` says so."""
    lines = []
    for n in range(rows):
        blocks = n % 10 + 1
        ids = [1000 * (n // 10) + block for block in range(blocks)]
        lines.append(
            {"timestamp": n * step_ms, "input_length": 512 * blocks, "output_length": 5, "hash_ids": ids, **more}
        )
    return "".join(json.dumps(line) + "\n" for line in lines)


def run(*arguments: str, capsys, notices: list[str] | None = None) -> dict[str, str]:
    """What inspect prints, by label."""
    main(arguments)
    pairs = [(line[:25].strip(), line[25:]) for line in capsys.readouterr().out.splitlines()]
    if notices is not None:
        notices += [text for label, text in pairs if label == "notice"]
    return dict(pairs)


def make_trace(ids, tokens, block_size=10) -> Trace:
    rows = len(ids)
    columns = {
        "arrival_s": np.arange(rows, dtype=float),
        "input_tokens": np.array(tokens),
        "output_tokens": np.ones(rows, int),
        "session_id": np.full(rows, -1),
        "gap_s": np.full(rows, np.nan),
        "service_s": np.full(rows, np.nan),
        "kind": np.zeros(rows, int),
        **encode(ids),
    }
    return build_trace(columns, name="made", kind="open-loop", block_size=block_size, path="made", where=str, link=True)


# Regimes


def test_a_flat_load_is_steady():
    regime = regime_of(np.array([10.0, 11, 9, 10, 11, 9, 10, 10]), 60.0)
    assert (regime.name, regime.peak) == ("Steady", 1.1)
    assert regime.cv < 0.1 and abs(regime.rise) < 0.1


def test_a_rising_load_is_a_trend_and_its_line_explains_it():
    regime = regime_of(np.arange(10.0, 20.0), 60.0)
    assert regime.name == "Trend"
    assert regime.rise == pytest.approx(10 / 14.5)
    assert regime.cv == pytest.approx(0.0, abs=1e-12)
    assert regime.dispersion == pytest.approx(0.0, abs=1e-12)


def test_a_load_that_rises_and_falls_is_a_trend_by_its_halves():
    regime = regime_of(np.array([6.0, 8, 10, 12, 12, 10, 8, 6]), 60.0)
    assert regime.rise == pytest.approx(0.0, abs=1e-12)
    assert regime.name == "Trend"


def test_a_peak_of_twice_the_mean_is_a_burst():
    assert regime_of(np.array([9.0, 9, 9, 9, 9, 9, 9, 9, 27, 9]), 60.0).name == "Burst"


def test_alternation_is_a_burst_by_its_variation():
    regime = regime_of(np.array([2.0, 8] * 10), 60.0)
    assert (regime.name, regime.peak) == ("Burst", 1.6)
    assert regime.dispersion == pytest.approx(9 / 5, rel=0.02)


def test_a_short_or_empty_load_is_not_judged():
    assert regime_of(np.ones(5), 60.0) is None
    assert regime_of(np.zeros(10), 60.0) is None


def test_bins_are_shorter_for_short_traces_and_whole():
    assert load_per_bin(np.array([5.0, 6.0, 30.0, 45.0, 66.0]))[0].tolist() == [2.0, 1.0, 1.0]
    load, bin_s = load_per_bin(np.array([0.0, 1.0, 1500.0]), np.array([2.0, 3.0, 9.0]))
    assert (load.tolist(), bin_s) == ([5.0] + 24 * [0.0], 60.0)


def test_times_far_apart_do_not_make_endless_bins():
    load, bin_s = load_per_bin(np.array([0.0, 1e30]))
    assert len(load) == 1_000_000 and bin_s == 1e24


@pytest.mark.parametrize(
    ("name", "regime", "cv", "rise"),
    [
        ("mooncake_conversation", "Steady", 0.10, 0.21),
        ("azure2023_conv", "Trend", 0.11, 0.62),
        ("azure2023_code", "Burst", 0.91, None),
        ("mooncake_synthetic", "Steady", None, None),
    ],
)
def test_public_traces_have_the_regimes_that_are_known_of_them(name, regime, cv, rise):
    path = PUBLIC / f"{name}.train.npz"
    if not path.is_file():
        pytest.skip("public traces are not beside the repository")
    found = regime_of(*load_per_bin(load_trace(path).arrival_s))
    assert found.name == regime
    assert cv is None or found.cv == pytest.approx(cv, abs=0.015)
    assert rise is None or found.rise == pytest.approx(rise, abs=0.015)


# Reuse


def test_only_leading_blocks_are_found_and_no_more_than_the_prompt():
    trace = make_trace([[1, 2], [1, 2, 3], [4, 2], [1, 5, 3], [1, 2, 3]], [20, 30, 20, 30, 25])
    assert found_tokens(trace).tolist() == [0, 20, 0, 10, 25]


def test_ids_that_a_file_codes_anew_are_found_too(tmp_path):
    trace = make_trace([[1, 2], [1, 2, 3]], [20, 30])
    plain = {"h_ref": [-1, -1], "h_lcp": [0, 0], "r_off": [0, 1, 2], "r_start": [0, 0], "r_len": [2, 3]}
    columns = {name: getattr(trace, name) for name in ("arrival_s", "input_tokens", "output_tokens", "session_id")}
    columns |= {name: getattr(trace, name) for name in ("turn", "parent", "gap_s", "service_s", "kind")}
    path = tmp_path / "a.npz"
    meta = np.array(json.dumps({"block_size": 10, "open_loop": True}))
    np.savez(path, meta=meta, **columns, **{name: np.array(values) for name, values in plain.items()})
    assert found_tokens(load_trace(path)).tolist() == [0, 20]


def test_a_trace_without_ids_finds_nothing_to_measure():
    assert found_tokens(make_trace([[], []], [5, 5], block_size=0)) is None


# The command


def test_inspect_prints_what_a_clocked_trace_holds(tmp_path, capsys):
    path = tmp_path / "a"
    path.write_text(mooncake_lines(400, step_ms=500))
    printed = run("inspect", str(path), capsys=capsys)
    assert printed["format"] == "Mooncake jsonl"
    assert printed["kind"] == "open-loop, 512 tokens per block id"
    assert printed["rows"] == "400"
    assert printed["span"].startswith("199.5 s")
    assert printed["rates"] == "2.005 requests/s, 5,646 input and 10 output tokens/s"
    assert printed["inter-arrivals"] == "CV 0.00"
    assert printed["load in requests"] == "Steady: per 20 s CV 0.00, peak/mean 1.00, rise +0.00"
    assert printed["index of dispersion"].endswith("requests per 20 s")
    assert printed["input tokens"] == "p50 2,816  p90 4,659  p95 5,120  p99 5,120  max 5,120  mean 2,816.0"
    assert printed["sessions"] == "none recorded"
    assert printed["infinite-cache hit rate"] == "81.8% of the prompt tokens"
    assert list(tmp_path.iterdir()) == [path]


def test_inspect_tells_rounding_from_burstiness(tmp_path, capsys):
    rng = np.random.default_rng(0)
    times = np.sort(rng.uniform(0, 3000, 2000)) // 3 * 3000
    rows = (
        {"timestamp": int(time), "input_length": 10, "output_length": 1, "hash_ids": [n]}
        for n, time in enumerate(times)
    )
    path = tmp_path / "a"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = run("inspect", str(path), capsys=capsys)["inter-arrivals"]
    assert 0.9 < float(said.split()[1]) < 1.1
    assert said.endswith("times are rounded to 3 s)")


def test_inspect_prints_turns_and_idle_times_of_a_library_and_its_notices(tmp_path, capsys):
    rows = [{"session_id": n % 3, "delay": 2000, "input_length": 512, "output_length": n and 5} for n in range(8)]
    path = tmp_path / "a"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    notices: list[str] = []
    printed = run("inspect", str(path), capsys=capsys, notices=notices)
    assert printed["clock"] == "none: sessions start when an episode is composed"
    assert printed["sessions"] == "3, 100.0% of several turns, 100.0% of the rows"
    assert printed["turns per session"].startswith("p50 3  ")
    assert printed["idle before a turn, s"].endswith("mean 2.0")
    assert "load in requests" not in printed
    assert [notice.split(": ")[1][:20] for notice in notices] == [
        "turns without a time",
        "1 rows had output_to",
        "rows were not sorted",
    ]


@pytest.mark.parametrize("rows", [1, 2, 60])
@pytest.mark.parametrize("kind", ["clocked", "library", "without ids"])
def test_every_kind_of_trace_is_printed_and_drawn(tmp_path, capsys, rows, kind):
    path = tmp_path / "a$b"
    if kind == "clocked":
        path.write_text(mooncake_lines(rows))
    elif kind == "library":
        path.write_text(mooncake_lines(rows, timestamp=None, session_id="s"))
    else:
        path.write_text(mooncake_lines(rows, hash_ids=None))
    printed = run("inspect", str(path), "--out", str(tmp_path / "a.png"), capsys=capsys)
    assert printed["rows"] == str(rows)
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)


def test_convert_loses_nothing(tmp_path, capsys):
    rows = mooncake_lines(50, session_id="s").splitlines() + mooncake_lines(1, output_length=0).splitlines()
    path, out = tmp_path / "a.jsonl", tmp_path / "b.npz"
    path.write_text("\n".join(rows))
    main(["convert", str(path), str(out)])
    printed = capsys.readouterr()
    assert printed.out == f"{out}: 50 rows of Mooncake jsonl\n"
    assert "dropped 1 rows" in printed.err
    assert_equal(load_trace(path), load_trace(out))


@pytest.mark.parametrize(
    "name", ["agentic_claude_code_weka", "mooncake_synthetic", "azure2023_code", "lmcache_miniswe"]
)
def test_public_traces_survive_the_round_trip(tmp_path, name):
    path = PUBLIC / f"{name}.train.npz"
    if not path.is_file():
        pytest.skip("public traces are not beside the repository")
    before = load_trace(path)
    (tmp_path / "a").write_bytes(compact_bytes(before))
    assert_equal(before, load_trace(tmp_path / "a"))


def assert_equal(one: Trace, other: Trace) -> None:
    for field in fields(Trace):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if isinstance(mine, np.ndarray):
            assert mine.dtype == theirs.dtype, field.name
            assert np.array_equal(mine, theirs, equal_nan=mine.dtype.kind == "f"), field.name
        else:
            assert mine == theirs, field.name


def test_a_generated_trace_is_not_written():
    trace = generate("steady-chat", 0, {"chat": 0.5}, 1.0, 10.0, 50.0)
    with pytest.raises(TraceError, match="generated"):
        compact_bytes(trace)


def test_named_columns_reach_the_loader(tmp_path, capsys):
    path = tmp_path / "a"
    path.write_text("when,prompt,answer\n0,10,1\n2000,20,2\n")
    mapping = "arrival_ms=when,input_tokens=prompt,output_tokens=answer"
    assert run("inspect", str(path), "--columns", mapping, capsys=capsys)["span"].startswith("2.0 s")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "the command is missing, expected one of inspect, convert"),
        (("look",), "the command is look, expected one of inspect, convert"),
        (("inspect",), "inspect takes one PATH, not 0"),
        (("inspect", "nowhere"), "nowhere: cannot be read: No such file"),
        (("inspect", "there", "--out", "a.jpg"), "--out is a.jpg, expected the name of a .png file"),
        (("inspect", "there", "--out", "nowhere/a.png"), "its folder does not exist"),
        (("inspect", "there", "--columns", "x"), "--columns has 'x', expected key=column"),
        (("convert", "there"), "convert takes PATH and OUT.npz, not 1 names"),
        (("convert", "there", "there"), "there exists, expected the name of a new file"),
        (("convert", "there", "nowhere/b.npz"), "its folder does not exist"),
        (("convert", "broken", "b.npz"), "broken: the file is empty"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").write_text(mooncake_lines(3))
    (tmp_path / "broken").write_text("")
    with pytest.raises(SystemExit) as leaving:
        main(list(arguments))
    printed = capsys.readouterr()
    assert leaving.value.code == 2
    assert said in printed.err and printed.err.count("\n") == 1
    assert not (tmp_path / "b.npz").exists()


@pytest.mark.slow
def test_the_package_runs_and_names_itself():
    command = [sys.executable, "-m", "hbmgym.envs.traces"]
    assert "inspect PATH" in subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    refused = subprocess.run([*command, "inspect", "nowhere"], capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stderr.split(":")[0]) == (2, "traces")
