"""`python eval/calibrate.py`: a user's rows, benchmark files or metrics in, errors and a profile out; and the committed
result of the published rows."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbmgym.envs.serving.core import Core
from hbmgym.envs.serving.engines import EngineProfile, find_engine
from hbmgym.envs.serving.metrics import tpot_s, ttft_s
from hbmgym.eval.calibrate import RESULT, main
from hbmgym.eval.calibration.closed_loop import replay
from hbmgym.eval.calibration.fit import MOST_FITTED
from hbmgym.eval.calibration.host import under
from hbmgym.eval.calibration.rows import PUBLISHED, read_rows

from .calibration_rows import (
    CONSTANTS,
    DEPLOYMENTS,
    SGLANG,
    VLLM,
    constants,
    fields,
    measured_fields,
    row,
    truth_for,
    write_csv,
)
from .open_traffic import LOADS, served
from .test_bench_files import Served, old_vllm_file, save, server_with, sglang_line, vllm_file
from .test_prometheus import EARLIER, Load, scrapes, sglang_page, vllm_page

PAGE = Path(__file__).parents[2] / "docs" / "calibration.md"
OWN = ("--weight-dtype", "fp8", "--version", "0.18.0")
"""What files of a benchmark and metrics do not tell, of the deployment of FIELDS."""


def calibrated(folder: Path, *arguments: object) -> tuple[dict[str, Any], Path]:
    """The result of a run of the script, and where the profile is."""
    out, profile = folder / "result.json", folder / "profile.json"
    main([*map(str, arguments), "--out", str(out), "--profile", str(profile), "--jobs", "1"])
    return json.loads(out.read_text()), profile


def test_rows_in_a_table_become_errors_of_every_deployment(tmp_path, capsys):
    content = [own for changes in ({}, DEPLOYMENTS["SGLang, graphs"]) for own in measured_fields(**changes)][:12]
    content += [fields(gpu="b200", speculative=1, date=None), fields(use="none")]
    out = tmp_path / "result.json"
    main(["--rows", str(write_csv(tmp_path / "mine.csv", content)), "--out", str(out), "--plot", f"{tmp_path}/p.png"])
    found = json.loads(out.read_text())
    for name in ("ttft", "tpot"):
        error = found["held_out"][name]
        assert error["rows"] == 2 * 2
        assert 0 <= error["median"] <= error["p90"] < 0.02
        assert found["uncalibrated"][name]["rows"] == 12 and found["uncalibrated"][name]["median"] > 0.1
    assert [len(one["rows"]) for one in found["deployments"]] == [6, 6]
    assert [sum(own["fitted"] for own in one["rows"]) for one in found["deployments"]] == [MOST_FITTED] * 2
    for one in found["deployments"]:
        assert constants(one["profile"]) == pytest.approx(CONSTANTS, rel=0.02)
    assert found["refused"] == [
        "mine.csv row 13: no TTFT: date is not stated",
        "mine.csv row 13: no TPOT: speculative decoding: how many tokens were accepted is not known",
    ]
    printed = capsys.readouterr()
    assert printed.err.splitlines() == found["refused"]
    assert all(" ".join(one["profile"]["name"].split()) in printed.out for one in found["deployments"])
    assert f"result: {out}" in printed.out
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_a_profile_is_what_the_engine_flag_takes_and_serves_the_same_times(tmp_path, capsys):
    content = measured_fields()[:2]
    found, path = calibrated(tmp_path, "--rows", write_csv(tmp_path / "mine.csv", content))
    profile = find_engine(str(path))
    assert dataclasses.asdict(profile) == found["deployments"][0]["profile"]
    assert (profile.name, profile.kernels) == ("qwen3-next-80b-a3b fp8 h200 TP1 vLLM 0.18.0", "vllm")
    assert profile.source == "eval/calibrate.py: vLLM 0.18.0, fitted to 1024/64 c1, 8192/64 c1"
    for own in content:
        assert replay(row(**own)).figures(profile)["ttft"] == pytest.approx(own["ttft_ms"], rel=0.02)
    assert f"profile: {path} (for --engine)" in capsys.readouterr().out


def benchmarked(tokens: int, clients: int, **changes: Any) -> tuple[Served, ...]:
    """The requests of a benchmark as its client saw them, from an engine with CONSTANTS."""
    made = row(input_tokens=tokens, concurrency=clients, requests=10 * clients, **changes)
    one = replay(made)
    core = Core(under(one.config, truth_for(made)))
    core.reset(one.episode, one.kv_share)
    while not core.done:
        core.run_window()
    sent = one.episode.rows
    times = zip(ttft_s(core.requests), tpot_s(sent, core.requests), core.requests["arrival_s"], strict=True)
    lengths = zip(sent["input_tokens"].tolist(), sent["output_tokens"].tolist(), strict=True)
    return tuple(Served(*own, *map(float, seconds)) for own, seconds in zip(lengths, times, strict=True))


RUNS = ((1024, 1), (8192, 1), (1024, 16), (8192, 16))


def vllm_folder(folder: Path) -> Path:
    """A file per run; older ones, which do not say when requests began, so that these are replayed in their order."""
    for tokens, clients in RUNS:
        requests = benchmarked(tokens, clients)
        save(folder, f"{tokens}-{clients}.json", old_vllm_file(requests=requests, max_concurrency=clients))
    return folder


def sglang_folder(folder: Path) -> Path:
    """One file, to which SGLang appends."""
    server = server_with(version="0.5.9")
    runs = [
        sglang_line(
            benchmarked(*run, engine="SGLang", version="0.5.9"),
            max_concurrency=run[1],
            random_input_len=run[0],
            server_info=server,
        )
        for run in RUNS
    ]
    return save(folder, "runs.jsonl", *runs)


@pytest.mark.parametrize(
    ("make", "engine", "version"),
    [(vllm_folder, VLLM, "0.18.0"), (sglang_folder, SGLANG, "0.5.9")],
    ids=["vllm", "sglang"],
)
def test_files_of_a_benchmark_give_the_host_back(make: Callable[[Path], Path], engine, version, tmp_path):
    (tmp_path / "bench").mkdir()
    own = ("--weight-dtype", "fp8_block", "--version", version)
    found, path = calibrated(tmp_path, "--from-bench", make(tmp_path / "bench"), *own)
    profile = find_engine(str(path))
    assert constants(profile) == pytest.approx(CONSTANTS, rel=0.02)
    assert dataclasses.replace(profile, **constants(engine), name=engine.name, source=engine.source) == engine
    assert found["held_out"]["ttft"]["rows"] == 1 and found["held_out"]["ttft"]["median"] < 0.2
    assert found["refused"] == []


def test_a_benchmark_of_single_tokens_tells_of_prefill_alone(tmp_path):
    (tmp_path / "bench").mkdir()
    for tokens in (1024, 8192):
        requests = tuple(one._replace(output_tokens=1) for one in benchmarked(tokens, 1))
        save(tmp_path / "bench", f"{tokens}.json", vllm_file(requests, max_concurrency=1))
    found, _ = calibrated(tmp_path, "--from-bench", tmp_path / "bench", *OWN)
    assert found["uncalibrated"].keys() == {"ttft"}


def scraped(folder: Path, page: Callable[..., str], engine: EngineProfile) -> list[str]:
    """Two scrapes of every load, as the flag takes them."""
    pairs = []
    for number, load in enumerate(LOADS):
        traffic = served(load, dataclasses.replace(engine, **CONSTANTS))
        means = {name: float(np.mean(values)) for name, values in traffic.columns.items()}
        count = len(traffic.columns["ttft_s"])
        window = Load(**(means | {"requests": count, "cached_tokens": 0, "iterations": 1000}))
        (folder / str(number)).mkdir()
        files = scrapes(folder / str(number), page(EARLIER), page(EARLIER, window), traffic.seconds)
        pairs += ["--from-prometheus", ",".join(map(str, files))]
    return pairs


@pytest.mark.parametrize(
    ("page", "engine", "version"),
    [(vllm_page, VLLM, "0.18.0"), (sglang_page, SGLANG, "0.5.9")],
    ids=["vllm", "sglang"],
)
def test_metrics_of_a_server_give_the_host_back(page, engine, version, tmp_path, capsys):
    own = ("--weight-dtype", "fp8", "--version", version)
    found, path = calibrated(tmp_path, *scraped(tmp_path, page, engine), *own)
    profile = find_engine(str(path))
    assert constants(profile) == pytest.approx(CONSTANTS, rel=0.05)
    assert dataclasses.replace(profile, **constants(engine), name=engine.name, source=engine.source) == engine
    assert dataclasses.asdict(profile) == found["profile"]
    assert profile.source.endswith(f"{version}, fitted to {len(LOADS)} windows of its metrics")
    assert len(found["windows"]) == len(LOADS)
    for one in found["windows"]:
        assert one["modelled_s"] == pytest.approx(one["measured_s"], rel=0.05)
    assert "HTTP, network and client are not in a server's metrics" in capsys.readouterr().out


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys) -> Callable[..., str]:
    """Runs the script in an empty folder that has to stay as it is; returns its one line."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, out: str = "result.json") -> str:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as leaving:
            main(["--jobs", "1", *(["--out", out] if out else []), *map(str, arguments)])
        printed = capsys.readouterr()
        assert leaving.value.code == 2
        assert printed.err.count("\n") == 1, printed.err
        assert not printed.out
        assert sorted(tmp_path.rglob("*")) == before
        return printed.err

    return run


def test_a_file_that_is_not_there_is_refused(refusal):
    assert "nowhere.csv: cannot be read: No such file" in refusal("--rows", "nowhere.csv")
    assert "nowhere: is not a folder" in refusal("--from-bench", "nowhere")
    assert "a.txt: cannot be read" in refusal("--from-prometheus", "a.txt,b.txt")


@pytest.mark.parametrize("content", ["", "[", "{}", "[]", "[1]"])
def test_what_holds_no_rows_is_refused(content, refusal):
    Path("mine.json").write_text(content)
    assert "mine.json: " in refusal("--rows", "mine.json")


CANNOT_BE = {
    "model": ({"model": "gpt-2"}, "mine.json: row 2: unknown model 'gpt-2'"),
    "gpu": ({"gpu": "v100"}, "mine.json: row 2: unknown GPU 'v100'"),
    "dtype": ({"kv_dtype": "int3"}, "mine.json: row 2: unknown dtype 'int3'"),
    "engine": ({"engine": "ollama"}, "mine.json: row 2: engine is 'ollama'"),
    "figure": ({"tpot_ms": -1}, "mine.json: row 2: tpot_ms is '-1'"),
    "column": ({"moons": 3}, "mine.json: row 2: unknown column moons"),
    "memory": ({"model": "qwen3.5-397b-a17b"}, "mine.json row 2: qwen3.5-397b-a17b has "),
    "heads": ({"tensor_parallel": 3}, "mine.json: row 2: tensor_parallel is 3, but "),
    "experts": ({"tensor_parallel": 4, "expert_parallel": 3}, "mine.json row 2: expert_parallel is 3, but "),
}


@pytest.mark.parametrize(("changes", "complaint"), CANNOT_BE.values(), ids=CANNOT_BE.keys())
def test_a_row_that_cannot_be_is_refused(changes, complaint, refusal):
    Path("mine.json").write_text(json.dumps([fields(), fields(**changes)]))
    assert complaint in refusal("--rows", "mine.json")


def test_a_file_whose_every_figure_is_refused_is_refused(refusal):
    content = [fields(date=None, tpot_ms=None), fields(use="tpot", speculative=1)]
    Path("mine.json").write_text(json.dumps(content))
    line = refusal("--rows", "mine.json")
    assert "every figure is refused: mine.json row 1: no TTFT: date is not stated; and 1 more" in line


def test_a_profile_is_of_one_deployment(refusal):
    Path("mine.json").write_text(json.dumps([fields(), fields(gpu="h100")]))
    assert "but the rows are of 2: give a file" in refusal("--rows", "mine.json", "--profile", "own.json")


FLAGS = {
    "no place for the result": (("--rows", "mine.json"), "", "--rows needs --out FILE or --profile FILE"),
    "two sources": (("--rows", "a.csv", "--from-bench", "b"), "r.json", "--rows and --from-bench exclude each other"),
    "all sources": (
        ("--rows", "a", "--from-bench", "b", "--from-prometheus", "c,d"),
        "r.json",
        "--rows and --from-bench and --from-prometheus exclude",
    ),
    "one scrape": (
        ("--from-prometheus", "a.txt"),
        "r.json",
        "--from-prometheus is 'a.txt', expected two files",
    ),
    "three scrapes": (("--from-prometheus", "a,b,c"), "r.json", "expected two files: BEFORE,AFTER"),
    "no folder for the result": ((), "nowhere/r.json", "--out nowhere/r.json: there is no folder nowhere"),
    "no folder for the profile": (("--profile", "no/p.json"), "r.json", "--profile no/p.json: there is no folder no"),
    "no folder for the picture": (("--plot", "no/p.png"), "r.json", "--plot no/p.png: there is no folder no"),
    "another picture": (("--plot", "p.pdf"), "r.json", "--plot p.pdf: expected a name that ends in .png"),
    "a picture of windows": (("--from-prometheus", "a,b", "--plot", "p.png"), "r.json", "--from-prometheus has none"),
    "a profile that no engine takes": (("--profile", "own.txt"), "r.json", "a name that ends in .json"),
    "a deployment beside rows": (
        ("--gpu", "h100", "--version", "1"),
        "r.json",
        "--gpu, --version: only for",
    ),
    "a name beside runs": (("--from-bench", "b", "--served-name", "m"), "r.json", "only for --from-prometheus"),
    "no processes": (("--jobs", "0"), "r.json", "--jobs is"),
}


@pytest.mark.parametrize(("arguments", "out", "complaint"), FLAGS.values(), ids=FLAGS.keys())
def test_flags_that_do_not_go_together_are_refused(arguments: Sequence[str], out, complaint, refusal):
    assert complaint in refusal(*arguments, out=out)


@pytest.mark.parametrize(
    ("flag", "value", "complaint"),
    [
        ("--model", "gpt-2", "unknown model 'gpt-2'"),
        ("--gpu", "v100", "unknown GPU 'v100'"),
        ("--kv-dtype", "int3", "unknown dtype 'int3'"),
        ("--weight-dtype", "int3", "unknown dtype of weights 'int3'"),
        ("--tensor-parallel", "3", "tensor_parallel is 3, but "),
        ("--tensor-parallel", "0", "tensor_parallel is 0, expected an integer >= 1"),
        ("--prefill-chunk", "0", "prefill_budget is 0, expected an integer >= 1"),
        ("--receive-interval", "0", "receive_interval is 0, expected an integer >= 1"),
    ],
)
def test_a_deployment_that_cannot_be_is_refused(flag, value, complaint, refusal, tmp_path):
    (tmp_path / "bench").mkdir()
    save(tmp_path / "bench", "run.json", vllm_file())
    assert complaint in refusal("--from-bench", "bench", flag, value)
    before, after = scrapes(tmp_path, vllm_page(EARLIER), vllm_page(EARLIER, Load()))
    assert complaint in refusal("--from-prometheus", f"{before},{after}", flag, value)


def committed() -> dict[str, Any]:
    return json.loads(RESULT.read_text())


def test_the_committed_result_is_of_the_published_rows():
    rows = {one.where: one for one in read_rows(PUBLISHED)}
    found = [own for one in committed()["deployments"] for own in one["rows"]]
    assert {own["where"] for own in found} == {where for where, one in rows.items() if one.measured}
    for own in found:
        assert (own["run"], own["measured_ms"]) == (rows[own["where"]].name, rows[own["where"]].measured)


def test_the_committed_result_is_of_this_engine():
    rows = {one.where: one for one in read_rows(PUBLISHED)}
    judged = [one for one in committed()["deployments"] if len(one["rows"]) > MOST_FITTED]
    for one in judged:
        own = min(one["rows"], key=lambda own: rows[own["where"]].requests)
        times = replay(rows[own["where"]]).figures(EngineProfile(**one["profile"]))
        stale = f"{own['where']}: the engine's times have changed, run python eval/calibrate.py"
        assert {name: times[name] for name in own["modelled_ms"]} == pytest.approx(own["modelled_ms"], rel=1e-3), stale


def test_the_committed_result_names_no_place_of_a_machine():
    assert not any(word in RESULT.read_text() for word in ("/home", "/tmp", "/usr", "/work", "/root", "\\\\"))


def test_the_committed_errors_are_those_of_the_committed_rows():
    facts = committed()
    for name in ("ttft", "tpot"):
        held_out = [
            own["modelled_ms"][name] / own["measured_ms"][name] - 1.0
            for one in facts["deployments"]
            for own in one["rows"]
            if not own["fitted"] and name in own["measured_ms"]
        ]
        assert facts["held_out"][name]["rows"] == len(held_out)
        assert facts["held_out"][name]["median"] == pytest.approx(np.median(np.abs(held_out)))
        assert facts["held_out"][name]["p90"] == pytest.approx(np.quantile(np.abs(held_out), 0.9))
    assert all(sum(own["fitted"] for own in one["rows"]) <= MOST_FITTED for one in facts["deployments"])


def test_the_committed_errors_are_as_small_as_promised():
    facts = committed()
    assert sum(bool(one["held_out"]) for one in facts["deployments"]) >= 8
    held_out, uncalibrated = facts["held_out"], facts["uncalibrated"]
    assert min(error["rows"] for error in held_out.values()) >= 60
    assert held_out["tpot"]["median"] <= 0.06 and held_out["tpot"]["p90"] <= 0.18
    assert held_out["ttft"]["median"] <= 0.09 and held_out["ttft"]["p90"] <= 0.25
    assert uncalibrated["tpot"]["median"] <= 0.15 and uncalibrated["ttft"]["median"] <= 0.30


def test_the_page_quotes_the_committed_errors():
    page, facts = PAGE.read_text(), committed()
    for name in ("ttft", "tpot"):
        for fraction in (facts["held_out"][name]["median"], facts["held_out"][name]["p90"]):
            assert f"{fraction:.1%}" in page
        assert f"{facts['uncalibrated'][name]['median']:.1%}" in page
