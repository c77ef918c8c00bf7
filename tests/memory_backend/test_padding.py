"""vLLM's padded pool against block sizes and paddings that its servers log."""

import dataclasses

import pytest

from hbmgym.memory_backend.geometry import MODELS, find_model
from hbmgym.memory_backend.padding import padded_pool

NANO_9B = dataclasses.replace(
    find_model("nemotron-h-8b"), slug="nemotron-nano-9b-v2", state_shape=(128, 80, 128), conv_shape=(12288, 3)
)


def padding(model, pool, state_dtype) -> float:
    """What a layer's state leaves of its page."""
    state = (model.state_bytes(state_dtype) + model.conv_bytes) / model.recurrent_layers
    layers = -(-model.attention_layers // pool.blocks_per_page)
    return pool.block_bytes / layers / state - 1.0


@pytest.mark.parametrize(
    ("slug", "page_tokens", "padded"),
    [
        ("qwen3.5-9b", 528, 0.0076),  # vLLM #37467
        ("qwen3.5-27b", 784, 0.0013),  # its startup log; LMCache's recipe for Qwen3.6-27B names 784 too
        ("qwen3.5-35b-a3b", 1056, 0.0076),  # its startup log
    ],
)
def test_pages_are_those_that_servers_log(slug, page_tokens, padded):
    model = find_model(slug)
    pool = padded_pool(model, "bf16", "fp32")
    assert pool.page_tokens == page_tokens
    assert padding(model, pool, "fp32") == pytest.approx(padded, abs=5e-5)


def test_the_dtype_of_the_state_counts():
    """vLLM #24280: 672 tokens for Nemotron Nano 9B v2, whose state was kept in bf16."""
    assert padded_pool(NANO_9B, "bf16", "bf16").page_tokens == 672


def test_sharing_heads_out_changes_nothing_while_both_kinds_are_shared():
    """Qwen3.5-35B-A3B on two GPUs logs 1056 tokens as well."""
    one, two = (padded_pool(find_model("qwen3.5-35b-a3b"), "bf16", "fp32", gpus) for gpus in (1, 2))
    assert one.page_tokens == two.page_tokens == 1056
    assert one.block_bytes == 2 * two.block_bytes


@pytest.mark.parametrize(
    ("slug", "blocks_per_page", "blocks_per_state"),
    [
        ("qwen3.5-27b", 1, 3),  # 16 attention and 48 recurrent layers
        ("falcon-h1-34b", 1, 1),  # 72 of both
        ("nemotron-3-nano-30b-a3b", 1, 4),  # 6 and 23: the last group is filled up with one layer
        ("kimi-linear-48b-a3b", 1, 3),  # 7 and 20
    ],
)
def test_a_state_takes_a_block_per_group_of_recurrent_layers(slug, blocks_per_page, blocks_per_state):
    pool = padded_pool(find_model(slug), "bf16", "fp32")
    assert (pool.blocks_per_page, pool.blocks_per_state) == (blocks_per_page, blocks_per_state)


def test_kinds_of_nearly_equal_frequency_share_the_larger_group():
    """vLLM's example: 12 and 13 layers become two groups of 13, not three of 12."""
    model = dataclasses.replace(find_model("qwen3-next-80b-a3b"), recurrent_layers=13)
    pool = padded_pool(model, "bf16", "fp32")
    assert (pool.blocks_per_page, pool.blocks_per_state) == (1, 1)
    assert 12 * pool.page_bytes == 13 * model.page_bytes("bf16", pool.page_tokens)


@pytest.mark.parametrize("slug", [slug for slug, model in MODELS.items() if model.recurrent_layers])
def test_a_page_and_a_state_fit_their_blocks_and_waste_less_than_a_step_of_tokens(slug):
    model = find_model(slug)
    pool = padded_pool(model, "bf16", model.state_dtype)
    assert pool.page_bytes >= model.page_bytes("bf16", pool.page_tokens)
    assert pool.slot_bytes >= model.slot_bytes(model.state_dtype)
    step = 64 if model.mla_dim else 16
    assert pool.page_tokens % step == 0
    assert padding(model, pool, model.state_dtype) * (pool.page_tokens - step) < step


@pytest.mark.parametrize("slug", ["gpt-oss-120b"])
def test_a_model_without_states_is_refused_in_one_line(slug):
    with pytest.raises(
        ValueError, match="0 recurrent and 18 window layers: choose a model with the first two"
    ) as error:
        padded_pool(find_model(slug), "bf16", "fp32")
    assert "\n" not in str(error.value)
