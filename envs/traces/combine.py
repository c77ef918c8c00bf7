"""Traces made of traces: merge, concatenate, scale, thin, cut. Sessions, their sub-agents and what prompts share stay.

Arrivals that were rounded to buckets are spread over them first, always alike: between those of another trace, or on
another clock, nobody could tell any more that they were rounded.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from hbmgym.envs.traces.coding import IdColumns, join, new_ids
from hbmgym.envs.traces.precedence import gaps_s, needs, recorded_ends_s
from hbmgym.envs.traces.repair import Columns, with_rows
from hbmgym.envs.traces.split import sources
from hbmgym.envs.traces.summary import arrivals_apart
from hbmgym.envs.traces.trace import ID_COLUMNS, ROW_COLUMNS, Trace, TraceError
from hbmgym.envs.traces.validate import build_trace

NONE = -1


def merge(traces: Sequence[Trace]) -> Trace:
    """The rows of all traces on one clock, each trace as it is; of session libraries all sessions.

    Any order of `traces` gives the same trace. They share ids only where they come from one file: a file and what was
    thinned or scaled of it. Raises `TraceError` for less than two traces, and for several kinds or block sizes.
    """
    traces = sorted(_checked(traces, "merge"), key=lambda trace: (trace.digest, trace.name))
    clocked = traces[0].trace_kind != "session-library"
    arrivals_s = [arrivals_apart(trace) if clocked else trace.arrival_s for trace in traces]
    spans_s = [trace.span_s for trace in traces if trace.span_s is not None]
    return _joined(traces, arrivals_s, "+".join(sorted(trace.name for trace in traces)), max(spans_s, default=None))


def concatenate(traces: Sequence[Trace]) -> Trace:
    """One trace after another: each begins, with its first arrival, where the one before ends (`Trace.end_s`).

    A generated trace begins with its time 0. Ids, and `TraceError`: as in `merge`; a session library is refused too.
    """
    traces = _checked(traces, "concatenate")
    begin_s, arrivals_s = 0.0, []
    for trace in traces:
        _check_clock(trace, "concatenate")
        first_s = float(trace.arrival_s[0]) if trace.span_s is None else 0.0
        arrivals_s.append(arrivals_apart(trace) - first_s + begin_s)
        begin_s += trace.end_s - first_s
    name = "-then-".join(trace.name for trace in traces)
    return _joined(traces, arrivals_s, name, begin_s if traces[0].span_s is not None else None)


def scale(trace: Trace, load: float) -> Trace:
    """The trace at `load` times its rate, as `--load` plays it: all arrivals are divided by `load`, gaps are kept.

    Of a sub-agent's start and of the turn that waits for sub-agents no gap is recorded: a closed loop finds it on the
    clock, so it is divided too. Raises `TraceError` for a session library and for a load that is not a number > 0.
    """
    _check_clock(trace, "scale")
    if not (math.isfinite(load) and load > 0.0):
        raise TraceError(f"load is {load}, expected a finite number > 0")
    if load == 1.0:
        return trace
    service_s = trace.service_s
    if trace.s_parent_session is not None:  # who ends before whom is found on the clock
        service_s = recorded_ends_s(trace) - trace.arrival_s
    count = np.bincount(needs(trace)[1], minlength=len(trace))
    unknown = (count == 1) & (trace.parent >= 0) & np.isnan(trace.gap_s)
    columns = _columns(trace) | {
        "arrival_s": arrivals_apart(trace) / load,
        "service_s": service_s / load,
        "gap_s": np.where(unknown, gaps_s(trace), trace.gap_s),
    }
    return _built(columns, trace, span_s=None if trace.span_s is None else trace.span_s / load)


def thin(trace: Trace, keep: float, seed: int = 0) -> Trace:
    """Every session with probability `keep`, with its sub-agents; of a session library every recording.

    A row without a session goes or stays with the row that it follows. With equal seeds the sessions that a smaller
    `keep` leaves are among those of a larger one. Raises `TraceError` when none is left, and unless 0 < keep <= 1.
    """
    if not 0.0 < keep <= 1.0:
        raise TraceError(f"keep is {keep}, expected a number > 0 and <= 1")
    if seed < 0:
        raise TraceError(f"seed is {seed}, expected an integer >= 0")
    _, label = np.unique(_wholes(trace), return_inverse=True)
    drawn = np.random.default_rng(seed).random(int(label.max()) + 1)
    kept = drawn[label] < keep
    if kept.all():
        return trace
    if not kept.any():
        raise TraceError(
            f"{trace.name}: none of {len(drawn)} sessions is left at keep {keep:g} (a larger one, or a seed)"
        )
    clocked = trace.trace_kind != "session-library"
    columns = _columns(trace) | ({"arrival_s": arrivals_apart(trace)} if clocked else {})
    return _built(with_rows(columns, np.flatnonzero(kept)), trace, span_s=trace.span_s)


def cut(trace: Trace, from_s: float, to_s: float) -> Trace:
    """The rows that arrive in [from_s, to_s) seconds after the first one; what they continue from before is their own.

    Raises `TraceError` for a session library, for a stretch of no length and where nothing arrives.
    """
    _check_clock(trace, "cut")
    if not from_s < to_s:
        raise TraceError(f"the cut is from {from_s:g} to {to_s:g} s, expected an end after the start")
    arrival_s = arrivals_apart(trace)
    since_s = arrival_s - float(trace.arrival_s[0])
    kept = np.flatnonzero((since_s >= from_s) & (since_s < to_s))
    if not len(kept):
        raise TraceError(f"{trace.name}: nothing arrives from {from_s:g} to {to_s:g} s after its first request")
    return _built(with_rows(_columns(trace) | {"arrival_s": arrival_s}, kept), trace, span_s=None)


def _checked(traces: Sequence[Trace], verb: str) -> list[Trace]:
    if len(traces) < 2:
        raise TraceError(f"{verb} takes at least 2 traces, not {len(traces)}")
    _check_alike([(trace.name, f"is {trace.trace_kind}") for trace in traces], verb)
    sizes = [(trace.name, f"has ids of {trace.block_size} tokens") for trace in traces if trace.block_size]
    _check_alike(sizes, verb)
    return list(traces)


def _check_alike(facts: Sequence[tuple[str, str]], verb: str) -> None:
    """Of traces, by name."""
    for name, fact in facts:
        if fact != facts[0][1]:
            raise TraceError(
                f"cannot {verb}: {name} {fact}, but {facts[0][0]} {facts[0][1]} (expected the same of all)"
            )


def _check_clock(trace: Trace, verb: str) -> None:
    if trace.trace_kind == "session-library":
        raise TraceError(
            f"{trace.name}: cannot {verb} a session library: it has no clock, its sessions start when an episode is"
            " composed (there --load says how often)"
        )


def _wholes(trace: Trace) -> np.ndarray:
    """int64 (n,): label of what rows belong to that stay together."""
    if trace.trace_kind == "session-library":
        return sources(trace)
    session = trace.session_id.astype(np.int64)
    root = np.arange(_sessions(trace))
    if trace.s_parent_session is not None:
        root = np.where(trace.s_parent_session >= 0, trace.s_parent_session, root)
        for _ in range(len(root).bit_length()):
            root = root[root]
    alone = np.flatnonzero(session < 0)
    whole = np.where(session >= 0, np.append(root, NONE)[session], len(root) + np.arange(len(trace)))
    for row in alone[trace.parent[alone] >= 0].tolist():
        whole[row] = whole[trace.parent[row]]
    return whole


def _sessions(trace: Trace) -> int:
    described = (column for column in (trace.s_source_id, trace.s_parent_session) if column is not None)
    return max(int(trace.session_id.max()) + 1, *(len(column) for column in described), 0)


def _columns(trace: Trace) -> Columns:
    columns = {name: getattr(trace, name) for name in (*ROW_COLUMNS, *ID_COLUMNS)}
    described = {"s_source_id": trace.s_source_id, "s_parent_session": trace.s_parent_session}
    return columns | {name: column for name, column in described.items() if column is not None}


def _built(columns: Columns, trace: Trace, span_s: float | None) -> Trace:
    """Another selection or clock of the rows of `trace`, with its ids."""
    built = build_trace(
        columns,
        name=trace.name,
        kind=trace.trace_kind,
        block_size=trace.block_size,
        path=trace.name,
        where=lambda row: f"{trace.name}:row {row}",
        notices=trace.all_notices,
        repaired=True,
        id_file=trace.id_file or trace.file_digest,
    )
    return dataclasses.replace(built, span_s=span_s)


def _joined(traces: Sequence[Trace], arrivals_s: Sequence[np.ndarray], name: str, span_s: float | None) -> Trace:
    """All rows at the given arrivals, numbers of rows, sessions, recordings and ids moved apart."""
    block_size = max(trace.block_size for trace in traces)
    # Without ids nothing is known to be shared, not even by two readings of one file.
    files = [
        (trace.id_file or trace.file_digest) if trace.block_size else f"no ids {i}" for i, trace in enumerate(traces)
    ]
    ids = join([_ids(trace, block_size) for trace in traces], files)
    columns = _apart(traces) | ids | {"arrival_s": np.concatenate(arrivals_s)}
    kind = traces[0].trace_kind
    if kind != "session-library":
        columns = with_rows(columns, np.argsort(columns["arrival_s"], kind="stable"))
    joined = build_trace(
        columns,
        name=name,
        kind=kind,
        block_size=block_size,
        path=name,
        where=lambda row: f"{name}:row {row}",
        notices=dict.fromkeys(notice for trace in traces for notice in trace.all_notices),
        repaired=True,
    )
    return dataclasses.replace(joined, span_s=span_s)


def _apart(traces: Sequence[Trace]) -> Columns:
    """Row and session columns, trace by trace."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in (*ROW_COLUMNS, "s_source_id", "s_parent_session")}
    row = session = source = 0
    for trace in traces:
        count = _sessions(trace)
        own = {name: getattr(trace, name).astype(np.int64) for name in ("parent", "session_id")}
        starter = np.full(count, NONE) if trace.s_parent_session is None else trace.s_parent_session.astype(np.int64)
        taken = np.arange(count) if trace.s_source_id is None else trace.s_source_id.astype(np.int64)
        moved = {
            "parent": np.where(own["parent"] >= 0, own["parent"] + row, NONE),
            "session_id": np.where(own["session_id"] >= 0, own["session_id"] + session, NONE),
            "s_parent_session": np.where(starter >= 0, starter + session, NONE),
            "s_source_id": taken + source,
        }
        for name, parts in found.items():
            parts.append(moved[name] if name in moved else getattr(trace, name))
        row, session, source = row + len(trace), session + count, source + int(taken.max(initial=NONE)) + 1
    columns = {name: np.concatenate(parts) for name, parts in found.items()}
    for name in ("s_source_id", "s_parent_session"):
        if all(getattr(trace, name) is None for trace in traces):
            del columns[name]
    return columns


def _ids(trace: Trace, block_size: int) -> IdColumns:
    """Its id columns; rows of a trace without ids get some that no other row has."""
    if block_size and not trace.block_size:
        none = np.zeros(len(trace), np.int64)
        return new_ids(none, none, trace.input_tokens.astype(np.int64) // block_size)
    return {name: getattr(trace, name) for name in ID_COLUMNS}
