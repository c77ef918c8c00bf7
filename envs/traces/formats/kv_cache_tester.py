"""kv-cache-tester's json: a recorded session per object, with its sub-agents inside it.

`hash_id_scope` local, or none: a session's ids, its sub-agents' included, mean nothing in other sessions.
"""

from array import array
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hbmgym.envs.traces.coding import IdColumns, join
from hbmgym.envs.traces.formats.block_ids import BlockIds, unknown_ids
from hbmgym.envs.traces.formats.columns import request_columns
from hbmgym.envs.traces.formats.reading import each_file, read_values
from hbmgym.envs.traces.formats.records import Record, block_list_or_none, seconds, seconds_or_nan, whole
from hbmgym.envs.traces.trace import Trace
from hbmgym.envs.traces.validate import build_trace, refuse


def load_kv_cache_tester(path: Path, files: Sequence[Path] = ()) -> Trace:
    """Read one file, or the `files` of the folder `path`, as one session library. Raises `TraceError`."""
    library = _Library()
    for file in each_file(path, files):
        for recording in read_values(file):
            library.add(recording, file)
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
        name=path.resolve().stem,
        kind="session-library",
        block_size=library.block_size,
        path=str(path),
        where=library.places.__getitem__,
        link=True,
        notices=unknown_ids(path, *library.ids),
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

    def add(self, recording: Any, file: Path) -> None:
        """One recorded session; raises `TraceError`."""
        if type(recording) is not dict:
            refuse(str(file), "session", type(recording).__name__, "a JSON object", "one recorded session per object")
        self._check_ids_alike(recording, file)
        if self._scope == "local" or not self.ids:
            self.ids.append(BlockIds())
        waiting = deque([("", recording, 0.0, -1)])
        while waiting:
            label, agent, start_s, starter = waiting.popleft()
            session = len(self.source_of)
            self.source_of.append(self._recordings)
            self.starter_of.append(starter)
            for number, request in enumerate(_requests(agent, file, label)):
                place = f"{label}request {number}"
                if request.get("type") == "subagent":
                    waiting.append((f"{place}, ", request, start_s + _clock_s(request, file, place), session))
                else:
                    self._add_request(request, file, place, start_s, session)
        self._recordings += 1

    def code_ids(self, input_tokens: np.ndarray) -> IdColumns:
        """Id columns of all rows."""
        parts, begin = [], 0
        for ids in self.ids:
            parts.append(ids.code(input_tokens[begin : begin + len(ids)], self.block_size))
            begin += len(ids)
        return join(parts)

    def _add_request(self, request: Record, file: Path, place: str, start_s: float, session: int) -> None:
        first = not self.session_id or self.session_id[-1] != session
        types = request.get("input_types")
        tool_result = type(types) is list and "tool_result" in types
        self.arrival_s.append(start_s + seconds(request, "t", file, place))
        self.input_tokens.append(whole(request, "in", file, place))
        self.output_tokens.append(whole(request, "out", file, place))
        self.service_s.append(seconds_or_nan(request, "api_time", file, place))
        self.gap_s.append(np.nan if first else seconds_or_nan(request, "think_time", file, place))
        self.session_id.append(session)
        self.kind.append(2 if self.starter_of[session] >= 0 else int(tool_result))
        self.ids[-1].add_row(block_list_or_none(request, file, place))
        self.places.append(f"{file}:{place}")

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


def _requests(agent: Record, file: Path, label: str) -> list[dict[str, Any]]:
    requests = agent.get("requests")
    if type(requests) is not list or not all(type(request) is dict for request in requests):
        refuse(f"{file}:{label}requests", "requests", requests, "a list of JSON objects", "the file is damaged")
    return requests


def _clock_s(agent: Record, file: Path, place: str) -> float:
    """Zero of a sub-agent's clock on that of its starter: its start or, in newer files, the same zero."""
    start_s = seconds(agent, "t", file, place)
    first = next(iter(_requests(agent, file, f"{place}, ")), agent)
    return 0.0 if seconds(first, "t", file, f"{place}, request 0") >= start_s else start_s
