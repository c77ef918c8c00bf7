"""Traffic from two scrapes of a running engine's /metrics, as far as they tell it.

They tell rates, lengths, which part of the prompts was reused, and gauges of the pools. They tell neither which request
continues which, nor how long after, nor what would have been reused had it not been evicted. So a world is made up for
each of PAUSES_S, in which the replay reuses what the server did, at the split that the server has (SGLang's default
where that is not told). A pause at which it does not, however much is repeated, is ruled out.

In a world requests arrive as a Poisson process at the measured rate, per replica. Their lengths are drawn from the
measured histograms, log-uniform within a bucket, scaled to the measured mean (without histograms: all of the mean
length). A request may continue a conversation, and then repeats all of it: the one whose pause ended last. As nobody
knows which length comes when, its prompt is the next longer one of the SHUFFLED that are at hand. Pauses are
exponential; a conversation that is not continued within four mean pauses is over. How
often requests do so is what makes the replay agree.
"""

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from hbmgym.controllers.static import StaticController
from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.serving.core import Core, make_layout
from hbmgym.envs.traces.compose import compose_generated
from hbmgym.envs.traces.episode import Episode
from hbmgym.envs.traces.generators import NO_ROW, Rows, sessions
from hbmgym.envs.traces.seeds import seeds_for
from hbmgym.envs.traces.service import unloaded_service_s
from hbmgym.envs.workload import MEASURED_S, WARMUP_S
from hbmgym.eval.advising.settings import default_share
from hbmgym.eval.advising.traffic import MOST_REQUESTS, Composed, Traffic
from hbmgym.eval.calibration.prometheus import MetricsWindow, read_window
from hbmgym.eval.calibration.server_page import ServerPage, read_page
from hbmgym.eval.rollout import run_episode

PAUSES_S = (10.0, 30.0, 100.0, 300.0)
"""Mean pauses between a conversation's turns."""
AGREES = 0.05
"""A world's hit rate may be off by so much."""
KEPT_PAUSES = 4.0
SHUFFLED = 256
"""Prompts are taken from so many of those that come next."""
LEAST_MEASURED_S = 300.0
BISECTIONS = 6
_PROMPTS = ("request_prompt_tokens", "prompt_tokens_histogram")
_OUTPUTS = ("request_generation_tokens", "generation_tokens_histogram")
_GAUGES = {
    "running": ("num_requests_running", "num_running_reqs"),
    "waiting": ("num_requests_waiting", "num_queue_reqs"),
    "kv_usage": ("kv_cache_usage_perc", "gpu_cache_usage_perc", "full_token_usage"),
    "state_usage": ("mamba_usage",),
    "window_usage": ("swa_token_usage",),
    "kv_tokens": ("max_total_num_tokens",),
}
"""vLLM's and SGLang's names of what a page says of the moment. SGLang's token_usage is the fullest pool's, so it is not
among them."""
_COUNTS = ("running", "waiting")


@dataclass(frozen=True)
class Lengths:
    """A histogram of token counts."""

    edges: np.ndarray
    """float64 (buckets + 1,): the first bucket is from 1; the last finite edge ends the last one."""
    counts: np.ndarray
    """float64 (buckets,)."""
    mean: float

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """int64 (count,), at least 1 each."""
        if not self.counts.sum() > 0.0:
            return np.full(count, max(round(self.mean), 1))
        bucket = rng.choice(len(self.counts), count, p=self.counts / self.counts.sum())
        low, high = np.log(self.edges[:-1])[bucket], np.log(self.edges[1:])[bucket]
        tokens = np.exp(rng.uniform(low, high))
        return np.maximum(np.rint(tokens * self.mean / tokens.mean()), 1).astype(np.int64)


@dataclass(frozen=True)
class Metered:
    """What two scrapes say."""

    window: MetricsWindow
    replicas: int
    prompts: Lengths
    outputs: Lengths
    gauges: dict[str, float]
    """By the keys of _GAUGES, at the second scrape, over all replicas; what is missing is not told."""

    @property
    def reused(self) -> float:
        """Part of the prompt tokens; 0 where it is not told."""
        share = self.window.cached_share
        return min(max(share, 0.0), 1.0) if math.isfinite(share) else 0.0

    @property
    def rate_per_s(self) -> float:
        """Of one replica."""
        return self.window.requests / self.window.seconds / self.replicas


def read_metered(text: str, model: str = "") -> Metered:
    """From 'BEFORE,AFTER'; ValueError in one line for what `read_window` refuses, and where time, lengths or the part
    that was reused are not told."""
    before, separator, after = text.partition(",")
    if not (before and separator and after) or "," in after:
        raise ValueError(f"--from-prometheus is {text!r}, expected two files: BEFORE,AFTER")
    window = read_window(Path(before), Path(after), model)
    unknown = [
        name for name in ("seconds", "prompt_tokens", "output_tokens") if not math.isfinite(getattr(window, name))
    ]
    if unknown:
        raise ValueError(f"{after}: does not tell {unknown[0]} since {before}: save both with `curl -si`")
    first, last = (read_page(Path(path), model) for path in (before, after))
    return Metered(
        window=window,
        replicas=last.replicas,
        prompts=_lengths(first, last, _PROMPTS, window.prompt_tokens),
        outputs=_lengths(first, last, _OUTPUTS, window.output_tokens),
        gauges=_gauges(last),
    )


def _lengths(first: ServerPage, last: ServerPage, names: Sequence[str], mean: float) -> Lengths:
    """What came between the pages; all buckets empty where they have none."""
    for name in names:
        at_most: dict[float, float] = {}
        for page, sign in ((first, -1.0), (last, 1.0)):
            for (sample, labels), value in page.samples.items():
                if sample == f"{name}_bucket":
                    edge = float(dict(labels)["le"])
                    at_most[edge] = at_most.get(edge, 0.0) + sign * value
        finite = sorted(edge for edge in at_most if 1.0 <= edge < math.inf)
        if len(finite) > 1 and at_most[max(at_most)] > 0.0:
            counts = np.diff([0.0, *(at_most[edge] for edge in finite)])
            counts[-1] += at_most[max(at_most)] - at_most[finite[-1]]
            return Lengths(np.array([1.0, *finite]), np.maximum(counts, 0.0), mean)
    return Lengths(np.array([1.0, 2.0]), np.zeros(1), mean)


def _gauges(page: ServerPage) -> dict[str, float]:
    """Requests are those of all replicas, what is said of a pool is said of the fullest."""
    found = {key: page.gauge(*names) for key, names in _GAUGES.items()}
    return {key: sum(values) if key in _COUNTS else max(values) for key, values in found.items() if values}


def of_scrapes(metered: Metered, config: ServingConfig, load: float = 1.0) -> Traffic:
    """An episode for each world that agrees with the scrapes; if none does, for the one that agrees best."""
    share = split_of(metered.gauges.get("kv_tokens"), config)
    with closing(Core(config)) as core:
        held = default_share(config, core.layout)[1] if share is None else share
        tried = [_agreeing(pause_s, metered, core, held) for pause_s in (PAUSES_S if metered.reused else PAUSES_S[:1])]
    agreeing = [(world, off) for world, off in tried if abs(off) <= AGREES]
    kept = agreeing or [min(tried, key=lambda found: abs(found[1]))]
    return Traffic(
        source=f"scrapes of {metered.window.model_id}",
        part="all",
        workloads=tuple(_composed(world, config.page_tokens, load, len(kept)) for world, _ in kept),
        notes=tuple(_notes(metered, kept, bool(agreeing), share)),
        kv_share=share,
        running=metered.window.running if math.isfinite(metered.window.running) else None,
    )


def split_of(kv_tokens: float | None, config: ServingConfig) -> float | None:
    """The kv_share at which the KV pool holds so many tokens; None where that is not told, or is not of this budget."""
    layout = make_layout(config)
    if kv_tokens is None:
        return None
    share = kv_tokens * layout.page_bytes / config.page_tokens / layout.budget_bytes
    return share if layout.share_bounds[0] <= share <= layout.share_bounds[1] else None


def _agreeing(pause_s: float, metered: Metered, core: Core, share: float) -> tuple["Conversations", float]:
    """The world of that pause whose hit rate is nearest to the server's, and by how much it is off."""
    low, high = 0.0, 1.0 if metered.reused else 0.0
    found = [_tried(Conversations(f"pause-{pause_s:g}s", metered, pause_s, high), core, share)]
    while found[0][1] > 0.0 and len(found) <= BISECTIONS:
        world = Conversations(f"pause-{pause_s:g}s", metered, pause_s, 0.5 * (low + high))
        found.append(_tried(world, core, share))
        if found[-1][1] < 0.0:
            low = world.often
        else:
            high = world.often
    return min(found, key=lambda one: abs(one[1]))


def _tried(world: "Conversations", core: Core, share: float) -> tuple["Conversations", float]:
    """And what it reuses more than the server did."""
    (episode,) = _composed(world, core.config.page_tokens, 1.0, len(PAUSES_S)).episodes.values()
    cell = run_episode(StaticController(share), core, episode).cell
    return world, float(cell["hit_rate"]) - world.metered.reused


def _composed(world: "Conversations", page_tokens: int, load: float, worlds: int) -> Composed:
    """Its episode, as long as MOST_REQUESTS of so many worlds allow."""
    return Composed(world.name, partial(_compose, world, load, worlds), page_tokens)


def _compose(world: "Conversations", load: float, worlds: int, page_tokens: int) -> dict[int, Episode]:
    rate_per_s = load * world.metered.rate_per_s
    most_s = MOST_REQUESTS / worlds / rate_per_s
    span_s = WARMUP_S + min(max(most_s - WARMUP_S, LEAST_MEASURED_S), MEASURED_S)
    (seed,) = seeds_for("validation", 1)
    rng = np.random.default_rng(seed)
    arrival_s = np.sort(rng.uniform(0.0, span_s, max(rng.poisson(rate_per_s * span_s), 1)))
    trace = sessions([(world, arrival_s)], rng, name=world.name, span_s=span_s)
    return {seed: compose_generated(trace, seed=seed, page_tokens=page_tokens, warmup_s=WARMUP_S)}


def _notes(
    metered: Metered, kept: Sequence[tuple["Conversations", float]], agree: bool, share: float | None
) -> Iterator[str]:
    """What is told, what is assumed, and how well that agrees."""
    window = metered.window
    shape = "by their histogram" if metered.prompts.counts.sum() > 0 else "all of the mean length"
    yield (
        f"told in {window.seconds:.0f} s ({window.clock}): {window.requests:.0f} requests on {metered.replicas} "
        f"replica(s), prompts of {window.prompt_tokens:.0f} tokens ({shape}), outputs of {window.output_tokens:.0f}, "
        f"{metered.reused:.0%} of the prompts reused"
    )
    if gauges := [f"{key.replace('_', ' ')} {value:g}" for key, value in metered.gauges.items()]:
        yield f"at the second scrape: {', '.join(gauges)} (SGLang's usage leaves out what may be evicted)"
    if share is None and "kv_tokens" in metered.gauges:
        yield "so many tokens of KV are not of this memory: give --hbm-gib, or the dtypes that the server has"
    yield (
        "assumed: Poisson arrivals; what is reused is the conversation so far, after an exponential pause. Not told: "
        "how long pauses are, and what would be reused that was evicted"
    )
    held = "SGLang's default split" if share is None else "the server's split"
    pauses = ", ".join(f"{world.pause_s:g}" for world, _ in kept)
    if not metered.reused:
        yield "nothing was reused, so nothing is: no conversation goes on"
    elif agree:
        yield f"mean pauses of {pauses} s let the replay reuse what the server did, at {held}: an episode each"
    else:
        off = f"{kept[0][1]:+.2f}"
        yield f"no pause lets the replay reuse what the server did at {held}; of {pauses} s it is off by {off}"


@dataclass(frozen=True)
class Conversations:
    """A traffic class (`generators.TrafficClass`) whose starts are requests."""

    name: str
    metered: Metered
    pause_s: float
    often: float
    """Probability with which a request continues a conversation, if one fits."""
    mean_requests: float = 1.0
    lead_s: float = 0.0

    def draw(self, starts_s: np.ndarray, rng: np.random.Generator, span_s: float, block_size: int) -> Rows:
        """A request at every start."""
        count = len(starts_s)
        prompts, outputs = self.metered.prompts.draw(rng, count), self.metered.outputs.draw(rng, count)
        pauses_s, may = rng.exponential(self.pause_s, count), rng.uniform(size=count) < self.often
        ends_s = starts_s + unloaded_service_s(outputs)
        over_s = ends_s + KEPT_PAUSES * self.pause_s
        talk = Talk(starts_s, ends_s + pauses_s, over_s, outputs, prompts)
        before, prompts = talk.continued(may, rng)
        session, turn = np.empty(count, np.int64), np.zeros(count, np.int64)
        for row, earlier in enumerate(before.tolist()):
            session[row] = session[earlier] if earlier >= 0 else row
            turn[row] = turn[earlier] + 1 if earlier >= 0 else 0
        order = np.lexsort((turn, session))
        place = np.empty(count, np.int64)
        place[order] = np.arange(count)
        follows = before >= 0
        source = np.where(follows, place[before], NO_ROW)
        _, session = np.unique(session, return_inverse=True)
        columns = {
            "arrival_s": starts_s,
            "input_tokens": prompts,
            "output_tokens": outputs,
            "gap_s": np.where(follows, np.maximum(starts_s - ends_s[before], 0.0), np.nan),
            "session": session,
            "turn": turn,
            "parent": source,
            "source": source,
            "repeated": np.where(follows, prompts[before] // block_size, 0),
        }
        return Rows(**{name: values[order] for name, values in columns.items()})


@dataclass(frozen=True)
class Talk:
    """Requests, any of which may continue what an earlier one had said. Arrays of shape (n,)."""

    starts_s: np.ndarray
    ready_s: np.ndarray
    """When the pause after a row is over."""
    over_s: np.ndarray
    """Until when it may be continued."""
    outputs: np.ndarray
    lengths: np.ndarray
    """Of prompts, in no order."""

    def continued(self, may: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """int64 (n,): the row that each row continues, NO_ROW, and the prompts; only those continue that `may`."""
        found, prompts = np.full(len(may), NO_ROW), np.empty_like(self.lengths)
        at_hand, coming = sorted(self.lengths[:SHUFFLED].tolist()), iter(self.lengths[SHUFFLED:].tolist())
        resting: list[tuple[float, int]] = []  # by the end of the pause
        for row, now_s in enumerate(self.starts_s.tolist()):
            place = -1
            rested = bisect_left(resting, (now_s, NO_ROW)) if may[row] else 0
            while rested and place < 0:
                rested -= 1
                _, earlier = resting.pop(rested)
                longer = bisect_right(at_hand, int(prompts[earlier] + self.outputs[earlier]))
                if now_s <= self.over_s[earlier] and longer < len(at_hand):
                    found[row], place = earlier, longer
            prompts[row] = at_hand.pop(place if place >= 0 else int(rng.integers(len(at_hand))))
            at_hand += [] if (length := next(coming, None)) is None else [length]
            at_hand.sort()
            insort(resting, (float(self.ready_s[row]), row))
        return found, prompts
