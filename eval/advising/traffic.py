"""The episodes that a split is judged on: of a scenario, a recorded trace, or what scrapes of a running engine say.

A trace with more than MOST_REQUESTS requests or MOST_IDS page ids is cut: up to CUTS stretches of equal length, evenly
spread over it, which keeps its rate, its sessions and what they share.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np

from hbmgym.envs.traces.combine import cut
from hbmgym.envs.traces.compose import MIN_MEASURED_S, START_RANGE
from hbmgym.envs.traces.episode import Episode
from hbmgym.envs.traces.seeds import Part, seeds_for
from hbmgym.envs.traces.trace import Trace, TraceError
from hbmgym.envs.workload import WARMUP_S, PaperTrafficWorkload, ScenarioWorkload, TraceWorkload

MOST_REQUESTS = 30_000
MOST_IDS = 4_000_000
"""More of a trace are not replayed, all stretches together; one episode could hold twice as many (`MAX_REFS`)."""
MOST_OVERRUN = 3.0
"""The shortest stretch that can be measured may hold so many times that; beyond it the trace is refused."""
CUTS = 4
PagedWorkload = ScenarioWorkload | PaperTrafficWorkload | TraceWorkload


@dataclass(frozen=True)
class Composed:
    """A workload whose episodes are there already: they are looked at by many splits."""

    name: str
    compose: Callable[[int], Mapping[int, Episode]]
    """The episodes by seed, from the tokens of a page."""
    page_tokens: int

    @cached_property
    def episodes(self) -> Mapping[int, Episode]:
        """By seed."""
        return self.compose(self.page_tokens)

    def episode(self, part: Part, seed: int) -> Episode:
        """The episode of a seed."""
        return self.episodes[seed]


@dataclass(frozen=True)
class Traffic:
    """What is replayed."""

    source: str
    """As the report calls it."""
    part: Part
    """Of the data, that its seeds belong to."""
    workloads: tuple[Composed, ...]
    notes: tuple[str, ...] = ()
    """What was cut, and what is assumed."""
    kv_share: float | None = None
    """That it was served with, where that is known."""
    running: float | None = None
    """Requests that ran there at once, on average."""
    shared_rows: bool = False
    """Episodes are of the same rows, so that intervals over them say little."""

    @property
    def cases(self) -> list[tuple[int, int]]:
        """Workload and seed of every episode."""
        return [(place, seed) for place, workload in enumerate(self.workloads) for seed in workload.episodes]

    @property
    def episodes(self) -> list[Episode]:
        """In the order of `cases`."""
        return [self.workloads[place].episodes[seed] for place, seed in self.cases]

    def paged(self, page_tokens: int) -> list[Episode]:
        """The same episodes in pages of so many tokens."""
        return [episode for workload in self.workloads for episode in workload.compose(page_tokens).values()]

    def mean(self, column: str) -> float:
        """Mean of a column over the measured rows of all episodes."""
        measured = [episode.rows[column][episode.rows["measured"] == 1] for episode in self.episodes]
        return float(np.concatenate(measured).mean())

    @property
    def requests(self) -> int:
        """Measured ones."""
        return sum(int((episode.rows["measured"] == 1).sum()) for episode in self.episodes)

    @property
    def rate_per_s(self) -> float:
        """Requests per second."""
        return self.requests / sum(episode.horizon_s - episode.warmup_s for episode in self.episodes)


def composed(workload: PagedWorkload, part: Part, seeds: Sequence[int]) -> Composed:
    """Raises TraceError where there is no such episode."""
    found = Composed(workload.name, partial(_compose, workload, part, seeds), workload.page_tokens)
    _ = found.episodes
    return found


def _compose(workload: PagedWorkload, part: Part, seeds: Sequence[int], page_tokens: int) -> dict[int, Episode]:
    paged = replace(workload, page_tokens=page_tokens)
    return {seed: paged.episode(part, seed) for seed in seeds}


def of_scenario(workload: ScenarioWorkload | PaperTrafficWorkload, count: int) -> Traffic:
    """Its first validation episodes."""
    return Traffic(workload.name, "validation", (composed(workload, "validation", seeds_for("validation", count)),))


def of_trace(workload: TraceWorkload, count: int) -> Traffic:
    """The whole of it with several seeds, or stretches of it; raises TraceError where both are impossible."""
    trace, load = workload.trace, workload.load
    stretches = _stretches(trace, load, workload.page_tokens) if trace.trace_kind == "open-loop" else []
    if not stretches:
        seeds = seeds_for("validation", count)
        return Traffic(trace.name, "all", (composed(workload, "all", seeds),), shared_rows=True)
    pieces = []
    for number, (from_s, to_s) in enumerate(stretches, 1):
        piece = replace(cut(trace, from_s, to_s), name=f"{trace.name}-{number}")
        pieces.append(composed(replace(workload, trace=piece), "all", seeds_for("validation", 1)))
    kept = sum(len(piece.episodes[seed].rows) for piece in pieces for seed in piece.episodes)
    where = ", ".join(f"{from_s:.0f} to {to_s:.0f} s" for from_s, to_s in stretches)
    note = f"of the trace's {len(trace):,} requests {kept:,} are replayed: those from {where} after the first"
    return Traffic(trace.name, "all", tuple(pieces), (note,))


def _stretches(trace: Trace, load: float, page_tokens: int) -> list[tuple[float, float]]:
    """Where they begin and end, seconds after the first arrival; none if the whole trace may be replayed."""
    span_s = trace.end_s - float(trace.arrival_s[0])
    ids = float((trace.block_counts * max(trace.block_size, 1) / page_tokens).sum())
    part = min(1.0, MOST_REQUESTS / len(trace), MOST_IDS / max(ids, 1.0))
    if part == 1.0:
        return []
    least_s = 1.01 * load * (MIN_MEASURED_S + WARMUP_S) / (1.0 - START_RANGE)
    count = max(1, min(CUTS, int(part * span_s / least_s)))
    length_s = min(max(part * span_s / count, least_s), span_s)
    if count == 1 and length_s > MOST_OVERRUN * part * span_s:
        raise TraceError(
            f"{trace.name}: the shortest stretch that can be measured, {length_s:.0f} s, holds {length_s / span_s:.0%} "
            f"of its {len(trace):,} requests: more than one engine is asked for (a smaller --load, or "
            "`python -m hbmgym.envs.traces thin`)"
        )
    middles_s = (np.arange(count) + 0.5) * span_s / count
    return [(float(middle) - length_s / 2, float(middle) + length_s / 2) for middle in middles_s]
