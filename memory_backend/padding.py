"""vLLM's one padded pool: the block into which both a page of KV and a part of a state fit.

Source: vLLM 0.31 (`_align_hybrid_block_size`, `_get_kv_cache_groups_uniform_page_size`; #24280, #37467). Layers of one
kind are divided into groups of equally many layers, as many as the rarer kind has, or all of the other kind's where
those are less than half as many again; the last group is filled up. A block holds one page of every layer of a group.
The page is enlarged, in steps that attention kernels can read, until a layer's state fits, and the state is padded to
it. So a state takes a block per group of recurrent layers.
"""

from dataclasses import dataclass

from hbmgym.memory_backend.geometry import HybridModel

PAGE_STEP, MLA_PAGE_STEP = 16, 64
"""Tokens: FlashAttention, FlashInfer and Triton read pages of any multiple of 16, FlashMLA those of 64."""
MOST_UNEVEN = 1.5
"""Groups are as large as the more frequent kind where it has fewer than so many times the layers of the other."""


@dataclass(frozen=True)
class PaddedPool:
    """Blocks that are all equal, and how many of them a page and a state take."""

    page_tokens: int
    block_bytes: int
    blocks_per_page: int
    blocks_per_state: int

    @property
    def page_bytes(self) -> int:
        return self.blocks_per_page * self.block_bytes

    @property
    def slot_bytes(self) -> int:
        return self.blocks_per_state * self.block_bytes


def can_be_padded(model: HybridModel) -> bool:
    """Whether it has pages of attention to pad to recurrent states, and nothing else."""
    return bool(model.recurrent_layers and model.attention_layers and not model.window_layers)


def padded_pool(model: HybridModel, kv_dtype: str, state_dtype: str, tensor_parallel: int = 1) -> PaddedPool:
    """What vLLM makes of a model; ValueError for one without recurrent layers or with sliding windows."""
    if not can_be_padded(model):
        raise ValueError(
            f"layout=padded pads the pages of attention to recurrent states, but {model.slug} has "
            f"{model.attention_layers} attention, {model.recurrent_layers} recurrent and {model.window_layers} window "
            "layers: choose a model with the first two, or layout=separate"
        )
    token_bytes = model.kv_token_bytes(kv_dtype, tensor_parallel) // model.attention_layers
    state_bytes = (model.state_bytes(state_dtype) + model.conv_bytes) // model.recurrent_layers // tensor_parallel
    step = PAGE_STEP if model.mla_dim is None else MLA_PAGE_STEP
    page_tokens = step * -(-state_bytes // (step * token_bytes))
    few, many = sorted((model.attention_layers, model.recurrent_layers))
    group = many if many < MOST_UNEVEN * few else few
    return PaddedPool(
        page_tokens=page_tokens,
        block_bytes=group * page_tokens * token_bytes,
        blocks_per_page=-(-model.attention_layers // group),
        blocks_per_state=-(-model.recurrent_layers // group),
    )
