import json
from dataclasses import replace
from pathlib import Path

import pytest

from hbmgym.memory_backend.geometry import MODELS, HybridModel, dtype_bytes, find_model

CORRECTED = {"falcon-h1-7b", "granite-4.0-h-1b", "granite-4.0-h-tiny", "zamba2-2.7b"}  # the published table is wrong
PUBLISHED = Path(__file__).resolve().parents[3] / "shared" / "models" / "hybrid_models.json"
TINY = HybridModel(
    slug="tiny",
    name="Tiny",
    attention_layers=2,
    kv_heads=3,
    head_dim=5,
    mla_dim=None,
    recurrent_layers=7,
    state_shape=(2, 3, 4),
    conv_shape=(11, 3),
    state_dtype="fp32",
    q_heads=3,
    total_params=100,
    active_params=10,
    hidden_size=10,
    vocabulary=100,
    attention_in=45,
    attention_out=15,
    recurrent_in=30,
    recurrent_out=12,
    dense_layers=4,
    dense_width=20,
    mlp_matrices=3,
    shape_verified=True,
    source="made up",
)


@pytest.mark.parametrize(
    ("slug", "tensor_parallel", "kv_token_bytes"),
    [
        ("qwen3-next-80b-a3b", 2, 12_288),  # one of two heads each
        ("qwen3-next-80b-a3b", 16, 12_288),  # no less: eight GPUs hold the same head
        ("qwen3.5-397b-a17b", 8, 15 * 2 * 1 * 256 * 2),
        ("jamba-1.5-mini", 8, 4 * 2 * 1 * 128 * 2),
        ("kimi-linear-48b-a3b", 1, 7 * 576 * 2),
        ("kimi-linear-48b-a3b", 8, 7 * 576 * 2),  # MLA's latent belongs to all heads
    ],
)
def test_kv_heads_are_shared_out_and_copied_where_they_are_fewer_than_the_gpus(slug, tensor_parallel, kv_token_bytes):
    model = find_model(slug)
    assert model.kv_token_bytes("bf16", tensor_parallel) == kv_token_bytes
    assert model.page_bytes("bf16", 64, tensor_parallel) == 64 * kv_token_bytes
    assert model.slot_bytes("fp32", tensor_parallel) == model.slot_bytes("fp32") // tensor_parallel


def test_a_group_of_gpus_must_divide_heads_or_be_divided_by_those_of_kv():
    assert [g for g in range(1, 17) if find_model("falcon-h1-7b").shares_out(g)] == [1, 2, 4, 6, 12]  # 12, 24, KV 2
    assert [g for g in range(1, 17) if find_model("jamba-1.5-mini").shares_out(g)] == [1, 2, 4, 8, 16]


def test_kv_token_counts_keys_and_values_of_all_attention_layers():
    assert TINY.kv_token_bytes("bf16") == 2 * 2 * 3 * 5 * 2
    assert TINY.kv_token_bytes("fp8") == 2 * 2 * 3 * 5


def test_mla_caches_its_latent_instead_of_heads():
    assert replace(TINY, kv_heads=None, mla_dim=9).kv_token_bytes("bf16") == 2 * 9 * 2


def test_slot_is_state_and_convolution_of_all_recurrent_layers():
    assert TINY.slot_bytes("fp32") == 7 * (24 * 4 + 11 * 3 * 2)


@pytest.mark.parametrize("dtype", ["fp8", "int8"])
def test_states_of_one_byte_keep_a_scale_per_row_of_a_head(dtype):
    assert TINY.state_bytes(dtype) == 7 * (2 * 3 * 4 + 2 * 3 * 4)
    assert TINY.slot_bytes(dtype) == TINY.state_bytes(dtype) + TINY.conv_bytes
    square = replace(TINY, state_shape=(32, 128, 128))
    assert square.state_bytes(dtype) / square.state_bytes("fp32") == (1 + 4 / 128) / 4


def test_convolution_stays_bf16_whatever_the_state():
    assert TINY.slot_bytes("bf16") - TINY.state_bytes("bf16") == TINY.conv_bytes == 7 * 11 * 3 * 2


def test_model_without_convolution_has_a_slot_of_state_alone():
    assert replace(TINY, conv_shape=None).slot_bytes("fp32") == 7 * 24 * 4


def test_a_window_belongs_to_the_slot_and_not_to_the_pages():
    windowed = replace(TINY, window_layers=5, window_tokens=128)
    window = 5 * 128 * 2 * 3 * 5 * 2
    assert windowed.slot_bytes("fp32") == TINY.slot_bytes("fp32") + window
    assert windowed.slot_bytes("bf16") == TINY.slot_bytes("bf16") + window  # bf16 whatever the state
    assert windowed.kv_token_bytes("fp8") == TINY.kv_token_bytes("fp8")
    assert windowed.layers == TINY.layers + 5 == 2 + 7 + 5


def test_a_window_may_have_heads_of_its_own():
    windowed = replace(TINY, window_layers=5, window_tokens=128, window_kv_heads=4, window_head_dim=7)
    assert windowed.window_token_bytes() == 5 * 2 * 4 * 7 * 2
    assert windowed.window_token_bytes(4) == 5 * 2 * 1 * 7 * 2
    assert windowed.kv_token_bytes("bf16") == TINY.kv_token_bytes("bf16")
    assert windowed.shares_out(1) and not windowed.shares_out(3)  # 3 query heads, but 4 KV heads in windows


def test_only_recurrent_bytes_are_copied_and_windows_are_not():
    windowed = replace(TINY, window_layers=5, window_tokens=128)
    assert windowed.recurrent_bytes("fp32") == TINY.slot_bytes("fp32")
    assert find_model("gpt-oss-120b").recurrent_bytes("fp32") == 0


def test_heads_of_a_window_are_shared_out_and_copied_as_those_of_pages():
    model = find_model("gpt-oss-120b")
    whole = 18 * 128 * 2 * 8 * 64 * 2
    assert [model.slot_bytes("fp32", gpus) for gpus in (1, 4, 8, 16)] == [whole, whole // 4, whole // 8, whole // 8]


def test_attention_alone_keeps_nothing_in_slots_and_is_shared_out_by_its_heads():
    model = replace(TINY, recurrent_layers=0, state_shape=(0, 0, 0), conv_shape=None)
    assert model.slot_bytes("fp32") == model.conv_bytes == 0
    assert [gpus for gpus in range(1, 10) if model.shares_out(gpus)] == [1, 3]
    assert [gpus for gpus in range(1, 20) if find_model("gpt-oss-120b").shares_out(gpus)] == [1, 2, 4, 8, 16]


def test_page_is_page_tokens_of_kv():
    assert TINY.page_bytes("bf16", 64) == 64 * TINY.kv_token_bytes("bf16")


def test_weights_take_all_parameters():
    assert (TINY.weight_bytes("fp8"), TINY.weight_bytes("bf16")) == (100, 200)


def test_default_model_has_its_known_sizes():
    model = find_model("qwen3-next-80b-a3b")
    assert model.kv_token_bytes("bf16") == 24_576
    assert model.slot_bytes("fp32") == 77_266_944
    assert model.weight_bytes("fp8") == 80 * 10**9


def test_unknown_model_is_one_line_with_the_known_slugs_and_a_guess():
    with pytest.raises(ValueError) as error:
        find_model("Qwen3.5-35B")
    message = str(error.value)
    assert "\n" not in message
    assert "did you mean 'qwen3.5-35b-a3b'" in message
    assert all(slug in message for slug in MODELS)


def test_unknown_dtype_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown dtype of states 'int3': choose one of fp32, bf16, fp16, fp8, int8"):
        TINY.slot_bytes("int3")
    with pytest.raises(ValueError, match="unknown dtype 'int3': choose one of fp32, bf16, fp16, fp8"):
        dtype_bytes("int3")


def test_shapes_are_hashable_and_the_table_read_only():
    assert len({*MODELS.values()}) == len(MODELS)
    with pytest.raises(TypeError):
        MODELS["x"] = find_model("qwen3.5-4b")  # type: ignore[index]


def test_params_are_the_matrices_by_their_widths():
    layers = 2 * 60 + 7 * 42 + 4 * 3 * 20
    assert TINY.counted_params == 10 * (2 * 100 + layers)
    assert replace(TINY, tied_embeddings=True).counted_params == TINY.counted_active_params == 10 * (100 + layers)


def test_a_token_passes_few_experts_of_many():
    moe = replace(TINY, moe_layers=6, experts=50, experts_per_token=3, expert_width=8, expert_input=10, shared_width=9)
    common = 6 * 10 * (50 + 3 * 9)  # router and shared experts
    assert moe.counted_params == TINY.counted_params + common + 6 * 50 * 3 * 8 * 10
    assert moe.counted_active_params == TINY.counted_active_params + common + 6 * 3 * 3 * 8 * 10


def test_experts_behind_a_latent_are_narrower_and_cost_the_way_there_and_back():
    wide = replace(TINY, moe_layers=6, experts=50, experts_per_token=3, expert_width=8, expert_input=10)
    saved = 6 * 50 * 3 * 8 * (10 - 4)
    assert replace(wide, expert_input=4).counted_params == wide.counted_params - saved + 6 * 2 * 4 * 10


def test_shared_blocks_are_stored_once_and_passed_at_every_call():
    shared = replace(TINY, attention_layers=4, shared_blocks=1)
    own = replace(TINY, attention_layers=4)
    assert shared.counted_active_params == own.counted_active_params
    assert own.counted_params - shared.counted_params == 10 * 3 * (60 + 3 * 20)


@pytest.mark.parametrize("model", [m for m in MODELS.values() if m.total_params], ids=lambda m: m.slug)
def test_widths_give_the_parameters_of_the_name(model):
    assert model.counted_params == pytest.approx(model.total_params, rel=0.06)
    assert model.counted_active_params == pytest.approx(model.active_params, rel=0.25)


def test_every_model_agrees_with_the_published_sizes():
    if not PUBLISHED.exists():
        pytest.skip("the published table shared/models is not beside the repository")
    rows = json.loads(PUBLISHED.read_text())["models"]
    assert len(rows) <= len(MODELS)
    for row, model in zip(rows, MODELS.values(), strict=False):
        assert model.slug in row["name"].lower()
        if model.slug in CORRECTED:
            continue
        computed = {
            "kv_bytes_per_token_bf16": model.kv_token_bytes("bf16"),
            "kv_bytes_per_token_fp8": model.kv_token_bytes("fp8"),
            "state_bytes_per_seq": model.slot_bytes(model.state_dtype),
            "state_bytes_per_seq_bf16_ssm": model.slot_bytes("bf16"),
            "conv_bytes_per_seq": model.conv_bytes,
            "weight_bytes_bf16": model.weight_bytes("bf16"),
            "weight_bytes_fp8": model.weight_bytes("fp8"),
            "prefill_flops_per_token_linear": 2 * model.active_params,
            "prefill_attn_flops_per_token_per_ctx_token": model.attention_layers * 4 * model.q_heads * model.head_dim,
        }
        assert computed == {key: row[key] for key in computed}, model.slug


def test_every_shape_names_its_source():
    assert all(len(model.source) > 10 for model in MODELS.values())
