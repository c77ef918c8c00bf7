"""read_config against the shipped shapes; each file in configs holds the fields that it reads, and their source."""

import copy
import json
import random
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


@pytest.mark.parametrize(
    ("slug", "layers", "slot_bytes", "tokens"),
    [
        ("qwen3.8-27b", (16, 0, 48), 153_944_064, 2_349),  # SGLang's cookbook: 153.9 MB per fp32 slot
        ("kimi-k3", (24, 0, 69), 449_372_160, 16_253),
        ("nemotron-3-super-120b-a12b", (8, 0, 40), 170_229_760, 20_780),
        ("gpt-oss-120b", (18, 18, 0), 4_718_592, 128),
        ("gemma-3-12b", (8, 40, 0), 320 * 2**20, 5_120),
        ("gemma-4-12b", (8, 40, 0), 320 * 2**20, 20_480),
        ("gemma-4-31b", (10, 50, 0), 800 * 2**20, 10_240),
        ("ling-3.0-flash", (7, 0, 35), 75_980_800, 9_422),
        ("ring-mini-linear-2.0", (4, 0, 16), 16 * 2**20, 2_048),
        ("mimo-v2-flash", (9, 39, 0), 25_559_040, 1_109),
        ("step-3.7-flash", (12, 33, 0), 69_206_016, 1_408),
    ],
)
def test_slots_are_as_large_as_published(slug, layers, slot_bytes, tokens):
    model = read_config(CONFIGS / f"{slug}.json")
    assert (model.attention_layers, model.window_layers, model.recurrent_layers) == layers
    assert model.slot_bytes("fp32") == slot_bytes
    assert slot_bytes / model.kv_token_bytes("bf16") == pytest.approx(tokens, abs=0.5)


def test_layers_that_read_the_kv_of_others_cache_none():
    """Gemma 4 E4B: 18 of 42 layers read, 3 of 7 full ones and 15 of 35 with a window; 24 cache."""
    model = read_config(CONFIGS / "gemma-4-e4b.json")
    assert (model.reused_kv_layers, model.reused_window_layers) == (3, 15)
    assert model.kv_token_bytes("bf16") == 4 * 2 * 2 * 512 * 2
    assert model.kv_read_bytes("bf16") == 7 * 2 * 2 * 512 * 2
    assert model.window_bytes() == 20 * 512 * 2 * 2 * 256 * 2
    assert model.window_read_bytes() == 35 * 512 * 2 * 2 * 256 * 2


def test_keys_that_are_values_are_one_projection_and_cached_twice(tmp_path):
    config = json.loads((CONFIGS / "gemma-4-31b.json").read_text())
    apart = copy.deepcopy(config)
    apart["text_config"].update(attention_k_eq_v=False, num_key_value_heads=4)
    one, two = (read_config(write(tmp_path / "x.json", each)) for each in (config, apart))
    assert (one.attention_in, two.attention_in) == ((32 + 4) * 512, (32 + 8) * 512)
    assert one.kv_token_bytes("bf16") == two.kv_token_bytes("bf16") == 80 * 1024


def test_a_ling_of_2_5_has_lightning_attention_where_3_0_has_kda(tmp_path):
    """Ling 2.5 and 2.6 of 1T: 80 layers of 8192, groups of 8, 11.25 KiB of KV per token."""
    config = json.loads((CONFIGS / "ling-3.0-flash.json").read_text())
    del config["short_conv_kernel_size"], config["no_kda_lora"]
    config.update(num_hidden_layers=80, hidden_size=8192, num_attention_heads=64, layer_group_size=8)
    model = read_config(write(tmp_path / "ling.json", config))
    assert (model.attention_layers, model.recurrent_layers, model.conv_shape) == (10, 70, None)
    assert model.kv_token_bytes("bf16") == 11.25 * 1024
    assert model.state_shape == (64, 128, 128)


def test_layers_beyond_the_last_whole_group_attend(tmp_path):
    config = json.loads((CONFIGS / "ring-mini-linear-2.0.json").read_text())
    model = read_config(write(tmp_path / "ring.json", {**config, "num_hidden_layers": 22}))
    assert (model.attention_layers, model.recurrent_layers) == (6, 16)


def test_a_short_convolution_is_all_that_lfm2_keeps():
    model = read_config(CONFIGS / "lfm2-8b-a1b.json")
    assert (model.attention_layers, model.recurrent_layers, model.state_elements) == (6, 18, 0)
    assert model.slot_bytes("fp32") == model.slot_bytes("bf16") == 18 * 2048 * 2 * 2


@pytest.mark.parametrize(
    ("config", "params"),
    [
        (  # Olmo-3-7B
            {"model_type": "olmo3", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
             "intermediate_size": 11008, "vocab_size": 100278, "sliding_window": 4096}, 7.3e9,
        ),
        (  # EXAONE-4.0-32B
            {"model_type": "exaone4", "hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 40,
             "num_key_value_heads": 8, "intermediate_size": 27392, "vocab_size": 102400, "sliding_window": 4096}, 32e9,
        ),
        (  # c4ai-command-r7b-12-2024
            {"model_type": "cohere2", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
             "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 256000, "sliding_window": 4096}, 8e9,
        ),
    ],
    ids=lambda case: case["model_type"] if isinstance(case, dict) else "",
)  # fmt: skip
def test_every_fourth_layer_attends_to_all_where_the_config_does_not_list_them(tmp_path, config, params):
    model = read_config(write(tmp_path / "x.json", config))
    assert (model.attention_layers, 3 * model.attention_layers) == (
        config["num_hidden_layers"] // 4,
        model.window_layers,
    )
    assert model.total_params == pytest.approx(params, rel=0.02)


def test_layers_that_predict_further_tokens_may_be_listed(tmp_path):
    config = json.loads((CONFIGS / "step-3.7-flash.json").read_text())
    further = [*config["layer_types"], *["sliding_attention"] * 3]
    model = read_config(write(tmp_path / "step.json", {**config, "layer_types": further}))
    assert shape(model) == shape(MODELS["step-3.7-flash"])
    one_more = {**config, "layer_types": [*further, "sliding_attention"]}
    with pytest.raises(ValueError, match="layer_types has 49 layers, but num_hidden_layers is 45"):
        read_config(write(tmp_path / "step.json", one_more))


def test_a_model_of_three_kinds_of_cache_is_refused_with_the_reason(tmp_path):
    with pytest.raises(ValueError, match="'deepseek_v4' keeps three kinds of cache"):
        read_config(write(tmp_path / "x.json", {"model_type": "deepseek_v4"}))


def test_a_nested_model_is_known_by_its_own_type(tmp_path):
    config = {"model_type": "a_wrapper_with_vision", "text_config": BAMBA_9B}
    assert shape(read_config(write(tmp_path / "x.json", config))) == shape(
        read_config(write(tmp_path / "y.json", BAMBA_9B))
    )


def test_a_model_without_full_attention_has_nothing_for_a_kv_pool(tmp_path):
    config = json.loads((CONFIGS / "gpt-oss-20b.json").read_text())
    config["layer_types"] = ["sliding_attention"] * len(config["layer_types"])
    with pytest.raises(ValueError, match="no layer caches the whole context"):
        read_config(write(tmp_path / "x.json", config))


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
        (
            {"model_type": "mamba3"},
            "model_type 'mamba3' is not known; a reader of this architecture would need hidden_",
        ),
        ({"hidden_size": -4096}, "hidden_size is -4096, expected an integer >= 1"),
        ({"hidden_size": "4096"}, "hidden_size is '4096', expected an integer >= 1"),
        ({"hidden_size": True}, "hidden_size is True, expected an integer >= 1"),
        ({"num_key_value_heads": 5}, "num_key_value_heads is 5, expected a divisor of num_attention_heads, 32"),
        (
            {"attn_layer_indices": [9, 32]},
            "attn_layer_indices is [9, 32], expected different numbers of layers, 0 to 31",
        ),
        ({"attn_layer_indices": [9, 9]}, "attn_layer_indices is [9, 9], expected different numbers of layers, 0 to 31"),
        ({"attn_layer_indices": 9}, "attn_layer_indices is 9, expected different numbers of layers, 0 to 31"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', expected true or false"),
        ({"text_config": [1]}, "text_config is [1], expected an object"),
        (
            {"model_type": "gpt_oss", "layer_types": ["full_attention"] * 31},
            "layer_types has 31 layers, but num_hidden_layers is 32",
        ),
        ({"model_type": "gpt_oss", "layer_types": 4}, "layer_types is 4, expected a list with a kind for each layer"),
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


ODD = [None, -1, 0, 3, 2.5, "x", True, [], [1], ["mamba"], {}, 10**30]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_damaged_config_is_a_model_or_one_line_that_names_the_file(tmp_path, path):
    """Every field of every config in turn is made odd in a few ways, or its list cut, swapped or lengthened."""
    draw = random.Random(path.stem)
    whole = json.loads(path.read_text())
    for place in (whole, whole.get("text_config", {}), whole.get("linear_attn_config", {})):
        for name, value in list(place.items()):
            cut = [value[:-1], [*value, *value[:1]], draw.sample(value, len(value))] if isinstance(value, list) else []
            for odd in (*draw.sample(ODD, 4), *cut):
                place[name] = odd
                damaged = write(tmp_path / "damaged.json", whole)
                try:
                    model = read_config(damaged)
                except ValueError as error:
                    assert str(error).startswith(f"{damaged}: ") and "\n" not in str(error)
                else:
                    assert (
                        model.kv_token_bytes("bf16") > 0 and model.slot_bytes("fp32") >= 0 and model.counted_params > 0
                    )
            place[name] = value


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
