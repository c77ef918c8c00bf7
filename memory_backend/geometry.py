"""HybridModel: how many bytes a token, a sequence's state and the weights of a hybrid model take.

The shapes lie in models.json, one line per model, with their source and whether they were checked against it.
"""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

DTYPE_BYTES: Mapping[str, int] = MappingProxyType({"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1})
_CONV_DTYPE = "bf16"

T = TypeVar("T")


def dtype_bytes(dtype: str) -> int:
    """Bytes of one number; ValueError for a dtype that is not in DTYPE_BYTES."""
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[dtype]


def pick(table: Mapping[str, T], slug: str, what: str) -> T:
    """`table[slug]`, or a ValueError that lists the known slugs and guesses the one that was meant."""
    if slug in table:
        return table[slug]
    begun = [known for known in table if known.startswith(slug.lower())]
    close = begun or difflib.get_close_matches(slug.lower(), table, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ValueError(f"unknown {what} {slug!r}{hint}: known are {', '.join(table)}")


@dataclass(frozen=True)
class HybridModel:
    """The cached shapes of a model that mixes attention with recurrent layers.

    Bytes of KV, pages and slots are those of each of `tensor_parallel` GPUs: engines share heads out among them, but
    where there are fewer KV heads than GPUs each head is copied to several, and MLA's latent is copied to all.
    """

    slug: str
    name: str
    attention_layers: int
    kv_heads: int | None
    """None under multi-head latent attention (MLA)."""
    head_dim: int
    """Width of an attention head. MLA: the mean of the expanded query-key and value widths, which are not cached."""
    mla_dim: int | None
    """Numbers that MLA caches per token and layer (latent + rope); None without MLA."""
    recurrent_layers: int
    state_shape: tuple[int, int, int]
    """Heads and the two dimensions of one head's state, per recurrent layer."""
    conv_shape: tuple[int, int] | None
    """Channels and cached columns of the short convolution, per recurrent layer; None without one."""
    state_dtype: str
    """The dtype in which engines keep the state by default."""
    q_heads: int
    total_params: int
    """0 where the model is a shape without weights."""
    active_params: int
    shape_verified: bool
    """Whether `source` was read; False where a part of the shape is inferred."""
    source: str

    def shares_out(self, tensor_parallel: int) -> bool:
        """Can engines share the model out among so many GPUs? Heads are divided evenly, or KV heads copied evenly."""
        if self.q_heads % tensor_parallel or self.state_shape[0] % tensor_parallel:
            return False
        return not self.kv_heads or not self.kv_heads % tensor_parallel or not tensor_parallel % self.kv_heads

    def kv_token_bytes(self, kv_dtype: str, tensor_parallel: int = 1) -> int:
        """KV bytes of one token, all attention layers."""
        if self.mla_dim is not None:
            return self.attention_layers * self.mla_dim * dtype_bytes(kv_dtype)
        assert self.kv_heads is not None
        heads = max(self.kv_heads // tensor_parallel, 1)
        return self.attention_layers * 2 * heads * self.head_dim * dtype_bytes(kv_dtype)

    def page_bytes(self, kv_dtype: str, page_tokens: int, tensor_parallel: int = 1) -> int:
        """Bytes of a page: `page_tokens` tokens of KV, all attention layers together."""
        return page_tokens * self.kv_token_bytes(kv_dtype, tensor_parallel)

    @property
    def state_elements(self) -> int:
        """Numbers in the recurrent state of one sequence in one layer, without the convolution."""
        heads, rows, columns = self.state_shape
        return heads * rows * columns

    def state_bytes(self, state_dtype: str) -> int:
        """Recurrent state of one sequence, all recurrent layers, without the convolution."""
        return self.recurrent_layers * self.state_elements * dtype_bytes(state_dtype)

    @property
    def conv_bytes(self) -> int:
        """Convolution state of one sequence, all recurrent layers; always bf16."""
        channels, columns = self.conv_shape or (0, 0)
        return self.recurrent_layers * channels * columns * dtype_bytes(_CONV_DTYPE)

    def slot_bytes(self, state_dtype: str, tensor_parallel: int = 1) -> int:
        """Bytes of a slot: the recurrent state of one sequence, all layers, convolution included."""
        return (self.state_bytes(state_dtype) + self.conv_bytes) // tensor_parallel

    def weight_bytes(self, weight_dtype: str) -> int:
        """All parameters in `weight_dtype`."""
        return self.total_params * dtype_bytes(weight_dtype)


def _load_models() -> Mapping[str, HybridModel]:
    rows = json.loads(Path(__file__).with_name("models.json").read_text(encoding="utf-8"))
    for row in rows:
        row["state_shape"] = tuple(row["state_shape"])
        row["conv_shape"] = row["conv_shape"] and tuple(row["conv_shape"])
    return MappingProxyType({row["slug"]: HybridModel(**row) for row in rows})


MODELS = _load_models()


def find_model(slug: str) -> HybridModel:
    """The model named `slug`; ValueError lists the known ones."""
    return pick(MODELS, slug, "model")
