"""python -m hbmgym.memory_backend.geometry: shapes as JSON."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hbmgym.memory_backend.describe import describe, main
from hbmgym.memory_backend.geometry import MODELS, find_model

CONFIG = Path(__file__).with_name("configs") / "gemma-4-31b.json"


def printed(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["geometry.py", *map(str, arguments)])
    main()
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_every_model_is_one_line(capsys, monkeypatch):
    gemma, qwen = printed(capsys, monkeypatch, CONFIG, "qwen3.8-27b")
    assert (gemma["slug"], gemma["kv_token_bytes"], gemma["slot_bytes"]) == ("gemma-4-31b", 80 * 2**10, 800 * 2**20)
    assert gemma["layers"] == {"attention": 10, "window": 50, "recurrent": 0, "dense": 60, "moe": 0}
    assert (gemma["slot_in_tokens"], gemma["slot_dtype"], gemma["recurrent_bytes"]) == (10240.0, "bf16", 0)
    assert (qwen["slot_bytes"], qwen["slot_dtype"], qwen["window_bytes"]) == (153_944_064, "fp32", 0)
    assert qwen["parameters"] == {"total": 27 * 10**9, "active": 27 * 10**9}


def test_heads_of_a_window_are_printed_where_they_are_those_of_all_layers(capsys, monkeypatch):
    (model,) = printed(capsys, monkeypatch, "gpt-oss-120b")
    assert [model[f"window_{name}"] for name in ("kv_heads", "q_heads", "head_dim")] == [8, 64, 64]
    assert (model["window_in"], model["window_out"]) == (model["attention_in"], model["attention_out"])


def test_bytes_are_those_of_one_gpu_in_the_dtypes_asked_for(capsys, monkeypatch):
    flags = ("--kv-dtype", "fp8", "--state-dtype", "int8", "--tensor-parallel", "2")
    (model,) = printed(capsys, monkeypatch, "qwen3.8-27b", *flags)
    assert model["kv_token_bytes"] == 65536 // 4
    assert model["slot_bytes"] == (48 * 48 * (128 * 128 + 4 * 128) + 48 * 10240 * 3 * 2) // 2


def test_a_folder_stands_for_the_config_in_it(capsys, monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text(CONFIG.read_text())
    (model,) = printed(capsys, monkeypatch, tmp_path)
    assert (model["slug"], model["slot_bytes"]) == (tmp_path.name.lower(), 800 * 2**20)


@pytest.mark.parametrize("model", MODELS.values(), ids=lambda model: model.slug)
def test_every_model_of_the_catalogue_can_be_described(model):
    shape = json.loads(json.dumps(describe(model, "bf16", "fp32", 1)))
    assert shape["kv_token_bytes"] == model.kv_token_bytes("bf16")
    assert find_model(shape["slug"]) is model


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "name a model"),
        (("qwen9",), "unknown model 'qwen9'"),
        (("nowhere/config.json",), "nowhere/config.json: no readable config.json"),
        (("qwen3.5-4b", "--kv-dtype", "int8"), "unknown dtype 'int8': choose one of fp32, bf16, fp16, fp8"),
        (("qwen3.5-4b", "--state-dtype", "int3"), "unknown dtype of states 'int3'"),
        (("qwen3.5-4b", "--tensor-parallel", "3"), "tensor_parallel is 3, but qwen3.5-4b has 16 query heads"),
    ],
)
def test_what_cannot_be_described_is_one_line_and_exit_code_2(capsys, monkeypatch, arguments, said):
    with pytest.raises(SystemExit) as end:
        printed(capsys, monkeypatch, *arguments)
    message = capsys.readouterr().err
    assert end.value.code == 2
    assert said in message and message.count("\n") == 1


def test_it_runs_as_a_module():
    command = [sys.executable, "-m", "hbmgym.memory_backend.geometry", str(CONFIG)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["kv_token_bytes"] == 80 * 2**10
    assert not done.stderr
