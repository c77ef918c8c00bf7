"""Episodes from recorded traces and from generated ones."""

import math
from zlib import crc32

import numpy as np

from hbmgym.envs.traces.episode import Episode, Loop
from hbmgym.envs.traces.jitter import spread
from hbmgym.envs.traces.library import select_sessions
from hbmgym.envs.traces.pages import Selection, assemble
from hbmgym.envs.traces.seeds import Part, check_seed, part_of_seed
from hbmgym.envs.traces.split import part_bounds
from hbmgym.envs.traces.trace import Trace, TraceError

MAX_REFS = 8_000_000
MIN_MEASURED_S = 300.0
LEAST_LOAD, MOST_LOAD = 1e-3, 1e3
START_RANGE = 0.1
"""A seed starts its episode within this leading part of the slice."""


def compose(
    trace: Trace,
    *,
    part: Part,
    seed: int,
    page_tokens: int,
    load: float = 1.0,
    warmup_s: float = 300.0,
    max_refs: int = MAX_REFS,
    loop: Loop = "open",
) -> Episode:
    """One episode of a recorded trace's part; `load` multiplies the arrival rate, `warmup_s` is on the episode's clock.

    In a closed loop the rows are the same, and those that follow another keep their recorded gap at any load.
    Raises `TraceError` (too short, too large, no such part) and `SeedError` (the seed belongs to another part).
    """
    if part != "final":
        check_seed(part, seed)
    _check_positive("load", load, zero=False)
    _check_positive("warmup_s", warmup_s, zero=True)
    rng = np.random.default_rng([seed, crc32(trace.name.encode())])
    if trace.trace_kind == "session-library":
        selection, horizon_s = select_sessions(trace, part, rng, load, warmup_s)
    else:
        selection, warmup_s, horizon_s = _select_slice(trace, part, rng, load, warmup_s)
    return assemble(
        trace,
        selection,
        seed=seed,
        page_tokens=page_tokens,
        warmup_s=warmup_s,
        horizon_s=horizon_s,
        max_refs=max_refs,
        loop=loop,
    )


def compose_generated(
    trace: Trace,
    *,
    seed: int,
    page_tokens: int,
    warmup_s: float = 300.0,
    max_refs: int = MAX_REFS,
    loop: Loop = "open",
) -> Episode:
    """The episode that a generated trace is; its part is the seed's. Raises `TraceError` and `SeedError`."""
    part_of_seed(seed)
    if trace.trace_kind != "generated" or trace.span_s is None:
        raise TraceError(f"{trace.name}: trace is {trace.trace_kind}, expected a generated one (use compose)")
    if not 0.0 <= warmup_s < trace.span_s:
        raise TraceError(f"{trace.name}: warmup_s is {warmup_s}, expected 0 <= warmup_s < {trace.span_s}, the span")
    rows = np.arange(len(trace))
    selection = Selection(rows, np.zeros_like(rows), trace.arrival_s)
    return assemble(
        trace,
        selection,
        seed=seed,
        page_tokens=page_tokens,
        warmup_s=warmup_s,
        horizon_s=trace.span_s,
        max_refs=max_refs,
        loop=loop,
    )


def _select_slice(
    trace: Trace, part: Part, rng: np.random.Generator, load: float, warmup_s: float
) -> tuple[Selection, float, float]:
    """Rows of a clocked part with the warm-up before it, real warm-up and horizon in seconds of the episode."""
    lower_s, upper_s = part_bounds(trace, part)
    first_s = float(trace.arrival_s[0])
    # Nothing was recorded before the first part: its own first rows warm the caches.
    inside_s = warmup_s if lower_s <= first_s else 0.0
    _check_length(trace, part, (1.0 - START_RANGE) * (upper_s - lower_s), load, inside_s)
    start_s = lower_s + rng.uniform(0.0, START_RANGE) * (upper_s - lower_s) + inside_s * load
    origin_s = max(first_s, start_s - warmup_s * load)
    arrival_s = spread(trace.arrival_s, trace.clock, rng)
    rows = np.flatnonzero((arrival_s >= origin_s) & (arrival_s < upper_s))
    clock_s = (arrival_s[rows] - origin_s) / load
    selection = Selection(rows, np.zeros_like(rows), clock_s)
    return selection, (start_s - origin_s) / load, (upper_s - origin_s) / load


def _check_length(trace: Trace, part: Part, slice_s: float, load: float, inside_s: float) -> None:
    """Judged at the latest start, so that a part is usable with all of its seeds or with none."""
    measured_s = slice_s / load - inside_s
    if measured_s >= MIN_MEASURED_S:
        return
    most = slice_s / (MIN_MEASURED_S + inside_s)
    remedy = f"load <= {most:.3g}, or a longer part or trace"
    if most < LEAST_LOAD:
        span_s = float(trace.arrival_s[-1] - trace.arrival_s[0])
        when = f"within {span_s:.3g} s" if span_s else "at the same time"
        remedy = f"its {len(trace):,} requests come {when}: are their times in another unit, or missing?"
    raise TraceError(
        f"{trace.name}: part {part!r} measures {max(0.0, measured_s):.0f} s at load {load:g}, expected at least"
        f" {MIN_MEASURED_S:.0f} s ({remedy})"
    )


def _check_positive(name: str, value: float, *, zero: bool) -> None:
    if not math.isfinite(value) or value < 0.0 or (value == 0.0 and not zero):
        raise TraceError(f"{name} is {value!r}, expected a finite number {'>=' if zero else '>'} 0")
