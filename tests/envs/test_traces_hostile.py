"""Damaged and hostile files: each becomes one `TraceError` of one line, or a trace that keeps its own rules."""

import io
import json
import os
import re
import time
import tracemalloc
import zipfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hbmgym.envs.traces.formats import compact, reading
from hbmgym.envs.traces.formats.compact import compact_bytes
from hbmgym.envs.traces.load import load_trace
from hbmgym.envs.traces.reuse import found_tokens
from hbmgym.envs.traces.summary import describe
from hbmgym.envs.traces.trace import Trace, TraceError

ROWS = 6
FUZZ = settings(
    derandomize=True, deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def _lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _mooncake() -> str:
    rows = [
        {"timestamp": 900 * n, "input_length": 700, "output_length": n, "hash_ids": [n // 2, 9 + n]}
        for n in range(ROWS)
    ]
    return _lines(rows)


def _aiperf() -> str:
    start = {"timestamp": 5, "session_id": "a", "input_length": 700, "output_length": 3, "hash_ids": [1, 2]}
    turn = {"delay": 20.5, "session_id": "a", "input_length": 900, "output_length": 3, "hash_ids": [1, "x"]}
    return _lines(
        [start, turn, turn | {"hash_ids": None}, {"timestamp": 8, "text_input": "some text", "output_length": 1}]
    )


def _bailian() -> str:
    row = {"type": "text", "input_length": 30, "output_length": 4, "turn": 1, "hash_ids": [1, 2]}
    return _lines(
        row | {"chat_id": n, "parent_chat_id": n - 2 if n > 1 else -1, "timestamp": n / 3} for n in range(ROWS)
    )


def _azure() -> str:
    rows = (f"2023-11-16 18:15:{10 + n}.6805900,{300 + n},{n}\n" for n in range(ROWS))
    return "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(rows)


def _burstgpt() -> str:
    header = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    return header + "".join(f"{n}.5,{'s' * (n % 2)},{n},ChatGPT,{40 + n},{n},9,API log\n" for n in range(ROWS))


def _csv() -> str:
    return "arrived_at;num_prefill_tokens;num_decode_tokens\n" + "".join(f"{n};{n + 5};{n + 1}\n" for n in range(ROWS))


def _kv_cache_tester() -> str:
    def request(t: float, *ids: int) -> dict:
        times = {"api_time": 1.5, "think_time": 0.5}
        return {
            "t": t,
            "type": "n",
            "in": 64 * len(ids),
            "out": 7,
            "hash_ids": list(ids),
            "input_types": ["text"],
            **times,
        }

    agent = {"t": 4.0, "type": "subagent", "requests": [request(0.0, 5), request(2.0, 5, 6)]}
    return json.dumps(
        {"block_size": 64, "hash_id_scope": "local", "requests": [request(0.0, 1, 2), agent, request(9.0, 1, 2, 3)]}
    )


def _claude_code() -> str:
    lines = []
    for n in range(ROWS):
        usage = {"input_tokens": 90 + n, "cache_read_input_tokens": 64 * n, "output_tokens": n}
        stem = {"sessionId": "s", "parentUuid": f"{n - 1}a" if n else None, "isSidechain": n == 4}
        lines.append(stem | {"type": "user", "uuid": f"{n}u", "timestamp": f"2026-01-01T00:00:{10 + n}.1Z"})
        answer = {"id": f"m{n // 2}", "model": "c", "usage": usage}
        more = {"type": "assistant", "uuid": f"{n}a", "parentUuid": f"{n}u", "timestamp": f"2026-01-01T00:00:{20 + n}Z"}
        lines.append(stem | more | {"message": answer})
    return _lines(lines)


def _sharegpt() -> str:
    talk = [{"from": who, "value": "some words of it " * 5} for who in ("human", "gpt", "human", "gpt")]
    return json.dumps([{"id": "x", "conversations": talk}, {"id": "y", "conversations": talk[:2]}])


TEXTS = {
    make.__name__.strip("_"): make().encode()
    for make in (_mooncake, _aiperf, _bailian, _azure, _burstgpt, _csv, _kv_cache_tester, _claude_code, _sharegpt)
}
HOSTILE = [
    "9223372036854775808", "-9223372036854775809", "1" + 400 * "0", "-1", "-0.0", "1e308", "-1e308", "1e-320", "NaN",
    "Infinity", "-Infinity", "nan", "inf", "2147483648", "4294967296", "true", "null", '"x"', '""', "[]", "{}", "[[1]]",
    '{"a": [1]}', "1_000", "0x10", "٣", "0", "1.5", "\x00", "\x1b[2J", '\\ud800', "now", "2262-04-12 00:00:00", "=1+1",
    "9" * 5000, "[" * 3000, '"' + "y" * 3000 + '"', "[true]", '["a", 2, 1e3]', "[18446744073709551616]",
]  # fmt: skip


def check(path: Path) -> Trace | None:
    """The trace, whose rules are checked, or None when the file was refused in one line."""
    try:
        trace = load_trace(path)
    except TraceError as error:
        line = str(error)
        assert "\n" not in line and len(line) < 2000 and line.startswith(str(path)), line
        return None
    check_rules(trace)
    return trace


def check_rules(trace: Trace) -> None:
    rows = np.arange(len(trace))
    assert len(trace) >= 1
    assert (trace.input_tokens >= 1).all() and (trace.output_tokens >= 1).all()
    assert np.isfinite(trace.arrival_s).all() and (trace.arrival_s >= 0).all()
    in_order = np.lexsort((trace.arrival_s, trace.session_id * (trace.trace_kind == "session-library")))
    assert (trace.arrival_s[in_order] == trace.arrival_s).all()
    assert ((trace.parent >= -1) & (trace.parent < rows)).all()
    assert (trace.arrival_s[trace.parent] <= trace.arrival_s)[trace.parent >= 0].all()
    assert (np.isnan(trace.gap_s) | (trace.gap_s >= 0)).all()
    assert (np.isnan(trace.service_s) | (trace.service_s >= 0)).all()
    assert ((trace.h_ref >= -1) & (trace.h_ref < rows)).all()
    assert all(len(trace.blocks(row)) == trace.block_counts[row] for row in rows if trace.block_counts[row] < 10**6)
    found = found_tokens(trace)
    assert found is None or ((found >= 0) & (found <= trace.input_tokens)).all()
    assert all("\n" not in text for _, text in describe(trace))


def cells(text: bytes) -> list[tuple[int, int]]:
    """Where the values of a text lie: its numbers, quoted texts and words."""
    return [match.span() for match in re.finditer(rb'"[^"]*"|[-\w.]+', text)]


@st.composite
def damaged(draw) -> bytes:
    """A file of some format after one to three accidents."""
    text = TEXTS[draw(st.sampled_from(sorted(TEXTS)))]
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["value", "value", "value", "cut", "lines", "byte", "insert", "twice", "drop"]))
        lines = text.split(b"\n")
        at = draw(st.integers(0, max(0, len(text) - 1)))
        if kind == "value" and cells(text):
            begin, end = draw(st.sampled_from(cells(text)))
            text = text[:begin] + draw(st.sampled_from(HOSTILE)).encode("utf-8", "surrogatepass") + text[end:]
        elif kind == "cut":
            text = text[:at]
        elif kind == "lines":
            text = b"\n".join(draw(st.permutations(lines[:12])) + lines[12:])
        elif kind == "byte" and text:
            text = text[:at] + bytes([draw(st.integers(0, 255))]) + text[at + 1 :]
        elif kind == "insert":
            text = text[:at] + draw(st.binary(max_size=8)) + text[at:]
        elif kind == "twice":
            text = text + text
        elif kind == "drop":
            del lines[draw(st.integers(0, len(lines) - 1))]
            text = b"\n".join(lines)
    return text


# Rows of the right fields: of any of a few values, so that they meet, or all of them sound and only their order odd.
NAMES = st.sampled_from(["a", "b", 1, 2, -1, None, "", 2**70])
IDS = st.lists(st.sampled_from([1, 2, 3, "1", 2**64]), max_size=4)
MOMENTS = [f"2026-01-01T00:00:0{second}Z" for second in range(5)]


def some(**fields: st.SearchStrategy) -> st.SearchStrategy[dict]:
    """Objects that lack any of the fields, or none."""
    return st.fixed_dictionaries(fields) | st.fixed_dictionaries({}, optional=fields)


@cache
def odd_rows(name: str) -> st.SearchStrategy[dict]:
    times = st.sampled_from([0, 1, 1.5, 2, 7, 1e11, None, 1e300])
    lengths = st.sampled_from([0, 1, 16, 17, 64, 512, 600, 2**31 - 1, 2**31])
    ids = IDS | st.none()
    call = some(t=times, **{"in": lengths}, out=lengths, hash_ids=ids, think_time=times, api_time=times)
    usage = some(input_tokens=lengths, cache_read_input_tokens=lengths, output_tokens=lengths)
    row = {"timestamp": times, "input_length": lengths, "output_length": lengths, "hash_ids": ids}
    return {
        "mooncake": some(**row, delay=times, session_id=NAMES),
        "bailian": some(**row, chat_id=NAMES, parent_chat_id=NAMES, turn=lengths),
        "kv_cache_tester": some(block_size=lengths, requests=st.lists(call, max_size=4)),
        "claude_code": log_lines(usage, st.sampled_from([*MOMENTS, "1969-12-31T23:00:00+14:00", None, "x"])),
    }[name]


@cache
def sound_rows(name: str) -> st.SearchStrategy[dict]:
    times = st.sampled_from([0, 1, 1.5, 2, 7])
    lengths = st.sampled_from([0, 1, 16, 64, 600])

    def request(size: int, tokens: str, **fields: st.SearchStrategy) -> st.SearchStrategy[dict]:
        fitting = IDS.map(lambda ids: {tokens: size * len(ids), "hash_ids": ids})
        return st.builds(dict.__or__, fitting, st.fixed_dictionaries(fields))

    call = request(64, "in", t=times, out=lengths, api_time=times | st.none(), think_time=times | st.none())
    requests = call
    for _ in range(2):
        agent = {"t": times, "type": st.just("subagent"), "requests": st.lists(requests, max_size=3)}
        requests = call | st.fixed_dictionaries(agent)
    recording = {"block_size": st.just(64), "requests": st.lists(requests, max_size=4)}
    usage = some(input_tokens=lengths, cache_read_input_tokens=lengths, output_tokens=lengths)
    started = request(512, "input_length", timestamp=times, output_length=lengths)
    delayed = request(512, "input_length", delay=times, session_id=st.sampled_from("ab"), output_length=lengths)
    chat = {"chat_id": NAMES, "parent_chat_id": NAMES, "turn": lengths}
    return {
        "mooncake": st.builds(dict.__or__, started, st.fixed_dictionaries({}, optional={"session_id": NAMES}))
        | delayed,
        "bailian": request(16, "input_length", timestamp=times, output_length=lengths, **chat),
        "kv_cache_tester": st.fixed_dictionaries(recording, optional={"hash_id_scope": st.just("local")}),
        "claude_code": log_lines(usage, st.sampled_from(MOMENTS)),
    }[name]


def log_lines(usage: st.SearchStrategy, moments: st.SearchStrategy) -> st.SearchStrategy[dict]:
    return some(
        uuid=NAMES, parentUuid=NAMES, sessionId=NAMES, agentId=NAMES, isSidechain=st.booleans(), timestamp=moments,
        type=st.sampled_from(["user", "assistant", "system"]), message=some(id=NAMES, usage=usage),
    )  # fmt: skip


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_what_will_be_damaged_is_a_trace(tmp_path, name):
    (tmp_path / name).write_bytes(TEXTS[name])
    assert check(tmp_path / name) is not None


@FUZZ
@given(content=damaged())
def test_damaged_files_are_refused_or_read(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    check(tmp_path / "a")


@pytest.mark.parametrize("rows", [odd_rows, sound_rows])
@pytest.mark.parametrize("name", ["mooncake", "bailian", "kv_cache_tester", "claude_code"])
@FUZZ
@given(data=st.data())
def test_odd_rows_and_odd_orders_are_refused_or_read(tmp_path, name, rows, data):
    drawn = data.draw(st.lists(rows(name), min_size=1, max_size=8))
    good = TEXTS[name].decode() if data.draw(st.booleans()) else ""
    (tmp_path / "a").write_text(good + "\n" + _lines(drawn))
    check(tmp_path / "a")


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_a_hostile_value_in_any_place(tmp_path, name):
    rng = np.random.default_rng(0)
    text, path = TEXTS[name], tmp_path / "a"
    for hostile in HOSTILE:
        for begin, end in rng.choice(cells(text), 4):
            path.write_bytes(text[:begin] + hostile.encode("utf-8", "surrogatepass") + text[end:])
            check(path)


# Archives


def _members(trace: Trace) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(compact_bytes(trace))) as archive:
        return {name: archive[name] for name in archive.files}


def _archive(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as archive:
        for name, member in members.items():
            archive.writestr(f"{name}.npy", member)
    return content.getvalue()


def _npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


@pytest.fixture(scope="module")
def members(tmp_path_factory) -> dict[str, np.ndarray]:
    """A library with sub-agents as the arrays of an npz."""
    path = tmp_path_factory.mktemp("good") / "a"
    path.write_bytes(TEXTS["kv_cache_tester"])
    return _members(load_trace(path))


NUMBERS = st.sampled_from([-(2**62), -2, -1, 0, 1, 2, 3, 5, 64, 2**31 - 1, 2**31, 2**62, 2**63 - 1])
REALS = st.sampled_from([-1.0, 0.0, 1.5, 1e12, 1e39, 1e308, np.nan, np.inf, -np.inf])


@FUZZ
@given(data=st.data())
def test_columns_of_any_values_are_refused_or_read(tmp_path, members, data):
    changed = {name: column.copy() for name, column in members.items()}
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(set(members) - {"meta"})))
        values = members[name].tolist()
        pool = REALS if members[name].dtype.kind == "f" else NUMBERS
        for place in data.draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=3)):
            values[place] = data.draw(pool)
        with np.errstate(over="ignore"):
            column = np.array(values, members[name].dtype if pool is REALS else None)
        changed[name] = data.draw(st.sampled_from([column, column, column, column[:-1], column[None]]))
    (tmp_path / "a").write_bytes(_archive({name: _npy(column) for name, column in changed.items()}))
    check(tmp_path / "a")


@FUZZ
@given(data=st.data())
def test_damaged_members_of_an_archive_are_refused_or_read(tmp_path, members, data):
    files = {name: _npy(column) for name, column in members.items()}
    name = data.draw(st.sampled_from(sorted(files)))
    at = data.draw(st.integers(0, len(files[name]) - 1))
    junk = data.draw(st.binary(max_size=6) | st.sampled_from([b"(" * 200, b"9" * 30, b"'|O8'", b"\n", b"1e9,"]))
    files[name] = files[name][:at] + junk + files[name][at + len(junk) * data.draw(st.booleans()) :]
    content = _archive(files)
    if data.draw(st.booleans()):
        cut = data.draw(st.integers(0, len(content)))
        content = content[:cut] + data.draw(st.binary(max_size=4)) + content[cut + data.draw(st.integers(0, 9)) :]
    (tmp_path / "a").write_bytes(b"PK\x03\x04" + content[4:])
    check(tmp_path / "a")


def test_an_archive_that_would_fill_the_memory_is_refused_before_it_does(tmp_path, members, monkeypatch):
    monkeypatch.setattr(compact, "MAX_UNPACKED_BYTES", 2**20)
    files = {name: _npy(column) for name, column in members.items()} | {"gap_s": _npy(np.zeros(2**22, np.float32))}
    (tmp_path / "a").write_bytes(_archive(files, zipfile.ZIP_DEFLATED))
    assert "unpacked size is 167" in refusal(tmp_path / "a")


def test_an_array_that_says_it_is_huge_is_refused(tmp_path, members):
    files = {name: _npy(column) for name, column in members.items()}
    for shape in ((10**9,), (10**12,), (10**30,), (-1,), (2**40, 2**40)):
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": shape})
        (tmp_path / "a").write_bytes(_archive(files | {"arrival_s": header.getvalue()}))
        assert "cannot be read as a compact npz" in refusal(tmp_path / "a")


def test_a_member_that_is_no_array_is_refused(tmp_path, members):
    files = {name: _npy(column) for name, column in members.items()} | {"kind": b"no array"}
    (tmp_path / "a").write_bytes(_archive(files))
    assert "kind is no array" in refusal(tmp_path / "a")


# Size and time


TEN_MB = 10_000_000
HUGE = {
    "open brackets": "[" * TEN_MB,
    "objects in objects": '{"hash_ids":' * (TEN_MB // 12),
    "one text": '{"text_input": "' + "x" * TEN_MB,
    "one number": '{"timestamp": ' + "9" * TEN_MB + "}",
    "blanks": " " * TEN_MB + "x",
    "empty lines": '{"timestamp": 1}' + "\n" * TEN_MB,
    "commas": "," * TEN_MB,
    "an open quote": 'arrived_at,num_prefill_tokens,num_decode_tokens\n1,"' + "2\n" * (TEN_MB // 2),
    "a wide csv cell": "arrived_at,num_prefill_tokens,num_decode_tokens\n1,2," + "9" * TEN_MB,
    "columns": "a," * (TEN_MB // 2) + "\n1",
    "bytes": "\xff" * (TEN_MB // 2),
    "commas between objects": '[{"conversations": []},' + "," * TEN_MB,
    "an object without an end": '[{"conversations": [' + "123456789," * (TEN_MB // 10),
    "a named table of too many columns": "arrived_at,num_prefill_tokens,num_decode_tokens," + "a," * 20_000 + "\n1",
    "nothing but null": "\0" * TEN_MB,
}


@pytest.mark.parametrize("name", sorted(HUGE))
def test_ten_megabytes_of_nonsense_are_refused_in_seconds_and_little_memory(tmp_path, name):
    (tmp_path / "a").write_text(HUGE[name], encoding="latin-1")
    tracemalloc.start()
    begin_s = time.process_time()
    try:
        assert check(tmp_path / "a") is None
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20 * TEN_MB
    assert time.process_time() - begin_s < 10.0


def test_a_prompt_of_a_million_ids_on_one_line_is_read(tmp_path):
    row = {"timestamp": 0, "input_length": 512 * 10**6, "output_length": 1}
    (tmp_path / "a").write_text(_lines(row | {"hash_ids": list(range(10**6))} for _ in range(2)))
    trace = check(tmp_path / "a")
    assert trace is not None and trace.h_lcp.tolist() == [0, 10**6]


def test_a_line_that_never_ends_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(reading, "MAX_LINE", 5000)
    (tmp_path / "a").write_text('{"timestamp": ' + "1" * 20_000)
    assert "a:1: line is longer than 5000 bytes" in refusal(tmp_path / "a")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_files_are_read_alike_in_pieces_of_any_size(tmp_path, monkeypatch, size):
    whole = {}
    for name, text in TEXTS.items():
        (tmp_path / name).write_bytes("\ufeff".encode() + text.replace(b"some words", "einige Wörter 漢".encode()))
        whole[name] = check(tmp_path / name)
    monkeypatch.setattr(reading, "CHUNK_BYTES", size)
    for name, trace in whole.items():
        again = check(tmp_path / name)
        assert np.array_equal(again.input_tokens, trace.input_tokens), name
        assert np.array_equal(again.arrival_s, trace.arrival_s), name


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "is no regular file" in refusal(tmp_path / "pipe")
    assert "is no regular file" in refusal(Path("/dev/zero"))


def test_a_folder_in_itself_is_walked_once(tmp_path):
    (tmp_path / "a.json").write_bytes(TEXTS["kv_cache_tester"])
    (tmp_path / "again").symlink_to(tmp_path)
    assert len(check(tmp_path)) == 4


def test_a_folder_of_two_formats_is_refused(tmp_path):
    for name in ("kv_cache_tester.json", "claude_code.jsonl", "mooncake.jsonl"):
        (tmp_path / name).write_bytes(TEXTS[name.partition(".")[0]])
    assert "1 of Claude Code session log and 1 of kv-cache-tester json" in refusal(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "cp500"])
@pytest.mark.parametrize("name", sorted(TEXTS))
def test_other_encodings_are_refused(tmp_path, name, encoding):
    (tmp_path / "a").write_bytes((TEXTS[name].decode() + "é").encode(encoding))
    assert check(tmp_path / "a") is None


def refusal(path: Path) -> str:
    with pytest.raises(TraceError) as caught:
        load_trace(path)
    return str(caught.value)
