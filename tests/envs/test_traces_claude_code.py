"""Claude Code's logs: one row per call of the model, its times, lengths and what it continues."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from hbmgym.envs.traces.load import load_trace, recognise
from hbmgym.envs.traces.trace import Trace, TraceError

START = datetime(2026, 1, 1, tzinfo=UTC)
SECRET = "do not keep this"


class Log:
    """Writes the lines of one session as the program does, each hanging on the one before."""

    def __init__(self, session: str = "s1", **more) -> None:
        self.lines: list[dict] = []
        self._session, self._more, self._last = session, more, None

    def line(self, at_s: float, kind: str, message: dict | None = None, parent: str | None = "last", **more) -> str:
        uuid = f"{self._session}-{self._more.get('agentId', '')}-{len(self.lines)}"
        time = (START + timedelta(seconds=at_s)).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        record = {
            "parentUuid": self._last if parent == "last" else parent,
            "isSidechain": False,
            "cwd": "/home/me",
            "sessionId": self._session,
            "type": kind,
            "uuid": uuid,
            "timestamp": time,
            **({"message": message} if message else {}),
            **self._more,
            **more,
        }
        self.lines.append(record)
        self._last = uuid
        return uuid

    def says(self, at_s: float, **more) -> str:
        return self.line(at_s, "user", {"role": "user", "content": SECRET}, **more)

    def tool(self, at_s: float, **more) -> str:
        result = {"type": "tool_result", "tool_use_id": "t", "content": SECRET}
        return self.line(at_s, "user", {"role": "user", "content": [result]}, **more)

    def answer(self, at_s: float, name: str, fresh: int, created: int, cached: int, output: int, **more) -> str:
        usage = {
            "input_tokens": fresh,
            "cache_creation_input_tokens": created,
            "cache_read_input_tokens": cached,
            "output_tokens": output,
        }
        content = [{"type": "text", "text": SECRET}]
        message = {"id": name, "role": "assistant", "model": "claude", "content": content, "usage": usage}
        return self.line(at_s, "assistant", message, **more)

    def write(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        return path


def blocks(trace: Trace) -> list[int]:
    """Ids of each row that the row that it refers to has as well, and all of them."""
    return list(zip(trace.h_lcp.tolist(), trace.block_counts.tolist(), strict=True))


def conversation() -> Log:
    log = Log()
    log.line(0, "file-history-snapshot")
    log.says(1.0)
    log.answer(3.0, "m1", 10, 990, 0, 2)
    log.answer(5.5, "m1", 10, 990, 0, 200)
    log.tool(15.5)
    log.answer(18.5, "m2", 5, 295, 1000, 50)
    log.says(60.0)
    log.answer(64.0, "m3", 0, 0, 2000, 70)
    return log


def test_a_call_is_one_row_however_many_lines_it_has(tmp_path):
    path = conversation().write(tmp_path / "log")
    trace = load_trace(path)
    assert recognise(path).name == "Claude Code session log"
    assert (trace.trace_kind, trace.block_size) == ("session-library", 64)
    assert trace.input_tokens.tolist() == [1000, 1300, 2000]
    assert trace.output_tokens.tolist() == [200, 50, 70]
    assert trace.arrival_s.tolist() == pytest.approx([0.0, 14.5, 59.0])
    assert trace.service_s.tolist() == pytest.approx([4.5, 3.0, 4.0])
    assert trace.gap_s.tolist() == pytest.approx([np.nan, 10.0, 41.5], nan_ok=True)
    assert trace.kind.tolist() == [0, 1, 0]
    assert trace.turn.tolist() == [0, 1, 2]
    assert trace.parent.tolist() == [-1, 0, 1]
    assert blocks(trace) == [(0, 15), (15, 20), (20, 31)]


def test_no_text_is_kept(tmp_path):
    trace = load_trace(conversation().write(tmp_path / "log"))
    kept = repr([getattr(trace, name) for name in trace.__dataclass_fields__])
    assert SECRET not in kept and "/home/me" not in kept


def test_after_a_compaction_only_what_the_cache_found_is_shared(tmp_path):
    log = conversation()
    log.line(70.0, "system", parent=None, subtype="compact_boundary")
    log.says(71.0, isCompactSummary=True)
    log.answer(73.0, "m4", 100, 400, 640, 10)
    log.says(80.0)
    log.answer(82.0, "m5", 0, 60, 1140, 10)
    trace = load_trace(log.write(tmp_path / "log"))
    assert trace.input_tokens.tolist() == [1000, 1300, 2000, 1140, 1200]
    assert trace.parent.tolist() == [-1, 0, 1, 2, 3]
    assert trace.h_ref.tolist() == [-1, 0, 1, 2, 3]
    assert blocks(trace)[3:] == [(10, 17), (17, 18)]


def test_a_shorter_prompt_shares_what_the_cache_found(tmp_path):
    log = conversation()
    log.says(80.0)
    log.answer(82.0, "m4", 0, 600, 320, 10)
    assert blocks(load_trace(log.write(tmp_path / "log")))[3] == (5, 14)


def test_a_call_continues_the_one_that_it_hangs_on_after_a_rewind(tmp_path):
    log = Log()
    log.says(0.0)
    first = log.answer(1.0, "m1", 1000, 0, 0, 10)
    log.says(10.0)
    log.answer(11.0, "m2", 2000, 0, 0, 10)
    log.says(20.0, parent=first)
    log.answer(21.0, "m3", 1500, 0, 0, 10)
    trace = load_trace(log.write(tmp_path / "log"))
    assert trace.h_ref.tolist() == [-1, 0, 0]
    assert trace.h_lcp.tolist() == [0, 15, 15]
    assert trace.parent.tolist() == [-1, 0, 1]


def test_sub_agents_have_files_of_their_own(tmp_path):
    conversation().write(tmp_path / "project" / "s1.jsonl")
    agent = Log(agentId="a1", isSidechain=True)
    agent.says(6.0)
    agent.answer(8.0, "n1", 640, 0, 0, 5)
    agent.tool(9.0)
    agent.answer(10.0, "n2", 700, 0, 0, 5)
    agent.write(tmp_path / "project" / "s1" / "subagents" / "agent-a1.jsonl")
    Log("s2").write(tmp_path / "project" / "s2.jsonl")
    trace = load_trace(tmp_path)
    assert trace.session_id.tolist() == [0, 0, 0, 1, 1]
    assert trace.s_source_id.tolist() == [0, 0]
    assert trace.s_parent_session.tolist() == [-1, 0]
    assert trace.arrival_s[3:].tolist() == pytest.approx([5.0, 8.0])
    assert trace.kind.tolist() == [0, 1, 0, 2, 2]
    assert trace.turn.tolist() == [0, 1, 2, 0, 1]
    assert blocks(trace)[3:] == [(0, 10), (10, 10)]


def test_old_logs_mark_a_sub_agents_lines_which_hang_together(tmp_path):
    log = conversation()
    for number in range(2):
        log.says(6.0 + number, parent=None, isSidechain=True)
        log.answer(8.0 + number, f"n{number}", 640, 0, 0, 5, isSidechain=True)
        log.tool(9.0 + number, isSidechain=True)
        log.answer(10.0 + number, f"o{number}", 700, 0, 0, 5, isSidechain=True)
    trace = load_trace(log.write(tmp_path / "log"))
    assert np.bincount(trace.session_id).tolist() == [3, 2, 2]
    assert trace.s_parent_session.tolist() == [-1, 0, 0]
    assert trace.s_source_id.tolist() == [0, 0, 0]


def test_a_resumed_session_repeats_no_call_and_shares_nothing(tmp_path):
    first = conversation()
    first.write(tmp_path / "1.jsonl")
    resumed = Log("s2")
    resumed.lines = list(first.lines)
    resumed._last = first.lines[-1]["uuid"]
    resumed.says(7200.0)
    resumed.answer(7202.0, "m9", 0, 0, 2100, 5)
    resumed.write(tmp_path / "2.jsonl")
    trace = load_trace(tmp_path)
    assert trace.session_id.tolist() == [0, 0, 0, 1]
    assert trace.s_source_id.tolist() == [0, 1]
    assert trace.parent.tolist() == [-1, 0, 1, -1]
    assert trace.h_ref.tolist() == [-1, 0, 1, -1]
    assert trace.arrival_s[3] == 0.0


def test_what_no_model_wrote_is_no_call(tmp_path):
    log = conversation()
    log.answer(70.0, "error", 0, 0, 0, 0)
    log.lines[-1]["message"]["model"] = "<synthetic>"
    log.lines.append({"type": "summary", "summary": SECRET, "leafUuid": "x"})
    assert len(load_trace(log.write(tmp_path / "log"))) == 3


def test_a_call_with_nothing_before_it_has_no_service_time(tmp_path):
    log = Log()
    log.answer(3.0, "m1", 100, 0, 0, 2)
    log.answer(5.0, "m1", 100, 0, 0, 9)
    trace = load_trace(log.write(tmp_path / "log"))
    assert trace.output_tokens.tolist() == [9]
    assert np.isnan(trace.service_s).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"timestamp": "yesterday"}, "timestamp is 'yesterday', expected a date and a time of day"),
        ({"timestamp": 5}, "timestamp is 5"),
        ({"timestamp": None}, "timestamp is None"),
        ({"uuid": ["x"]}, "uuid is ['x']"),
        ({"message": {"id": "m", "usage": {"input_tokens": -1}}}, "input_tokens is -1"),
        ({"message": {"id": {}, "usage": {}}}, "id is {}"),
    ],
)
def test_a_line_with_a_bad_value_is_left_out_and_named(tmp_path, change, said):
    log = conversation()
    log.lines[2] |= change
    path = log.write(tmp_path / "log")
    trace = load_trace(path)
    assert trace.output_tokens.tolist() == [200, 50, 70]
    assert trace.notices[0].startswith(f"{path}: damaged lines are left out: 1 of 8; the first: {path}:3: {said}")


def test_where_most_lines_have_a_bad_value_the_first_is_refused(tmp_path):
    log = conversation()
    for line in log.lines:
        line["timestamp"] = 5
    path = log.write(tmp_path / "log")
    with pytest.raises(TraceError) as caught:
        load_trace(path)
    assert str(caught.value).startswith(f"{path}:1: timestamp is 5, expected a date and a time of day")


# Usage


def usage(fresh: int = 0, created: int = 0, cached: int = 0, output: int = 0) -> tuple[int, ...]:
    return fresh, created, cached, output


@pytest.mark.parametrize(
    "lines",
    [
        [usage(), usage(4, 1000, 0, 100)],
        [usage(4, 1000, 0, 100), usage()],
        [usage(1, 0, 0, 100), usage(4, 1000, 0, 3), usage()],
        [usage(4, 600, 400, 1), usage(4, 1000, 0, 100), usage(1004, 0, 0, 1)],
    ],
)
def test_the_largest_usage_of_any_line_of_a_call_holds(tmp_path, lines):
    log = Log()
    for call in range(3):
        log.says(10.0 * call)
        for line in lines:
            log.answer(10.0 * call + 5.0, f"m{call}", *line)
    trace = load_trace(log.write(tmp_path / "log"))
    assert trace.input_tokens.tolist() == [1004] * 3
    assert trace.output_tokens.tolist() == [100] * 3


def test_the_cached_part_of_a_prompt_is_of_the_line_that_its_length_is_of(tmp_path):
    log = Log()
    log.says(0.0)
    log.answer(1.0, "m1", 2000, 0, 0, 5)
    log.says(10.0, parent=None)
    log.answer(11.0, "m2", 0, 0, 900, 5)
    log.answer(11.5, "m2", 0, 1080, 320, 5)
    assert blocks(load_trace(log.write(tmp_path / "log"))) == [(0, 31), (5, 21)]


# Calls that stand in several logs


def written(log: Log, path: Path, lines: list[dict]) -> None:
    log.lines = lines
    log.write(path)


def calls_of(trace: Trace) -> dict[int, list[int]]:
    """Output tokens, which name the calls, of each session."""
    return {int(s): trace.output_tokens[trace.session_id == s].tolist() for s in np.unique(trace.session_id)}


def numbered(calls: int, **more) -> Log:
    log = Log(**more)
    for n in range(calls):
        log.says(10.0 * n)
        log.answer(10.0 * n + 5.0, f"m{n}", 100 * n + 100, 0, 0, n + 1)
    return log


MAIN_NAMES = [("S.jsonl", "S/subagents/agent-acompact-1.jsonl"), ("z.jsonl", "a.jsonl"), ("a.jsonl", "z.jsonl")]


@pytest.mark.parametrize(("main", "side"), MAIN_NAMES)
def test_a_call_that_a_sub_agent_repeats_is_its_sessions(tmp_path, main, side):
    log = numbered(6)
    log.write(tmp_path / main)
    agent = Log(agentId="acompact-1", isSidechain=True)
    agent.lines = [line | {"agentId": "acompact-1", "isSidechain": True} for line in log.lines[:8]]
    agent._last = log.lines[7]["uuid"]
    agent.says(36.0)
    agent.answer(39.0, "own", 500, 0, 0, 99)
    agent.write(tmp_path / side)
    trace = load_trace(tmp_path)
    assert calls_of(trace) == {0: [1, 2, 3, 4, 5, 6], 1: [99]}
    assert trace.s_parent_session.tolist() == [-1, 0]
    assert trace.service_s.tolist() == pytest.approx([5.0] * 6 + [3.0])
    assert trace.parent.tolist() == [-1, 0, 1, 2, 3, 4, -1]


def as_session(lines: list[dict], name: str, **more) -> list[dict]:
    return [line | {"sessionId": name} | more for line in lines]


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
@pytest.mark.parametrize("copied", ["whole", "tail", "with later times", "marked"])
def test_a_resumed_or_forked_session_leaves_the_calls_to_the_one_that_it_repeats(tmp_path, names, copied):
    first, second = names
    log = numbered(4)
    lines = {
        "whole": as_session(log.lines, second),
        "tail": as_session(log.lines[4:], second),
        "with later times": [
            line | {"sessionId": second, "timestamp": line["timestamp"].replace("2026-01-01", "2026-01-02")}
            for line in log.lines
        ],
        "marked": as_session(log.lines, second, forkedFrom={"sessionId": first, "messageUuid": "x"}),
    }[copied]
    resumed = Log(second)
    resumed.lines, resumed._last = lines, lines[-1]["uuid"]
    resumed.says(100_000.0)
    resumed.answer(100_005.0, "m9", 900, 0, 0, 9)
    if copied == "marked":  # the original goes on for longer than its fork
        log.says(200_000.0)
        log.answer(200_005.0, "m10", 900, 0, 0, 10)
    written(log, tmp_path / f"{first}.jsonl", as_session(log.lines, first))
    resumed.write(tmp_path / f"{second}.jsonl")
    found = calls_of(load_trace(tmp_path))
    assert found == {0: [1, 2, 3, 4] + [10] * (copied == "marked"), 1: [9]}


def test_three_sessions_that_repeat_each_other_have_each_call_once(tmp_path):
    log, names = numbered(2), ("c", "a", "b")
    for number, name in enumerate(names):
        log.lines = as_session(log.lines, name)
        log._session = name
        log.says(1000.0 * (number + 1))
        log.answer(1000.0 * (number + 1) + 5.0, f"own{number}", 400, 0, 0, 50 + number)
        log.write(tmp_path / f"{name}.jsonl")
    assert calls_of(load_trace(tmp_path)) == {0: [1, 2, 50], 1: [51], 2: [52]}


@pytest.mark.parametrize("names", [("1", "2"), ("2", "1")])
def test_a_session_that_goes_on_in_another_file_is_one_in_any_order_of_files(tmp_path, names):
    log = numbered(4)
    first, second = log.lines[:4], log.lines[3:]
    for name, lines in zip(names, (first, second), strict=True):
        written(Log(), tmp_path / f"{name}.jsonl", lines)
    trace = load_trace(tmp_path)
    assert calls_of(trace) == {0: [1, 2, 3, 4]}
    assert trace.service_s.tolist() == pytest.approx([5.0] * 4)
    assert trace.h_ref.tolist() == [-1, 0, 1, 2]


def test_files_may_have_any_names(tmp_path):
    logs = [numbered(3, session=name) for name in ("p", "q", "r")]
    for number, log in enumerate(logs):
        for line in log.lines:
            if "message" in line and "id" in line["message"]:
                line["message"]["id"] += f"-{number}"
    digests = set()
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        folder = tmp_path / "".join(map(str, order))
        for name, number in zip("xyz", order, strict=True):
            logs[number].write(folder / f"{name}.jsonl")
        digests.add(load_trace(folder).digest)
    assert len(digests) == 1
