"""A GPU of one's own: a file with an entry as in gpus.json."""

import json
from pathlib import Path
from typing import Any

import pytest

from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.serving.core import cost_of, setup_hash
from hbmgym.envs.serving.gpus import FILE, find_gpu

H200 = json.loads(FILE.read_text())[0]


def write(folder: Path, content: Any) -> str:
    path = folder / "own.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_a_copy_of_a_shipped_gpu_is_that_gpu_and_one_with_other_rates_another(tmp_path):
    config = ServingConfig(gpu=H200["slug"])
    assert setup_hash(ServingConfig(gpu=write(tmp_path, H200))) == setup_hash(config)
    (tmp_path / "slow").mkdir()
    slow = ServingConfig(gpu=write(tmp_path / "slow", {**H200, "bandwidth": H200["bandwidth"] / 2}))
    assert cost_of(slow).kv_s_per_ctx_token == 2 * cost_of(config).kv_s_per_ctx_token
    assert setup_hash(slow) != setup_hash(config)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "fast", None, True, [], 10**400])
def test_rates_that_are_none_are_refused_by_name(value, tmp_path):
    for name in ("bandwidth", "flops", "state_e_bw", "memory_bytes"):
        (folder := tmp_path / name).mkdir()
        with pytest.raises(ValueError, match=rf"own\.json: .*({name}|another shape)") as refusal:
            find_gpu(write(folder, {**H200, name: value}))
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ([H200], "expected one object"),
        ("", "is no entry"),
        ("[" * 100_000, "is no entry"),
        ({name: value for name, value in H200.items() if name != "all_reduce"}, "lacks 'all_reduce'"),
        ({**H200, "gemm": {"bf16": H200["gemm"]["bf16"]}}, "lacks 'fp8'"),
        ({**H200, "gemm": {**H200["gemm"], "fp8": [1.0]}}, "is no entry"),
        ({**H200, "engines": {}}, "lacks 'vllm'"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 40 else "",
)
def test_what_is_no_entry_is_refused_in_one_line(content, named, tmp_path):
    with pytest.raises(ValueError, match=named) as refusal:
        find_gpu(write(tmp_path, content))
    assert "own.json" in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.json: cannot be read"):
        find_gpu(str(tmp_path / "nowhere.json"))
