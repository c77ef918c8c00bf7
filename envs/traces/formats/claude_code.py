"""Claude Code's own session logs, `~/.claude/projects/*/*.jsonl`: one's own agents, for replay.

Only times, lengths and the order of things are kept, no text. A call of the model is written as one line per block of
its answer; each carries the length of the prompt, the last one that of the output. The line that the first of them
hangs on was the last thing before the call, so its time is the call's arrival. Lines of a sub-agent carry its agentId
or, in old logs, are marked and hang together.

The logs hold no block ids. A call that continues another one repeats its prompt, unless its own is shorter: then, as
after a compaction, the two share what the API's cache is recorded to have found. Sessions share nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hbmgym.envs.traces.coding import IdColumns, new_ids
from hbmgym.envs.traces.formats.columns import request_columns
from hbmgym.envs.traces.formats.reading import each_file, read_objects
from hbmgym.envs.traces.formats.records import Record, name_or_none, whole
from hbmgym.envs.traces.formats.times import parse_datetime
from hbmgym.envs.traces.trace import Trace
from hbmgym.envs.traces.validate import build_trace, refuse

BLOCK_TOKENS = 64
_CACHED = "cache_read_input_tokens"
_PROMPT = ("input_tokens", "cache_creation_input_tokens", _CACHED)
_SYNTHETIC = "<synthetic>"
"""Named as the model of messages that no model wrote, such as errors."""

_NAMES = ("uuid", "parentUuid", "sessionId", "agentId")

Thread = tuple[str | int, str | int]
"""A session and its sub-agent, which is empty for the session itself."""


@dataclass(slots=True, eq=False)
class _Call:
    """A call of the model."""

    thread: Thread
    place: str
    arrival_s: float
    """Where nothing precedes the answer, its first line's time; then end_s is NaN."""
    end_s: float
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    after_tool: bool
    continued: "_Call | None"


@dataclass(slots=True)
class _Line:
    """What a line means to those that hang on it."""

    call: _Call | None
    """The call that it belongs to or, failing that, comes after."""
    in_call: bool
    time_s: float
    after_tool: bool
    root: str | int
    """First line of the marked ones that it hangs on, empty for a line that is not marked as a sub-agent's."""


_NOTHING = _Line(call=None, in_call=False, time_s=math.nan, after_tool=False, root="")


def load_claude_code(path: Path, files: Sequence[Path] = ()) -> Trace:
    """Read one log, or the `files` of the folder `path`, as one session library. Raises `TraceError`."""
    log = _Log()
    for file in each_file(path, files):
        for number, record in read_objects(file):
            log.add(record, file, number)
    return _build(path, list(log.calls.values()))


class _Log:
    """The calls so far, each once though a resumed session repeats them, and the lines that others may hang on."""

    def __init__(self) -> None:
        self.calls: dict[str | int, _Call] = {}
        self._lines: dict[str | int, _Line] = {}

    def add(self, record: Record, file: Path, number: int) -> None:
        """One line of a file; raises `TraceError`."""
        uuid, parent, session, agent = (name_or_none(record, name, file, number) for name in _NAMES)
        if uuid is None:
            return  # a summary, a snapshot of files or the like
        above = self._lines.get(parent or "", _NOTHING)
        time_s = _time_s(record, file, number)
        root = (above.root or uuid) if record.get("isSidechain") is True else ""
        call = None
        if (answer := _answer(record)) is not None:
            thread = (str(file) if session is None else session, root if agent is None else agent)
            call = self._call(answer, uuid, thread, above, time_s, file, number)
        after_tool = _has_tool_result(record) or (record.get("type") != "user" and above.after_tool)
        self._lines[uuid] = _Line(call or above.call, call is not None, time_s, after_tool, root)

    def _call(
        self, answer: Record, uuid: str | int, thread: Thread, above: _Line, time_s: float, file: Path, number: int
    ) -> _Call:
        """The call that a line of an answer belongs to, begun or brought up to date."""
        if math.isnan(time_s):
            refuse(f"{file}:{number}", "timestamp", None, "a date and a time of day", "the field is missing; add it")
        name = name_or_none(answer, "id", file, number)
        call = self.calls.get(uuid if name is None else name)
        usage = answer["usage"]
        if call is None:
            timed = not above.in_call and above.time_s <= time_s
            call = self.calls[uuid if name is None else name] = _Call(
                thread=thread,
                place=f"{file}:{number}",
                arrival_s=above.time_s if timed else time_s,
                end_s=time_s if timed else math.nan,
                input_tokens=sum(_tokens(usage, part, file, number) for part in _PROMPT),
                output_tokens=0,
                cached_tokens=_tokens(usage, _CACHED, file, number),
                after_tool=above.after_tool,
                continued=above.call,
            )
        call.end_s = max(call.end_s, time_s)  # NaN stays
        call.output_tokens = max(call.output_tokens, _tokens(usage, "output_tokens", file, number))
        return call


def _answer(record: Record) -> dict[str, Any] | None:
    """The message of a line that a model wrote."""
    message = record.get("message")
    if record.get("type") != "assistant" or type(message) is not dict or type(message.get("usage")) is not dict:
        return None
    return message if message.get("model") != _SYNTHETIC else None


def _has_tool_result(record: Record) -> bool:
    message = record.get("message")
    content = message.get("content") if type(message) is dict else None
    return type(content) is list and any(type(part) is dict and part.get("type") == "tool_result" for part in content)


def _tokens(usage: Record, field: str, file: Path, number: int) -> int:
    return 0 if usage.get(field) is None else whole(usage, field, file, number)


def _time_s(record: Record, file: Path, number: int) -> float:
    """Seconds since 1970, NaN where the line has no time."""
    text = record.get("timestamp")
    if text is None:
        return math.nan
    try:
        return parse_datetime(text)
    except (TypeError, ValueError, OverflowError):
        refuse(f"{file}:{number}", "timestamp", text, "a date and a time of day", "correct the value")


def _build(path: Path, calls: list[_Call]) -> Trace:
    sources, sessions = _sort(calls)
    session_id = np.array([sessions[call.thread] for call in calls], np.int64)
    source_of = np.array([sources[source] for source, _ in sessions], np.int64)
    starters = [sessions.get((source, ""), -1) if agent != "" else -1 for source, agent in sessions]
    starter_of = np.array(starters, np.int64)
    arrival_s, end_s = np.array([call.arrival_s for call in calls]), np.array([call.end_s for call in calls])
    start_s = np.full(len(sources), np.inf)
    np.minimum.at(start_s, source_of[session_id], arrival_s)
    columns = request_columns(
        arrival_s - start_s[source_of[session_id]],
        np.array([call.input_tokens for call in calls], np.int64),
        np.array([call.output_tokens for call in calls], np.int64),
        session_id=session_id,
        service_s=end_s - arrival_s,
        kind=np.where(starter_of[session_id] >= 0, 2, [call.after_tool for call in calls]),
        s_source_id=source_of,
        s_parent_session=starter_of,
        **_shared_prompts(calls),
    )
    return build_trace(
        columns,
        name=path.resolve().stem,
        kind="session-library",
        block_size=BLOCK_TOKENS,
        path=str(path),
        where=lambda row: calls[row].place,
        link=True,
        notices=[f"{path}: block ids follow from which call continues which; sessions share nothing"],
    )


def _sort(calls: list[_Call]) -> tuple[dict[str | int, int], dict[Thread, int]]:
    """Sort calls by session and arrival. Returns the numbers of sources and of sessions, in this order.

    Sources come as they begin, in each its own session before its sub-agents.
    """
    calls.sort(key=lambda call: call.arrival_s)
    sources = {source: number for number, source in enumerate(dict.fromkeys(call.thread[0] for call in calls))}
    threads = dict.fromkeys(call.thread for call in calls)
    order = sorted(threads, key=lambda thread: (sources[thread[0]], thread[1] != ""))
    sessions = {thread: number for number, thread in enumerate(order)}
    calls.sort(key=lambda call: sessions[call.thread])
    return sources, sessions


def _shared_prompts(calls: Sequence[_Call]) -> IdColumns:
    """Id columns of calls in the order of rows."""
    row_of = {id(call): row for row, call in enumerate(calls)}
    h_ref, shared_tokens = np.full(len(calls), -1, np.int64), np.zeros(len(calls), np.int64)
    for row, call in enumerate(calls):
        before = call.continued
        continues = before is not None and before.thread == call.thread and row_of[id(before)] < row
        if not continues:
            before = calls[row - 1] if row and calls[row - 1].thread == call.thread else None
        if before is not None:
            repeats = continues and call.input_tokens >= before.input_tokens
            h_ref[row] = row_of[id(before)]
            shared_tokens[row] = min(before.input_tokens, call.input_tokens if repeats else call.cached_tokens)
    tokens = np.array([call.input_tokens for call in calls], np.int64)
    shared = np.minimum(shared_tokens, tokens) // BLOCK_TOKENS
    return new_ids(h_ref, shared, tokens // BLOCK_TOKENS - shared)
