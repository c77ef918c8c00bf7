"""Measured costs of moves and copies in place of assumed ones, and what a configuration makes of parallelism."""

import dataclasses
import json
from pathlib import Path

import pytest

from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.serving.core import Core, cost_of, make_layout, setup_hash
from hbmgym.envs.serving.costs import read_costs
from hbmgym.memory_backend.geometry import find_model

CONFIG = ServingConfig(model="qwen3.5-4b", hbm_gib=1.0)


def write_costs(folder: Path, **constants: float) -> Path:
    path = folder / "costs.json"
    path.write_text(json.dumps({"constants": constants, "measured_on": {"name": "NVIDIA H200", "driver": "13.0"}}))
    return path


def test_measured_costs_reach_the_cost_record_and_the_engine(tmp_path):
    costs = read_costs(write_costs(tmp_path, chunk_move_s=6e-5, block_copy_s_per_byte=5e-13))
    config = costs.applied_to(CONFIG)
    cost = cost_of(config)
    assert (cost.chunk_move_s, cost.block_copy_s_per_byte) == (6e-5, 5e-13)
    assert Core(config).setup.chunk_move_s == 6e-5
    assert costs.line.endswith("costs.json: chunk_move_s 6e-05, block_copy_s_per_byte 5e-13, measured on NVIDIA H200")


@pytest.mark.parametrize("name", ["chunk_move_s", "block_copy_s_per_byte"])
def test_what_was_not_measured_stays(tmp_path, name):
    usual, measured = cost_of(CONFIG), cost_of(read_costs(write_costs(tmp_path, **{name: 1e-3})).applied_to(CONFIG))
    changed = {field for field in usual.dtype.names if (usual[field] != measured[field]).any()}
    assert changed == {"chunk_move_s": {name}, "block_copy_s_per_byte": {name, "slot_copy_s"}}[name]


@pytest.mark.parametrize("name", ["chunk_move_s", "block_copy_s_per_byte"])
def test_setup_hash_sees_measured_costs(tmp_path, name):
    hashes = [
        setup_hash(read_costs(write_costs(tmp_path, **{name: seconds})).applied_to(CONFIG)) for seconds in (1e-9, 2e-9)
    ]
    assert len({setup_hash(CONFIG), *hashes}) == 3


def test_setup_hash_sees_expert_parallelism_and_the_interval_of_looks():
    config = ServingConfig(tensor_parallel=2)
    others = [dataclasses.replace(config, expert_parallel=2), dataclasses.replace(config, receive_interval=10)]
    assert len({setup_hash(config), *map(setup_hash, others)}) == 3


@pytest.mark.parametrize("value", [0.0, -1e-6, 30.0, float("nan"), float("inf"), True, "1"])
def test_what_is_no_time_to_copy_is_refused(value):
    with pytest.raises(ValueError, match=r"block_copy_s_per_byte is .*, expected seconds up to 1"):
        ServingConfig(block_copy_s_per_byte=value)


def test_a_group_of_gpus_shares_slots_out_and_copies_the_kv_heads_that_are_too_few():
    whole, half, eighth = (make_layout(ServingConfig(hbm_gib=20.0, tensor_parallel=g)) for g in (1, 2, 8))
    assert whole.slot_bytes == 2 * half.slot_bytes == 8 * eighth.slot_bytes
    assert whole.page_bytes == 2 * half.page_bytes == 1_572_864
    assert eighth.page_bytes == 786_432  # of two KV heads one, as on two GPUs
    too_large = dataclasses.replace(CONFIG, model="qwen3.5-397b-a17b")
    with pytest.raises(ValueError, match="exceeds the 141 GB of h200"):
        make_layout(too_large)
    make_layout(dataclasses.replace(too_large, tensor_parallel=8))


@pytest.mark.parametrize(("kv", "state"), [("bf16", "fp32"), ("fp8", "fp32"), ("bf16", "bf16"), ("fp8", "bf16")])
def test_dtypes_change_the_blocks_that_they_name(kv, state):
    layout = make_layout(dataclasses.replace(CONFIG, kv_dtype=kv, state_dtype=state))
    model = find_model("qwen3.5-4b")
    assert layout.page_bytes == 64 * 8 * 2 * 4 * 256 * {"bf16": 2, "fp8": 1}[kv]
    assert layout.slot_bytes == 24 * 32 * 128 * 128 * {"fp32": 4, "bf16": 2}[state] + model.conv_bytes
