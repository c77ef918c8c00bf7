"""A split in the engines' own words, and back.

SGLang 0.5.23 (`_handle_max_mamba_cache` of srt/mem_cache/kv_cache_configurator.py) makes of B bytes, states of s bytes
and tokens of t bytes, at a mamba_full_memory_ratio r:

    states = floor(B r / (1 + r) / s)        tokens = floor((B - states s) / t), whole pages

and for models with a sliding window (`HybridSWAPoolConfigurator` of srt/model_executor/pool_configurator.py), where a
token takes f bytes in the layers of full attention and w in those of the window, at a swa_full_tokens_ratio r from 0 to
1:

    tokens = floor(B / (f + r w)), whole pages        window tokens = floor(r tokens), whole pages
"""

from collections.abc import Callable
from dataclasses import dataclass

from hbmgym.controllers.demand import balanced_share
from hbmgym.controllers.static import SGLANG_RATIO, static_name
from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.serving.core import make_layout
from hbmgym.memory_backend.geometry import HybridModel, find_model
from hbmgym.memory_backend.padding import can_be_padded
from hbmgym.memory_backend.split import Layout

MOST_DIGITS = 12
ROUNDS = 4
WINDOW_RATIO = 0.8
"""SGLang's default swa_full_tokens_ratio."""


@dataclass(frozen=True)
class SglangPools:
    """What a ratio gives."""

    slots: int
    """States (max_mamba_cache_size), or windows of one request."""
    tokens: int
    """Of KV, in the layers of full attention (max_total_num_tokens)."""


def pools_of_state_ratio(layout: Layout, page_tokens: int, ratio: float) -> SglangPools:
    """SGLang's pools at a mamba_full_memory_ratio."""
    return _beside_states(layout, page_tokens, int(layout.budget_bytes * ratio / (1.0 + ratio) // layout.slot_bytes))


def pools_of_window_ratio(
    layout: Layout, page_tokens: int, window_tokens: int, ratio: float, chunk_tokens: int = 0
) -> SglangPools:
    """SGLang's pools at a swa_full_tokens_ratio; a slot is a window of `window_tokens` tokens. Prompts in flight take
    `chunk_tokens` of the window's pool beside them, which are not in the layout."""
    token_bytes, window_token_bytes = layout.page_bytes / page_tokens, layout.slot_bytes / window_tokens
    budget_bytes = layout.budget_bytes + chunk_tokens * window_token_bytes
    tokens = _whole_pages(int(budget_bytes // (token_bytes + ratio * window_token_bytes)), page_tokens)
    in_windows = max(_whole_pages(int(tokens * ratio), page_tokens) - chunk_tokens, 0)
    return SglangPools(in_windows // window_tokens, tokens)


def state_ratio(layout: Layout, slots: int) -> float:
    """The shortest mamba_full_memory_ratio at which SGLang has so many states."""
    middle_bytes = _middle(layout, slots)
    ratio = middle_bytes / (layout.budget_bytes - middle_bytes)
    return _shortest(ratio, lambda r: pools_of_state_ratio(layout, 1, r).slots == slots)


def window_ratio(
    layout: Layout, page_tokens: int, window_tokens: int, slots: int, chunk_tokens: int = 0
) -> float | None:
    """The shortest swa_full_tokens_ratio at which SGLang has windows for so many slots; None where there is none: it
    takes none above 1."""

    def pools(ratio: float) -> SglangPools:
        return pools_of_window_ratio(layout, page_tokens, window_tokens, ratio, chunk_tokens)

    windows_bytes = _middle(layout, slots)
    tokens = (layout.budget_bytes - windows_bytes) * page_tokens / layout.page_bytes
    in_windows = windows_bytes * window_tokens / layout.slot_bytes + chunk_tokens
    for _ in range(ROUNDS):  # of tokens only whole pages remain, which windows are a part of
        ratio = in_windows / max(tokens, 1.0)
        if ratio > 1.0:
            return None
        if pools(ratio).slots == slots:
            return _shortest(ratio, lambda short: pools(short).slots == slots)
        tokens = pools(ratio).tokens
    return None


def default_share(config: ServingConfig, layout: Layout) -> tuple[float, float]:
    """SGLang's default ratio for a model, and the kv_share that it means."""
    model = find_model(config.model)
    if has_windows_alone(model):
        pools = pools_of_window_ratio(
            layout, config.page_tokens, model.window_tokens, WINDOW_RATIO, config.prefill_budget
        )
        return WINDOW_RATIO, layout.share(pools.slots)
    return SGLANG_RATIO, 1.0 / (1.0 + SGLANG_RATIO)


def default_controller(config: ServingConfig) -> str:
    """The controller that holds SGLang's default split for a model, by name."""
    ratio, share = default_share(config, make_layout(config))
    return static_name(share) if has_windows_alone(find_model(config.model)) else f"sglang-{ratio:g}"


def floating_rule(config: ServingConfig) -> str:
    """The on_shortage of the engine's own floating pool."""
    return "float-lru" if config.engine.kernels == "vllm" else "float"


def is_reachable(config: ServingConfig, layout: Layout, slots: int) -> bool:
    """Whether SGLang can be told to have so many slots."""
    model = find_model(config.model)
    if not has_windows_alone(model):
        return True
    return window_ratio(layout, config.page_tokens, model.window_tokens, slots, config.prefill_budget) is not None


def has_windows_alone(model: HybridModel) -> bool:
    """Whether its slots are windows, and no states."""
    return bool(model.window_layers and not model.recurrent_layers)


def _middle(layout: Layout, slots: int) -> float:
    """Bytes between those of so many slots and of one more, so that a rounded ratio still means so many."""
    taken = slots * layout.slot_bytes
    return taken + 0.5 * min(layout.slot_bytes, layout.budget_bytes - taken)


def _shortest(ratio: float, is_right: Callable[[float], bool]) -> float:
    return next((short for digits in range(1, MOST_DIGITS) if is_right(short := round(ratio, digits))), ratio)


def _beside_states(layout: Layout, page_tokens: int, slots: int) -> SglangPools:
    rest = layout.budget_bytes - slots * layout.slot_bytes
    return SglangPools(slots, int(rest * page_tokens // layout.page_bytes) // page_tokens * page_tokens)


def _whole_pages(tokens: int, page_tokens: int) -> int:
    return tokens // page_tokens * page_tokens


@dataclass(frozen=True)
class VllmPool:
    """vLLM's one pool of equal blocks (`memory_backend/padding.py`)."""

    block_tokens: int
    """Tokens of a page of attention."""
    blocks: int
    blocks_per_state: int
    blocks_per_page: int


def vllm_pool(config: ServingConfig) -> VllmPool | None:
    """None for a model that vLLM pads nothing for."""
    model = find_model(config.model)
    if not can_be_padded(model):
        return None
    pool = config.padded_pool
    blocks = config.budget_bytes // pool.block_bytes
    return VllmPool(pool.page_tokens, blocks, pool.blocks_per_state, pool.blocks_per_page)


def sglang_settings(config: ServingConfig, layout: Layout, slots: int) -> dict[str, float | int]:
    """Flags of SGLang that give so many slots, and the tokens that its log then tells; empty where it has no flag."""
    model = find_model(config.model)
    if has_windows_alone(model):
        window, chunk = model.window_tokens, config.prefill_budget
        ratio = window_ratio(layout, config.page_tokens, window, slots, chunk)
        if ratio is None:
            return {}
        pools = pools_of_window_ratio(layout, config.page_tokens, window, ratio, chunk)
        return {"--swa-full-tokens-ratio": ratio, "max_total_num_tokens": pools.tokens}
    if model.window_layers:
        return {}
    return {
        "--mamba-full-memory-ratio": (ratio := state_ratio(layout, slots)),
        "--max-mamba-cache-size": slots,
        "max_total_num_tokens": pools_of_state_ratio(layout, config.page_tokens, ratio).tokens,
    }


def balanced_ratio(layout: Layout, page_tokens: int, slots_per_request: int, context_tokens: float) -> float:
    """The mamba_full_memory_ratio of SGLang's sizing guide (compute-mamba-ratio, PR 32763): neither pool is the first
    to hold up requests of that many tokens. It knows nothing of what is cached."""
    share = balanced_share(context_tokens, layout.page_bytes / page_tokens, slots_per_request, layout.slot_bytes)
    return (1.0 - share) / share
