"""Files of runs: what a row says, which of its figures are refused, and what is wrong with a bad one."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from hbmgym.envs.serving.gpus import GPUS
from hbmgym.eval.calibration.rows import PUBLISHED, Row, by_deployment, locate_model, make_row, read_rows
from hbmgym.memory_backend.geometry import find_model

from .calibration_rows import FIELDS, fields, row, write_csv


def read(folder: Path, *content: dict[str, Any]) -> list[Row]:
    return read_rows(write_csv(folder / "rows.csv", content))


def test_a_row_is_what_its_columns_say(tmp_path):
    given = fields(prefill_chunk=16384, recv_interval=30, statistic="median", source="a log", expert_parallel=1)
    (found,) = read(tmp_path, given)
    assert (found.where, found.date, found.source) == ("rows.csv row 1", "2026-04-01", "a log")
    assert (found.input_tokens, found.output_tokens, found.shortest) == (1024, 64, 0.8)
    assert (found.concurrency, found.requests) == (4, 40)
    assert (found.prefill_chunk, found.receive_interval, found.statistic) == (16384, 30, "median")
    assert found.measured == {"ttft": 100.0, "tpot": 10.0} and not found.refused
    assert found.deployment.name == "qwen3-next-80b-a3b fp8 h200 TP1 vLLM 0.18.0"


def test_what_a_row_need_not_say_has_defaults():
    needed = ("model", "gpu", "engine", "input_tokens", "output_tokens", "concurrency", "tpot_ms")
    found = make_row("row 1", {name: FIELDS[name] for name in needed})
    assert found is not None
    assert (found.requests, found.prefill_chunk, found.receive_interval) == (40, 8192, 1)
    assert (found.statistic, found.speculative, found.shortest) == ("mean", False, None)
    deployment = found.deployment
    assert (deployment.tensor_parallel, deployment.expert_parallel) == (1, 1)
    assert (deployment.weight_dtype, deployment.kv_dtype, deployment.state_dtype) == ("bf16", "bf16", "fp32")


def test_json_and_csv_say_the_same(tmp_path):
    given = [fields(), fields(concurrency=8, ttft_ms=None), fields(speculative=True, prefill_chunk=None)]
    (tmp_path / "rows.json").write_text(json.dumps(given))
    from_json, from_csv = read_rows(tmp_path / "rows.json"), read(tmp_path, *given)
    assert [vars(one) | {"where": ""} for one in from_json] == [vars(one) | {"where": ""} for one in from_csv]


def test_tables_of_spreadsheets_are_read(tmp_path):
    given = {name: f"{value}.0" if isinstance(value, int) else value for name, value in FIELDS.items()}
    path = write_csv(tmp_path / "Rows.CSV", [given | {"note": 'two\nlines, and a "quote"'}])
    path.write_text(path.read_text(), encoding="utf-8-sig")
    (found,) = read_rows(path)
    assert (found.concurrency, found.deployment) == (4, row().deployment)


def test_blank_cells_say_nothing():
    found = row(version="  ", date="")
    assert found.refused == {"ttft": "version, date are not stated"}
    assert found.deployment.version == ""


def test_a_dtype_has_the_name_that_our_kernels_have():
    assert row(weight_dtype="fp8_block").deployment == row(weight_dtype="fp8").deployment


def test_rows_belong_to_one_deployment_unless_something_that_acts_differs():
    assert len(by_deployment([row(), row(concurrency=8, date="2026-05-01", prefill_chunk=2048)])) == 1
    for name, value in {
        **{"model": "qwen3.5-27b", "gpu": "h100", "tensor_parallel": 2, "expert_parallel": 2, "weight_dtype": "bf16"},
        **{"kv_dtype": "fp8", "state_dtype": "bf16", "engine": "SGLang", "version": "0.19"},
    }.items():
        assert len(by_deployment([row(), row(**{name: value})])) == 2, name


@pytest.mark.parametrize("name", ["length_range", "weight_dtype", "kv_dtype", "state_dtype", "version", "date"])
@pytest.mark.parametrize("said", [None, "unknown"])
def test_without_its_settings_a_row_has_no_ttft(name, said):
    found = row(**{name: said})
    assert found.measured == {"tpot": 10.0}
    assert found.refused == {"ttft": f"{name} is not stated"}


@pytest.mark.parametrize("name", ["tensor_parallel", "expert_parallel"])
def test_without_its_parallelism_a_row_has_no_ttft(name):
    assert row(**{name: None}).refused == {"ttft": f"{name} is not stated"}


@pytest.mark.parametrize("text", ["ShareGPT", "0.5-1.5", "0.8", "-0.1-1.0", "1.2-1.0"])
def test_lengths_that_are_no_range_up_to_the_nominal_one_give_no_ttft(text):
    found = row(length_range=text)
    assert found.shortest is None and found.measured == {"tpot": 10.0}
    assert found.refused == {"ttft": f"length_range is {text!r}, not 'fixed' or a range such as 0.8-1.0"}


@pytest.mark.parametrize(("text", "shortest"), [("fixed", 1.0), ("0.8-1.0", 0.8), ("0-1 uniform", 0.0), ("1-1", 1.0)])
def test_ranges_of_lengths_are_read(text, shortest):
    assert row(length_range=text).shortest == shortest


@pytest.mark.parametrize("said", ["1", "true", "True", True, "eagle"])
def test_speculative_decoding_gives_no_tpot(said):
    found = row(speculative=said)
    assert found.speculative and found.measured == {"ttft": 100.0}
    assert found.refused["tpot"].startswith("speculative decoding")


@pytest.mark.parametrize("said", ["0", "false", False, "no", "off", None])
def test_without_speculation_there_is_a_tpot(said):
    assert not row(speculative=said).refused


def test_a_prefix_cache_gives_neither():
    found = row(prefix_cache="on")
    assert not found.measured and found.refused.keys() == {"ttft", "tpot"}
    assert not row(prefix_cache="off").refused


def test_only_what_a_row_has_and_is_to_be_used_for_is_refused():
    assert row(ttft_ms=None, date=None).refused == {}
    assert row(use="ttft", speculative=1).refused == {}
    assert row(use="ttft", speculative=1).measured == {"ttft": 100.0}
    assert row(use="tpot").measured == {"tpot": 10.0}


@pytest.mark.parametrize(
    "changes",
    [{"use": "none"}, {"ttft_ms": None, "tpot_ms": None}, {"use": "ttft", "ttft_ms": None}],
    ids=["none", "no figures", "no figure to use"],
)
def test_rows_that_are_not_to_be_used_are_passed_over(changes, tmp_path):
    (found,) = read(tmp_path, fields(**changes), fields())
    assert found.where == "rows.csv row 2"
    with pytest.raises(ValueError, match=r"rows.csv: has no row to use: expected a header and at least one run"):
        read(tmp_path, fields(**changes))


BAD = {
    "model": ({"model": "gpt-2"}, "unknown model 'gpt-2'"),
    "gpu": ({"gpu": "v100"}, "unknown GPU 'v100'"),
    "engine": ({"engine": "TensorRT"}, "engine is 'TensorRT', expected vLLM or SGLang"),
    "weights": ({"weight_dtype": "int3"}, "unknown dtype of weights 'int3'"),
    "kv": ({"kv_dtype": "int3"}, "unknown dtype 'int3'"),
    "state": ({"state_dtype": "int3"}, "unknown dtype of states 'int3'"),
    "no prompt": ({"input_tokens": 0}, "input_tokens is '0', expected an integer from 1 to 10000000"),
    "long prompt": ({"input_tokens": 10**30}, "input_tokens is '10000"),
    "half a token": ({"input_tokens": 1.5}, "input_tokens is '1.5'"),
    "one output token": ({"output_tokens": 1}, "output_tokens is '1', expected an integer from 2"),
    "no clients": ({"concurrency": -4}, "concurrency is '-4'"),
    "no number": ({"concurrency": "many"}, "concurrency is 'many'"),
    "infinite": ({"concurrency": "inf"}, "concurrency is 'inf'"),
    "few requests": ({"requests": 3}, "requests is 3, expected at least concurrency 4"),
    "chunk": ({"prefill_chunk": 0}, "prefill_chunk is '0'"),
    "interval": ({"recv_interval": -1}, "recv_interval is '-1'"),
    "heads": ({"tensor_parallel": 3}, "tensor_parallel is 3, but qwen3-next-80b-a3b has 16 query heads"),
    "parallel": ({"tensor_parallel": "two"}, "tensor_parallel is 'two'"),
    "negative ttft": ({"ttft_ms": -1.0}, "ttft_ms is '-1.0', expected a number > 0, or nothing"),
    "negative but refused": ({"ttft_ms": -1.0, "date": None}, "ttft_ms is '-1.0'"),
    "endless": ({"tpot_ms": "inf"}, "tpot_ms is 'inf'"),
    "not a number": ({"tpot_ms": "nan"}, "tpot_ms is 'nan'"),
    "word": ({"tpot_ms": "fast"}, "tpot_ms is 'fast'"),
    "statistic": ({"statistic": "p99"}, "statistic is 'p99', expected one of: mean, median"),
    "use": ({"use": "some"}, "use is 'some', expected both, ttft, tpot or none"),
    "missing": ({"model": None, "concurrency": None}, "model, concurrency is missing"),
    "unknown column": ({"colour": "red"}, "unknown column colour: known are model, gpu"),
}


@pytest.mark.parametrize(("changes", "complaint"), BAD.values(), ids=BAD.keys())
def test_a_bad_row_is_named_in_one_line(changes, complaint, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([fields(), fields(**changes)]))
    with pytest.raises(ValueError) as raised:
        read_rows(tmp_path / "rows.json")
    line = str(raised.value)
    assert f"rows.json: row 2: {complaint}" in line and "\n" not in line


FILES = {
    "an empty one": ("rows.json", b"", "rows.json: is not JSON"),
    "an empty table": ("rows.csv", b"", "rows.csv: has no row to use"),
    "a header": ("rows.csv", b"model,gpu\n", "rows.csv: has no row to use"),
    "half of one": ("rows.json", b'[{"model": ', "rows.json: is not JSON"),
    "an object": ("rows.json", b"{}", "rows.json: expected a list of objects, one per run"),
    "numbers": ("rows.json", b"[1, 2]", "rows.json: expected a list of objects"),
    "no rows": ("rows.json", b"[]", "rows.json: has no row to use"),
    "nested too deep": ("rows.json", b"[" * 100_000, "rows.json: is not JSON"),
    "bytes": ("rows.csv", b"\xff\xfe\x00", "rows.csv: is no text: invalid start byte at byte 0"),
    "a long line": ("rows.csv", b"model,gpu\nq," + b"x" * 200_000, "rows.csv: is not CSV: field larger"),
    "cells too many": (
        "rows.csv",
        b"model,gpu\na,b,c,d\n",
        "rows.csv: row 1: has more cells than the header, from 'c'",
    ),
}


@pytest.mark.parametrize(("name", "content", "complaint"), FILES.values(), ids=FILES.keys())
def test_a_file_without_rows_is_named_in_one_line(name, content, complaint, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as raised:
        read_rows(tmp_path / name)
    assert complaint in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.csv: cannot be read: No such file"):
        read_rows(tmp_path / "nowhere.csv")


def test_models_are_those_that_are_served_and_those_of_published_rows(tmp_path):
    assert locate_model("qwen3.5-4b") == "qwen3.5-4b"
    assert find_model(locate_model("minimax-m2.5")).slug == "minimax-m2.5"
    own = tmp_path / "config.json"
    own.write_text(Path(locate_model("qwen3-32b")).read_text())
    assert locate_model(str(own)) == str(own)


def test_the_published_rows_have_sources_settings_and_known_places():
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        content = list(csv.DictReader(file))
    assert all(own["source"] for own in content)
    rows = read_rows(PUBLISHED)
    assert len(rows) > 250 and len({one.where for one in rows}) == len(rows)
    assert {one.deployment.gpu for one in rows} <= GPUS.keys()
    assert not any("/home" in str(own) or "/tmp" in str(own) for own in content)
