"""The formats that people have: what each loader makes of them, and that it makes up nothing."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from hbmgym.envs.traces.formats import reading
from hbmgym.envs.traces.formats.compact import compact_bytes
from hbmgym.envs.traces.formats.generic_csv import parse_columns
from hbmgym.envs.traces.formats.words import count_tokens
from hbmgym.envs.traces.load import load_trace, recognise
from hbmgym.envs.traces.service import unloaded_service_s
from hbmgym.envs.traces.trace import Trace, TraceError

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "traces"


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def write_json_lines(path: Path, rows) -> Path:
    return write(path, *map(json.dumps, rows))


def blocks(trace: Trace) -> list[list[int]]:
    return [trace.blocks(row).tolist() for row in range(len(trace))]


def tokens(trace: Trace) -> list[tuple[int, int]]:
    return list(zip(trace.input_tokens.tolist(), trace.output_tokens.tolist(), strict=True))


def refusal(path, **more) -> str:
    with pytest.raises(TraceError) as caught:
        load_trace(path, **more)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_a_large_file_shows_a_bar_on_a_terminal_only(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    path = write_json_lines(tmp_path / "large", [{"timestamp": 0, "input_length": 5, "output_length": 1}])
    monkeypatch.setattr(reading, "BAR_BYTES", 0)
    for stderr, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stderr)
        load_trace(path)
        assert ("large: " in stderr.getvalue()) == shown


# Azure


def test_azure_times_count_from_the_first_request_to_the_last_digit(tmp_path):
    path = write(
        tmp_path / "a",
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2023-11-16 18:15:46.6805900,374,44",
        "2023-11-16 18:15:50.9951690,396,109",
    )
    trace = load_trace(path)
    assert recognise(path).name == "Azure csv"
    assert trace.arrival_s.tolist() == [0.0, 4.314579]
    assert tokens(trace) == [(374, 44), (396, 109)]
    assert (trace.trace_kind, trace.block_size, trace.notices) == ("open-loop", 0, ())
    assert (trace.session_id == -1).all() and (trace.parent == -1).all()


@pytest.mark.parametrize("zone", ["+00:00", "Z", " UTC", "+02:00"])
def test_azure_times_may_name_their_zone(tmp_path, zone):
    rows = (f"2024-05-10 00:00:0{second}.25{zone},10,5" for second in (1, 0))
    trace = load_trace(write(tmp_path / "a", "TIMESTAMP,ContextTokens,GeneratedTokens", *rows))
    assert trace.arrival_s.tolist() == [0.0, 1.0]
    assert trace.notices == (f"{tmp_path / 'a'}: rows were not sorted by arrival, moved 2",)


@pytest.mark.parametrize("time", ["now", "today", "NaT", "", "18:15", "9999-01-01", "1000-01-01", "2024-13-01", "17"])
def test_what_is_no_date_is_named_by_line(tmp_path, time):
    path = write(
        tmp_path / "a", "TIMESTAMP,ContextTokens,GeneratedTokens", "2024-05-10 00:00:00,1,1", "", f"{time},10,5"
    )
    assert refusal(path).startswith(f"{path}:4: TIMESTAMP is {time!r}, expected a date and a time of day")


def test_images_are_said_not_to_be_counted(tmp_path):
    path = write(tmp_path / "a", "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens", "2024-10-15 00:00:00,2,10,5")
    assert load_trace(path).notices == (
        f"{path}: images are counted by what ContextTokens says of them and not otherwise",
    )


@pytest.mark.parametrize("name", ["code", "conv"])
def test_azure_rows_equal_those_of_the_compact_file(name):
    native, compact = (
        SHARED / "native" / f"azure_2023_{name}_head500.csv",
        SHARED / "train" / f"azure2023_{name}.train.npz",
    )
    if not (native.is_file() and compact.is_file()):
        pytest.skip("public traces are not beside the repository")
    one, other = load_trace(native), load_trace(compact)
    assert tokens(one) == tokens(other)[: len(one)]
    assert np.abs(one.arrival_s - other.arrival_s[: len(one)]).max() < 1e-9


# BurstGPT


def test_burstgpt_without_sessions_is_read_by_column_name(tmp_path):
    path = write(
        tmp_path / "a",
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type",
        "5,ChatGPT,472,18,490,Conversation log",
        "45,GPT-4,1087,0,1087,API log",
        "118,ChatGPT,417,276,693,Conversation log",
    )
    trace = load_trace(path)
    assert recognise(path).name == "BurstGPT csv"
    assert trace.arrival_s.tolist() == [5.0, 118.0]
    assert tokens(trace) == [(472, 18), (417, 276)]
    assert trace.notices == (
        f"{path}: 1 requests failed (0 response tokens)",
        f"{path}: dropped 1 rows with 0 input or output tokens",
    )


def test_burstgpt_turns_follow_their_session_and_share_no_ids(tmp_path):
    path = write(
        tmp_path / "a",
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type",
        "0,one,2.5,ChatGPT,10,5,15,Conversation log",
        "1,,,ChatGPT,20,5,25,API log",
        "10,one,4,ChatGPT,30,5,35,Conversation log",
        "11,one,4,ChatGPT,40,5,45,Conversation log",
        "12,two,1,ChatGPT,50,5,55,Conversation log",
        "20,one,1,ChatGPT,60,5,65,Conversation log",
    )
    trace = load_trace(path)
    assert trace.session_id.tolist() == [0, -1, 0, 0, 1, 0]
    assert trace.turn.tolist() == [0, -1, 1, 2, 0, 3]
    # The row at 11 s came while the one at 10 s was being served: it continues nothing.
    assert trace.parent.tolist() == [-1, -1, 0, -1, -1, 3]
    assert trace.gap_s.tolist() == pytest.approx([np.nan, np.nan, 7.5, np.nan, np.nan, 5.0], nan_ok=True)
    assert trace.service_s.tolist() == pytest.approx([2.5, np.nan, 4, 4, 1, 1], nan_ok=True)
    assert blocks(trace) == [[]] * 6


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("nan,ChatGPT,1,1", "2: Timestamp is 'nan', expected a time >= 0 in seconds"),
        ("1,ChatGPT,-1,1", "2: Request tokens is '-1', expected an integer >= 0"),
        ("1,ChatGPT,1,1.5", "2: Response tokens is '1.5', expected an integer >= 0"),
        ("1,ChatGPT,1e308,1", "2: Request tokens is '1e308', expected an integer >= 0"),
        ("1,ChatGPT,1", "2: number of columns is 3, expected 4"),
        ('1,"ChatGPT', "2: number of columns is 2, expected 4"),
    ],
)
def test_a_bad_cell_is_named_by_line_and_column(tmp_path, row, said):
    path = write(tmp_path / "a", "Timestamp,Model,Request tokens,Response tokens", row)
    assert said in refusal(path)


# Any csv


def test_a_csv_with_common_names_needs_no_mapping(tmp_path):
    path = write(tmp_path / "a", "num_decode_tokens;num_prefill_tokens;arrived_at", "5;100;0.5", "6;200;2")
    trace = load_trace(path)
    assert recognise(path).name == "csv with common column names"
    assert trace.arrival_s.tolist() == [0.5, 2.0]
    assert tokens(trace) == [(100, 5), (200, 6)]


@pytest.mark.parametrize(
    ("unit", "times"),
    [
        ("s", ("1.5", "3")),
        ("ms", ("1500", "3000")),
        ("us", ("1500000", "3e6")),
        ("ns", ("1500000000", "3000000000")),
    ],
)
def test_named_columns_say_the_unit(tmp_path, unit, times):
    path = write(tmp_path / "a", "when,who,prompt,answer", f"{times[0]},x,10,1", f"{times[1]},x,20,2")
    names = parse_columns(f"arrival_{unit}=when,input_tokens=prompt,output_tokens=answer,session_id=who")
    trace = load_trace(path, columns=names)
    assert trace.arrival_s.tolist() == [1.5, 3.0]
    assert trace.parent.tolist() == [-1, 0]
    assert trace.turn.tolist() == [0, 1]


def test_named_columns_may_hold_dates(tmp_path):
    path = write(tmp_path / "a", "when,prompt,answer", "2024-01-01T00:00:00Z,10,1", "2024-01-01T01:00:00+00:00,20,2")
    trace = load_trace(path, columns=parse_columns("arrival_s=when,input_tokens=prompt,output_tokens=answer"))
    assert trace.arrival_s.tolist() == [0.0, 3600.0]


def test_columns_that_say_nothing_are_shown_with_the_remedy(tmp_path):
    path = write(tmp_path / "a", "timestamp,in,out", "1,2,3")
    assert "columns is 'timestamp, in, out'" in refusal(path)
    assert "convert --columns" in refusal(path)


@pytest.mark.parametrize(
    "text",
    [
        "arrival_s",
        "arrival_s=",
        "time=when,input_tokens=a,output_tokens=b",
        "arrival_s=when,input_tokens=a",
        "arrival_s=when,arrival_ms=when,input_tokens=a,output_tokens=b",
        "arrival_s=when,arrival_s=then,input_tokens=a,output_tokens=b",
    ],
)
def test_a_bad_mapping_is_refused(text):
    with pytest.raises(TraceError, match="--columns"):
        parse_columns(text)


def test_a_mapping_to_a_column_that_is_not_there_is_refused(tmp_path):
    path = write(tmp_path / "a", "when,prompt", "1,2")
    line = refusal(path, columns=parse_columns("arrival_s=when,input_tokens=prompt,output_tokens=answer"))
    assert "columns is 'when, prompt', expected answer" in line


# Mooncake as AIPerf extends it


def test_turns_with_a_delay_follow_an_idle_engine(tmp_path):
    rows = [
        {"session_id": "a", "timestamp": 1000, "input_length": 600, "output_length": 40, "hash_ids": [1, 2]},
        {"timestamp": 2000, "input_length": 10, "output_length": 1, "hash_ids": [9]},
        {"session_id": "a", "delay": 500, "input_length": 1100, "output_length": 80, "hash_ids": [1, 2, 3]},
        {"session_id": "a", "input_length": 1200, "output_length": 5, "hash_ids": [1, 2, 3]},
        {"session_id": 7, "timestamp": 1500, "input_length": 10, "output_length": 1, "hash_ids": [8]},
    ]
    trace = load_trace(write_json_lines(tmp_path / "a", rows))
    second_s = 1.0 + unloaded_service_s(np.array([40]))[0] + 0.5
    third_s = second_s + unloaded_service_s(np.array([80]))[0]
    assert trace.trace_kind == "open-loop"
    assert trace.arrival_s.tolist() == pytest.approx([1.0, 1.5, 2.0, second_s, third_s])
    assert trace.session_id.tolist() == [0, 1, -1, 0, 0]
    assert trace.turn.tolist() == [0, 0, -1, 1, 2]
    assert trace.parent.tolist() == [-1, -1, -1, 0, 3]
    assert trace.gap_s.tolist() == pytest.approx([np.nan, np.nan, np.nan, 0.5, 0.0], nan_ok=True)
    assert blocks(trace) == [[0, 1], [4], [2], [0, 1, 3], [0, 1, 3]]
    assert len(trace.notices) == 2 and "idle engine" in trace.notices[0] and "sorted" in trace.notices[1]


def test_sessions_without_any_timestamp_are_a_library(tmp_path):
    rows = [
        {"session_id": "a", "input_length": 100, "output_length": 40},
        {"session_id": "b", "input_length": 100, "output_length": 40},
        {"session_id": "a", "delay": 2000, "input_length": 200, "output_length": 40},
    ]
    trace = load_trace(write_json_lines(tmp_path / "a", rows))
    assert (trace.trace_kind, trace.block_size) == ("session-library", 0)
    assert trace.session_id.tolist() == [0, 0, 1]
    assert trace.arrival_s.tolist() == pytest.approx([0.0, 2.0 + unloaded_service_s(np.array([40]))[0], 0.0])


def test_a_session_that_never_starts_is_refused(tmp_path):
    rows = [
        {"timestamp": 0, "input_length": 100, "output_length": 40},
        {"session_id": "a", "delay": 2000, "input_length": 200, "output_length": 40},
    ]
    assert ":2: timestamp is None, expected a time" in refusal(write_json_lines(tmp_path / "a", rows))


def test_rows_without_ids_share_nothing(tmp_path):
    rows = [
        {"timestamp": 0, "input_length": 1200, "output_length": 1, "hash_ids": [4, 5]},
        {"timestamp": 1, "input_length": 1200, "output_length": 1},
        {"timestamp": 2, "input_length": 1200, "output_length": 1, "hash_ids": [4, 5]},
        {"timestamp": 3, "input_length": 200, "output_length": 1, "hash_ids": None},
    ]
    trace = load_trace(write_json_lines(tmp_path / "a", rows))
    assert blocks(trace) == [[0, 1], [2, 3], [0, 1], []]
    assert trace.notices == (f"{tmp_path / 'a'}: 2 rows have no block ids, so they share nothing",)


def test_texts_are_measured_by_their_words(tmp_path):
    row = {"timestamp": 0, "text_input": "three words here", "output_length": 1}
    trace = load_trace(write_json_lines(tmp_path / "a", [row]))
    assert tokens(trace) == [(4, 1)]
    assert "1 input lengths are estimated" in trace.notices[0]


def test_a_text_without_spaces_is_measured_by_its_bytes():
    assert count_tokens("x" * 600) == 100
    assert count_tokens("漢" * 600) == 300
    assert count_tokens("") == 0


def test_other_block_sizes_are_seen_by_the_lengths(tmp_path):
    rows = [
        {"timestamp": n, "input_length": 64 * n + 3, "output_length": 1, "hash_ids": list(range(n))}
        for n in range(1, 9)
    ]
    trace = load_trace(write_json_lines(tmp_path / "a", rows))
    assert trace.block_size == 64
    assert "taken for 64 tokens per block id, not 512" in trace.notices[0]


# Qwen-Bailian


def bailian_row(chat, parent, timestamp, ids, turn=1, **more):
    return {
        "chat_id": chat,
        "parent_chat_id": parent,
        "timestamp": timestamp,
        "input_length": 16 * len(ids),
        "output_length": 3,
        "type": "text",
        "turn": turn,
        "hash_ids": ids,
        **more,
    }


def test_bailian_chats_are_linked_by_their_ids(tmp_path):
    rows = [
        bailian_row(55, -1, 61.114, [1, 2]),
        bailian_row(60, 12, 62.0, [5], turn=4),
        bailian_row(159, 55, 70.5, [1, 2, 3], turn=2),
        bailian_row(160, 55, 71.0, [1, 2, 4], turn=2),
        bailian_row(161, 159, 80.0, [1, 2, 3, 6], turn=3),
    ]
    path = write_json_lines(tmp_path / "a", rows)
    trace = load_trace(path)
    assert recognise(path).name == "Qwen-Bailian jsonl"
    assert trace.block_size == 16
    assert trace.arrival_s.tolist() == [61.114, 62.0, 70.5, 71.0, 80.0]
    assert trace.parent.tolist() == [-1, -1, 0, 0, 2]
    assert trace.session_id.tolist() == [0, 1, 0, 0, 0]
    assert trace.turn.tolist() == [0, 3, 1, 1, 2]
    assert np.isnan(trace.gap_s).all()
    assert blocks(trace) == [[0, 1], [2], [0, 1, 3], [0, 1, 4], [0, 1, 3, 5]]


def test_bailian_rows_out_of_order_keep_their_parents(tmp_path):
    rows = [
        bailian_row(2, 1, 5.0, [1, 2], turn=2),
        bailian_row(1, -1, 3.0, [1]),
        bailian_row(4, 3, 6.0, [7], turn=2),
        bailian_row(3, -1, 9.0, [8]),
    ]
    trace = load_trace(write_json_lines(tmp_path / "a", rows))
    assert trace.arrival_s.tolist() == [3.0, 5.0, 6.0, 9.0]
    assert trace.parent.tolist() == [-1, 0, -1, -1]
    assert blocks(trace)[1][:1] == blocks(trace)[0]
    assert ["arrived before the turn" in trace.notices[0], "not sorted" in trace.notices[1]] == [True, True]


def test_bailian_ids_that_name_blocks_and_not_prefixes_are_told_apart(tmp_path):
    rows = [bailian_row(1, -1, 0, [1, 2]), bailian_row(2, -1, 1, [3, 2]), bailian_row(3, -1, 2, [3, 2, 1])]
    assert blocks(load_trace(write_json_lines(tmp_path / "a", rows))) == [[0, 1], [2, 3], [2, 3, 4]]


def test_bad_bailian_values_are_named_by_line(tmp_path):
    path = write_json_lines(tmp_path / "a", [bailian_row(1, -1, 0, [1]), bailian_row([1], -1, 0, [1])])
    assert refusal(path).startswith(f"{path}:2: chat_id is [1], expected a text or an integer")


# kv-cache-tester


def request(t, tokens, ids, *, stop="", **more):
    return {"t": t, "type": "n", "in": tokens, "out": 7, "hash_ids": ids, "input_types": ["text"], **more}


def recording(*requests, **more):
    return {"id": "x", "models": ["m"], "block_size": 64, "requests": list(requests), **more}


def sub_agent(t, *requests):
    return {"t": t, "type": "subagent", "agent_id": "a", "duration_ms": None, "requests": list(requests)}


def test_sub_agents_run_on_their_parents_clock_with_its_ids(tmp_path):
    whole = recording(
        request(0.0, 130, [1, 2], api_time=2.0, think_time=0.0),
        sub_agent(5.5, request(0.0, 70, [9], api_time=1.0), request(4.0, 130, [9, 10], think_time=3.0)),
        request(20.0, 200, [1, 2, 3], api_time=2.0, think_time=18.0, input_types=["tool_result"]),
        sub_agent(21.0, request(21.5, 64, [1]), sub_agent(21.5, request(0.5, 64, [11]))),
    )
    path = tmp_path / "a"
    path.write_text(json.dumps(whole, indent=1))
    trace = load_trace(path)
    assert recognise(path).name == "kv-cache-tester json"
    assert trace.trace_kind == "session-library"
    assert trace.session_id.tolist() == [0, 0, 1, 1, 2, 3]
    # The second sub-agent counts from the recording's start, as newer files do, the third from its own again.
    assert trace.arrival_s.tolist() == [0.0, 20.0, 5.5, 9.5, 21.5, 22.0]
    assert trace.s_source_id.tolist() == [0, 0, 0, 0]
    assert trace.s_parent_session.tolist() == [-1, 0, 0, 2]
    assert trace.turn.tolist() == [0, 1, 0, 1, 0, 0]
    assert trace.parent.tolist() == [-1, 0, -1, 2, -1, -1]
    assert trace.kind.tolist() == [0, 1, 2, 2, 2, 2]
    assert trace.gap_s.tolist() == pytest.approx([np.nan, 18.0, np.nan, 3.0, np.nan, np.nan], nan_ok=True)
    assert trace.service_s.tolist() == pytest.approx([2.0, 2.0, 1.0, np.nan, np.nan, np.nan], nan_ok=True)
    assert blocks(trace) == [[0, 1], [0, 1, 2], [3], [3, 4], [0], [5]]


@pytest.mark.parametrize(("scope", "second"), [("local", [2, 3]), ("global", [0, 1]), (None, [2, 3])])
def test_ids_of_recordings_in_a_folder_mean_what_their_scope_says(tmp_path, scope, second):
    for name in ("a", "b"):
        whole = recording(request(0.0, 130, [1, 2]), **({"hash_id_scope": scope} if scope else {}))
        (tmp_path / f"{name}.json").write_text(json.dumps(whole))
    (tmp_path / "notes.txt").write_text("cache hit rates")
    trace = load_trace(tmp_path)
    assert blocks(trace) == [[0, 1], second]
    assert trace.s_source_id.tolist() == [0, 1]
    assert trace.name == tmp_path.name
    assert trace.notices == (f"{tmp_path}: 1 files of other kinds are left out",)


def test_requests_without_ids_are_counted_once_for_all_recordings(tmp_path):
    bare = {key: value for key, value in request(1, 130, []).items() if key != "hash_ids"}
    path = write_json_lines(tmp_path / "a", [recording(request(0, 64, [1]), bare), recording(bare)])
    trace = load_trace(path)
    assert blocks(trace) == [[0], [1, 2], [3, 4]]
    assert trace.notices == (f"{path}: 2 rows have no block ids, so they share nothing",)


def test_recordings_may_follow_each_other_in_one_file(tmp_path):
    path = write_json_lines(tmp_path / "a", [recording(request(0, 64, [1])), recording(request(0, 64, [1]))])
    assert blocks(load_trace(path)) == [[0], [1]]


def test_recordings_of_two_block_sizes_do_not_mix(tmp_path):
    path = write_json_lines(tmp_path / "a", [recording(request(0, 64, [1])), recording(block_size=32)])
    assert "(block_size, hash_id_scope) is (32, 'local'), expected (64, 'local')" in refusal(path)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (request(-1, 64, [1]), "request 1: t is -1"),
        (request(1, "64", [1]), "request 1: in is '64'"),
        (request(1, 64, [1, 2, 3]), "request 1: number of block ids is 3, expected 1 or 1"),
        (sub_agent(1, request(0, None, [1])), "request 1, request 0: in is None"),
        ({"t": 1, "type": "subagent"}, "request 1, requests: requests is None"),
        ("x", "requests is ["),
    ],
)
def test_a_bad_request_of_a_recording_is_named(tmp_path, bad, said):
    path = tmp_path / "a"
    path.write_text(json.dumps(recording(request(0, 64, [1]), bad)))
    line = refusal(path)
    assert line.startswith(f"{path}:") and said in line


def test_a_sub_agent_stamped_with_its_end_is_moved_once_and_not_again_when_it_was_converted(tmp_path):
    whole = recording(
        request(0.0, 130, [1, 2], api_time=2.0),
        sub_agent(10.0, request(0.0, 70, [9], api_time=3.0)),
        request(30.0, 200, [1, 2, 3], api_time=2.0),
    )
    (tmp_path / "a").write_text(json.dumps(whole))
    once = load_trace(tmp_path / "a")
    assert once.arrival_s.tolist() == [0.0, 30.0, 7.0]
    (tmp_path / "b").write_bytes(compact_bytes(once))
    assert load_trace(tmp_path / "b").arrival_s.tolist() == [0.0, 30.0, 7.0]


def test_a_recorded_session_equals_the_converted_one():
    native, compact = (
        SHARED / "native" / "kv_cache_tester_session.json",
        SHARED / "train" / "agentic_claude_code_weka.train.npz",
    )
    if not (native.is_file() and compact.is_file()):
        pytest.skip("public traces are not beside the repository")
    one, library = load_trace(native), load_trace(compact)
    rows = np.flatnonzero(library.s_source_id[library.session_id] == 265)
    for column in ("arrival_s", "input_tokens", "output_tokens", "turn", "gap_s", "service_s", "kind", "h_lcp"):
        assert np.array_equal(getattr(one, column), getattr(library, column)[rows], equal_nan=True), column
    assert (one.parent[1:] + rows[0] == library.parent[rows[1:]]).all()
    first = library.blocks(rows[0])[0]
    assert all(np.array_equal(one.blocks(n), library.blocks(row) - first) for n, row in enumerate(rows))


# ShareGPT


def test_each_reply_of_a_conversation_is_a_request(tmp_path):
    talk = [("system", "s " * 12), ("human", "a " * 12), ("gpt", "b " * 24), ("human", "c " * 12), ("gpt", "")]
    conversations = [
        {"id": "x", "conversations": [{"from": who, "value": text} for who, text in talk]},
        {"id": "y", "conversations": [{"from": "gpt", "value": "b " * 3}, {"from": "gpt", "value": "b " * 3}]},
        {"id": "z", "conversations": []},
    ]
    path = tmp_path / "a"
    path.write_text(json.dumps(conversations))
    trace = load_trace(path)
    assert recognise(path).name == "ShareGPT json"
    assert (trace.trace_kind, trace.block_size) == ("session-library", 16)
    assert tokens(trace) == [(32, 32), (80, 1), (4, 4)]
    assert trace.session_id.tolist() == [0, 0, 1]
    assert trace.arrival_s.tolist() == pytest.approx([0.0, unloaded_service_s(np.array([32]))[0], 0.0])
    assert trace.gap_s.tolist() == pytest.approx([np.nan, 0.0, np.nan], nan_ok=True)
    assert blocks(trace) == [[0, 1], [0, 1, 2, 3, 4], []]
    assert ["estimated" in trace.notices[0], "no times" in trace.notices[1]] == [True, True]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[\n{}\n{}]", "3: the array does not go on with , or ]"),
        ("[{},\n{}", "2: the array does not go on with , or ]"),
        ("[{},\n{},", "2: text is not JSON"),
        ("[{}]\nx", "2: text is not JSON"),
        ("{}\n]\n]", "2: line is not JSON"),
        ("[{},\n{]", "2: text is not JSON"),
    ],
)
def test_broken_json_is_named_by_line(tmp_path, text, said):
    path = tmp_path / "a"
    path.write_text(text.replace("{}", '{"conversations": []}'))
    assert refusal(path).startswith(f"{path}:{said}")


def test_a_message_that_is_no_text_is_named(tmp_path):
    path = write(tmp_path / "a", json.dumps([{"conversations": [{"from": "human", "value": 3}]}]))
    assert refusal(path).startswith(f"{path}:conversation 0, message 0: value is 3, expected a text")
