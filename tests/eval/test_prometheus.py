"""Pages are built as the engines' prometheus_client writes them, from the requests that they have served."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from hbmgym.eval.calibration.exposition import read_scrape
from hbmgym.eval.calibration.prometheus import MetricsWindow, read_window

MODEL = "Qwen/Qwen3-Next-80B-A3B-Instruct"
SCRAPED = 1_800_000_000.0
DATE = "date: Fri, 15 Jan 2027 08:{minute:02}:00 GMT"


class Load(NamedTuple):
    """Requests that are alike."""

    requests: int = 40
    ttft_s: float = 0.5
    queue_s: float = 0.2
    prefill_s: float = 0.25
    itl_s: float = 0.02
    e2e_s: float = 2.6
    prompt_tokens: int = 1000
    output_tokens: int = 101
    cached_tokens: int = 250
    iterations: int = 500


EARLIER = Load(100, 3.0, 2.0, 0.9, 0.5, 60.0, 8000, 400, 4000, 9000)
NEW = Load()


def labelled(labels: Mapping[str, str]) -> str:
    escaped = (value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"') for value in labels.values())
    pairs = ",".join(f'{name}="{value}"' for name, value in zip(labels, escaped, strict=True))
    return f"{{{pairs}}}" if pairs else ""


def metric(name: str, kind: str, value: float, **labels: str) -> str:
    """A counter or gauge."""
    return f"# HELP {name} What it is.\n# TYPE {name} {kind}\n{name}{labelled(labels)} {value!r}\n"


def histogram(name: str, total: float, count: float, **labels: str) -> str:
    lines = [f"# HELP {name} What it is.", f"# TYPE {name} histogram"]
    lines += [f"{name}_bucket{labelled({**labels, 'le': le})} {float(count)}" for le in ("1.0", "1e+06", "+Inf")]
    lines += [f"{name}_count{labelled(labels)} {float(count)}", f"{name}_sum{labelled(labels)} {total!r}"]
    return "\n".join(lines) + "\n"


def totals(loads: tuple[Load, ...]) -> dict[str, tuple[float, float]]:
    """Sum and count of what is observed once per request, or, for `itl_s`, per token."""
    table = np.array(loads, float).T
    found = dict(zip(Load._fields, table, strict=True))
    requests, tokens = found["requests"], found["requests"] * (found["output_tokens"] - 1)
    found["computed"] = found["prompt_tokens"] - found["cached_tokens"]
    sums = {name: (float(requests @ column), float(requests.sum())) for name, column in found.items()}
    return sums | {"itl_s": (float(tokens @ found["itl_s"]), float(tokens.sum()))}


def vllm_page(*loads: Load, engine: str = "0", model: str = MODEL, started: float = 1.7e9, running: float = 9.0) -> str:
    """As vLLM writes it in 2026, in one process."""
    sums, labels = totals(loads), {"engine": engine, "model_name": model}
    finished = sums["e2e_s"][1]
    iteration_tokens = sums["prompt_tokens"][0] + sums["output_tokens"][0]
    histograms = {
        "time_to_first_token_seconds": sums["ttft_s"],
        "inter_token_latency_seconds": sums["itl_s"],
        "request_time_per_output_token_seconds": (99.0, finished),
        "e2e_request_latency_seconds": sums["e2e_s"],
        "request_queue_time_seconds": sums["queue_s"],
        "request_prefill_time_seconds": sums["prefill_s"],
        "request_prompt_tokens": sums["prompt_tokens"],
        "request_generation_tokens": sums["output_tokens"],
        "request_prefill_kv_computed_tokens": sums["computed"],
        "iteration_tokens_total": (iteration_tokens, sum(load.iterations for load in loads)),
    }
    counters = {
        "request_success_total": finished,
        "prompt_tokens_total": sums["prompt_tokens"][0],
        "prefix_cache_queries_total": sums["prompt_tokens"][0],
        "prefix_cache_hits_total": sums["cached_tokens"][0] / 2,  # the computed tokens are to be believed first
    }
    return "".join(
        [
            metric("process_start_time_seconds", "gauge", started),
            metric("python_info", "gauge", 1.0, implementation="CPython", version="3.12.3"),
            metric("vllm:num_requests_running", "gauge", running, **labels),
            metric("vllm:cache_config_info", "gauge", 1.0, engine=engine, enable_prefix_caching="True"),
            *(metric(f"vllm:{name}", "counter", value, **labels) for name, value in counters.items()),
            *(histogram(f"vllm:{name}", *value, **labels) for name, value in histograms.items()),
            metric("vllm:e2e_request_latency_seconds_created", "gauge", started + 1.0, **labels),
        ]
    )


def old_vllm_page(*loads: Load) -> str:
    """As vLLM wrote it in the middle of 2025."""
    page = (
        vllm_page(*loads)
        .replace("inter_token_latency", "time_per_output_token")
        .replace("prefix_cache", "gpu_prefix_cache")
    )
    return without(page, "request_prefill_kv_computed_tokens", "request_time_per_output_token")


def sglang_page(*loads: Load, streaming: str = "true") -> str:
    """As SGLang 0.5.23 writes it: always of several processes, so nothing tells when they began."""
    sums = totals(loads)
    labels = {"engine_type": "unified", "model_name": MODEL}
    scheduler = labels | {"moe_ep_rank": "0", "pp_rank": "0", "tp_rank": "0"}
    stream = labels | {"is_streaming": streaming}
    finished = sums["e2e_s"][1]
    cached = [
        metric("sglang:cached_tokens_total", "counter", sums["cached_tokens"][0], **labels, cache_source="device")
    ]
    return "".join(
        [
            metric("sglang:num_running_reqs", "gauge", 9.0, **scheduler),
            metric("sglang:spec_accept_length", "gauge", 0.0, **scheduler),
            histogram("sglang:queue_time_seconds", *sums["queue_s"], **scheduler),
            histogram("sglang:per_stage_req_latency_seconds", *sums["prefill_s"], **scheduler, stage="prefill_forward"),
            histogram("sglang:per_stage_req_latency_seconds", 99.0, finished, **scheduler, stage="request_process"),
            metric("sglang:prompt_tokens_total", "counter", sums["prompt_tokens"][0], **stream),
            metric("sglang:generation_tokens_total", "counter", sums["output_tokens"][0], **stream),
            *(cached if sums["cached_tokens"][0] else []),
            histogram("sglang:prompt_tokens_histogram", *sums["prompt_tokens"], **labels),
            histogram("sglang:uncached_prompt_tokens_histogram", *sums["computed"], **labels),
            histogram("sglang:generation_tokens_histogram", *sums["output_tokens"], **labels),
            histogram("sglang:time_to_first_token_seconds", *sums["ttft_s"], **stream),
            histogram("sglang:inter_token_latency_seconds", *sums["itl_s"], **labels),
            histogram("sglang:e2e_request_latency_seconds", *sums["e2e_s"], **stream),
        ]
    )


def old_sglang_page(*loads: Load) -> str:
    """As 0.5.9 wrote it without --collect-tokens-histogram."""
    page = sglang_page(*loads).replace(',is_streaming="true"', "")
    return without(page, "per_stage_req_latency_seconds", "_tokens_histogram")


def without(page: str, *names: str) -> str:
    return "".join(line for line in page.splitlines(True) if not any(name in line for name in names))


def scrapes(folder: Path, before: str, after: str, seconds: float = 60.0) -> tuple[Path, Path]:
    """Two files, the second written `seconds` after the first."""
    paths = folder / "before.txt", folder / "after.txt"
    for path, page, written in zip(paths, (before, after), (SCRAPED, SCRAPED + seconds), strict=True):
        path.write_text(page, encoding="utf-8")
        os.utime(path, (written, written))
    return paths


def window(folder: Path, before: str, after: str, seconds: float = 60.0, model: str = "") -> MetricsWindow:
    return read_window(*scrapes(folder, before, after, seconds), model)


PAGES = {"vllm": vllm_page, "older vllm": old_vllm_page, "sglang": sglang_page, "older sglang": old_sglang_page}


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES.keys())
def test_means_are_of_the_requests_between_the_scrapes(tmp_path: Path, page):
    found = window(tmp_path, page(EARLIER), page(EARLIER, NEW))
    assert (found.model_id, found.requests, found.seconds, found.clock) == (MODEL, 40, 60.0, "file times")
    assert (found.ttft_s, found.queue_s, found.e2e_s) == pytest.approx((0.5, 0.2, 2.6))
    assert found.itl_s == pytest.approx(0.02)
    assert (found.prompt_tokens, found.output_tokens) == pytest.approx((1000.0, 101.0))


@pytest.mark.parametrize(("name", "engine"), [("vllm", "vLLM"), ("sglang", "SGLang")])
def test_newer_engines_tell_prefill_time_and_computed_tokens(tmp_path: Path, name: str, engine: str):
    found = window(tmp_path, PAGES[name](EARLIER), PAGES[name](EARLIER, NEW))
    assert found.engine == engine
    assert found.prefill_s == pytest.approx(0.25)
    assert found.cached_share == pytest.approx(0.25)
    assert found.computed_tokens == pytest.approx(750.0)


def test_an_older_vllm_tells_prefill_time_and_shares_of_the_cache(tmp_path: Path):
    found = window(tmp_path, old_vllm_page(EARLIER), old_vllm_page(EARLIER, NEW))
    assert found.prefill_s == pytest.approx(0.25)
    assert found.cached_share == pytest.approx(0.125)


def test_an_older_sglang_does_not_tell_prefill_time_but_cached_tokens(tmp_path: Path):
    found = window(tmp_path, old_sglang_page(EARLIER), old_sglang_page(EARLIER, NEW))
    assert math.isnan(found.prefill_s)
    assert found.cached_share == pytest.approx(0.25)


def test_iterations_are_told_by_vllm_alone(tmp_path: Path):
    found = window(tmp_path, vllm_page(EARLIER), vllm_page(EARLIER, NEW))
    assert (found.iterations, found.iteration_tokens) == pytest.approx((500.0, 40 * 1101 / 500))
    found = window(tmp_path, sglang_page(EARLIER), sglang_page(EARLIER, NEW))
    assert math.isnan(found.iterations) and math.isnan(found.iteration_tokens)


def test_a_cache_that_is_off_shares_nothing(tmp_path: Path):
    off = NEW._replace(cached_tokens=0)
    assert window(tmp_path, sglang_page(off), sglang_page(off, off)).cached_share == 0.0
    assert window(tmp_path, old_sglang_page(off), old_sglang_page(off, off)).cached_share == 0.0
    silent = [without(old_vllm_page(*loads), "prefix_cache_") for loads in ((off,), (off, off))]
    assert math.isnan(window(tmp_path, *silent).cached_share)
    still = [page + metric("vllm:prefix_cache_queries_total", "counter", 0.0, model_name=MODEL) for page in silent]
    still = [page + metric("vllm:prefix_cache_hits_total", "counter", 0.0, model_name=MODEL) for page in still]
    assert window(tmp_path, *still).cached_share == 0.0


def test_running_requests_follow_from_littles_law_per_replica(tmp_path: Path):
    one = window(tmp_path, vllm_page(EARLIER), vllm_page(EARLIER, NEW))
    assert one.running == pytest.approx(40 * (2.6 - 0.2) / 60)
    two = window(
        tmp_path,
        vllm_page(EARLIER) + vllm_page(EARLIER, engine="1"),
        vllm_page(EARLIER, NEW) + vllm_page(EARLIER, NEW, engine="1"),
    )
    assert two.requests == 80 and two.ttft_s == pytest.approx(0.5)
    assert two.running == pytest.approx(one.running)


def test_label_sets_that_appear_within_the_window_count_from_zero(tmp_path: Path):
    found = window(tmp_path, vllm_page(EARLIER), vllm_page(EARLIER) + vllm_page(NEW, engine="1"))
    assert found.requests == 40 and found.ttft_s == pytest.approx(0.5)


def test_requests_that_did_not_stream_have_no_part_in_ttft(tmp_path: Path):
    slow = NEW._replace(ttft_s=2.6)
    before = sglang_page(EARLIER) + sglang_page(EARLIER, streaming="false")
    after = sglang_page(EARLIER, NEW) + sglang_page(EARLIER, slow, streaming="false")
    found = window(tmp_path, before, after)
    assert found.requests == 80 and found.ttft_s == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["vllm:spec_decode_num_drafts_total", "sglang:spec_verify_calls_total"])
def test_time_per_token_is_unknown_under_speculative_decoding(tmp_path: Path, name: str):
    page = PAGES[name.partition(":")[0]]
    speculated = page(EARLIER, NEW) + metric(name, "counter", 7.0, model_name=MODEL)
    found = window(tmp_path, page(EARLIER), speculated)
    assert math.isnan(found.itl_s) and found.ttft_s == pytest.approx(0.5)


def test_one_of_several_models_must_be_named(tmp_path: Path):
    pages = vllm_page(EARLIER) + vllm_page(NEW, model="b"), vllm_page(EARLIER, NEW) + vllm_page(NEW, NEW, model="b")
    with pytest.raises(
        ValueError, match=rf"before.txt: has models \['{MODEL}', 'b'\], asked for none: name one of them"
    ):
        window(tmp_path, *pages)
    with pytest.raises(ValueError, match="asked for c"):
        window(tmp_path, *pages, model="c")
    found = window(tmp_path, *pages, model="b")
    assert (found.model_id, found.requests) == ("b", 40)


def test_names_and_labels_may_be_written_as_openmetrics_writes_them(tmp_path: Path):
    def open_metrics(page: str, seconds: float) -> str:
        lines = page.replace("vllm:", "vllm_").splitlines()
        exemplar = ' # {trace_id="a}\\"b"} 0.1 1795992649.0'
        stamped = [line if line.startswith("#") else f"{line} {seconds}{exemplar}" for line in lines]
        return "\n".join([*stamped, "# EOF", ""])

    strange = 'a"b\\c\n{d}, e="f" # g'
    pages = vllm_page(EARLIER, model=strange), vllm_page(EARLIER, NEW, model=strange)
    found = window(tmp_path, open_metrics(pages[0], 1000.5), open_metrics(pages[1], 1045.75))
    assert found.model_id == strange and found.ttft_s == pytest.approx(0.5)
    assert (found.seconds, found.clock) == (45.25, "sample times")


def test_times_of_samples_are_milliseconds_as_prometheus_federates_them(tmp_path: Path):
    def federated(page: str, ms: int) -> str:
        return "".join(f"{line} {ms}\n" for line in page.splitlines() if not line.startswith("#"))

    found = window(tmp_path, federated(vllm_page(EARLIER), 5000), federated(vllm_page(EARLIER, NEW), 95_000))
    assert (found.seconds, found.clock) == (90.0, "sample times")


def test_the_date_of_the_http_header_is_a_better_clock_than_the_files(tmp_path: Path):
    def answered(page: str, minute: int) -> str:
        return f"HTTP/1.1 200 OK\r\n{DATE.format(minute=minute)}\r\nserver: uvicorn\r\n\r\n{page}"

    found = window(tmp_path, answered(vllm_page(EARLIER), 1), answered(vllm_page(EARLIER, NEW), 3), seconds=0.0)
    assert (found.seconds, found.clock) == (120.0, "Date header")
    redirected = "HTTP/1.1 307 Temporary Redirect\r\nlocation: /metrics/\r\n\r\n" + answered(vllm_page(EARLIER, NEW), 3)
    found = window(tmp_path, vllm_page(EARLIER), redirected, seconds=60.0)
    assert (found.seconds, found.clock) == (60.0, "file times")


def test_files_that_were_copied_do_not_tell_the_time(tmp_path: Path):
    found = window(tmp_path, vllm_page(EARLIER), vllm_page(EARLIER, NEW), seconds=0.01)
    assert math.isnan(found.seconds) and math.isnan(found.running)
    assert found.ttft_s == pytest.approx(0.5)


def test_values_are_read_in_every_way_that_the_format_writes_them(tmp_path: Path):
    path = tmp_path / "page.txt"
    path.write_text('a 1e-3\nb{} +Inf\nc{x=""} NaN\n  d{x="1",} -2\t1795992649000\n\n# comment\n', encoding="utf-8")
    scrape = read_scrape(path)
    assert scrape.samples == pytest.approx(
        {("a", ()): 1e-3, ("b", ()): math.inf, ("c", (("x", ""),)): math.nan, ("d", (("x", "1"),)): -2.0}, nan_ok=True
    )
    assert scrape.times["sample times"] == 1795992649.0


REFUSED = {
    "no scrape": (
        "<html>\n<body>",
        "<html>\n<body>",
        r"before.txt:1: is '<html>', no sample .*save /metrics with curl",
    ),
    "an error page": ("{'error': 1}", "", "before.txt:1: is .*no sample"),
    "an error behind a header": ("HTTP/1.1 404 Not Found\n\n{}", "", r"before.txt:3: is '\{\}', no sample"),
    "half a line": (vllm_page(EARLIER)[:-20], "", r"before.txt:\d+: is 'vllm:e2e_.*no sample"),
    "an empty file": ("", "", "before.txt: has metrics of neither engine: save http://HOST:PORT/metrics"),
    "another server": (metric("up", "gauge", 1.0), "", "before.txt: has metrics of neither engine"),
    "both engines": (vllm_page(NEW) + sglang_page(NEW), "", "before.txt: has metrics of vLLM and SGLang"),
    "no model": (metric("vllm:up", "gauge", 1.0), "", r"before.txt: has models \[\], asked for none"),
    "two servers": (vllm_page(NEW), sglang_page(NEW), "after.txt: is of SGLang .*scrape one server twice"),
    "two models": (vllm_page(NEW), vllm_page(NEW, model="b"), "after.txt: is of vLLM b, but .*before.txt of vLLM Qwen"),
    "no prefill": (
        sglang_page(NEW).replace('"unified"', '"decode"'),
        "",
        "before.txt: is of a server that only prefills or only decodes: scrape one that does both",
    ),
    "a restart": (
        vllm_page(EARLIER),
        vllm_page(EARLIER, NEW, started=1.8e9),
        "after.txt: the server restarted since .*before.txt: scrape twice without a restart",
    ),
    "a restart by the counts": (
        sglang_page(EARLIER),
        sglang_page(NEW),
        r"e2e_request_latency_seconds_count fell from 100 in .*before.txt to 40, did the server restart\?: scrape",
    ),
    "a part that is gone": (
        vllm_page(NEW) + vllm_page(NEW, engine="1"),
        vllm_page(NEW, NEW),
        "e2e_request_latency_seconds_count fell from 40 in .*before.txt to 0",
    ),
    "swapped files": (
        vllm_page(EARLIER, NEW),
        vllm_page(EARLIER),
        r"e2e_request_latency_seconds_count fell from 140 in .* to 100, are the files swapped\?: give the earlier",
    ),
    "few requests": (
        vllm_page(EARLIER),
        vllm_page(EARLIER, NEW._replace(requests=29)),
        "after.txt: 29 requests ended since .*before.txt: wait longer, for 30 or more",
    ),
    "one file twice": (vllm_page(EARLIER), vllm_page(EARLIER), "0 requests ended since"),
    "no latencies": (
        without(vllm_page(EARLIER), "e2e_request"),
        without(vllm_page(EARLIER, NEW), "e2e_request"),
        "0 requests ended since",
    ),
    "a clock that stood still": (
        f"HTTP/1.1 200 OK\n{DATE.format(minute=1)}\n\n{vllm_page(EARLIER)}",
        f"HTTP/1.1 200 OK\n{DATE.format(minute=1)}\n\n{vllm_page(EARLIER, NEW)}",
        "after.txt: 0 s after .*before.txt, by its Date header, though requests ended",
    ),
    "a strange date": (
        f"HTTP/1.1 200 OK\ndate: tomorrow\n\n{vllm_page(EARLIER)}",
        "",
        "before.txt: Date header is 'tomorrow', no date",
    ),
}


@pytest.mark.parametrize(("before", "after", "complaint"), REFUSED.values(), ids=REFUSED.keys())
def test_a_window_that_says_nothing_is_refused_in_one_line(tmp_path: Path, before: str, after: str, complaint: str):
    with pytest.raises(ValueError, match=complaint) as raised:
        window(tmp_path, before, after)
    assert "\n" not in str(raised.value)


def test_swapped_files_are_told_by_their_times_where_nothing_says_when_the_server_began(tmp_path: Path):
    with pytest.raises(ValueError, match=r"are the files swapped\?"):
        window(tmp_path, sglang_page(EARLIER, NEW), sglang_page(EARLIER), seconds=-60.0)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"nowhere.txt: cannot be read as UTF-8 text"):
        read_window(tmp_path / "nowhere.txt", tmp_path / "nowhere.txt")
