"""Mooncake's jsonl: timestamp (ms), input_length, output_length, hash_ids; and what AIPerf adds to it.

AIPerf's rows may carry a session_id; a later turn then may have a delay (ms after the turn before it) instead of a
timestamp, hash_ids may be missing, and text_input may stand for input_length. Where no row has a timestamp, those
without a session are sessions of one turn.
"""

from array import array
from pathlib import Path
from typing import Any

import numpy as np

from hbmgym.envs.traces.formats.block_ids import BlockIds, unknown_ids
from hbmgym.envs.traces.formats.columns import request_columns
from hbmgym.envs.traces.formats.damage import Damage
from hbmgym.envs.traces.formats.fields import Unused
from hbmgym.envs.traces.formats.reading import name_of, read_objects
from hbmgym.envs.traces.formats.records import block_list_or_none, name_or_none, refuse_value, seconds_or_nan, whole
from hbmgym.envs.traces.formats.words import RULE, count_tokens
from hbmgym.envs.traces.service import unloaded_service_s
from hbmgym.envs.traces.trace import Trace
from hbmgym.envs.traces.validate import build_trace

BLOCK_TOKENS = 512
_FIELDS = ("timestamp", "input_length", "output_length", "hash_ids", "session_id", "delay", "text_input")


class _Rows:
    """What the lines say, one entry per row; NaN and -1 where a line does not say."""

    def __init__(self, path: Path) -> None:
        self.lines, self.timestamp_s, self.delay_s = array("q"), array("d"), array("d")
        self.input_tokens, self.output_tokens, self.session_id = array("q"), array("q"), array("q")
        self.ids = BlockIds()
        self.estimated = 0
        self._path = path
        self._sessions: dict[str | int, int] = {}

    def add(self, line: int, record: dict[str, Any]) -> None:
        """Raises `TraceError`."""
        path = self._path
        session = name_or_none(record, "session_id", path, line)
        self.timestamp_s.append(seconds_or_nan(record, "timestamp", path, line, per_second=1e3))
        self.delay_s.append(seconds_or_nan(record, "delay", path, line, per_second=1e3))
        self.session_id.append(-1 if session is None else self._sessions.setdefault(session, len(self._sessions)))
        self.input_tokens.append(self._input_tokens(line, record))
        self.output_tokens.append(whole(record, "output_length", path, line))
        self.ids.add_row(block_list_or_none(record, path, line))
        self.lines.append(line)

    def _input_tokens(self, line: int, record: dict[str, Any]) -> int:
        text = record.get("text_input")
        if type(text) is not str or "input_length" in record:
            return whole(record, "input_length", self._path, line)
        self.estimated += 1
        return count_tokens(text)


def load_mooncake(path: Path) -> Trace:
    """Read one request per line; where no line has a timestamp, a session library. Raises `TraceError`."""
    rows, damage, unused = _Rows(path), Damage(path), Unused(_FIELDS)
    for line, record in read_objects(path, damage):
        rows.add(line, record)
        unused.note(record)
    notices = damage.notices() + unused.notices(path)
    if rows.estimated:
        notices.append(f"{path}: {rows.estimated} input lengths are estimated from texts: {RULE}")
    input_tokens, output_tokens = np.array(rows.input_tokens, np.int64), np.array(rows.output_tokens, np.int64)
    session_id = np.array(rows.session_id, np.int64)
    block_size = rows.ids.block_size(input_tokens, BLOCK_TOKENS, path, notices)
    known = rows.ids.code(input_tokens, block_size)
    notices += unknown_ids(path, rows.ids)
    arrival_s = np.array(rows.timestamp_s)
    clocked = not len(arrival_s) or not np.isnan(arrival_s).all()
    alone = np.flatnonzero(session_id < 0)
    if not clocked and len(alone):
        session_id[alone] = session_id.max() + 1 + np.arange(len(alone))
        notices.append(f"{path}: {len(alone):,} rows have neither time nor session: each is a session of one turn")
    if np.isnan(arrival_s).any():
        for row in np.flatnonzero(np.isnan(arrival_s) & (session_id < 0))[:1]:
            refuse_value(f"{path}:{rows.lines[row]}", "timestamp", None, "a time, as other rows have one")
        start_s = np.nan if clocked else 0.0
        service_s = unloaded_service_s(output_tokens)
        arrival_s, known["gap_s"] = _place_turns(arrival_s, np.array(rows.delay_s), session_id, service_s, start_s)
        if clocked or len(alone) < len(arrival_s):
            notices.append(f"{path}: turns without a timestamp are placed as if the turn before met an idle engine")
        for row in np.flatnonzero(np.isnan(arrival_s))[:1]:
            refuse_value(f"{path}:{rows.lines[row]}", "timestamp", None, "a time, as other sessions have one")
    return build_trace(
        request_columns(arrival_s, input_tokens, output_tokens, session_id=session_id, **known),
        name=name_of(path),
        kind="open-loop" if clocked else "session-library",
        block_size=block_size,
        path=str(path),
        where=lambda row: f"{path}:{rows.lines[row]}",
        link=True,
        notices=notices,
        clock="Mooncake",
    )


def _place_turns(
    timestamp_s: np.ndarray, delay_s: np.ndarray, session_id: np.ndarray, service_s: np.ndarray, start_s: float
) -> tuple[np.ndarray, np.ndarray]:
    """Arrivals, rows without a timestamp `delay_s` (NaN: 0) after the turn before has been served, and these times.

    A session whose first row has no timestamp starts at `start_s`.
    """
    delay_s = np.nan_to_num(delay_s)
    order = np.argsort(session_id, kind="stable")
    first = np.diff(session_id[order], prepend=-2) != 0
    time_s = timestamp_s[order]
    time_s = np.where(first & np.isnan(time_s), start_s, time_s)
    placed = first | ~np.isnan(time_s)
    step_s = np.where(placed, 0.0, delay_s[order] + np.concatenate(([0.0], service_s[order][:-1])))
    after_s = np.cumsum(step_s)
    base = np.maximum.accumulate(np.where(placed, np.arange(len(order)), 0))
    arrival_s, gap_s = np.empty_like(timestamp_s), np.empty_like(timestamp_s)
    arrival_s[order] = time_s[base] + after_s - after_s[base]
    gap_s[order] = np.where(placed, np.nan, delay_s[order])
    return arrival_s, gap_s
