"""Files as they are found: damaged lines, files that are no logs, unused fields, compression, missing values."""

import gzip
import json
import lzma
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest

from hbmgym.envs.traces.formats import damage, packed
from hbmgym.envs.traces.formats.generic_csv import parse_columns
from hbmgym.envs.traces.load import load_trace, recognise
from hbmgym.envs.traces.trace import Trace, TraceError

from .test_traces_claude_code import Log
from .test_traces_formats import recording, refusal, request, tokens, write, write_json_lines
from .test_traces_hostile import TEXTS

ROW = {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens"


def mooncake(count: int) -> list[str]:
    return [json.dumps(ROW | {"timestamp": 1000 * n, "output_length": n + 1}) for n in range(count)]


def session(calls: int = 3, name: str = "s1", **more) -> Log:
    log = Log(name, **more)
    for n in range(calls):
        log.says(10.0 * n)
        log.answer(10.0 * n + 5.0, f"m{n}", 4, 1000, 0, 100)
    return log


def texts(log: Log) -> list[str]:
    return [json.dumps(line) for line in log.lines]


def write_bytes(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# Lines


@pytest.mark.parametrize("where", [0, 3, 8])
@pytest.mark.parametrize(
    "bad",
    [b'{"timestamp": 0, "inp', b"\0" * 300, b'"a text"', b"[1, 2]", b"17", b"null", b'{"a": "\xff"}', b"<html>", b"{]"],
)
def test_a_damaged_line_costs_itself_alone_and_is_named(tmp_path, bad, where):
    lines = [line.encode() for line in mooncake(8)]
    lines.insert(where, bad)
    path = write_bytes(tmp_path / "a.jsonl", b"\n".join(lines))
    trace = load_trace(path)
    assert trace.output_tokens.tolist() == list(range(1, 9))
    (notice,) = trace.notices
    assert notice.startswith(f"{path}: damaged lines are left out: 1 of 9; the first: {path}:{where + 1}: line ")


@pytest.mark.parametrize("glue", ["", " ", "\0" * 40])
def test_two_records_on_one_line_are_both_read(tmp_path, glue):
    lines = mooncake(4)
    path = write_bytes(tmp_path / "a", "\n".join([lines[0], lines[1] + glue.strip("\0") + lines[2], lines[3]]).encode())
    trace = load_trace(path)
    assert (trace.output_tokens.tolist(), trace.notices) == ([1, 2, 3, 4], ())
    path.write_text("\n".join([lines[0], glue + lines[1], lines[2] + glue, lines[3]]))
    assert load_trace(path).output_tokens.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("cut", [1, 5, 14, 20, 40, 70])
def test_a_record_that_follows_a_cut_one_on_its_line_is_read(tmp_path, cut):
    lines = mooncake(6)
    path = write(tmp_path / "a", *lines[:3], lines[3][:cut] + lines[4], lines[5])
    trace = load_trace(path)
    assert trace.output_tokens.tolist() == [1, 2, 3, 5, 6]
    assert "damaged lines are left out: 1 of 5" in trace.notices[0]


def test_an_overlong_line_is_passed_over(tmp_path, monkeypatch):
    from hbmgym.envs.traces.formats import reading

    lines = mooncake(6)
    for size in (50, 1000):
        monkeypatch.setattr(reading, "CHUNK_BYTES", size)
        monkeypatch.setattr(reading, "MAX_LINE", 500)
        path = write(tmp_path / "a", *lines[:3], '{"x": "' + "y" * 3000 + '"}', *lines[3:])
        trace = load_trace(path)
        assert trace.output_tokens.tolist() == [1, 2, 3, 4, 5, 6]
        assert f"damaged lines are left out: 1 of 7; the first: {path}:4: line is longer" in trace.notices[0]


@pytest.mark.parametrize(("sound", "bad", "read"), [(1, 1, True), (1, 2, False), (10, 10, True), (100, 12, False)])
def test_too_many_damaged_lines_are_refused_with_the_first(tmp_path, sound, bad, read):
    path = write(tmp_path / "a", *mooncake(sound), *["{oops"] * bad)
    if read:
        assert len(load_trace(path)) == sound
    else:
        line = refusal(path)
        assert line.startswith(f"{path}:{sound + 1}: line is not JSON") and f"{bad} of {sound + bad} lines" in line


def test_a_tenth_may_be_damaged_and_a_hopeless_file_is_not_read_to_its_end(tmp_path, monkeypatch):
    path = write(tmp_path / "a", *mooncake(180), *["{oops"] * 20)
    assert len(load_trace(path)) == 180
    monkeypatch.setattr(damage, "HOPELESS", 50)
    path = write(tmp_path / "a", *mooncake(3), *["{oops"] * 1000)
    assert "51 of 54 lines are damaged" in refusal(path)


def test_a_wrong_value_in_a_whole_line_is_still_refused(tmp_path):
    for wrong in ({"input_length": -5}, {"input_length": "5"}, {"output_length": None}, {"timestamp": "soon"}):
        path = write(tmp_path / "a", *mooncake(20), json.dumps(ROW | wrong))
        assert f"{path}:21: {next(iter(wrong))} is " in refusal(path)


def test_blank_lines_marks_and_line_ends_of_other_systems_are_no_damage(tmp_path):
    for name, text in TEXTS.items():
        whole = load_trace(write_bytes(tmp_path / "a", text))
        changed = b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n\r\n") + b"\r\n \r\n"
        trace = load_trace(write_bytes(tmp_path / "b", changed))
        assert np.array_equal(trace.arrival_s, whole.arrival_s), name
        assert [notice.partition(": ")[2] for notice in trace.notices] == [
            notice.partition(": ")[2] for notice in whole.notices
        ]


# Rows of a csv


@pytest.mark.parametrize(
    "bad", ["2023-11-16 18:15:59.1,3", "2023", '"', "1,2,3,4", "\0\0\0", "2023-11-16 18:15:59.1;3;4", "\0,1,2"]
)
@pytest.mark.parametrize("where", [2, 10])
def test_a_csv_row_with_other_cells_than_the_header_costs_itself_alone(tmp_path, bad, where):
    rows = [f"2023-11-16 18:15:{10 + n}.5,{300 + n},{n + 1}" for n in range(8)]
    rows.insert(where - 2, bad)
    path = write(tmp_path / "a", AZURE, *rows)
    if bad == '"' and where == 2:  # a quote that nobody closes takes all lines
        assert f"{path}:2: number of columns is 1, expected 3" in refusal(path)
        return
    trace = load_trace(path)
    assert trace.output_tokens.tolist() == list(range(1, 9))
    assert f"damaged lines are left out: 1 of 9; the first: {path}:{where}" in trace.notices[0]


def test_a_csv_row_may_end_in_empty_cells(tmp_path):
    path = write(tmp_path / "a", AZURE, "2023-11-16 18:15:46.5,374,44,", "2023-11-16 18:15:50.5,396,109,,")
    assert (tokens(load_trace(path)), load_trace(path).notices) == ([(374, 44), (396, 109)], ())


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    path = write(tmp_path / "a", "arrival_s,input_tokens,input_tokens,output_tokens", "1,2,3,4")
    assert "expected input_tokens once" in refusal(path)


# Folders


def test_the_damaged_lines_of_a_folder_of_logs_are_counted_together(tmp_path):
    good = texts(session())
    junk = {"cut": [*good[:5], good[5][:80]], "nulls": [*good[:3], "\0" * 300, *good[3:]]}
    junk |= {"glued": [*good[:2], good[2] + good[3], *good[4:]], "text": [*good, '"a string"', *good[:0]]}
    for name, lines in junk.items():
        renamed = [line.replace('"s1"', f'"{name}"').replace('"id": "m', f'"id": "{name}m') for line in lines]
        write_bytes(tmp_path / "p" / f"{name}.jsonl", "\n".join(renamed).encode())
    trace = load_trace(tmp_path)
    assert np.bincount(trace.session_id).tolist() == [2, 3, 3, 3]
    assert f"{tmp_path}: damaged lines are left out: 3 of 25, in 3 files; the first: " in trace.notices[0]
    assert f"{tmp_path / 'p' / 'cut.jsonl'}:6: line is not JSON" in trace.notices[0]


def test_what_is_no_log_neither_joins_a_folder_nor_refuses_it(tmp_path):
    session().write(tmp_path / "p" / "s1.jsonl")
    index = {"version": 1, "entries": [{"sessionId": "s1", "fullPath": "s1.jsonl", "messageCount": 6}]}
    others = {
        "sessions-index.json": json.dumps(index, indent=2),
        "one-line.json": json.dumps(index),
        "record.json": texts(session())[0],
        "log.txt": "\n".join(texts(session())),
        "empty.jsonl": "",
        "blank.jsonl": "\n\n",
        "prose.jsonl": "no log at all\n",
        "names.jsonl": '{"name": {"sessionId": 1}}\n',
        "broken.json": '{"requests": [',
        "null.jsonl": "\0" * 400,
    }
    for name, text in others.items():
        (tmp_path / name).write_text(text)
    write_bytes(tmp_path / "broken.jsonl.gz", b"\x1f\x8b and no more")
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.jsonl")
    trace = load_trace(tmp_path)
    assert len(trace) == 3
    assert f"{tmp_path}: {len(others)} files of other kinds are left out" in trace.notices
    assert "broken.jsonl.gz: cannot be unpacked" in trace.notices[0], "a log, by its name"


def test_a_log_is_told_by_its_first_sound_records(tmp_path):
    beginnings = [
        '{"type": "summary", "summary": "x", "leafUuid": "y"}',
        '{"type": "file-history-snapshot", "messageId": "x", "snapshot": {}}',
        '{"type": "unheard-of"}',
        '{"broken',
        "\0" * 100,
        '"text"',
    ]
    for beginning in beginnings:
        path = write(tmp_path / "a.jsonl", beginning, *texts(session()))
        assert recognise(path).name == "Claude Code session log", beginning
        assert len(load_trace(path)) == 3


def test_a_first_record_longer_than_what_is_looked_at_is_told_by_its_keys(tmp_path):
    log = session()
    log.lines[0]["message"]["content"] = 'x "sessionId": {' * 20_000
    for key in ("sessionId", "message"):  # either order occurs
        log.lines[0][key] = log.lines[0].pop(key)
        assert len(load_trace(log.write(tmp_path / "a.jsonl"))) == 3
    long = recording(*(request(n, 64 * 5000, list(range(5000))) for n in range(3)))
    (tmp_path / "b").write_text(json.dumps(long, indent=1))
    assert recognise(tmp_path / "b").name == "kv-cache-tester json"


def test_a_key_within_a_record_names_no_format(tmp_path):
    for inner in ("sessionId", "conversations", "hash_ids", "timestamp"):
        path = write(tmp_path / "a", json.dumps({"x": {inner: []}, "y": [{inner: 1}]}, indent=1))
        assert "format is not recognised" in refusal(path)


def test_a_log_without_any_call_is_one_line(tmp_path):
    log = Log()
    log.says(0.0)
    assert f"{log.write(tmp_path / 'p' / 'a.jsonl')}: no call of a model" in refusal(tmp_path / "p" / "a.jsonl")
    assert f"{tmp_path / 'p'}: no call of a model" in refusal(tmp_path / "p")
    session().write(tmp_path / "p" / "b.jsonl")
    assert f"{tmp_path}: 1 of 2 logs hold no call of a model" in load_trace(tmp_path).notices


def test_damaged_files_of_a_folder_of_sessions_are_left_out(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.json").write_text(json.dumps(recording(request(0, 64, [1])), indent=1))
    text = (tmp_path / "b.json").read_text()
    (tmp_path / "b.json").write_text(text[: len(text) // 2])
    trace = load_trace(tmp_path)
    assert len(trace) == 2
    assert "damaged sessions are left out: 1 of 3; the first" in trace.notices[0]
    assert f"{tmp_path / 'b.json'}:" in trace.notices[0]
    for name in "ac":
        (tmp_path / f"{name}.json").write_text(text[: len(text) // 2])
    assert "3 of 3 sessions are damaged" in refusal(tmp_path)


@pytest.mark.parametrize("lacking", ["t", "in", "out"])
def test_a_session_that_lacks_a_value_is_left_out_whole(tmp_path, lacking):
    bad = recording(request(0, 64, [1]), {**request(1, 128, [1, 2]), lacking: None})
    good = recording(request(0, 64, [1]), request(5, 128, [1, 2]))
    for order in ([bad, good], [good, bad]):
        trace = load_trace(write_json_lines(tmp_path / "a", order))
        assert trace.arrival_s.tolist() == [0.0, 5.0] and trace.s_source_id.tolist() == [0]
        assert f"request 1: {lacking} is None" in trace.notices[0]


# Conversations


def talk(*values, who=("human", "gpt")) -> dict:
    return {"conversations": [{"from": who[n % 2], "value": value} for n, value in enumerate(values)]}


@pytest.mark.parametrize(
    "bad",
    [
        talk(None, "c"),
        {"conversations": None},
        {"id": "x"},
        [1],
        None,
        {"conversations": [{"from": "human"}]},
        {"conversations": [None]},
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
    ],
)
def test_a_damaged_conversation_is_left_out(tmp_path, bad):
    path = tmp_path / "a"
    path.write_text(json.dumps([talk("a b c", "d"), bad]))
    trace = load_trace(path)
    assert tokens(trace) == [(4, 1)]
    assert f"damaged conversations are left out: 1 of 2; the first: {path}:conversation 1" in trace.notices[0]


@pytest.mark.parametrize(
    "content",
    ["a b c", [{"type": "text", "text": "a b"}, {"type": "text", "text": " c"}], [{"type": "image_url"}, "a b c"]],
)
@pytest.mark.parametrize("field", ["conversations", "messages"])
def test_messages_may_be_told_by_role_and_content(tmp_path, field, content):
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "c " * 6}]
    for text in (json.dumps([{field: messages}]), json.dumps({field: messages}) + "\n"):
        (tmp_path / "a").write_text(text)
        assert recognise(tmp_path / "a").name == "ShareGPT json"
        assert tokens(load_trace(tmp_path / "a")) == [(4, 8)]


def test_a_call_of_a_tool_is_said_too(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    (tmp_path / "a").write_text(json.dumps([{"messages": [{"role": "user", "content": "a b c"}, call]}]))
    assert tokens(load_trace(tmp_path / "a")) == [(4, round(len(json.dumps(call["tool_calls"])) / 6))]


def test_a_cut_last_line_of_conversations_is_left_out(tmp_path):
    path = write(tmp_path / "a", *[json.dumps(talk("a b c", "d"))] * 5, json.dumps(talk("a b c", "d"))[:50])
    assert len(load_trace(path)) == 5
    assert "damaged conversations are left out: 1 of 6" in load_trace(path).notices[0]


# Fields that nobody reads


@pytest.mark.parametrize("extra", [{"request_id": "r1", "priority": 3}, {"extra": {}}, {"type": "mooncake_trace"}])
def test_unused_fields_of_a_mooncake_file_are_named_once(tmp_path, extra):
    path = write_json_lines(tmp_path / "a", [ROW | extra, ROW, ROW | extra])
    assert load_trace(path).notices == (f"{path}: these fields are not used: {', '.join(sorted(extra))}",)


def test_unused_fields_are_named_in_every_format_that_people_write(tmp_path):
    bailian = json.loads(TEXTS["bailian"].splitlines()[0]) | {"colour": 1}
    cases = {
        "bailian": json.dumps(bailian),
        "kv": json.dumps(recording(request(0, 64, [1], colour=2))),
        "sharegpt": json.dumps([talk("a b", "c") | {"colour": "red"}]),
        "azure": f"{AZURE},Colour\n2023-11-16 18:15:46.5,374,44,red\n",
        "burstgpt": "Timestamp,Model,Request tokens,Response tokens,colour\n1,x,2,3,\n",
        "csv": "arrival_s,input_tokens,output_tokens,colour\n1,2,3,\n",
    }
    for name, text in cases.items():
        (tmp_path / name).write_text(text)
        notices = [notice for notice in load_trace(tmp_path / name).notices if "not used" in notice]
        assert [notice.lower() for notice in notices] == [f"{tmp_path / name}: these fields are not used: colour"], name


def test_no_end_of_unused_fields_is_cut_short_and_made_printable(tmp_path):
    rows = [ROW | {f"field {n:04}\x1b\n": n for n in range(100 * k, 100 * k + 100)} for k in range(30)]
    (notice,) = load_trace(write_json_lines(tmp_path / "a", rows)).notices
    assert len(notice) < 400 and notice.isprintable() and "more" in notice


# Compression


def zst(content: bytes) -> bytes:
    return pytest.importorskip(packed.ZSTD).compress(content)


PACKERS = {"gz": gzip.compress, "xz": lzma.compress, "zst": zst}


@pytest.mark.parametrize("packer", PACKERS)
def test_compressed_files_are_read_as_what_is_in_them(tmp_path, packer):
    pack = PACKERS[packer]
    for name, text in TEXTS.items():
        plain = load_trace(write_bytes(tmp_path / "plain" / "a.json", text))
        for file in ("a", f"a.json.{packer}"):
            trace = load_trace(write_bytes(tmp_path / "packed" / file, pack(text)))
            assert (trace.name, trace.digest) == (plain.name, plain.digest), name


@pytest.mark.parametrize("packer", PACKERS)
def test_compressed_files_are_read_in_folders_in_parts_and_by_named_columns(tmp_path, packer):
    pack = PACKERS[packer]
    write_bytes(tmp_path / "f" / f"s1.jsonl.{packer}", pack("\n".join(texts(session())).encode()))
    assert len(load_trace(tmp_path / "f")) == 3
    write_bytes(tmp_path / "g" / f"a.json.{packer}", pack(json.dumps(recording(request(0, 64, [1]))).encode()))
    assert len(load_trace(tmp_path / "g")) == 1
    two = b"when,p,a\n1,2,3\n", b"4,5,6\n"
    names = parse_columns("arrival_s=when,input_tokens=p,output_tokens=a")
    assert len(load_trace(write_bytes(tmp_path / "two", b"".join(map(pack, two))), columns=names)) == 2


@pytest.mark.parametrize("packer", PACKERS)
def test_a_compact_file_may_be_compressed_too(tmp_path, packer):
    from hbmgym.envs.traces.formats.compact import compact_bytes

    trace = load_trace(write_bytes(tmp_path / "a", TEXTS["kv_cache_tester"]))
    packed_again = write_bytes(tmp_path / "b", PACKERS[packer](compact_bytes(trace)))
    assert load_trace(packed_again).digest == trace.digest


@pytest.mark.parametrize("packer", PACKERS)
def test_a_compressed_file_that_breaks_off_is_read_up_to_there_as_a_plain_one_is(tmp_path, packer):
    rng = random.Random(0)
    lines = [json.dumps(ROW | {"timestamp": n, "hash_ids": [rng.getrandbits(60), n]}) for n in range(9000)]
    content = PACKERS[packer]("\n".join(lines).encode())
    half = len(content) // 2
    path = write_bytes(tmp_path / f"a.jsonl.{packer}", content[:half])
    trace = load_trace(path)
    assert 1000 < len(trace) < 9000
    assert f"{path}: cannot be unpacked: " in trace.notices[0] and "what comes after is missing" in trace.notices[0]
    assert f"{path}: cannot be unpacked: " in refusal(write_bytes(path, content[:7]))
    changed = content[:half] + bytes(byte ^ 255 for byte in content[half : half + 200]) + content[half + 200 :]
    write_bytes(path, changed)
    try:
        assert "cannot be unpacked" in " ".join(load_trace(path).notices)
    except TraceError as error:
        assert str(path) in str(error) and "\n" not in str(error), "what gz took for text"


def test_a_compressed_log_that_breaks_off_is_read_up_to_there_in_its_folder(tmp_path):
    session(name="s0").write(tmp_path / "a.jsonl")
    rng = random.Random(0)
    lines = texts(session(9, "s1"))
    lines = [line.replace('"content"', f'"pad": "{rng.randbytes(20_000).hex()}", "content"') for line in lines]
    content = gzip.compress("\n".join(lines).replace('"id": "m', '"id": "n').encode())
    write_bytes(tmp_path / "b.jsonl.gz", content[: len(content) * 3 // 4])
    trace = load_trace(tmp_path)
    assert 3 < len(trace) < 3 + 9
    assert "b.jsonl.gz: cannot be unpacked: " in trace.notices[0] and "are left out: 1 of " in trace.notices[0]


def test_zst_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    path = write_bytes(tmp_path / "a.zst", b"\x28\xb5\x2f\xfd\0\0\0\0")
    monkeypatch.setitem(sys.modules, packed.ZSTD, None)
    assert "run pip install backports.zstd" in refusal(path)
    session().write(tmp_path / "a.jsonl")
    path.rename(tmp_path / "b.jsonl.zst")
    assert "run pip install backports.zstd" in refusal(tmp_path), "as a part of a folder"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_text_in_another_unicode_is_named(tmp_path, encoding):
    path = write_bytes(tmp_path / "a.csv", (AZURE + "\n2023-11-16 18:15:46.5,374,44\n").encode(encoding))
    assert "text is in UTF-16 or UTF-32, expected UTF-8" in refusal(path)


# Values that are missing


MISSING = ["", " ", "nan", "NaN", "NAN", "null", "None", "NULL", "N/A"]


@pytest.mark.parametrize("text", MISSING)
def test_a_missing_cell_is_missing_however_it_is_written(tmp_path, text):
    header = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type"
    path = write(tmp_path / "a", header, f"1,{text},{text},{text},4,5,{text},{text}", "2,s,3,x,4,5,9,y")
    trace = load_trace(path)
    assert trace.service_s.tolist() == pytest.approx([np.nan, 3.0], nan_ok=True)
    assert (trace.session_id.tolist(), trace.notices) == ([-1, 0], ())


@pytest.mark.parametrize("text", MISSING)
def test_missing_images_are_none(tmp_path, text):
    header = "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens"
    path = write(tmp_path / "a", header, f"2024-10-15 00:00:00,{text},10,5")
    assert (tokens(load_trace(path)), load_trace(path).notices) == ([(10, 5)], ())


@pytest.mark.parametrize("value", [*MISSING, None, float("nan")])
def test_a_missing_value_of_a_record_is_missing_however_it_is_written(tmp_path, value):
    row = {"timestamp": 0, "input_length": 5, "output_length": 1}
    path = write_json_lines(tmp_path / "a", [row | {"session_id": value, "delay": value, "hash_ids": value}])
    trace = load_trace(path)
    assert (trace.session_id.tolist(), trace.block_size, trace.notices) == ([-1], 0, ())
    path = write_json_lines(tmp_path / "b", [recording(request(0, 64, [1], api_time=value, think_time=value))])
    assert np.isnan(load_trace(path).service_s).all()


def test_rows_with_neither_time_nor_session_are_sessions_of_one_turn(tmp_path):
    rows = [{"text_input": "Write a haiku.", "output_length": 100}] * 2
    path = write_json_lines(tmp_path / "a", rows)
    trace = load_trace(path)
    assert (trace.trace_kind, trace.session_id.tolist(), trace.turn.tolist()) == ("session-library", [0, 1], [0, 0])
    assert trace.notices[-1] == f"{path}: 2 rows have neither time nor session: each is a session of one turn"
    mixed = [*rows, {"session_id": "a", "input_length": 9, "output_length": 1}, {"session_id": "a", "input_length": 9}]
    mixed[3]["output_length"] = 1
    trace = load_trace(write_json_lines(tmp_path / "b", mixed))
    assert np.bincount(trace.session_id).tolist() == [2, 1, 1]


def test_a_row_without_time_among_rows_with_times_is_refused(tmp_path):
    rows = [{"timestamp": 1, "input_length": 9, "output_length": 1}, {"input_length": 9, "output_length": 1}]
    assert ":2: timestamp is None, expected a time, as other rows have one" in refusal(
        write_json_lines(tmp_path / "a", rows)
    )


# Units


EPOCHS = {"ms": 1e3, "us": 1e6, "ns": 1e9}


@pytest.mark.parametrize("unit", EPOCHS)
def test_times_since_1970_in_small_units_are_told_as_such(tmp_path, unit):
    now = int(1_700_000_000 * EPOCHS[unit])
    csv = write(tmp_path / "a", "arrival_s,input_tokens,output_tokens", f"{now},2,3")
    line = refusal(csv)
    assert f"looks like {unit} since 1970" in line and f"arrival_{unit}" in line
    named = write(tmp_path / "b", f"arrival_{unit},input_tokens,output_tokens", f"{now},2,3")
    assert load_trace(named).arrival_s.tolist() == [1.7e9]
    burst = write(tmp_path / "c", "Timestamp,Model,Request tokens,Response tokens", f"{now},x,2,3")
    assert f"looks like {unit} since 1970" in refusal(burst)
    rows = write_json_lines(tmp_path / "d", [ROW | {"timestamp": now}])
    if unit == "ms":
        assert load_trace(rows).arrival_s.tolist() == [1.7e9]
    else:
        assert f"looks like {unit} since 1970" in refusal(rows)


@pytest.mark.parametrize(("step_ms", "said"), [(0.13, True), (2, False), (1e5, False), (4e6, True)])
def test_a_rate_that_no_trace_has_is_asked_about(tmp_path, step_ms, said):
    path = write_json_lines(tmp_path / "a", [ROW | {"timestamp": step_ms * n} for n in range(450)])
    notices = [notice for notice in load_trace(path).notices if "another unit" in notice]
    assert len(notices) == said


def trace_of(path: Path, *rows: str) -> Trace:
    return load_trace(write(path, "arrival_s,input_tokens,output_tokens", *rows))


def test_requests_that_all_come_at_once_are_refused_in_words(tmp_path):
    from hbmgym.envs.traces.compose import compose

    for rows, said in ((["5,10,1"] * 40, "at the same time"), ([f"{n / 1e3},9,1" for n in range(99)], "0.098 s")):
        trace = trace_of(tmp_path / "a", *rows)
        for part, seed in (("all", 0), ("train", 0), ("validation", 10_000)):
            with pytest.raises(TraceError, match="measures 0 s at load 1, expected at least 300 s") as caught:
                compose(trace, part=part, seed=seed, page_tokens=16)
            assert said in str(caught.value) and "load <=" not in str(caught.value)


# Fields that other formats are told by


@pytest.mark.parametrize(
    "extra", [{"chat_id": 1}, {"sessionId": "x"}, {"conversations": []}, {"requests": 1, "block_size": 5}]
)
def test_a_foreign_field_makes_no_other_format_of_a_mooncake_file(tmp_path, extra):
    rows = [ROW | {"timestamp": 3000 * n, "hash_ids": [n]} | extra for n in range(3)]
    path = write(tmp_path / "a.jsonl", *map(json.dumps, rows))
    assert recognise(path).name == "Mooncake jsonl"
    assert load_trace(path).arrival_s[-1] == 6.0


def test_a_trace_of_which_nothing_is_left_says_why(tmp_path):
    path = write(tmp_path / "a.jsonl", *(json.dumps(ROW | {"output_length": 0}) for _ in range(3)))
    assert "0 rows are left, expected at least 1 (" in refusal(path) and "dropped 3 rows with 0" in refusal(path)
