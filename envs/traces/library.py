"""Open-loop order of a session library: recordings start as a Poisson process, rows at offsets with clipped gaps."""

from functools import lru_cache

import numpy as np

from hbmgym.envs.traces.pages import Selection
from hbmgym.envs.traces.precedence import MAX_GAP_S, recorded_ends_s
from hbmgym.envs.traces.seeds import Part
from hbmgym.envs.traces.split import part_sources, sources
from hbmgym.envs.traces.trace import Trace, TraceError

SESSION_RATE_PER_S = 0.02
"""Recordings started per second at load 1."""
MEASURED_S = 1800.0


def select_sessions(
    trace: Trace, part: Part, rng: np.random.Generator, load: float, warmup_s: float
) -> tuple[Selection, float]:
    """Rows of one episode and its horizon in seconds; a recording starts again only when all of the part have."""
    if part == "final":
        raise TraceError(f"{trace.name}: part is 'final', expected train, validation, test or all (it is recorded)")
    names = part_sources(trace, part)
    if not len(names):
        raise TraceError(f"{trace.name}: part {part!r} has 0 sources, expected at least 1 (take part 'all')")
    horizon_s = warmup_s + MEASURED_S
    starts_s = _poisson_starts(rng, SESSION_RATE_PER_S * load, horizon_s)
    rounds = -(-len(starts_s) // len(names))
    picks = np.concatenate([names[:0], *(rng.permutation(names) for _ in range(rounds))])[: len(starts_s)]
    offsets_s = _offsets_s(trace)
    pieces = [_play(trace, offsets_s, *play) for play in zip(picks.tolist(), starts_s.tolist(), strict=True)]
    row = np.concatenate([np.zeros(0, np.int64), *(rows for rows, _ in pieces)])
    arrival_s = np.concatenate([np.zeros(0), *(times for _, times in pieces)])
    copy = np.repeat(np.arange(len(pieces)) // len(names), [len(rows) for rows, _ in pieces])
    order = np.argsort(arrival_s, kind="stable")
    order = order[arrival_s[order] < horizon_s]
    return Selection(row[order], copy[order], arrival_s[order]), horizon_s


def _poisson_starts(rng: np.random.Generator, rate_per_s: float, end_s: float) -> np.ndarray:
    return np.sort(rng.uniform(0.0, end_s, rng.poisson(rate_per_s * end_s)))


def _play(trace: Trace, offsets_s: np.ndarray, source: int, start_s: float) -> tuple[np.ndarray, np.ndarray]:
    rows = _rows_by_source(trace)[source]
    return rows, start_s + offsets_s[rows]


@lru_cache(maxsize=8)
def _rows_by_source(trace: Trace) -> dict[int, np.ndarray]:
    """Rows of each recording by arrival, its sub-agents on the same clock."""
    source = sources(trace)
    order = np.lexsort((trace.arrival_s, source))
    names, begin = np.unique(source[order], return_index=True)
    return dict(zip(names.tolist(), np.split(order, begin[1:]), strict=True))


@lru_cache(maxsize=8)
def _offsets_s(trace: Trace) -> np.ndarray:
    """float64 (n,): time since the recording's first row, stretches in which nobody was served cut to MAX_GAP_S."""
    ends_s = recorded_ends_s(trace)
    offsets_s = np.zeros(len(trace))
    for rows in _rows_by_source(trace).values():
        arrival_s = trace.arrival_s[rows]
        busy_until_s = np.maximum.accumulate(ends_s[rows])
        excess_s = np.maximum(0.0, arrival_s[1:] - busy_until_s[:-1] - MAX_GAP_S)
        offsets_s[rows] = arrival_s - arrival_s[0] - np.concatenate(([0.0], np.cumsum(excess_s)))
    return offsets_s
