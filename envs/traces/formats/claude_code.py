"""Claude Code's own session logs, `~/.claude/projects/*/*.jsonl`: one's own agents, for replay.

Only times, lengths and the order of things are kept, no text. A call of the model is written as one line per block of
its answer; each carries the lengths of prompt and output so far, so the largest hold. The line that the first of them
hangs on was the last thing before the call, so its time is the call's arrival. Lines of a sub-agent carry its agentId
or, in old logs, are marked and hang together.

Resumed and forked sessions, and sub-agents that compact or take up their parent's talk, repeat calls of others. Such a
call is counted once: for a session before a sub-agent, for what is not marked as forked, for the log in which it stands
earliest, for the session that began first, for the one that ended first. Nobody edits these logs, so a line whose
values are missing or wrong counts as damaged.

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
from hbmgym.envs.traces.formats.damage import Damage
from hbmgym.envs.traces.formats.reading import each_file, head_objects, name_of, read_head, read_objects
from hbmgym.envs.traces.formats.records import Record, name_or_none, refuse_value, whole
from hbmgym.envs.traces.formats.times import parse_datetime
from hbmgym.envs.traces.trace import Trace, TraceError
from hbmgym.envs.traces.validate import build_trace

BLOCK_TOKENS = 64
_LENGTHS = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens", "output_tokens")
_SYNTHETIC = "<synthetic>"
"""Named as the model of messages that no model wrote, such as errors."""

_NAMES = ("uuid", "parentUuid", "sessionId", "agentId")

Thread = tuple[str | int, str | int]
"""A session and its sub-agent, which is empty for the session itself."""
Name = str | int
"""Of a call: the id of its message."""


@dataclass(slots=True, eq=False)
class _Call:
    """A call of the model as one thread tells it."""

    name: Name
    thread: Thread
    place: str
    arrival_s: float
    """Where nothing precedes the answer, its first line's time; then end_s is NaN."""
    first_s: float
    """Time of its first line."""
    end_s: float
    after_tool: bool
    forked: bool
    continued: Name | None
    prompt: tuple[int, int] = (0, 0)
    """Tokens, and how many of them the cache had; the largest of any line."""
    output_tokens: int = 0

    @property
    def input_tokens(self) -> int:
        """Of the whole prompt."""
        return self.prompt[0]


@dataclass(slots=True)
class _Line:
    """What a line means to those that hang on it."""

    call: Name | None
    """The call that it belongs to or, failing that, comes after."""
    in_call: bool
    time_s: float
    after_tool: bool
    root: str | int
    """First line of the marked ones that it hangs on, empty for a line that is not marked as a sub-agent's."""


_NOTHING = _Line(call=None, in_call=False, time_s=math.nan, after_tool=False, root="")


def load_claude_code(path: Path, files: Sequence[Path] = ()) -> Trace:
    """Read one log, or the `files` of the folder `path`, as one session library. Raises `TraceError`."""
    log, damage, without = _Log(), Damage(path), 0
    for file in each_file(path, sorted(files, key=_begin)):
        known = log.lines_of_calls
        with damage.left_out(file):
            log.read(file, damage)
        without += log.lines_of_calls == known
    notices = damage.notices()
    if not log.copies:
        raise TraceError(f"{path}: no call of a model is logged, expected the usage of at least one (name another log)")
    if files and without:
        notices.append(f"{path}: {without:,} of {len(files):,} logs hold no call of a model")
    return _build(path, log.calls(), notices)


def _begin(file: Path) -> tuple[bool, float, Path]:
    """Whether a log is a sub-agent's, and when it begins: what hangs on lines of another log is read after that one."""
    try:
        for record in head_objects(read_head(file)):
            if record.get("uuid") is not None:
                return record.get("isSidechain") is True, _time_s(record, file, 1), file
    except TraceError:
        pass  # it is read, and named, later
    return False, math.inf, file


class _Log:
    """The calls so far, as each thread tells them, and the lines that others may hang on."""

    def __init__(self) -> None:
        self.copies: dict[tuple[Name, Thread], _Call] = {}
        self.lines_of_calls = 0
        self._lines: dict[Name, _Line] = {}
        self._here: dict[Name, _Line] = {}
        """Those of the file that is read, which go before equal ones of others."""
        self._spans_s: dict[Thread, tuple[float, float]] = {}

    def read(self, file: Path, damage: Damage) -> None:
        """All lines of a file; raises `TraceError`."""
        self._here = {}
        for number, record in read_objects(file, damage):
            try:
                self._add(record, file, number)
            except TraceError as reason:
                damage.leave_out(file, reason)
        self._lines |= self._here

    def calls(self) -> list[_Call]:
        """Each call once, by its owner, with the largest usage of all."""
        copies: dict[Name, list[_Call]] = {}
        for call in self.copies.values():
            copies.setdefault(call.name, []).append(call)
        for told in copies.values():
            told.sort(key=self._claim)
            told[0].prompt = max(call.prompt for call in told)
            told[0].output_tokens = max(call.output_tokens for call in told)
        return [told[0] for told in copies.values()]

    def _claim(self, call: _Call) -> tuple[Any, ...]:
        """The least owns the call, in whatever order files are read."""
        return call.thread[1] != "", call.forked, call.first_s, self._spans_s[call.thread], *map(str, call.thread)

    def _add(self, record: Record, file: Path, number: int) -> None:
        """One line of a file; raises `TraceError` and adds nothing."""
        uuid, parent, session, agent = (name_or_none(record, name, file, number) for name in _NAMES)
        if uuid is None:
            return  # a summary, a snapshot of files or the like
        above = self._here.get(parent or "") or self._lines.get(parent or "", _NOTHING)
        time_s = _time_s(record, file, number)
        root = (above.root or uuid) if record.get("isSidechain") is True else ""
        thread = (str(file) if session is None else session, root if agent is None else agent)
        call = None
        if (answer := _answer(record)) is not None:
            call = self._call(answer, uuid, thread, above, time_s, file, number)
            call.forked = call.forked or type(record.get("forkedFrom")) is dict
            self.lines_of_calls += 1
        if not math.isnan(time_s):
            begun_s, ended_s = self._spans_s.get(thread, (time_s, time_s))
            self._spans_s[thread] = min(begun_s, time_s), max(ended_s, time_s)
        after_tool = _has_tool_result(record) or (record.get("type") != "user" and above.after_tool)
        self._here[uuid] = _Line(call.name if call else above.call, call is not None, time_s, after_tool, root)

    def _call(
        self, answer: Record, uuid: Name, thread: Thread, above: _Line, time_s: float, file: Path, number: int
    ) -> _Call:
        """The call that a line of an answer belongs to, begun or brought up to date."""
        if math.isnan(time_s):
            refuse_value(f"{file}:{number}", "timestamp", None, "a date and a time of day")
        message = name_or_none(answer, "id", file, number)
        prompt, output_tokens = _usage(answer["usage"], file, number)
        name = uuid if message is None else message
        timed = not above.in_call and above.time_s <= time_s
        call = self.copies.get((name, thread))
        # A thread's log may go on in another file that does not repeat what the call hangs on.
        if call is None or (timed and math.isnan(call.end_s) and time_s <= call.first_s):
            call = self.copies[name, thread] = _Call(
                name=name,
                thread=thread,
                place=f"{file}:{number}",
                arrival_s=above.time_s if timed else time_s,
                first_s=time_s,
                end_s=time_s if timed else math.nan,
                after_tool=above.after_tool,
                forked=call is not None and call.forked,
                continued=above.call,
                prompt=(0, 0) if call is None else call.prompt,
                output_tokens=0 if call is None else call.output_tokens,
            )
        call.end_s = max(call.end_s, time_s)  # NaN stays
        call.prompt = max(call.prompt, prompt)
        call.output_tokens = max(call.output_tokens, output_tokens)
        return call


def _usage(usage: Record, file: Path, number: int) -> tuple[tuple[int, int], int]:
    """Prompt tokens, how many of them the cache had, and output tokens; what is missing is 0. Raises `TraceError`."""
    lengths = (0 if usage.get(name) is None else whole(usage, name, file, number) for name in _LENGTHS)
    fresh, created, cached, output = lengths
    return (fresh + created + cached, cached), output


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


def _time_s(record: Record, file: Path, number: int) -> float:
    """Seconds since 1970, NaN where the line has no time."""
    text = record.get("timestamp")
    if text is None:
        return math.nan
    try:
        return parse_datetime(text)
    except (TypeError, ValueError, OverflowError):
        refuse_value(f"{file}:{number}", "timestamp", text, "a date and a time of day")


def _build(path: Path, calls: list[_Call], notices: Sequence[str]) -> Trace:
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
        name=name_of(path),
        kind="session-library",
        block_size=BLOCK_TOKENS,
        path=str(path),
        where=lambda row: calls[row].place,
        link=True,
        notices=[*notices, f"{path}: block ids follow from which call continues which; sessions share nothing"],
    )


def _sort(calls: list[_Call]) -> tuple[dict[str | int, int], dict[Thread, int]]:
    """Sort calls by session and arrival. Returns the numbers of sources and of sessions, in this order.

    Sources come as they begin, in each its own session before its sub-agents.
    """
    calls.sort(key=lambda call: (call.arrival_s, call.first_s, *map(str, call.thread), str(call.name)))
    sources = {source: number for number, source in enumerate(dict.fromkeys(call.thread[0] for call in calls))}
    threads = dict.fromkeys(call.thread for call in calls)
    order = sorted(threads, key=lambda thread: (sources[thread[0]], thread[1] != ""))
    sessions = {thread: number for number, thread in enumerate(order)}
    calls.sort(key=lambda call: sessions[call.thread])
    return sources, sessions


def _shared_prompts(calls: Sequence[_Call]) -> IdColumns:
    """Id columns of calls in the order of rows."""
    row_of = {call.name: row for row, call in enumerate(calls)}
    h_ref, shared_tokens = np.full(len(calls), -1, np.int64), np.zeros(len(calls), np.int64)
    for row, call in enumerate(calls):
        found = -1 if call.continued is None else row_of.get(call.continued, -1)
        continues = 0 <= found < row and calls[found].thread == call.thread
        before = found if continues else row - 1
        if before >= 0 and calls[before].thread == call.thread:
            before_tokens = calls[before].input_tokens
            repeats = continues and call.input_tokens >= before_tokens
            h_ref[row] = before
            shared_tokens[row] = min(before_tokens, call.input_tokens if repeats else call.prompt[1])
    tokens = np.array([call.input_tokens for call in calls], np.int64)
    shared = np.minimum(shared_tokens, tokens) // BLOCK_TOKENS
    return new_ids(h_ref, shared, tokens // BLOCK_TOKENS - shared)
