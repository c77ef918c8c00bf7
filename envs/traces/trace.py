"""Trace: requests as read-only columns, their prefix block ids delta and run-length coded.

`blocks(i) = blocks(h_ref[i])[:h_lcp[i]] + ranges(r_start, r_len)[r_off[i]:r_off[i + 1]]`; rows refer to earlier
rows only.
"""

from dataclasses import dataclass, fields
from functools import cached_property
from hashlib import sha256
from typing import Literal

import numpy as np

from hbmgym.envs.traces.coding import expand, write_shortcuts
from hbmgym.envs.traces.jitter import buckets_of

Kind = Literal["open-loop", "session-library", "generated"]

ROW_COLUMNS = {
    "arrival_s": np.float64,
    "input_tokens": np.int32,
    "output_tokens": np.int32,
    "session_id": np.int32,
    "turn": np.int32,
    "parent": np.int32,
    "gap_s": np.float32,
    "service_s": np.float32,
    "kind": np.uint8,
}
ID_COLUMNS = {"h_ref": np.int32, "h_lcp": np.int32, "r_off": np.int64, "r_start": np.int64, "r_len": np.int32}
SESSION_COLUMNS = {
    "s_source_id": np.int32,
    "s_parent_session": np.int32,
    "s_tool_tokens": np.int32,
    "s_system_tokens": np.int32,
}


class TraceError(ValueError):
    """Bad trace input; the message is one line: where, which field, its value, what was expected, a remedy."""


@dataclass(frozen=True, eq=False)
class Trace:
    """n rows sorted by arrival (open loop, generated) or by session, then arrival (session library)."""

    name: str
    trace_kind: Kind
    """open-loop: arrival_s is a clock; session-library: it counts from the source session's start;
    generated: a clock that already spans warm-up and measured part."""
    block_size: int
    """Tokens per block id; 0: the trace has no ids."""
    arrival_s: np.ndarray
    """float64 (n,), seconds."""
    input_tokens: np.ndarray
    """int32 (n,), >= 1."""
    output_tokens: np.ndarray
    """int32 (n,), >= 1."""
    session_id: np.ndarray
    """int32 (n,), -1 unknown."""
    turn: np.ndarray
    """int32 (n,), -1 unknown."""
    parent: np.ndarray
    """int32 (n,), the row of the previous turn, -1 none."""
    gap_s: np.ndarray
    """float32 (n,), idle seconds since the previous turn ended, NaN unknown."""
    service_s: np.ndarray
    """float32 (n,), recorded service time, NaN unknown."""
    kind: np.ndarray
    """uint8 (n,): 0 human or unknown, 1 tool result, 2 sub-agent."""
    h_ref: np.ndarray
    """int32 (n,): earlier row that the ids continue, -1 empty prefix."""
    h_lcp: np.ndarray
    """int32 (n,): leading block ids taken from h_ref."""
    r_off: np.ndarray
    """int64 (n + 1,): each row's stretch of r_start and r_len."""
    r_start: np.ndarray
    """int64: first id of a run of consecutive ids; ids lie in 0..id_span - 1."""
    r_len: np.ndarray
    """int32: ids in the run, >= 1."""
    s_source_id: np.ndarray | None = None
    """int32 (sessions,): recording that a session was taken from; None: every session is its own."""
    s_parent_session: np.ndarray | None = None
    """int32 (sessions,): session that started this sub-agent, -1 none; on the same clock as its parent."""
    traffic_class: np.ndarray | None = None
    """uint8 (n,), which of its scenario's classes a row is of, by number; None: it is told by `kind`."""
    span_s: float | None = None
    """Generated traces: every arrival lies in [0, span_s)."""
    id_file: str = ""
    """Digest of the trace that this one takes its ids from; empty: they are its own."""
    clock: str = ""
    """Who recorded the arrivals, as `jitter.CLOCKS` names those that round; empty: they are taken as they are."""
    notices: tuple[str, ...] = ()
    """What the loader repaired, one line each, for the caller to print."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                value.flags.writeable = False

    def __len__(self) -> int:
        return len(self.arrival_s)

    @cached_property
    def digest(self) -> str:
        """Of what is played: rows, ids, and whether arrivals are spread."""
        if not self.quantum_s:
            return self.file_digest
        return sha256(f"{self.file_digest} spread over {self.quantum_s} s".encode()).hexdigest()[:16]

    @cached_property
    def file_digest(self) -> str:
        """Of rows and ids: equal for two readings of one file, whatever its name."""
        found = sha256(f"{self.trace_kind} {self.block_size}".encode())
        for name in (*ROW_COLUMNS, *ID_COLUMNS):
            found.update(np.ascontiguousarray(getattr(self, name)).data)
        return found.hexdigest()[:16]

    @cached_property
    def block_counts(self) -> np.ndarray:
        """int64 (n,): block ids of each row."""
        total = np.concatenate(([0], np.cumsum(self.r_len, dtype=np.int64)))
        return self.h_lcp + total[self.r_off[1:]] - total[self.r_off[:-1]]

    @cached_property
    def id_span(self) -> int:
        """Every block id is smaller."""
        return int((self.r_start + self.r_len).max(initial=0))

    @cached_property
    def h_jump(self) -> np.ndarray:
        """int32 (n,): like h_ref, past the rows that add nothing, so that a walk costs no more than its ids."""
        jump = np.empty(len(self), np.int32)
        write_shortcuts(self.h_ref, self.h_lcp, jump)
        return jump

    @cached_property
    def quantum_s(self) -> float:
        """Width of the buckets that arrivals were rounded to, and are spread over; 0.0 if they were not."""
        return buckets_of(self.arrival_s, self.clock)[1] if self.trace_kind == "open-loop" else 0.0

    @cached_property
    def all_notices(self) -> tuple[str, ...]:
        """`notices`, and that arrivals are spread where they are."""
        if not self.quantum_s:
            return self.notices
        step = f"{self.quantum_s:g} s"
        how = f"{len(self):,} arrivals are rounded to {step}: each is spread over its {step}, in file order"
        return (*self.notices, f"{self.name}: {how} (read with --no-spread they stay as recorded)")

    @cached_property
    def end_s(self) -> float:
        """End of the clock: the last bucket's end, or one mean gap after the last arrival."""
        if self.span_s is not None:
            return self.span_s
        first, last = float(self.arrival_s[0]), float(self.arrival_s[-1])
        return last + (self.quantum_s or (last - first) / max(1, len(self) - 1))

    def blocks(self, row: int) -> np.ndarray:
        """int64: the block ids of one row, in prefix order."""
        return expand(row, self.h_jump, self.h_lcp, self.r_off, self.r_start, self.r_len)
