"""From the turns that classes of traffic draw to one Trace, merged by arrival, ids coded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hbmgym.envs.traces.trace import Trace, TraceError

BLOCK_TOKENS = 64
NO_ROW = -1


@dataclass(frozen=True)
class Rows:
    """Requests of one class, those of a session together and in order. Arrays of shape (n,)."""

    arrival_s: np.ndarray
    input_tokens: np.ndarray
    output_tokens: np.ndarray
    gap_s: np.ndarray
    """Idle seconds since the row's parent ended, NaN without one."""
    session: np.ndarray
    """Counts from 0 within the class."""
    turn: np.ndarray
    parent: np.ndarray
    """The row that it follows, NO_ROW for a first turn."""
    source: np.ndarray
    """An earlier row whose leading blocks it repeats, NO_ROW: those that all sessions of the class share."""
    repeated: np.ndarray
    """So many blocks; all that follow are new."""
    starter: np.ndarray | None = None
    """The session that started the row's session, a sub-agent's; NO_ROW for others. None: there are no sub-agents."""

    def __len__(self) -> int:
        return len(self.arrival_s)


class TrafficClass(Protocol):
    """How the requests of one kind of user look."""

    @property
    def name(self) -> str:
        """Unique among the classes of a scenario."""
        ...

    @property
    def mean_requests(self) -> float:
        """Requests per start."""
        ...

    @property
    def lead_s(self) -> float:
        """Seconds before time 0 in which starts are drawn too, so that traffic is in full swing at 0."""
        ...

    def draw(self, starts_s: np.ndarray, rng: np.random.Generator, span_s: float, block_size: int) -> Rows:
        """The rows that arrive in [0, span_s) of what starts at the given times."""
        ...


def sessions(
    plan: Sequence[tuple[TrafficClass, np.ndarray]],
    rng: np.random.Generator,
    *,
    name: str,
    span_s: float,
    block_size: int = BLOCK_TOKENS,
) -> Trace:
    """The rows that arrive in [0, span_s) of what starts at the given times, class by class.

    Raises `TraceError` when no row arrives.
    """
    drawn = [group.draw(np.asarray(starts_s, np.float64), rng, span_s, block_size) for group, starts_s in plan]
    if not sum(map(len, drawn)):
        raise TraceError(f"{name}: 0 rows arrive within {span_s:g} s, expected at least 1 (higher rates or load)")
    return _trace(drawn, name, span_s, block_size)


def _trace(drawn: list[Rows], name: str, span_s: float, block_size: int) -> Trace:
    """Merge the classes by arrival and code their ids."""
    sizes = np.cumsum([0, *map(len, drawn)])
    session_base = np.cumsum([0, *(int(rows.session.max(initial=-1)) + 1 for rows in drawn)])
    arrival_s = np.concatenate([rows.arrival_s for rows in drawn])
    order = np.argsort(arrival_s, kind="stable")
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))

    def merged(column: str, dtype: type) -> np.ndarray:
        return np.concatenate([getattr(rows, column) for rows in drawn])[order].astype(dtype)

    def renumbered(column: str) -> np.ndarray:
        """Row numbers of a class become those of the trace."""
        parts = [(getattr(rows, column), base) for rows, base in zip(drawn, sizes[:-1].tolist(), strict=True)]
        rows = np.concatenate([np.where(own >= 0, own + base, NO_ROW) for own, base in parts])
        return np.where(rows >= 0, place[rows], NO_ROW)[order].astype(np.int32)

    session = np.concatenate([rows.session + base for rows, base in zip(drawn, session_base[:-1], strict=True)])
    counts, r_start, r_len = _runs(drawn, block_size)
    run_order, r_off = _reorder(counts, order)
    source = renumbered("source")
    starter = _starters(drawn, session_base.tolist())
    return Trace(
        name=name,
        trace_kind="generated",
        block_size=block_size,
        arrival_s=arrival_s[order],
        input_tokens=merged("input_tokens", np.int32),
        output_tokens=merged("output_tokens", np.int32),
        session_id=session[order].astype(np.int32),
        turn=merged("turn", np.int32),
        parent=renumbered("parent"),
        gap_s=merged("gap_s", np.float32),
        service_s=np.full(len(order), np.nan, np.float32),
        kind=np.zeros(len(order), np.uint8),
        h_ref=source,
        h_lcp=np.where(source >= 0, merged("repeated", np.int32), 0).astype(np.int32),
        r_off=r_off,
        r_start=r_start[run_order],
        r_len=r_len[run_order].astype(np.int32),
        s_parent_session=starter if (starter >= 0).any() else None,
        traffic_class=np.repeat(np.arange(len(drawn)), list(map(len, drawn)))[order].astype(np.uint8),
        span_s=span_s,
    )


def _starters(drawn: list[Rows], session_base: list[int]) -> np.ndarray:
    """int32 (sessions,): Trace.s_parent_session, -1 where no session started another."""
    found = np.full(session_base[-1], NO_ROW, np.int32)
    for rows, base in zip(drawn, session_base[:-1], strict=True):
        if rows.starter is not None:
            agents = rows.starter >= 0
            found[rows.session[agents] + base] = rows.starter[agents] + base
    return found


def _runs(drawn: list[Rows], block_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs per row, and all runs in the order of rows: first what its class shares, where it does, then new blocks."""
    starts, lengths, base = [], [], 0
    for rows in drawn:
        new = rows.input_tokens // block_size - rows.repeated
        shared = np.where(rows.source == NO_ROW, rows.repeated, 0)
        first_new = int(shared.max(initial=0))
        begin = first_new + np.cumsum(new) - new
        starts.append(np.stack((np.full(len(new), base), base + begin), axis=1))
        lengths.append(np.stack((shared, new), axis=1))
        base += first_new + int(new.sum())
    start, length = np.concatenate(starts), np.concatenate(lengths)
    used = length > 0
    return used.sum(axis=1), start[used], length[used]


def _reorder(counts: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index that gathers the runs of rows `order`, and the rows' new offsets."""
    begin = np.cumsum(counts) - counts
    moved = counts[order]
    offsets = np.concatenate(([0], np.cumsum(moved)))
    return np.arange(offsets[-1]) + np.repeat(begin[order] - offsets[:-1], moved), offsets.astype(np.int64)
