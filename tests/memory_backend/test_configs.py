"""read_config against the shipped shapes; each file in configs holds the fields that it reads, and their source."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from hbmgym.memory_backend.configs import ARCHITECTURES, read_config
from hbmgym.memory_backend.geometry import MODELS, find_model

CONFIGS = Path(__file__).with_name("configs")
REFERENCES = Path(__file__).resolve().parents[2] / "eval" / "calibration" / "configs"
PATHS = sorted(CONFIGS.glob("*.json"))
OF_THE_TABLE = {"slug", "name", "total_params", "active_params", "source", "shape_verified"}

BAMBA_9B = {
    "model_type": "bamba",
    "hidden_size": 4096,
    "vocab_size": 128256,
    "num_hidden_layers": 32,
    "attn_layer_indices": [9, 18, 27],
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "mamba_n_heads": 128,
    "mamba_d_head": "auto",
    "mamba_expand": 2,
    "mamba_d_state": 128,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
}


def shape(model):
    return {name: value for name, value in asdict(model).items() if name not in OF_THE_TABLE}


def write(path, config):
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_config_gives_the_shipped_shape(path):
    model = read_config(path)
    assert model.slug == path.stem
    assert shape(model) == shape(MODELS[path.stem])


@pytest.mark.parametrize("path", [*PATHS, *sorted(REFERENCES.glob("*.json"))], ids=lambda path: path.stem)
def test_a_config_says_where_it_was_read(path):
    assert len(json.loads(path.read_text())["_source"]) > 20


def test_few_models_have_no_config_and_theirs_are_not_called_verified():
    without = {slug: model for slug, model in MODELS.items() if not (CONFIGS / f"{slug}.json").exists()}
    assert set(without) == {"jamba-1.5-large", "mamba2-1b3"}
    assert not without["jamba-1.5-large"].shape_verified
    assert not without["mamba2-1b3"].total_params  # a shape that has no weights


def test_reference_models_of_the_calibration_are_attention_alone():
    minimax, qwen = (read_config(REFERENCES / f"{slug}.json") for slug in ("minimax-m2.5", "qwen3-32b"))
    assert (minimax.layers, minimax.recurrent_layers, minimax.slot_bytes("fp32")) == (62, 0, 0)
    assert (qwen.layers, qwen.recurrent_layers, qwen.slot_bytes("fp32")) == (64, 0, 0)
    assert minimax.total_params == pytest.approx(229e9, rel=0.01)
    assert qwen.total_params == pytest.approx(32.8e9, rel=0.01)


def test_parameters_are_counted_where_the_config_has_none():
    model = read_config(CONFIGS / "minimax-text-01.json")
    assert model.total_params == model.counted_params == pytest.approx(456.1e9, rel=1e-3)
    assert model.active_params == model.counted_active_params


def test_bamba_mixes_attention_at_the_layers_it_lists(tmp_path):
    model = read_config(write(tmp_path / "bamba-9b.json", BAMBA_9B))
    assert (model.attention_layers, model.recurrent_layers) == (3, 29)
    assert model.state_shape == (128, 64, 128)
    assert model.total_params == pytest.approx(9.78e9, rel=0.01)


def test_experts_lie_where_qwen3_moe_says(tmp_path):
    config = json.loads((REFERENCES / "qwen3-32b.json").read_text())
    experts = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 768}
    sparse = {"decoder_sparse_step": 2, "mlp_only_layers": [1, 2]}
    model = read_config(write(tmp_path / "x.json", {**config, **experts, **sparse, "model_type": "qwen3_moe"}))
    assert (model.moe_layers, model.dense_layers) == (31, 33)
    assert (model.dense_width, model.expert_width, model.expert_input) == (25600, 768, 5120)


def test_both_spellings_of_layers_are_read_alike(tmp_path):
    minimax = json.loads((CONFIGS / "minimax-text-01.json").read_text())
    kinds = ["full_attention" if kind else "linear_attention" for kind in minimax.pop("attn_type_list")]
    listed = write(tmp_path / "minimax.json", {**minimax, "model_type": "minimax", "layer_types": kinds})
    assert shape(read_config(listed)) == shape(MODELS["minimax-text-01"])

    nemotron = json.loads((CONFIGS / "nemotron-h-8b.json").read_text())
    names = {"M": "mamba", "*": "attention", "-": "mlp"}
    blocks = [names[letter] for letter in nemotron.pop("hybrid_override_pattern")]
    listed = write(tmp_path / "nemotron.json", {**nemotron, "layers_block_type": blocks})
    assert shape(read_config(listed)) == shape(MODELS["nemotron-h-8b"])


def test_queries_of_a_low_rank_are_counted_by_their_parameters(tmp_path):
    kimi = json.loads((CONFIGS / "kimi-linear-48b-a3b.json").read_text())
    full, low = (read_config(write(tmp_path / "x.json", {**kimi, "q_lora_rank": rank})) for rank in (None, 512))
    saved = 2304 * 32 * 192 - 512 * (2304 + 32 * 192)
    assert 2304 * (full.attention_in - low.attention_in) == pytest.approx(saved, rel=1e-3)


@pytest.mark.parametrize("field", ["mamba_ssm_dtype", "mamba_ssm_cache_dtype"])
def test_state_dtype_is_that_of_the_config(tmp_path, field):
    assert read_config(write(tmp_path / "x.json", BAMBA_9B)).state_dtype == "fp32"
    assert read_config(write(tmp_path / "x.json", {**BAMBA_9B, field: "bfloat16"})).state_dtype == "bf16"


def test_slug_is_the_model_in_the_file_name(tmp_path):
    folder = tmp_path / "Bamba-9B-v2"
    folder.mkdir()
    for name in ("ibm--Bamba-9B-v2_config.json", "bamba-9b-v2.json", "Bamba-9B-v2/config.json"):
        assert read_config(write(tmp_path / name, BAMBA_9B)).slug == "bamba-9b-v2"


def test_find_model_reads_a_path_once(tmp_path):
    path = write(tmp_path / "bamba-9b.json", BAMBA_9B)
    model = find_model(str(path))
    path.unlink()
    assert find_model(str(path)) is model


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "mamba3"}, "model_type 'mamba3' is not known"),
        ({"hidden_size": None}, "field 'hidden_size' of architecture 'bamba' is missing"),
        ({"mamba_d_state": None}, "field 'mamba_d_state' of architecture 'bamba' is missing"),
        ({"mamba_ssm_dtype": "int3"}, "state dtype 'int3' is not known: known are float32, bfloat16, float16"),
        (
            {"model_type": "gpt_oss", "layer_types": ["chunked_attention"]},
            "layer_types has a layer 'chunked_attention'",
        ),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "M?"}, "hybrid_override_pattern has a layer '?'"),
    ],
)
def test_a_config_that_cannot_be_read_is_one_line_with_file_and_field(tmp_path, change, said):
    path = write(tmp_path / "odd.json", {**BAMBA_9B, **change})
    with pytest.raises(ValueError) as error:
        read_config(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and said in message and "\n" not in message


def test_an_unknown_architecture_lists_the_known_ones(tmp_path):
    with pytest.raises(ValueError) as error:
        read_config(write(tmp_path / "odd.json", {"architectures": ["LlamaForCausalLM"]}))
    assert all(architecture in str(error.value) for architecture in ARCHITECTURES)


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_a_file_that_is_no_config_is_one_line(tmp_path, text):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"config\.json") as error:
        read_config(path)
    assert "\n" not in str(error.value)


def test_a_path_without_a_file_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"no readable config\.json"):
        find_model(str(tmp_path / "nowhere.json"))
