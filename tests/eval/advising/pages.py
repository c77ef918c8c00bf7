"""Pages of /metrics with whole histograms of lengths, as SGLang 0.5.23 and vLLM write them."""

import os
from pathlib import Path

import numpy as np

from ..test_prometheus import MODEL, SCRAPED, histogram, labelled, metric

EDGES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
BEFORE, AFTER = 100, 2000
SECONDS = 1000.0


def lengths(mean_log: float, count: int = AFTER) -> np.ndarray:
    """Log-normal token counts, the same at every call."""
    return 1 + np.exp(np.random.default_rng(0).normal(mean_log, 0.8, count)).astype(int)


PROMPTS, OUTPUTS = lengths(7.0), lengths(4.5)


def buckets(name: str, values: np.ndarray, **labels: str) -> str:
    lines = [f"# TYPE {name} histogram"]
    for edge in (*map(float, EDGES), float("inf")):
        le = "+Inf" if edge == float("inf") else repr(edge)
        lines.append(f"{name}_bucket{labelled({**labels, 'le': le})} {float((values <= edge).sum())}")
    lines += [f"{name}_count{labelled(labels)} {float(len(values))}"]
    lines += [f"{name}_sum{labelled(labels)} {float(values.sum())}"]
    return "\n".join(lines) + "\n"


def sglang_page(count: int, reused: float, ranks: int = 1, **gauges: float) -> str:
    """After `count` requests; `gauges` by SGLang's names, of every rank."""
    labels = {"engine_type": "unified", "model_name": MODEL}
    prompts, outputs = PROMPTS[:count], OUTPUTS[:count]
    told = {"num_running_reqs": 9.0, **gauges}
    return "".join(
        [
            *(
                metric(f"sglang:{name}", "gauge", value, **labels, tp_rank=str(rank))
                for name, value in told.items()
                for rank in range(ranks)
            ),
            metric("sglang:cached_tokens_total", "counter", reused * float(prompts.sum()), **labels),
            metric("sglang:prompt_tokens_total", "counter", float(prompts.sum()), **labels),
            buckets("sglang:prompt_tokens_histogram", prompts, **labels),
            buckets("sglang:generation_tokens_histogram", outputs, **labels),
            histogram("sglang:e2e_request_latency_seconds", 3.0 * count, count, **labels),
            histogram("sglang:queue_time_seconds", 0.1 * count, count, **labels),
        ]
    )


def scrapes(folder: Path, before: str, after: str, seconds: float = SECONDS) -> str:
    """As --from-prometheus takes them."""
    paths = folder / "before.txt", folder / "after.txt"
    for path, page, written in zip(paths, (before, after), (SCRAPED, SCRAPED + seconds), strict=True):
        path.write_text(page, encoding="utf-8")
        os.utime(path, (written, written))
    return f"{paths[0]},{paths[1]}"


def sglang_scrapes(folder: Path, reused: float, **gauges: float) -> str:
    """Of a server that served AFTER - BEFORE requests in SECONDS."""
    return scrapes(folder, *(sglang_page(count, reused, **gauges) for count in (BEFORE, AFTER)))
