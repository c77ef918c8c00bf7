"""A user's own runs: what `vllm bench serve` and SGLang's `bench_serving` save with every request in it.

The formats were read in vLLM's vllm/benchmarks/serve.py and lib/endpoint_request_func.py (commits 009e6d4a, 02cfb534)
and its older benchmarks/benchmark_serving.py (0049e29c), and in SGLang's bench_serving.py (0.5.4, 0.5.9) and
benchmark/serving.py (0.5.15, 0.5.23). What they have in common:

- Lists with one entry per request, in the order in which requests were created. They wait for one of `max_concurrency`
  places first come, first served, so they are sent in that order. vLLM's newer files also have `start_times`.
- `input_lens` and `output_lens` in tokens; `ttfts` and `itls` in seconds, an inter-token gap per token or chunk.
- A failed request has 0 in output_lens and a text in `errors`, or, in SGLang, a TTFT of 0: no token ever came.
- One JSON object per run. vLLM with `--append-result`, and SGLang always, append further ones to the same file.

SGLang's files have no date; 0.5.9 tells the server's settings (`server_info`), 0.5.4 does not. vLLM's tell nothing of
the server, neither its version nor whether its prefix cache was on; `--backend openai` is taken for vLLM.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from json import JSONDecodeError, JSONDecoder
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

SUFFIXES = (".json", ".jsonl")
MOST_TOKENS = 10_000_000
MOST_CACHED = 0.01
"""Share of prompt tokens: a first token or a chat template that all prompts have in common is less."""
_LISTS = ("input_lens", "output_lens", "ttfts", "itls")
_NOT_INDEPENDENT = ("agentic", "generated-shared-prefix", "mooncake")
"""SGLang's data sets whose requests come at a trace's times, in turns, or share prefixes."""
_CONTENT = re.compile(r"\S")


@dataclass(frozen=True)
class BenchRun:
    """One closed-loop run: a client sends its next request when its last one has ended. Arrays are read-only."""

    file: str
    """Name; with the line of the run where a file can have several."""
    engine: str
    """vLLM or SGLang, by the benchmark's backend."""
    date: str
    """As the file has it (vLLM: 20261128-224010), or empty."""
    model_id: str
    """Name or path, or empty."""
    concurrency: int
    """Clients."""
    input_tokens: np.ndarray
    """Shape (n,), int64, as `output_tokens`: of every successful request, in the order in which they were sent."""
    output_tokens: np.ndarray
    ttft_s: np.ndarray
    """Shape (n,), float64, as `tpot_s`: seconds at the client, from sending the request to its first token."""
    tpot_s: np.ndarray
    """Seconds per token after the first one; NaN for requests with one token, or whose tokens came all at once."""
    duration_s: float
    """Of the whole run."""
    failed: int
    """Requests that are left out of the arrays."""


def read_bench_folder(folder: Path) -> list[BenchRun]:
    """The runs in a folder's .json and .jsonl files, by file name and line; files of other kinds are passed over.

    Raises ValueError with one line for the first run that cannot be replayed, and if there is no run at all.
    """
    if not folder.is_dir():
        _refuse(str(folder), "is not a folder", "name the one that has the benchmark's result files")
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())
    runs = [run for path in files for run in _read(path)]
    if not runs:
        found = f"{len(files)} files ({', '.join(SUFFIXES)}), none of vllm bench serve or sglang.bench_serving"
        _refuse(str(folder), found, "name the folder that results were saved in")
    return runs


def _read(path: Path) -> list[BenchRun]:
    values = list(_values(path))
    named = len(values) == 1 and path.suffix == ".json"
    return [
        _run(str(path) if named else f"{path}:{line}", value)
        for line, value in values
        if isinstance(value, dict) and "completed" in value and isinstance(value.get("duration"), (int, float))
    ]


def _values(path: Path) -> Iterator[tuple[int, Any]]:
    """Line and content of the JSON values that follow one another in a file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as UTF-8 text ({error}): move it out of the folder") from error
    found = _CONTENT.search(text)
    while found:
        line = text.count("\n", 0, found.start()) + 1
        try:
            value, end = JSONDecoder().raw_decode(text, found.start())
        except (JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path}:{line}: is not JSON ({error}): remove the file, or what was cut off") from error
        yield line, value
        found = _CONTENT.search(text, end)


def _run(place: str, record: Mapping[str, Any]) -> BenchRun:
    if missing := [name for name in _LISTS if not isinstance(record.get(name), list)]:
        flags = "--save-result --save-detailed" if "tokenizer_id" in record else "--output-details"
        _refuse(place, f"has no {missing[0]}, only means", f"run the benchmark with {flags}")
    server = info if isinstance(info := record.get("server_info"), dict) else {}
    engine = _engine(place, record)
    _check_loop(place, record)
    _check_reuse(place, record, server)
    _check_decoding(place, record, server)
    columns, failed = _columns(place, record)
    return BenchRun(
        file=Path(place).name,
        engine=engine,
        date=str(record.get("date") or ""),
        model_id=str(record.get("model_id") or server.get("model_path") or ""),
        concurrency=record["max_concurrency"],
        duration_s=float(record["duration"]),
        failed=failed,
        **columns,
    )


def _engine(place: str, record: Mapping[str, Any]) -> str:
    backend = str(record.get("backend") or record.get("endpoint_type"))
    for start, engine in (("sglang", "SGLang"), ("vllm", "vLLM"), ("openai", "vLLM")):
        if backend.startswith(start):
            return engine
    _refuse(place, f"backend is {backend!r}", "only vLLM and SGLang can be calibrated")


def _check_loop(place: str, record: Mapping[str, Any]) -> None:
    clients = record.get("max_concurrency")
    if type(clients) is not int or clients < 1:
        _refuse(place, f"max_concurrency is {clients}", "run a closed loop: --max-concurrency N, no --request-rate")
    rate = record.get("request_rate", "inf")
    if rate not in ("inf", math.inf) or record.get("ramp_up_strategy"):
        _refuse(place, f"request_rate is {rate}, an open loop", "run a closed loop, without --request-rate or ramp-up")
    if str(dataset := record.get("dataset_name")).startswith(_NOT_INDEPENDENT):
        _refuse(place, f"dataset_name is {dataset}", "run independent requests: --dataset-name random")


def _check_reuse(place: str, record: Mapping[str, Any], server: Mapping[str, Any]) -> None:
    """What SGLang's cache report says counts, else whether its cache was on: seeds repeat prompts from run to run."""
    remedy = "start SGLang with --disable-radix-cache"
    if report := record.get("cache_report"):
        try:
            cached = report["total_cached_tokens"] / max(report["total_prompt_tokens"], 1)
        except (KeyError, TypeError):
            _refuse(place, "cache_report has no counts of cached and prompt tokens", "run it again")
        if cached > MOST_CACHED:
            _refuse(place, f"{cached:.0%} of the prompts were cached", remedy)
    elif server.get("disable_radix_cache") is False:
        _refuse(place, "the prefix cache was on", f"{remedy}, or show by --cache-report that nothing was reused")


def _check_decoding(place: str, record: Mapping[str, Any], server: Mapping[str, Any]) -> None:
    """Several tokens per iteration (vLLM reports them where they occur), or prompts computed elsewhere."""
    algorithm = str(server.get("speculative_algorithm") or "NONE")
    speculative = any(name.startswith(("spec_decode_", "diffusion_")) for name in record)
    if speculative or record.get("accept_length") or algorithm != "NONE":
        _refuse(place, "tokens were speculated", "run without speculative decoding: its time per token is not modelled")
    if "decode" in server:
        _refuse(place, "prefill and decode ran on different servers", "only servers that do both are modelled")


def _columns(place: str, record: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], int]:
    """The arrays of a `BenchRun`, and how many requests failed."""
    try:
        decode = [math.fsum(gaps) for gaps in record["itls"]]
        started = record.get("start_times") or range(len(decode))
        table = np.array([*(record[name] for name in _LISTS[:3]), decode, started], np.float64)
        ok = np.array([not error for error in record.get("errors") or [""] * len(decode)], bool)
        ok &= (table[:3] > 0).all(0)
        table = table[:, ok]
    except (TypeError, ValueError, IndexError, OverflowError) as error:
        _refuse(place, f"{', '.join(_LISTS)} are not numbers, an entry per request ({error})", "run it again")
    if not ok.any():
        _refuse(place, f"none of {len(ok)} requests succeeded", "see its field errors, and run it again")
    if not (table[:2] <= MOST_TOKENS).all():
        _refuse(place, f"a request has more than {MOST_TOKENS:,} tokens", "see its input_lens and output_lens")
    sent, served, ttft, decoding = table[:-1, np.argsort(table[-1], kind="stable")]
    columns = {"input_tokens": sent.astype(np.int64), "output_tokens": served.astype(np.int64), "ttft_s": ttft}
    columns["tpot_s"] = _tpot_s(place, served, decoding)
    for column in columns.values():
        column.flags.writeable = False
    return columns, int((~ok).sum())


def _tpot_s(place: str, output_tokens: np.ndarray, decode_s: np.ndarray) -> np.ndarray:
    """As both benchmarks define it: the time from the first token to the last one over the tokens after the first."""
    timed = (output_tokens > 1) & (decode_s > 0)
    if not timed.any() and (output_tokens > 1).any():
        _refuse(place, "itls are empty: tokens were not streamed", "run it again without --disable-stream")
    return np.divide(decode_s, output_tokens - 1, out=np.full(len(timed), np.nan), where=timed)


def _refuse(place: str, what: str, remedy: str) -> NoReturn:
    raise ValueError(f"{place}: {what}: {remedy}")
