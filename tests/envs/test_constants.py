"""Constants that a calibration or a measurement may replace, and what says so."""

import dataclasses
import json
from pathlib import Path

import pytest

from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.serving.constants import LOADED, PRIORS, Calibration, CostConstants
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
    changed = {field for field in usual.dtype.names if usual[field] != measured[field]}
    assert changed == {"chunk_move_s": {name}, "block_copy_s_per_byte": {name, "slot_copy_s"}}[name]


@pytest.mark.parametrize("name", ["chunk_move_s", "block_copy_s_per_byte"])
def test_setup_hash_sees_measured_costs(tmp_path, name):
    hashes = [
        setup_hash(read_costs(write_costs(tmp_path, **{name: seconds})).applied_to(CONFIG)) for seconds in (1e-9, 2e-9)
    ]
    assert len({setup_hash(CONFIG), *hashes}) == 3


@pytest.mark.parametrize("field", dataclasses.fields(CostConstants), ids=lambda field: field.name)
def test_setup_hash_sees_every_constant_that_acts(field):
    pair = dataclasses.replace(CONFIG, tensor_parallel=2)
    other = dataclasses.replace(pair, constants=dataclasses.replace(pair.constants, **{field.name: 0.123}))
    assert setup_hash(other) != setup_hash(pair)


def test_a_model_without_a_row_is_told_from_one_with(tmp_path):
    facts = {
        "accepted": False,
        "constants": dataclasses.asdict(PRIORS),
        "rows": [{"model": "a", "gpu": "h200"}, {"model": "b", "gpu": "h100"}],
    }
    calibration = Calibration.from_json(facts)
    assert calibration.constants == PRIORS
    assert calibration.notice("a", "h200") is None
    assert "a on h100: no published measurement" in (calibration.notice("a", "h100") or "")


def test_the_default_model_has_a_row_on_every_data_centre_gpu():
    assert [LOADED.notice("qwen3-next-80b-a3b", gpu) for gpu in ("h200", "h100", "a100")] == [None] * 3
    assert LOADED.notice("qwen3-next-80b-a3b", "rtx3060") is not None


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


@pytest.mark.parametrize("value", [0.0, -0.1, 1.1, float("nan"), float("inf"), True, "1"])
def test_what_is_no_share_of_a_rate_is_refused(value):
    for name in ("e_w", "e_k", "e_s", "e_c"):
        with pytest.raises(ValueError, match=f"constant {name} is .*, expected a number above 0 and at most 1"):
            CostConstants(**{name: value})


@pytest.mark.parametrize("value", [-1e-6, 30.0, float("nan"), float("inf"), True, "1"])
def test_what_is_no_time_is_refused(value):
    for name in ("t_fix_s", "t_fix_per_layer_s", "t_seq_s", "t_comm_s", "block_copy_s_per_byte"):
        with pytest.raises(ValueError, match=f"constant {name} is .*, expected seconds"):
            CostConstants(**{name: value})
