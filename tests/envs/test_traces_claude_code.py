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
    first.write(tmp_path / "1")
    resumed = Log("s2")
    resumed.lines = list(first.lines)
    resumed._last = first.lines[-1]["uuid"]
    resumed.says(7200.0)
    resumed.answer(7202.0, "m9", 0, 0, 2100, 5)
    resumed.write(tmp_path / "2")
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
def test_a_bad_value_is_named_by_file_and_line(tmp_path, change, said):
    log = conversation()
    log.lines[2] |= change
    path = log.write(tmp_path / "log")
    with pytest.raises(TraceError) as caught:
        load_trace(path)
    assert str(caught.value).startswith(f"{path}:3: {said}")
