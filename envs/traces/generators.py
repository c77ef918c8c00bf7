"""Multi-turn sessions drawn from a class description, all turns of all sessions at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hbmgym.envs.traces.service import unloaded_service_s
from hbmgym.envs.traces.trace import Trace, TraceError

BLOCK_TOKENS = 64


@dataclass(frozen=True)
class LogNormal:
    """exp(N(mu, sigma)), at most `clip`."""

    mu: float
    sigma: float
    clip: float = float("inf")

    def draw(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """float64, shape (size,)."""
        return np.minimum(np.exp(self.mu + self.sigma * rng.standard_normal(size)), self.clip)


@dataclass(frozen=True)
class SessionClass:
    """How the sessions of one kind of user look. Lengths in tokens, gaps in seconds."""

    name: str
    first_prompt: LogNormal
    later_text: tuple[tuple[float, LogNormal], ...]
    """What the user adds in a later turn: (weight, distribution), weights summing to 1."""
    output: LogNormal
    gap_s: LogNormal
    """Idle time between a turn's end and the next turn."""
    geometric_turns: float
    """Mean of the geometric distribution of turns before it is capped."""
    max_turns: int
    system_tokens: int = 0
    """Leading tokens that every session of the class shares, on top of the first prompt."""

    @property
    def mean_turns(self) -> float:
        """Mean of min(geometric, max_turns)."""
        stay = 1.0 - 1.0 / self.geometric_turns
        return (1.0 - stay**self.max_turns) / (1.0 - stay)


@dataclass(frozen=True)
class _Rows:
    """Turns of one class, session by session; `ids` counts from 0 within the class, the shared prefix first."""

    arrival_s: np.ndarray
    input_tokens: np.ndarray
    output_tokens: np.ndarray
    gap_s: np.ndarray
    session: np.ndarray
    turn: np.ndarray
    first_id: np.ndarray
    """Id that the session's block 0 would have if it were not shared."""
    shared_blocks: int
    id_count: int


def sessions(
    plan: Sequence[tuple[SessionClass, np.ndarray]],
    rng: np.random.Generator,
    *,
    name: str,
    span_s: float,
    block_size: int = BLOCK_TOKENS,
) -> Trace:
    """The turns that arrive before `span_s` of sessions that start at the given times (seconds >= 0), class by class.

    A turn's prompt is the previous prompt and output and the new text; it arrives one unloaded service time and one
    gap after the previous turn. Raises `TraceError` when no turn arrives.
    """
    drawn = [_draw(group, np.asarray(starts_s, np.float64), rng, span_s, block_size) for group, starts_s in plan]
    if not sum(len(rows.arrival_s) for rows in drawn):
        raise TraceError(f"{name}: 0 rows arrive within {span_s:g} s, expected at least 1 (higher rates or load)")
    return _trace(drawn, name, span_s, block_size)


def _draw(group: SessionClass, starts_s: np.ndarray, rng: np.random.Generator, span_s: float, block_size: int) -> _Rows:
    turns = np.minimum(rng.geometric(1.0 / group.geometric_turns, len(starts_s)), group.max_turns)
    first = np.cumsum(turns) - turns
    session = np.repeat(np.arange(len(starts_s)), turns)
    turn = np.arange(len(session)) - first[session]
    output = _tokens(group.output.draw(rng, len(session)))
    text = _tokens(_mixture(group.later_text, rng, len(session)))
    text[first] = _tokens(group.first_prompt.draw(rng, len(starts_s))) + group.system_tokens
    gap_s = group.gap_s.draw(rng, len(session))
    added = text + np.where(turn > 0, _previous(output), 0)
    wait_s = np.where(turn > 0, _previous(unloaded_service_s(output)) + gap_s, starts_s[session])
    input_tokens = _running_sum(added, first, session)
    arrival_s = _running_sum(wait_s, first, session)
    blocks = np.maximum.reduceat(input_tokens, first) // block_size if len(first) else np.zeros(0, np.int64)
    shared = group.system_tokens // block_size
    own = blocks - shared
    begin = shared + np.cumsum(own) - own
    kept = arrival_s < span_s
    return _Rows(
        arrival_s=arrival_s[kept],
        input_tokens=input_tokens[kept],
        output_tokens=output[kept],
        gap_s=np.where(turn > 0, gap_s, np.nan)[kept],
        session=session[kept],
        turn=turn[kept],
        first_id=(begin - shared)[session[kept]],
        shared_blocks=shared,
        id_count=shared + int(own.sum()),
    )


def _trace(drawn: list[_Rows], name: str, span_s: float, block_size: int) -> Trace:
    """Merge the classes by arrival and code their ids."""
    arrival_s = np.concatenate([rows.arrival_s for rows in drawn])
    order = np.argsort(arrival_s, kind="stable")
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    turn = np.concatenate([rows.turn for rows in drawn])
    parent = np.where(turn > 0, place[np.arange(len(order)) - 1], -1)
    counts, r_start, r_len = _runs(drawn, block_size)
    run_order, r_off = _reorder(counts, order)
    session_base = np.cumsum([0, *(int(rows.session.max(initial=-1)) + 1 for rows in drawn)])
    session = np.concatenate([rows.session + base for rows, base in zip(drawn, session_base[:-1], strict=True)])
    input_tokens = np.concatenate([rows.input_tokens for rows in drawn])
    lcp = np.where(turn > 0, _previous(input_tokens) // block_size, 0)
    return Trace(
        name=name,
        trace_kind="generated",
        block_size=block_size,
        arrival_s=arrival_s[order],
        input_tokens=input_tokens[order].astype(np.int32),
        output_tokens=np.concatenate([rows.output_tokens for rows in drawn])[order].astype(np.int32),
        session_id=session[order].astype(np.int32),
        turn=turn[order].astype(np.int32),
        parent=parent[order].astype(np.int32),
        gap_s=np.concatenate([rows.gap_s for rows in drawn])[order].astype(np.float32),
        service_s=np.full(len(order), np.nan, np.float32),
        kind=np.zeros(len(order), np.uint8),
        h_ref=parent[order].astype(np.int32),
        h_lcp=lcp[order].astype(np.int32),
        r_off=r_off,
        r_start=r_start[run_order],
        r_len=r_len[run_order].astype(np.int32),
        span_s=span_s,
    )


def _runs(drawn: list[_Rows], block_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs per row, and all runs in the order of rows: a first turn adds the shared prefix and its own blocks."""
    starts, lengths, base = [], [], 0
    for rows in drawn:
        blocks = rows.input_tokens // block_size
        before = np.where(rows.turn > 0, _previous(blocks), rows.shared_blocks)
        prefix = np.where(rows.turn > 0, 0, rows.shared_blocks)
        starts.append(np.stack((np.full(len(blocks), base), base + rows.first_id + before), axis=1))
        lengths.append(np.stack((prefix, blocks - before), axis=1))
        base += rows.id_count
    start, length = np.concatenate(starts), np.concatenate(lengths)
    used = length > 0
    return used.sum(axis=1), start[used], length[used]


def _reorder(counts: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index that gathers the runs of rows `order`, and the rows' new offsets."""
    begin = np.cumsum(counts) - counts
    moved = counts[order]
    offsets = np.concatenate(([0], np.cumsum(moved)))
    return np.arange(offsets[-1]) + np.repeat(begin[order] - offsets[:-1], moved), offsets.astype(np.int64)


def _mixture(parts: tuple[tuple[float, LogNormal], ...], rng: np.random.Generator, size: int) -> np.ndarray:
    edges = np.cumsum([weight for weight, _ in parts])
    choice = np.searchsorted(edges[:-1], rng.random(size), side="right")
    mu, sigma, clip = (np.array([getattr(part, key) for _, part in parts])[choice] for key in ("mu", "sigma", "clip"))
    return np.asarray(np.minimum(np.exp(mu + sigma * rng.standard_normal(size)), clip))


def _tokens(values: np.ndarray) -> np.ndarray:
    return np.asarray(np.maximum(1, np.rint(values)), np.int64)


def _previous(values: np.ndarray) -> np.ndarray:
    """The value of the row before; row 0 gets a value that nobody uses."""
    return np.roll(values, 1)


def _running_sum(values: np.ndarray, first: np.ndarray, session: np.ndarray) -> np.ndarray:
    """Cumulative sum that starts anew at each session's first row."""
    total = np.cumsum(values)
    return np.asarray(total - (total[first] - values[first])[session])
