"""A window of a server's own metrics: two scrapes of /metrics of vLLM or SGLang, and what happened between them.

Counters, and sums and counts of histograms, are differenced; a mean is the one difference over the other. Names were
read in vLLM's vllm/v1/metrics/loggers.py (a6f0308c, 005a810b), docs/design/metrics.md (0328b592) and pull requests, and
in SGLang's srt/metrics/collector.py (0.5.4, 0.5.9) and srt/observability/metrics_collector.py and req_time_stats.py
(0.5.10, 0.5.12, 0.5.15, 0.5.23). What to know of them:

- Times start where the server sees a request, so none has the client's or the network's share in it. vLLM's TTFT starts
  with tokenisation, its queue and prefill intervals are the scheduler's: docs/design/metrics.md, interval calculations.
- vLLM renamed time_per_output_token_seconds to inter_token_latency_seconds in 0.11 (PR 24110) and gpu_prefix_cache_* to
  prefix_cache_* in 0.9; for a while both were there. It tells computed tokens since PR 30189 of December 2025.
- SGLang tells the time of a prefill from 0.5.10 on, as a stage of per_stage_req_latency_seconds, computed tokens from
  0.5.12 on. 0.5.23 tells whether a request streamed; one that did not has a TTFT of many tokens.
- vLLM's iteration_tokens_total is a histogram in spite of its name. It counts a prompt whole, cached tokens included,
  in the iteration that ends its prefill. SGLang has nothing like it.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from hbmgym.eval.calibration.exposition import CLOCKS, Key, Labels
from hbmgym.eval.calibration.server_page import ServerPage, read_page

MOST = 1e8
"""No mean is larger."""
FEWEST_REQUESTS = 30
"""That end within a window: the ones that reach over its ends are counted wrongly."""
_FINISHED = "e2e_request_latency_seconds"
_MEANS = {
    "ttft_s": ("time_to_first_token_seconds",),
    "queue_s": ("request_queue_time_seconds", "queue_time_seconds"),
    "prefill_s": ("request_prefill_time_seconds", "per_stage_req_latency_seconds"),
    "itl_s": ("inter_token_latency_seconds", "time_per_output_token_seconds"),
    "e2e_s": (_FINISHED,),
    "prompt_tokens": ("request_prompt_tokens", "prompt_tokens_histogram"),
    "output_tokens": ("request_generation_tokens", "generation_tokens_histogram"),
    "computed_tokens": ("request_prefill_kv_computed_tokens", "uncached_prompt_tokens_histogram"),
    "iteration_tokens": ("iteration_tokens_total",),
}
"""Histograms by what their mean is called here: vLLM's and SGLang's name, or the new one and the old one."""
_LABELS = {
    "time_to_first_token_seconds": ("is_streaming", "true"),
    "per_stage_req_latency_seconds": ("stage", "prefill_forward"),
}
"""The label that a sample of a histogram must have, unless it has none of that name."""


@dataclass(frozen=True)
class MetricsWindow:
    """Means over the requests of a window; NaN where the engine does not tell."""

    engine: str
    """vLLM or SGLang."""
    model_id: str
    """The label model_name: the name that it is served by."""
    seconds: float
    """Between the scrapes; NaN if only the times of the files tell and they are less than a second apart."""
    clock: str
    """Which of `exposition.CLOCKS` says so."""
    requests: float
    """Finished."""
    ttft_s: float
    """Of streaming requests, where the engine tells which they are."""
    queue_s: float
    prefill_s: float
    """From being scheduled to the first token."""
    itl_s: float
    """NaN under speculative decoding too, where an iteration gives several tokens."""
    e2e_s: float
    prompt_tokens: float
    output_tokens: float
    cached_share: float
    """Of prompt tokens; 0 if the prefix cache is off."""
    running: float
    """Requests of a replica that are not waiting, by Little's law: their seconds outside the queue over the window's
    and the replicas'. The gauges of two instants would say less."""
    iteration_tokens: float
    iterations: float
    """That gave a token, of all replicas."""

    @property
    def computed_tokens(self) -> float:
        """Per prompt."""
        return self.prompt_tokens * (1.0 - self.cached_share)

    @property
    def decoding(self) -> float:
        """Those of `running` that have their first token."""
        return self.running * _ratio(self.e2e_s - self.ttft_s, self.e2e_s - self.queue_s)


def read_window(before: Path, after: Path, model: str = "") -> MetricsWindow:
    """The window between two scrapes of one server; `model`: its model_name, needed if the server has several.

    Raises ValueError with one line if a file is no scrape, the files are swapped or of different servers, the server
    restarted or prefills elsewhere, or fewer than FEWEST_REQUESTS requests ended.
    """
    first, last = read_page(before, model), read_page(after, model)
    if (first.engine, first.model) != (last.engine, last.model):
        raise ValueError(
            f"{after}: is of {last.engine} {last.model}, but {before} of {first.engine} {first.model}: "
            "scrape one server twice"
        )
    return _Window(first, last).read()


@dataclass(frozen=True)
class _Window:
    first: ServerPage
    last: ServerPage

    def read(self) -> MetricsWindow:
        if self._same_process() is False:
            self._refuse("the server restarted since {}", "scrape twice without a restart")
        requests = self.change(f"{_FINISHED}_count")
        if not requests >= FEWEST_REQUESTS:
            ended = 0 if math.isnan(requests) else int(requests)
            self._refuse(f"{ended} requests ended since {{}}", f"wait longer, for {FEWEST_REQUESTS} or more")
        means = {field: self.mean(names) for field, names in _MEANS.items()}
        for field, total in (("prompt_tokens", "prompt_tokens_total"), ("output_tokens", "generation_tokens_total")):
            if math.isnan(means[field]):
                means[field] = _ratio(self.change(total), requests)
        uncached = _ratio(means.pop("computed_tokens"), means["prompt_tokens"])
        if self.last.speculates:
            means["itl_s"] = math.nan
        if absurd := [field for field, value in means.items() if value >= MOST]:
            self._refuse(f"the mean of {absurd[0]} since {{}} is {means[absurd[0]]:g}", "see the sums and counts")
        seconds, clock = self._seconds()
        return MetricsWindow(
            engine=self.last.engine,
            model_id=self.last.model,
            seconds=seconds,
            clock=clock,
            requests=requests,
            cached_share=self._cached_share() if math.isnan(uncached) else 1.0 - uncached,
            running=requests * (means["e2e_s"] - means["queue_s"]) / seconds / self.last.replicas,
            iterations=self.change("iteration_tokens_total_count"),
            **means,
        )

    def change(self, name: str, label: tuple[str, str] | None = None) -> float:
        """By how much a counter grew, over all label sets, but for those with another value of `label`."""
        keys = [key for key in {**self.first.samples, **self.last.samples} if key[0] == name and _has(key[1], label)]
        return math.fsum(self._growth(key) for key in keys) if keys else math.nan

    def mean(self, names: Iterable[str]) -> float:
        """Of the first of these histograms that saw anything."""
        for name in names:
            label = _LABELS.get(name)
            if (count := self.change(f"{name}_count", label)) > 0:
                return self.change(f"{name}_sum", label) / count
        return math.nan

    def _growth(self, key: Key) -> float:
        was, now = self.first.samples.get(key, 0.0), self.last.samples.get(key, 0.0)
        if now < was:
            swapped = self._same_process() or self._elapsed(self._clock()) < 0
            cause = "are the files swapped?" if swapped else "did the server restart?"
            remedy = "give the earlier scrape first" if swapped else "scrape twice without a restart"
            self._refuse(f"{key[0]} fell from {was:g} in {{}} to {now:g}, {cause}", remedy)
        return now - was

    def _same_process(self) -> bool | None:
        """None if the pages do not tell."""
        first, last = self.first.births, self.last.births
        same = [first[key] == last[key] for key in first.keys() & last.keys()]
        return all(same) if same else None

    def _cached_share(self) -> float:
        """vLLM's queries are tokens, and stand still if the cache is off. SGLang shows no hits before the first."""
        if self.last.engine == "SGLang":
            hits = self.change("cached_tokens_total")
            return _ratio(0.0 if math.isnan(hits) else hits, self.change("prompt_tokens_total"))
        for cache in ("prefix_cache", "gpu_prefix_cache"):
            if not math.isnan(queries := self.change(f"{cache}_queries_total")):
                return self.change(f"{cache}_hits_total") / queries if queries else 0.0
        return math.nan

    def _clock(self) -> str:
        first, last = self.first.scrape.times, self.last.scrape.times
        return next(clock for clock in CLOCKS if clock in first and clock in last)

    def _elapsed(self, clock: str) -> float:
        return self.last.scrape.times[clock] - self.first.scrape.times[clock]

    def _seconds(self) -> tuple[float, str]:
        clock = self._clock()
        seconds = self._elapsed(clock)
        if seconds >= 1.0:
            return seconds, clock
        if clock != "file times":
            self._refuse(f"{seconds:g} s after {{}}, by its {clock}, though requests ended", "scrape again")
        return math.nan, clock

    def _refuse(self, what: str, remedy: str) -> NoReturn:
        """Of the later page; {} in `what` is the earlier one's file."""
        raise ValueError(f"{self.last.scrape.path}: {what.format(self.first.scrape.path)}: {remedy}")


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan


def _has(labels: Labels, wanted: tuple[str, str] | None) -> bool:
    return wanted is None or dict(labels).get(wanted[0], wanted[1]) == wanted[1]
