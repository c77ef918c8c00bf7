"""Loaders: what they read, what they mend with a notice, and the one line for everything that they refuse."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbmgym.envs.traces.coding import encode, expand
from hbmgym.envs.traces.load import load_trace
from hbmgym.envs.traces.trace import ID_COLUMNS, Trace, TraceError

NATIVE = Path(__file__).resolve().parents[2] / ".." / "shared" / "traces"


def mooncake_row(timestamp=0, input_length=1000, output_length=10, hash_ids=(1, 2), **more):
    return {
        "timestamp": timestamp,
        "input_length": input_length,
        "output_length": output_length,
        "hash_ids": list(hash_ids),
        **more,
    }


def write_jsonl(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def compact_columns(**changes):
    """Three rows of one session, block size 10: ids [0 1], [0 1 2], [0 1 2 3]."""
    columns = {
        "arrival_s": np.array([0.0, 5.0, 9.0]),
        "input_tokens": np.array([20, 30, 45], np.int32),
        "output_tokens": np.array([5, 5, 5], np.int32),
        "session_id": np.zeros(3, np.int32),
        "turn": np.arange(3, dtype=np.int32),
        "parent": np.array([-1, 0, 1], np.int32),
        "gap_s": np.array([np.nan, 1, 1], np.float32),
        "service_s": np.full(3, np.nan, np.float32),
        "kind": np.zeros(3, np.uint8),
        "h_ref": np.array([-1, 0, 1], np.int32),
        "h_lcp": np.array([0, 2, 3], np.int32),
        "r_off": np.array([0, 1, 2, 3], np.int64),
        "r_start": np.array([0, 2, 3], np.int64),
        "r_len": np.array([2, 1, 1], np.int32),
    }
    return columns | changes


def write_compact(path: Path, columns, **meta) -> Path:
    meta = {"name": "tiny", "block_size": 10, "open_loop": True} | meta
    np.savez(path, meta=np.array(json.dumps(meta)), **columns)
    return path


def refusal(path) -> str:
    with pytest.raises(TraceError) as caught:
        load_trace(path)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(str(path))
    return line


def blocks(trace: Trace) -> list[list[int]]:
    return [trace.blocks(row).tolist() for row in range(len(trace))]


def test_compact_trace_is_read_with_read_only_columns(tmp_path):
    trace = load_trace(write_compact(tmp_path / "tiny.bin.npz", compact_columns()))
    assert (trace.name, trace.trace_kind, trace.block_size, len(trace), trace.notices) == (
        "tiny",
        "open-loop",
        10,
        3,
        (),
    )
    assert blocks(trace) == [[0, 1], [0, 1, 2], [0, 1, 2, 3]]
    assert trace.block_counts.tolist() == [2, 3, 4]
    with pytest.raises(ValueError, match="read-only"):
        trace.arrival_s[0] = 1.0


def test_compact_trace_without_ids_needs_no_id_columns(tmp_path):
    columns = {name: column for name, column in compact_columns().items() if name[:2] not in ("h_", "r_")}
    trace = load_trace(write_compact(tmp_path / "a.npz", columns, block_size=0))
    assert blocks(trace) == [[], [], []]


def test_gaps_in_the_ids_are_closed(tmp_path):
    columns = compact_columns(r_start=np.array([10**12, 10**12 + 2, 5]))
    trace = load_trace(write_compact(tmp_path / "a.npz", columns))
    assert trace.id_span == 4
    assert blocks(trace)[2] == [1, 2, 3, 0]


def test_mooncake_ids_survive_the_coding(tmp_path):
    ids = [[9, 4], [9, 4, 7], [9, 5], [8], [9, 4, 7, 6], [3, 2]]
    lengths = [len(row) * 512 - 3 for row in ids]
    rows = [mooncake_row(1000 * n, lengths[n], 10, ids[n]) for n in range(len(ids))]
    trace = load_trace(write_jsonl(tmp_path / "names-do-not-matter.npz", rows))
    renamed: dict[int, int] = {}
    expected = [[renamed.setdefault(block, len(renamed)) for block in row] for row in ids]
    assert blocks(trace) == expected
    assert trace.arrival_s.tolist() == [0, 1, 2, 3, 4, 5]
    assert trace.h_ref.tolist() == [-1, 0, 1, -1, 1, -1]
    assert (trace.parent == -1).all()


def test_an_id_stands_for_all_that_lies_before_it_too(tmp_path):
    ids = [[9, 4], [5, 4], [4], [5, 4, 4], [9, 4, 4]]
    rows = [mooncake_row(n, len(row) * 512, 10, row) for n, row in enumerate(ids)]
    trace = load_trace(write_jsonl(tmp_path / "a", rows))
    assert blocks(trace) == [[0, 1], [2, 3], [4], [2, 3, 5], [0, 1, 6]]


@settings(derandomize=True, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4) | st.sampled_from([-(2**63), 2**62, 2**63 - 1]), max_size=6), max_size=12))
def test_coded_ids_number_the_prefixes_of_all_rows(rows):
    numbers: dict[tuple[int, ...], int] = {}
    columns = encode(rows)
    for row, ids in enumerate(rows):
        prefixes = [tuple(ids[: depth + 1]) for depth in range(len(ids))]
        shared = sum(prefix in numbers for prefix in prefixes)
        assert columns["h_lcp"][row] == shared
        holders = [earlier for earlier in range(row) if shared and rows[earlier][:shared] == ids[:shared]]
        assert columns["h_ref"][row] == max(holders, default=-1)
        expected = [numbers.setdefault(prefix, len(numbers)) for prefix in prefixes]
        assert expand(row, *(columns[name] for name in ID_COLUMNS)).tolist() == expected


def test_ids_may_be_texts_and_integers_of_any_size(tmp_path):
    ids = [["5"], ["5", "a"], [5], [2**63], [-1, 2**63 - 1], [2**63, 2**200], [-1, 2**63 - 1, "a"]]
    rows = [mooncake_row(n, len(row) * 512, 10, row) for n, row in enumerate(ids)]
    trace = load_trace(write_jsonl(tmp_path / "a", rows))
    assert blocks(trace) == [[0], [0, 1], [2], [3], [4, 5], [3, 6], [4, 5, 7]]


def test_dropping_and_sorting_keep_blocks_and_parents(tmp_path):
    columns = compact_columns(output_tokens=np.array([5, 0, 5], np.int32))
    trace = load_trace(write_compact(tmp_path / "a.npz", columns))
    assert blocks(trace) == [[0, 1], [0, 1, 2, 3]]
    assert trace.parent.tolist() == [-1, 0]
    assert np.isnan(trace.gap_s).all()
    assert trace.h_ref.tolist() == [-1, 0]
    assert trace.notices == (f"{tmp_path / 'a.npz'}: dropped 1 rows with 0 input or output tokens",)


def test_unsorted_rows_are_sorted_with_a_notice(tmp_path):
    rng = np.random.default_rng(3)
    tree: list[list[int]] = []
    for fresh in range(60):
        stem = tree[rng.integers(len(tree))] if tree and rng.random() < 0.8 else []
        tree.append([*stem[: rng.integers(len(stem) + 1)], 1000 + fresh])
    rows = [mooncake_row(100 * int(rng.integers(50)), 512 * len(ids), int(rng.random() < 0.8), ids) for ids in tree]
    trace = load_trace(write_jsonl(tmp_path / "a", rows))
    kept = sorted((row for row in rows if row["output_length"]), key=lambda row: row["timestamp"])
    expected = [row["hash_ids"] for row in kept]
    back: dict[int, int] = {}
    for mine, theirs in zip(blocks(trace), expected, strict=True):
        assert [back.setdefault(block, id_) for block, id_ in zip(mine, theirs, strict=True)] == theirs
    assert len(set(back.values())) == len(back)
    assert (np.diff(trace.arrival_s) >= 0).all()
    assert [("dropped" in notice, "not sorted" in notice) for notice in trace.notices] == [(True, False), (False, True)]


def test_session_library_keeps_rows_without_output(tmp_path):
    columns = compact_columns(output_tokens=np.array([5, 0, 5], np.int32))
    path = write_compact(tmp_path / "a.npz", columns, open_loop=False, session_library=True)
    trace = load_trace(path)
    assert trace.output_tokens.tolist() == [5, 1, 5]
    assert trace.notices == (f"{path}: 1 rows had output_tokens 0, set to 1",)


def test_missing_file_and_folder_are_one_line(tmp_path):
    assert "No such file" in refusal(tmp_path / "absent")
    assert "the folder holds no session files" in refusal(tmp_path)


def test_empty_and_foreign_files_are_refused(tmp_path):
    (tmp_path / "empty").write_text("")
    (tmp_path / "prose").write_text("No trace at all\n")
    (tmp_path / "json").write_text('{"colour": 1}\n')
    assert "empty" in refusal(tmp_path / "empty")
    assert "not recognised" in refusal(tmp_path / "prose")
    assert "not recognised" in refusal(tmp_path / "json")


def test_trace_whose_rows_are_all_empty_is_refused(tmp_path):
    assert "0 rows" in refusal(write_jsonl(tmp_path / "a", [mooncake_row(output_length=0)]))


def test_truncated_npz_is_refused(tmp_path):
    path = write_compact(tmp_path / "a.npz", compact_columns())
    path.write_bytes(path.read_bytes()[:900])
    assert "cannot be read as a compact npz" in refusal(path)


def test_npz_with_flipped_bytes_is_refused(tmp_path):
    path = write_compact(tmp_path / "a.npz", compact_columns())
    content = bytearray(path.read_bytes())
    content[60:200] = bytes(140)
    path.write_bytes(bytes(content))
    assert "cannot be read as a compact npz" in refusal(path)


def test_pickle_is_never_loaded(tmp_path):
    columns = compact_columns(kind=np.array([{}, {}, {}], object))
    assert "cannot be read as a compact npz" in refusal(write_compact(tmp_path / "a.npz", columns))
    (tmp_path / "b.npz").write_bytes(pickle.dumps([1]))
    assert "not recognised" in refusal(tmp_path / "b.npz")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"colour": np.zeros(3)}, "column is 'colour'"),
        ({"turn": np.zeros(2, np.int32)}, "shape of turn is (2,)"),
        ({"turn": np.zeros(3)}, "dtype of turn is 'float64'"),
        ({"arrival_s": np.array([0.0, np.nan, 1.0])}, "row 1: arrival_s is nan"),
        ({"arrival_s": np.array([0.0, np.inf, 1.0])}, "row 1: arrival_s is inf"),
        ({"arrival_s": np.array([0.0, -2.0, 1.0])}, "row 1: arrival_s is -2.0"),
        ({"gap_s": np.array([0, 0, -1.0], np.float32)}, "row 2: gap_s is -1.0"),
        ({"input_tokens": np.array([20, -30, 45])}, "row 1: input_tokens is -30"),
        ({"kind": np.array([0, 0, 3], np.uint8)}, "row 2: kind is 3"),
        ({"parent": np.array([-1, 1, 1])}, "row 1: parent is 1"),
        ({"h_ref": np.array([-1, 2, 1])}, "row 1: h_ref is 2"),
        ({"h_lcp": np.array([0, 3, 3])}, "row 1: h_lcp is 3"),
        ({"arrival_s": np.array([5.0, 1.0, 9.0])}, "row 1: arrival_s is 1.0, expected a time not before its parent"),
        ({"r_off": np.array([0, 2, 1, 3])}, "r_off"),
        ({"r_len": np.array([2, 0, 1])}, "r_len is 0"),
        ({"input_tokens": np.array([20, 41, 45])}, "row 1: number of block ids is 3, expected 4 or 5"),
    ],
)
def test_bad_compact_value_names_row_field_and_expectation(tmp_path, changes, expected):
    line = refusal(write_compact(tmp_path / "a.npz", compact_columns(**changes)))
    assert expected in line
    assert ", expected " in line
    assert line.endswith(")")


def test_missing_compact_column_is_named(tmp_path):
    columns = compact_columns()
    del columns["turn"]
    assert "column is 'turn'" in refusal(write_compact(tmp_path / "a.npz", columns))


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        ({"block_size": None}, "meta block_size is None"),
        ({"block_size": -1}, "meta block_size is -1"),
        ({"open_loop": False}, "cannot be replayed"),
        ({"session_library": True}, "exactly one"),
    ],
)
def test_bad_meta_is_refused(tmp_path, meta, expected):
    assert expected in refusal(write_compact(tmp_path / "a.npz", compact_columns(), **meta))


def test_library_row_without_a_session_is_refused(tmp_path):
    columns = compact_columns(session_id=np.array([0, 0, -1], np.int32))
    path = write_compact(tmp_path / "a.npz", columns, open_loop=False, session_library=True)
    assert "row 2: session_id is -1" in refusal(path)


def test_library_row_whose_parent_is_in_another_session_is_refused(tmp_path):
    columns = compact_columns(session_id=np.array([0, 1, 0], np.int32), parent=np.array([-1, -1, 1], np.int32))
    path = write_compact(tmp_path / "a.npz", columns, open_loop=False, session_library=True)
    assert "row 2: parent is 1, expected a row of the same session" in refusal(path)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"timestamp": 0}, "input_length is None"),
        (mooncake_row(timestamp=float("nan")), "timestamp is None"),
        (mooncake_row(timestamp=-1), "timestamp is -1"),
        (mooncake_row(input_length=10.5), "input_length is 10.5"),
        (mooncake_row(output_length=True), "output_length is True"),
        (mooncake_row(hash_ids=[1.5]), "hash_ids is [1.5]"),
        (mooncake_row(hash_ids=[True]), "hash_ids is [True]"),
        (mooncake_row(hash_ids=[1, 2, 3]), "number of block ids is 3, expected 1 or 2"),
    ],
)
def test_bad_mooncake_value_names_line_and_field(tmp_path, row, expected):
    path = write_jsonl(tmp_path / "a", [mooncake_row(), row])
    line = refusal(path)
    assert line.startswith(f"{path}:2: {expected}")


def test_line_that_is_not_json_is_named(tmp_path):
    path = tmp_path / "a"
    path.write_text(json.dumps(mooncake_row()) + "\n{oops\n{oops\n")
    assert refusal(path).startswith(f"{path}:2: ")


def test_both_formats_of_one_public_trace_agree():
    native = NATIVE / "native" / "mooncake_conversation_head300.jsonl"
    compact = NATIVE / "train" / "mooncake_conversation.train.npz"
    if not (native.is_file() and compact.is_file()):
        pytest.skip("public traces are not beside the repository")
    one, other = load_trace(native), load_trace(compact)
    assert other.quantum_s == 3.0
    assert all((one.blocks(row) == other.blocks(row)).all() for row in range(len(one)))
