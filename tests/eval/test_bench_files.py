"""Files are built as the benchmarks write them: fields, order and units of vLLM's and SGLang's own code."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from hbmgym.eval.calibration.bench_files import BenchRun, read_bench_folder


class Served(NamedTuple):
    """A request as the client saw it."""

    input_tokens: int
    output_tokens: int
    ttft_s: float
    gap_s: float
    sent_s: float
    error: str = ""


REQUESTS = (
    Served(1000, 5, 0.25, 0.01, 100.0),
    Served(820, 1, 0.125, 0.0, 100.5),
    Served(900, 0, 0.0, 0.0, 101.0, "Service Unavailable"),
    Served(950, 3, 0.5, 0.02, 101.5),
)


def without(file: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in file.items() if name not in names}


def details(requests: tuple[Served, ...]) -> dict[str, Any]:
    return {
        "input_lens": [request.input_tokens for request in requests],
        "output_lens": [request.output_tokens for request in requests],
        "ttfts": [request.ttft_s for request in requests],
        "itls": [[request.gap_s] * (request.output_tokens - 1) for request in requests],
        "generated_texts": ["word " * request.output_tokens for request in requests],
        "errors": [request.error for request in requests],
    }


def means(requests: tuple[Served, ...]) -> dict[str, Any]:
    return {
        "duration": 2.5,
        "completed": sum(not request.error for request in requests),
        "total_input_tokens": sum(request.input_tokens for request in requests),
        "total_output_tokens": sum(request.output_tokens for request in requests),
        "mean_ttft_ms": 250.0,
        "mean_tpot_ms": 15.0,
    }


def vllm_file(requests: tuple[Served, ...] = REQUESTS, **changes: Any) -> dict[str, Any]:
    """As `vllm bench serve --save-result --save-detailed` writes it in 2026."""
    return {
        "date": "20261128-224010",
        "endpoint_type": "vllm",
        "backend": "vllm",
        "label": None,
        "model_id": "Qwen/Qwen3-Next-80B-A3B-Instruct",
        "tokenizer_id": "Qwen/Qwen3-Next-80B-A3B-Instruct",
        "num_prompts": len(requests),
        "request_rate": "inf",
        "burstiness": 1.0,
        "max_concurrency": 2,
        **means(requests),
        "failed": sum(bool(request.error) for request in requests),
        **details(requests),
        "latencies": [request.ttft_s + request.gap_s * max(request.output_tokens - 1, 0) for request in requests],
        "start_times": [request.sent_s for request in requests],
        "queue_times": [0.0] * len(requests),
        **changes,
    }


def old_vllm_file(**changes: Any) -> dict[str, Any]:
    """As benchmark_serving.py wrote it in 2025: no latencies, no times at which requests were sent."""
    return without(vllm_file(**changes), "endpoint_type", "label", "failed", "latencies", "start_times", "queue_times")


def sglang_line(requests: tuple[Served, ...] = REQUESTS, **changes: Any) -> dict[str, Any]:
    """As `sglang.bench_serving --output-details` writes it from 0.5.9 on."""
    server = {
        "model_path": "Qwen/Qwen3.5-397B-A17B-FP8",
        "disable_radix_cache": True,
        "speculative_algorithm": None,
        "internal_states": [{"last_gen_throughput": 300.0}],
        "version": "0.5.15",
    }
    return {
        "tag": None,
        "backend": "sglang",
        "dataset_name": "random",
        "request_rate": math.inf,
        "max_concurrency": 2,
        "sharegpt_output_len": None,
        "random_input_len": 1024,
        "random_output_len": 8,
        "random_range_ratio": 0.8,
        "server_info": server,
        **means(requests),
        "accept_length": None,
        **details(requests),
        **changes,
    }


def old_sglang_line(**changes: Any) -> dict[str, Any]:
    """As 0.5.4 wrote it: nothing of the server."""
    return without(sglang_line(**changes), "tag", "server_info")


def server_with(**changes: Any) -> dict[str, Any]:
    return sglang_line()["server_info"] | changes


def save(folder: Path, name: str, *runs: object) -> Path:
    (folder / name).write_text("\n".join(json.dumps(run) for run in runs), encoding="utf-8")
    return folder


def the_run(folder: Path) -> BenchRun:
    (run,) = read_bench_folder(folder)
    return run


@pytest.mark.parametrize("file", [vllm_file(), old_vllm_file()], ids=["2026", "2025"])
def test_a_file_of_vllm_becomes_a_run(tmp_path: Path, file: dict[str, Any]):
    run = the_run(save(tmp_path, "c2.json", file))
    assert (run.file, run.engine, run.date) == ("c2.json", "vLLM", "20261128-224010")
    assert (run.model_id, run.concurrency, run.duration_s) == ("Qwen/Qwen3-Next-80B-A3B-Instruct", 2, 2.5)


def test_a_line_of_sglang_becomes_a_run(tmp_path: Path):
    run = the_run(save(tmp_path, "runs.jsonl", sglang_line()))
    assert (run.file, run.engine, run.date) == ("runs.jsonl:1", "SGLang", "")
    assert (run.model_id, run.concurrency, run.duration_s) == ("Qwen/Qwen3.5-397B-A17B-FP8", 2, 2.5)


def test_a_line_of_an_sglang_that_tells_nothing_of_the_server_has_no_model(tmp_path: Path):
    assert the_run(save(tmp_path, "runs.jsonl", old_sglang_line())).model_id == ""


@pytest.mark.parametrize("file", [vllm_file(), old_vllm_file(), sglang_line(), old_sglang_line()])
def test_failed_requests_are_left_out_and_times_are_seconds(tmp_path: Path, file: dict[str, Any]):
    run = the_run(save(tmp_path, "run.json", file))
    assert run.failed == 1
    assert run.input_tokens.tolist() == [1000, 820, 950] and run.input_tokens.dtype == np.int64
    assert run.output_tokens.tolist() == [5, 1, 3] and run.output_tokens.dtype == np.int64
    assert run.ttft_s.tolist() == [0.25, 0.125, 0.5]


def test_time_per_token_is_over_the_tokens_after_the_first_and_unknown_for_one_token(tmp_path: Path):
    run = the_run(save(tmp_path, "run.json", vllm_file()))
    assert run.tpot_s == pytest.approx([0.01, np.nan, 0.02], nan_ok=True)


def test_chunks_of_several_tokens_do_not_change_the_time_per_token(tmp_path: Path):
    gaps = [[0.02, 0.02], [], [], [0.04]]
    run = the_run(save(tmp_path, "run.json", vllm_file(itls=gaps)))
    assert run.tpot_s == pytest.approx([0.01, np.nan, 0.02], nan_ok=True)


def test_a_request_whose_tokens_came_at_once_has_no_time_per_token(tmp_path: Path):
    run = the_run(save(tmp_path, "run.json", vllm_file(itls=[[], [], [], [0.04]])))
    assert run.tpot_s == pytest.approx([np.nan, np.nan, 0.02], nan_ok=True)


def test_an_sglang_request_that_got_no_token_has_failed_though_it_has_no_error(tmp_path: Path):
    silent = Served(700, 8, 0.0, 0.0, 102.0)  # the client keeps the output length that it asked for
    run = the_run(
        save(tmp_path, "run.jsonl", sglang_line((*REQUESTS, silent)) | {"itls": [[0.01] * 4, [], [], [0.1] * 2, []]})
    )
    assert run.failed == 2 and 700 not in run.input_tokens


def test_requests_come_in_the_order_in_which_they_were_sent(tmp_path: Path):
    run = the_run(save(tmp_path, "run.json", vllm_file(tuple(reversed(REQUESTS)))))
    assert run.input_tokens.tolist() == [1000, 820, 950]
    assert run.tpot_s == pytest.approx([0.01, np.nan, 0.02], nan_ok=True)


def test_without_times_of_sending_the_order_of_the_list_is_kept(tmp_path: Path):
    run = the_run(save(tmp_path, "run.json", sglang_line(tuple(reversed(REQUESTS)))))
    assert run.input_tokens.tolist() == [950, 820, 1000]


def test_the_arrays_cannot_be_written(tmp_path: Path):
    run = the_run(save(tmp_path, "run.json", vllm_file()))
    for column in (run.input_tokens, run.output_tokens, run.ttft_s, run.tpot_s):
        with pytest.raises(ValueError, match="read-only"):
            column[0] = 1


def test_runs_of_a_folder_come_by_file_and_line(tmp_path: Path):
    save(tmp_path, "b.jsonl", sglang_line(max_concurrency=1), sglang_line(max_concurrency=4))
    save(tmp_path, "a.json", vllm_file(max_concurrency=8), vllm_file(max_concurrency=16))  # --append-result
    runs = read_bench_folder(tmp_path)
    assert [run.file for run in runs] == ["a.json:1", "a.json:2", "b.jsonl:1", "b.jsonl:2"]
    assert [run.concurrency for run in runs] == [8, 16, 1, 4]


def test_an_indented_file_is_read_too(tmp_path: Path):
    (tmp_path / "run.json").write_text(json.dumps(vllm_file(), indent=2), encoding="utf-8-sig")
    assert the_run(tmp_path).file == "run.json"


def test_other_files_are_passed_over(tmp_path: Path):
    save(tmp_path, "run.json", vllm_file())
    save(tmp_path, "run.pytorch.json", [{"benchmark": {"name": "vLLM benchmark"}}])
    save(tmp_path, "throughput.json", {"elapsed_time": 10.0, "num_requests": 100})
    (tmp_path / "server.log").write_text("not JSON at all", encoding="utf-8")
    (tmp_path / "folder.json").mkdir()
    assert the_run(tmp_path).file == "run.json"


@pytest.mark.parametrize(
    ("backend", "engine"),
    [("openai-chat", "vLLM"), ("vllm-chat", "vLLM"), ("sglang-oai-chat", "SGLang"), ("sglang", "SGLang")],
)
def test_the_backend_tells_the_engine_whichever_benchmark_ran(tmp_path: Path, backend: str, engine: str):
    save(tmp_path, "a.json", vllm_file(backend=backend))
    save(tmp_path, "b.jsonl", sglang_line(backend=backend))
    assert [run.engine for run in read_bench_folder(tmp_path)] == [engine, engine]


def test_a_radix_cache_that_was_on_but_never_hit_is_no_obstacle(tmp_path: Path):
    report = {"total_prompt_tokens": 4000, "total_cached_tokens": 4}
    run = sglang_line(server_info=server_with(disable_radix_cache=False), cache_report=report)
    assert the_run(save(tmp_path, "run.jsonl", run)).engine == "SGLang"


def means_only(file: dict[str, Any]) -> dict[str, Any]:
    return without(file, *details(()))


UNUSABLE = {
    "means of vLLM": (means_only(vllm_file()), "has no input_lens, only means.*--save-result --save-detailed"),
    "means of SGLang": (means_only(sglang_line()), "has no input_lens, only means.*--output-details"),
    "no limit": (vllm_file(max_concurrency=None), "max_concurrency is None.*--max-concurrency N"),
    "no such field": (without(sglang_line(), "max_concurrency"), "max_concurrency is None"),
    "a rate": (vllm_file(request_rate=4.0), "request_rate is 4.0, an open loop.*without --request-rate"),
    "a rate of SGLang": (sglang_line(request_rate=4.0), "request_rate is 4.0, an open loop"),
    "a trace's times": (sglang_line(request_rate="trace"), "request_rate is trace, an open loop"),
    "ramp-up": (vllm_file(ramp_up_strategy="linear"), "an open loop"),
    "a trace": (sglang_line(dataset_name="mooncake"), "dataset_name is mooncake.*--dataset-name random"),
    "prefixes": (old_sglang_line(dataset_name="generated-shared-prefix"), "dataset_name is generated-shared-prefix"),
    "a cache": (
        sglang_line(server_info=server_with(disable_radix_cache=False)),
        "the prefix cache was on.*--disable-radix-cache.*--cache-report",
    ),
    "hits": (
        sglang_line(cache_report={"total_prompt_tokens": 4000, "total_cached_tokens": 1000}),
        "25% of the prompts were cached.*--disable-radix-cache",
    ),
    "speculation of vLLM": (vllm_file(spec_decode_acceptance_rate=70.0), "tokens were speculated"),
    "speculation, seen": (old_sglang_line(accept_length=2.4), "tokens were speculated"),
    "speculation, set": (
        sglang_line(server_info=server_with(speculative_algorithm="EAGLE")),
        "tokens were speculated.*without speculative decoding",
    ),
    "two servers": (sglang_line(server_info={"prefill": [{}], "decode": [{}]}), "ran on different servers"),
    "another engine": (sglang_line(backend="lmdeploy"), "backend is 'lmdeploy'.*only vLLM and SGLang"),
    "all failed": (vllm_file(REQUESTS[2:3]), "none of 1 requests succeeded.*errors"),
    "no requests": (vllm_file(()), "none of 0 requests succeeded"),
    "no stream": (sglang_line(itls=[[], [], [], []]), "itls are empty.*--disable-stream"),
    "damaged lists": (vllm_file(ttfts=[0.25]), "input_lens, output_lens, ttfts, itls are not numbers, an entry per"),
    "too few gaps": (vllm_file(itls=[[0.01]]), "are not numbers, an entry per request"),
    "flat gaps": (vllm_file(itls=[0.01, 0.02, 0.0, 0.0]), "are not numbers, an entry per request"),
    "texts": (vllm_file(input_lens=["a", "b", "c", "d"]), "are not numbers, an entry per request"),
}


@pytest.mark.parametrize(("file", "complaint"), UNUSABLE.values(), ids=UNUSABLE.keys())
def test_a_run_that_cannot_be_replayed_is_refused_in_one_line_with_its_place(
    tmp_path: Path, file: dict[str, Any], complaint: str
):
    save(tmp_path, "good.json", vllm_file())
    save(tmp_path, "runs.jsonl", sglang_line(), file)
    with pytest.raises(ValueError, match=f"runs.jsonl:2: .*{complaint}") as raised:
        read_bench_folder(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_file_that_was_cut_off_is_refused_with_its_line(tmp_path: Path):
    save(tmp_path, "runs.jsonl", sglang_line())
    whole = (tmp_path / "runs.jsonl").read_text(encoding="utf-8")
    (tmp_path / "runs.jsonl").write_text(whole + "\n" + whole[:200], encoding="utf-8")
    with pytest.raises(ValueError, match=r"runs.jsonl:2: is not JSON .*remove the file, or what was cut off") as raised:
        read_bench_folder(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path):
    (tmp_path / "run.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot be read as UTF-8 text"):
        read_bench_folder(tmp_path)


def test_a_folder_without_results_is_refused(tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"0 files .*none of vllm bench serve or sglang.bench_serving: name the folder"
    ):
        read_bench_folder(tmp_path)
    save(tmp_path, "throughput.json", {"elapsed_time": 10.0, "num_requests": 100})
    with pytest.raises(ValueError, match="1 files"):
        read_bench_folder(tmp_path)


def test_what_is_no_folder_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="is not a folder"):
        read_bench_folder(save(tmp_path, "run.json", vllm_file()) / "run.json")
