"""A split in the engines' own words: SGLang's and vLLM's arithmetic, held against their logs, and inverted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbmgym.envs.serving.config import GIB, ServingConfig
from hbmgym.envs.serving.core import make_layout
from hbmgym.eval.advising.settings import (
    balanced_ratio,
    default_share,
    is_reachable,
    pools_of_state_ratio,
    pools_of_window_ratio,
    sglang_settings,
    state_ratio,
    vllm_pool,
    window_ratio,
)
from hbmgym.memory_backend.split import Layout

PAGE = 64
WINDOWS = ServingConfig(model="gpt-oss-120b", weight_dtype="mxfp4", gpu="h100", hbm_gib=6.0)


def layout_of(budget_bytes: int, slot_bytes: int, token_bytes: int, page_tokens: int = PAGE) -> Layout:
    return Layout(budget_bytes, 1, token_bytes * page_tokens, slot_bytes, min_slots=1, min_pages=1)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    token_bytes, slot_bytes = draw(st.integers(256, 2**18)), draw(st.integers(2**10, 2**28))
    least = slot_bytes + PAGE * token_bytes
    return layout_of(draw(st.integers(least, least + 2**38)), slot_bytes, token_bytes)


@given(layouts(), st.data())
def test_the_state_ratio_gives_the_slots_that_it_was_made_for(layout, data):
    slots = data.draw(st.integers(layout.min_slots, layout.max_slots))
    pools = pools_of_state_ratio(layout, PAGE, state_ratio(layout, slots))
    assert pools.slots == slots
    assert layout.pages(slots) * PAGE == pools.tokens


@st.composite
def windows(draw: st.DrawFn) -> tuple[Layout, int]:
    """And the tokens of a window, two pages at least, as gpt-oss has."""
    token_bytes, window = draw(st.integers(256, 2**18)), PAGE * draw(st.integers(2, 64))
    slot_bytes = window * draw(st.integers(256, 2**18))
    least = 4 * slot_bytes + 4 * window * token_bytes
    return layout_of(draw(st.integers(least, least + 2**38)), slot_bytes, token_bytes), window


@given(windows(), st.sampled_from([0, 512, 8192]), st.data())
def test_the_window_ratio_gives_the_slots_that_it_was_made_for(shape, chunk, data):
    layout, window = shape
    slots = data.draw(st.integers(layout.min_slots, layout.max_slots))
    ratio = window_ratio(layout, PAGE, window, slots, chunk)
    found = pools_of_window_ratio(layout, PAGE, window, 1.0 if ratio is None else ratio, chunk)
    if ratio is None:
        assert found.slots <= slots, "the largest ratio that SGLang takes does not give more"
    else:
        assert found.slots == slots
        assert found.tokens * layout.page_bytes / PAGE + slots * layout.slot_bytes <= layout.budget_bytes


def test_ratios_are_as_short_as_they_can_be():
    layout = make_layout(ServingConfig())
    assert state_ratio(layout, 267) == 0.93
    assert pools_of_state_ratio(layout, PAGE, 0.9).slots != 267 != pools_of_state_ratio(layout, PAGE, 1.0).slots


def test_sglang_s_published_log_at_its_default_ratio():
    """PR 32763: 257 states of 13.50 GiB in all beside 1,167,552 tokens of 15.03 GiB."""
    slot_bytes, token_bytes = round(13.5 * GIB / 257), round(15.03 * GIB / 1_167_552)
    layout = layout_of(round((13.5 + 15.03) * GIB), slot_bytes, token_bytes, 1)
    pools = pools_of_state_ratio(layout, 1, 0.9)
    assert pools.slots == 257
    assert pools.tokens == pytest.approx(1_167_552, rel=1e-3)


def test_sglang_s_published_guide():
    """PR 32763: a state of 4,080 tokens' bytes, 4 slots, requests of 9,216 tokens: a ratio of about 1.8."""
    assert balanced_ratio(layout_of(GIB, 4080, 1, 1), 1, 4, 9216.0) == pytest.approx(1.77, abs=0.01)


def test_sglang_s_sizes_with_a_window():
    """F = 100, S = 40 bytes per token, 1,000,000 bytes, ratio .5: 8,333 tokens, 8,320 in pages, 4,160 in the window."""
    layout = layout_of(1_000_000, 40 * 128, 100)
    pools = pools_of_window_ratio(layout, PAGE, 128, 0.5)
    assert (pools.tokens, pools.slots) == (8320, 4160 // 128)


@pytest.mark.parametrize(
    ("model", "gpu", "tokens"),
    [("qwen3.5-35b-a3b", "h200", 1056), ("qwen3.5-27b", "h100", 784)],
)
def test_vllm_s_block_is_the_one_that_its_log_tells(model, gpu, tokens):
    """`Setting attention block size to ... tokens`, as public logs of Qwen3.5-35B-A3B and Qwen3.6-27B have it."""
    config = ServingConfig(model=model, gpu=gpu, hbm_gib=20.0)
    pool = vllm_pool(config)
    assert pool is not None
    assert (pool.block_tokens, pool.blocks_per_state, pool.blocks_per_page) == (tokens, 3, 1)


def test_blocks_of_vllm_fill_the_memory():
    config = ServingConfig()
    layout, pool = make_layout(config), vllm_pool(config)
    assert pool is not None
    held = pool.blocks * pool.block_tokens * layout.page_bytes / config.page_tokens
    assert 0 <= layout.budget_bytes - held < pool.block_tokens * layout.page_bytes / config.page_tokens


def test_a_model_with_a_window_has_a_ratio_of_tokens():
    layout = make_layout(WINDOWS)
    settings = sglang_settings(WINDOWS, layout, 100)
    assert set(settings) == {"--swa-full-tokens-ratio", "max_total_num_tokens"}
    pools = pools_of_window_ratio(layout, PAGE, 128, settings["--swa-full-tokens-ratio"], WINDOWS.prefill_budget)
    assert (pools.slots, pools.tokens) == (100, settings["max_total_num_tokens"])
    assert vllm_pool(WINDOWS) is None


def test_splits_with_more_tokens_in_windows_than_in_full_attention_cannot_be_set():
    layout = make_layout(WINDOWS)
    assert is_reachable(WINDOWS, layout, 100)
    assert not is_reachable(WINDOWS, layout, layout.max_slots)
    assert sglang_settings(WINDOWS, layout, layout.max_slots) == {}


def test_what_the_defaults_mean():
    assert default_share(ServingConfig(), make_layout(ServingConfig())) == (0.9, 1 / 1.9)
    layout = make_layout(WINDOWS)
    ratio, share = default_share(WINDOWS, layout)
    assert ratio == 0.8
    kv = WINDOWS.budget_bytes / 1.8  # gpt-oss has as many layers of either kind, and prompts in flight have their part
    assert share == pytest.approx(kv / layout.budget_bytes, abs=0.01)
