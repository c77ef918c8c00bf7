"""kv-cache-tester's json: a recorded session per object, with its sub-agents inside it.

`hash_id_scope` local, or none: a session's ids, its sub-agents' included, mean nothing in other sessions. A session
that lacks a value is damaged as a whole: what it continues is part of what it measures.
"""

import itertools
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hbmgym.envs.traces.coding import IdColumns, join
from hbmgym.envs.traces.formats.block_ids import BlockIds, unknown_ids
from hbmgym.envs.traces.formats.columns import request_columns
from hbmgym.envs.traces.formats.damage import Damage, Damaged
from hbmgym.envs.traces.formats.fields import Unused
from hbmgym.envs.traces.formats.reading import each_file, name_of, read_values
from hbmgym.envs.traces.formats.records import (
    Record,
    block_list_or_none,
    refuse_value,
    seconds,
    seconds_or_nan,
    whole,
)
from hbmgym.envs.traces.trace import Trace
from hbmgym.envs.traces.validate import build_trace, refuse

_OF_RECORDINGS = ("id", "models", "block_size", "hash_id_scope", "tool_tokens", "system_tokens", "requests", "totals")
_OF_REQUESTS = ("t", "type", "model", "in", "out", "hash_ids", "input_types", "output_types", "stop", "api_time")
_OF_AGENTS = ("agent_id", "subagent_type", "duration_ms", "total_tokens", "tool_use_count", "status", "think_time")
_FIELDS = (*_OF_RECORDINGS, *_OF_REQUESTS, *_OF_AGENTS)
"""Those that are read, and those that are known to add nothing."""


@dataclass(frozen=True, slots=True)
class _Request:
    place: str
    agent: int
    """Number of the sub-agent within its recording, 0 for the session itself."""
    t_s: float
    input_tokens: int
    output_tokens: int
    api_s: float
    think_s: float
    after_tool: bool
    ids: list[str | int] | None


def load_kv_cache_tester(path: Path, files: Sequence[Path] = ()) -> Trace:
    """Read one file, or the `files` of the folder `path`, as one session library. Raises `TraceError`."""
    library, damage, unused = _Library(), Damage(path, "sessions"), Unused(_FIELDS)
    for file in each_file(path, files):
        with damage.left_out(file):
            for recording in read_values(file, damage):
                try:
                    library.add(recording, file, unused)
                except Damaged as reason:
                    damage.leave_out(file, reason)
    notices = [*damage.notices(), *unused.notices(path), *unknown_ids(path, *library.ids)]
    input_tokens = np.array(library.input_tokens, np.int64)
    columns = request_columns(
        np.array(library.arrival_s),
        input_tokens,
        np.array(library.output_tokens, np.int64),
        session_id=np.array(library.session_id, np.int64),
        gap_s=np.array(library.gap_s),
        service_s=np.array(library.service_s),
        kind=np.array(library.kind, np.uint8),
        s_source_id=np.array(library.source_of, np.int64),
        s_parent_session=np.array(library.starter_of, np.int64),
        **library.code_ids(input_tokens),
    )
    return build_trace(
        columns,
        name=name_of(path),
        kind="session-library",
        block_size=library.block_size,
        path=str(path),
        where=library.places.__getitem__,
        link=True,
        notices=notices,
    )


class _Library:
    """Rows and sessions so far. A recording's own rows come first, then each sub-agent's, in order of their start."""

    def __init__(self) -> None:
        self.arrival_s, self.gap_s, self.service_s = array("d"), array("d"), array("d")
        self.input_tokens, self.output_tokens = array("q"), array("q")
        self.session_id, self.kind = array("q"), array("B")
        self.source_of, self.starter_of = array("q"), array("q")
        self.places: list[str] = []
        self.block_size, self._scope = 0, ""
        self.ids: list[BlockIds] = []
        self._recordings = 0

    def add(self, recording: Any, file: Path, unused: Unused) -> None:
        """One recorded session, whole or not at all; raises `TraceError`."""
        if type(recording) is not dict:
            raise Damaged(f"{file}: session is {type(recording).__name__!r}, expected a JSON object")
        starters: list[int] = []
        requests = list(_requests(recording, file, starters, unused))
        self._check_ids_alike(recording, file)
        if self._scope == "local" or not self.ids:
            self.ids.append(BlockIds())
        first = len(self.source_of)
        self.source_of.extend([self._recordings] * len(starters))
        self.starter_of.extend(first + starter if starter >= 0 else -1 for starter in starters)
        self._recordings += 1
        for agent, group in itertools.groupby(requests, lambda request: request.agent):
            for number, request in enumerate(group):
                self._add_request(request, file, first + agent, is_first=number == 0)

    def code_ids(self, input_tokens: np.ndarray) -> IdColumns:
        """Id columns of all rows."""
        parts, begin = [], 0
        for ids in self.ids:
            parts.append(ids.code(input_tokens[begin : begin + len(ids)], self.block_size))
            begin += len(ids)
        return join(parts)

    def _add_request(self, request: _Request, file: Path, session: int, is_first: bool) -> None:
        self.arrival_s.append(request.t_s)
        self.input_tokens.append(request.input_tokens)
        self.output_tokens.append(request.output_tokens)
        self.service_s.append(request.api_s)
        self.gap_s.append(np.nan if is_first else request.think_s)
        self.session_id.append(session)
        self.kind.append(2 if self.starter_of[session] >= 0 else int(request.after_tool))
        self.ids[-1].add_row(request.ids)
        self.places.append(f"{file}:{request.place}")

    def _check_ids_alike(self, recording: Record, file: Path) -> None:
        size, scope = whole(recording, "block_size", file, "session"), recording.get("hash_id_scope", "local")
        if not size:
            refuse(str(file), "block_size", size, "an integer >= 1", "correct the value")
        if scope not in ("local", "global"):
            refuse(str(file), "hash_id_scope", scope, "local or global", "correct the value")
        if self._recordings and (size, scope) != (self.block_size, self._scope):
            expected = f"{(self.block_size, self._scope)}, as in the files before"
            refuse(str(file), "(block_size, hash_id_scope)", (size, scope), expected, "load them one by one")
        self.block_size, self._scope = size, scope


def _requests(recording: Record, file: Path, starters: list[int], unused: Unused) -> Iterator[_Request]:
    """A recording's own requests, then each sub-agent's; `starters` gets who started each of them, -1 first."""
    waiting = deque([("", recording, 0.0, -1)])
    while waiting:
        label, agent, start_s, starter = waiting.popleft()
        own = len(starters)
        starters.append(starter)
        unused.note(agent)
        for number, request in enumerate(_list(agent, file, label)):
            place = f"{label}request {number}"
            if request.get("type") == "subagent":
                waiting.append((f"{place}, ", request, start_s + _clock_s(request, file, place), own))
            else:
                unused.note(request)
                yield _request(request, file, place, own, start_s)


def _request(request: Record, file: Path, place: str, agent: int, start_s: float) -> _Request:
    types = request.get("input_types")
    return _Request(
        place=place,
        agent=agent,
        t_s=start_s + seconds(request, "t", file, place),
        input_tokens=whole(request, "in", file, place),
        output_tokens=whole(request, "out", file, place),
        api_s=seconds_or_nan(request, "api_time", file, place),
        think_s=seconds_or_nan(request, "think_time", file, place),
        after_tool=type(types) is list and "tool_result" in types,
        ids=block_list_or_none(request, file, place),
    )


def _list(agent: Record, file: Path, label: str) -> list[dict[str, Any]]:
    requests = agent.get("requests")
    if type(requests) is not list or not all(type(request) is dict for request in requests):
        refuse_value(f"{file}:{label}requests", "requests", requests, "a list of JSON objects")
    return requests


def _clock_s(agent: Record, file: Path, place: str) -> float:
    """Zero of a sub-agent's clock on that of its starter: its start or, in newer files, the same zero."""
    start_s = seconds(agent, "t", file, place)
    first = next(iter(_list(agent, file, f"{place}, ")), agent)
    return 0.0 if seconds(first, "t", file, f"{place}, request 0") >= start_s else start_s
