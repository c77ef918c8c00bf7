"""What a trace holds, in words: `describe`."""

from collections.abc import Iterator

import numpy as np

from hbmgym.envs.traces.jitter import spread
from hbmgym.envs.traces.regime import Regime, judge
from hbmgym.envs.traces.reuse import found_tokens
from hbmgym.envs.traces.trace import Trace


def describe(trace: Trace) -> list[tuple[str, str]]:
    """Label and text of each line; the last ones are the loader's notices."""
    clocked = trace.trace_kind != "session-library"
    lines = [("kind", f"{trace.trace_kind}, {_ids(trace)}"), ("rows", f"{len(trace):,}")]
    lines += _clock_lines(trace) if clocked else [("clock", "none: sessions start when an episode is composed")]
    lines += [("input tokens", _quantiles(trace.input_tokens)), ("output tokens", _quantiles(trace.output_tokens))]
    lines += _session_lines(trace)
    if (found := found_tokens(trace)) is not None:
        share = found.sum() / trace.input_tokens.sum(dtype=np.int64)
        lines.append(("infinite-cache hit rate", f"{share:.1%} of the prompt tokens"))
    return lines + [("notice", notice) for notice in trace.all_notices]


def arrivals_apart(trace: Trace) -> np.ndarray:
    """Sorted arrivals; those that were rounded to buckets are spread over them, always alike for one trace."""
    # Two traces that share their draws would meet in every bucket.
    return spread(trace.arrival_s, trace.clock, np.random.default_rng(int(trace.file_digest, 16)))


def _ids(trace: Trace) -> str:
    return f"{trace.block_size} tokens per block id" if trace.block_size else "no block ids, so nothing is shared"


def _clock_lines(trace: Trace) -> Iterator[tuple[str, str]]:
    arrival_s = arrivals_apart(trace)
    span_s = float(arrival_s[-1] - arrival_s[0])
    yield "span", f"{span_s:,.1f} s ({span_s / 3600:.2f} h)"
    if span_s <= 0.0:
        return
    tokens = [int(column.sum(dtype=np.int64)) / span_s for column in (trace.input_tokens, trace.output_tokens)]
    yield "rates", f"{len(trace) / span_s:.4g} requests/s, {tokens[0]:,.0f} input and {tokens[1]:,.0f} output tokens/s"
    yield (
        "inter-arrivals",
        f"CV {_cv(arrival_s):.2f}"
        + (
            f" (as recorded {_cv(trace.arrival_s):.2f}: times are rounded to {trace.quantum_s:g} s)"
            if trace.quantum_s
            else ""
        ),
    )
    offered = trace.input_tokens.astype(np.float64) + trace.output_tokens
    for label, amount in (("load in tokens", offered), ("load in requests", None)):
        regime = judge(arrival_s, amount)
        yield label, _regime(regime) if regime else "too short to judge"
        if regime and amount is None:
            yield "index of dispersion", f"{regime.dispersion:.4g} requests per {regime.bin_s:g} s"


def _cv(arrival_s: np.ndarray) -> float:
    steps_s = np.diff(arrival_s)
    return float(steps_s.std() / steps_s.mean())


def _regime(regime: Regime) -> str:
    measured = f"CV {regime.cv:.2f}, peak/mean {regime.peak:.2f}, rise {regime.rise:+.2f}"
    return f"{regime.name}: per {regime.bin_s:g} s {measured}"


def _session_lines(trace: Trace) -> Iterator[tuple[str, str]]:
    known = trace.session_id[trace.session_id >= 0]
    if not len(known):
        yield "sessions", "none recorded"
        return
    turns = np.unique(known, return_counts=True)[1]
    several = float((turns > 1).mean())
    yield "sessions", f"{len(turns):,}, {several:.1%} of several turns, {len(known) / len(trace):.1%} of the rows"
    yield "turns per session", _quantiles(turns)
    gap_s = trace.gap_s[~np.isnan(trace.gap_s)]
    if len(gap_s):
        yield "idle before a turn, s", _quantiles(gap_s)
    starter = trace.s_parent_session
    if starter is not None and (sub_agents := int((starter[np.unique(known)] >= 0).sum())):
        yield "sub-agents", f"{sub_agents:,} of the sessions"


def _quantiles(values: np.ndarray) -> str:
    marks = np.quantile(values, (0.5, 0.9, 0.95, 0.99, 1.0))
    named = zip(("p50", "p90", "p95", "p99", "max"), marks, strict=True)
    return "  ".join(f"{name} {mark:,.0f}" for name, mark in named) + f"  mean {values.mean(dtype=np.float64):,.1f}"
