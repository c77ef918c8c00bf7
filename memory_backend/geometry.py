"""HybridModel: how many bytes a token, a sequence's record and the weights of a hybrid model take.

The record of a sequence has a fixed size, whatever its length: recurrent state, the tail of sliding windows, or both.

The shapes lie in models.json, one line per model, with their source and whether they were checked against it; those of
any other model are read from its config.json (configs). `python -m hbmgym.memory_backend.geometry MODEL ...` prints
them (describe.py).
"""

import difflib
import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

DTYPE_BYTES: Mapping[str, int] = MappingProxyType({"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1})
WEIGHT_BYTES: Mapping[str, float] = MappingProxyType({**DTYPE_BYTES, "nvfp4": 0.5625, "mxfp4": 0.53125})
"""Bytes of one weight, the scales of 16 or 32 weights of 4 bits included."""
STATE_BYTES: Mapping[str, int] = MappingProxyType({**DTYPE_BYTES, "int8": 1})
"""Bytes of one number of a recurrent state, without scales."""
SCALED_STATES = ("fp8", "int8")
"""Dtypes of states that keep a scale of fp32 per row of a head's state, as vLLM #52962 does per (head, head_dim).
SGLang #28185 has one per (head, key channel), as many where states are square, in the dtype that the state had."""
SCALE_BYTES = 4
_CONV_DTYPE = "bf16"

T = TypeVar("T")


def dtype_bytes(dtype: str) -> int:
    """Bytes of one number; ValueError for a dtype that is not in DTYPE_BYTES."""
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[dtype]


def state_number_bytes(dtype: str) -> int:
    """Bytes of one number of a recurrent state; ValueError for a dtype that is not in STATE_BYTES."""
    if dtype not in STATE_BYTES:
        raise ValueError(f"unknown dtype of states {dtype!r}: choose one of {', '.join(STATE_BYTES)}")
    return STATE_BYTES[dtype]


def weight_number_bytes(dtype: str) -> float:
    """Bytes of one weight; ValueError for a dtype that is not in WEIGHT_BYTES."""
    if dtype not in WEIGHT_BYTES:
        raise ValueError(f"unknown dtype of weights {dtype!r}: choose one of {', '.join(WEIGHT_BYTES)}")
    return WEIGHT_BYTES[dtype]


def pick(table: Mapping[str, T], slug: str, what: str) -> T:
    """`table[slug]`, or a ValueError that lists the known slugs and guesses the one that was meant."""
    if slug in table:
        return table[slug]
    begun = [known for known in table if known.startswith(slug.lower())]
    close = begun or difflib.get_close_matches(slug.lower(), table, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ValueError(f"unknown {what} {slug!r}{hint}: known are {', '.join(table)}")


@dataclass(frozen=True, kw_only=True)
class HybridModel:
    """The cached shapes of a model that mixes attention with recurrent layers, and the widths of its matrices.

    Bytes of KV, pages and slots are those of each of `tensor_parallel` GPUs: engines share heads out among them, but
    where there are fewer KV heads than GPUs each head is copied to several, and MLA's latent is copied to all.

    Widths are counts of numbers, of the whole model. A layer's projections hold hidden_size * (in + out) parameters;
    where a part of them does not read the hidden state (a low-rank factor, a concatenated input) it is counted as the
    number of hidden-sized columns with as many parameters, rounded. Where layers of one kind differ in a width, it is
    their mean, rounded.
    """

    slug: str
    name: str
    attention_layers: int
    """Layers that attend to the whole context; those of a sliding window are `window_layers`."""
    kv_heads: int | None
    """None under multi-head latent attention (MLA)."""
    head_dim: int
    """Width of an attention head, the mean of its key and its value. MLA: that of the expanded ones, which are not
    cached."""
    mla_dim: int | None
    """Numbers that MLA caches per token and layer (latent + rope); None without MLA."""
    recurrent_layers: int
    state_shape: tuple[int, int, int]
    """Heads and the two dimensions of one head's state, per recurrent layer; zeros without recurrent layers."""
    conv_shape: tuple[int, int] | None
    """Channels and cached columns of the short convolution, per recurrent layer; None without one."""
    state_dtype: str
    """The dtype in which engines keep the state by default."""
    q_heads: int
    total_params: int
    """0 where the model is a shape without weights."""
    active_params: int
    """Those that a token passes through."""
    hidden_size: int
    """Width of the residual stream; this and all widths below are 0 where the model is a shape without weights."""
    vocabulary: int
    """Rows of the embedding table."""
    attention_in: int
    """Columns of all matrices that read the hidden state in one attention layer: Q with its output gate, K and V. MLA:
    Q, the latent and the rope key, and the expansion of the latent counted in hidden-sized columns."""
    attention_out: int
    """Rows of an attention layer's output projection: q_heads times the width of a head's value."""
    recurrent_in: int
    """The same for one recurrent layer. Gated DeltaNet: q, k, v, z, b, a; KDA: q, k, v, b and its gates; Mamba-2: z, x,
    B, C, dt; Mamba-1: x, z and the projections of B, C, dt; lightning attention: q, k, v, its gate; short
    convolution: B, C, x."""
    recurrent_out: int
    """Rows of a recurrent layer's output projection."""
    window_layers: int = 0
    """Attention layers that cache only the last `window_tokens` tokens; `attention_layers` does not count them."""
    window_tokens: int = 0
    window_kv_heads: int = 0
    """This and the next four are 0 where the layers of a window have what `attention_layers` have."""
    window_head_dim: int = 0
    window_q_heads: int = 0
    window_in: int = 0
    window_out: int = 0
    reused_kv_layers: int = 0
    """Of `attention_layers`, those that read the KV of a layer before them and cache none of their own (Gemma 4)."""
    reused_window_layers: int = 0
    """The same of `window_layers`."""
    lookup_params: int = 0
    """Parameters of tables beside the embedding that a token only looks up (Gemma 4's embeddings per layer)."""
    shared_blocks: int = 0
    """How many sets of weights attention layers and their MLPs take turns with (Zamba2); 0 where each has its own."""
    tied_embeddings: bool = False
    """Whether the output layer is the embedding table again."""
    dense_layers: int = 0
    """Layers with an ordinary MLP. This and the fields below are 0 where the model has no such layers."""
    dense_width: int = 0
    """Intermediate size of an ordinary MLP."""
    moe_layers: int = 0
    experts: int = 0
    """Routed experts of one layer."""
    experts_per_token: int = 0
    expert_width: int = 0
    """Intermediate size of one routed expert."""
    expert_input: int = 0
    """Width that routed experts read: `hidden_size`, or the latent that the layer projects it to and back from."""
    shared_width: int = 0
    """Intermediate size of all shared experts of one layer together."""
    mlp_matrices: int = 0
    """Matrices of one MLP or expert: 3 where it is gated, 2 where it is not."""
    shape_verified: bool
    """Whether `source` was read; False where a part of the shape is inferred."""
    source: str

    def shares_out(self, tensor_parallel: int) -> bool:
        """Can engines share the model out among so many GPUs? Heads are divided evenly, or KV heads copied evenly."""
        divided = (self.q_heads, self.window_q_heads, self.state_shape[0])
        copied = (self.kv_heads or 0, self.window_kv_heads)
        return not any(heads % tensor_parallel for heads in divided) and not any(
            heads % tensor_parallel and tensor_parallel % heads for heads in copied
        )

    def require_shares(self, tensor_parallel: int) -> None:
        """Raise ValueError, which names the numbers that are possible, unless `shares_out`."""
        if tensor_parallel < 1:
            raise ValueError(f"tensor_parallel is {tensor_parallel}, expected an integer >= 1")
        if not self.shares_out(tensor_parallel):
            possible = ", ".join(str(g) for g in range(1, self.q_heads + 1) if self.shares_out(g))
            kv_heads = f", {self.kv_heads} KV heads" if self.kv_heads else ""
            raise ValueError(
                f"tensor_parallel is {tensor_parallel}, but {self.slug} has {self.q_heads} query heads{kv_heads} and "
                f"{self.state_shape[0]} state heads to share out: choose one of {possible}"
            )

    @property
    def layers(self) -> int:
        """Layers that mix tokens, of all kinds; layers with attention and recurrence side by side count twice."""
        return self.attention_layers + self.window_layers + self.recurrent_layers

    @property
    def blocks(self) -> int:
        """Mixers and MLPs: an ordinary layer is a pair of them."""
        return self.layers + self.dense_layers + self.moe_layers

    def kv_token_bytes(self, kv_dtype: str, tensor_parallel: int = 1) -> int:
        """KV bytes of one token, all attention layers but those of a sliding window."""
        cached = self.attention_layers - self.reused_kv_layers
        return cached * self._layer_kv_numbers(tensor_parallel) * dtype_bytes(kv_dtype)

    def kv_read_bytes(self, kv_dtype: str, tensor_parallel: int = 1) -> int:
        """What decoding reads of one token's KV: every layer reads, also where it caches none of its own."""
        return self.attention_layers * self._layer_kv_numbers(tensor_parallel) * dtype_bytes(kv_dtype)

    def _layer_kv_numbers(self, tensor_parallel: int) -> int:
        if self.mla_dim is not None:
            return self.mla_dim
        assert self.kv_heads is not None
        return _kv_numbers(self.kv_heads, self.head_dim, tensor_parallel)

    @property
    def window_heads(self) -> tuple[int, int, int]:
        """KV heads, query heads and width of a head in the layers of a sliding window."""
        return (
            self.window_kv_heads or self.kv_heads or 0,
            self.window_q_heads or self.q_heads,
            self.window_head_dim or self.head_dim,
        )

    @property
    def window_projections(self) -> tuple[int, int]:
        """`attention_in` and `attention_out` of the layers of a sliding window."""
        return self.window_in or self.attention_in, self.window_out or self.attention_out

    def page_bytes(self, kv_dtype: str, page_tokens: int, tensor_parallel: int = 1) -> int:
        """Bytes of a page: `page_tokens` tokens of KV, all attention layers together."""
        return page_tokens * self.kv_token_bytes(kv_dtype, tensor_parallel)

    @property
    def state_elements(self) -> int:
        """Numbers in the recurrent state of one sequence in one layer, without the convolution."""
        heads, rows, columns = self.state_shape
        return heads * rows * columns

    def state_bytes(self, state_dtype: str) -> int:
        """Recurrent state of one sequence with its scales, all recurrent layers, without the convolution."""
        heads, rows, _ = self.state_shape
        scales = heads * rows * SCALE_BYTES if state_dtype in SCALED_STATES else 0
        return self.recurrent_layers * (self.state_elements * state_number_bytes(state_dtype) + scales)

    @property
    def conv_bytes(self) -> int:
        """Convolution state of one sequence, all recurrent layers; always bf16."""
        channels, columns = self.conv_shape or (0, 0)
        return self.recurrent_layers * channels * columns * dtype_bytes(_CONV_DTYPE)

    def window_token_bytes(self, tensor_parallel: int = 1, kv_dtype: str = "bf16") -> int:
        """KV of one token in all layers of a sliding window."""
        kv_heads, _, head_dim = self.window_heads
        cached = self.window_layers - self.reused_window_layers
        return cached * _kv_numbers(kv_heads, head_dim, tensor_parallel) * dtype_bytes(kv_dtype)

    def window_bytes(self, tensor_parallel: int = 1, kv_dtype: str = "bf16") -> int:
        """The window tail of one sequence: KV of its last `window_tokens` tokens in all layers of a window."""
        return self.window_tokens * self.window_token_bytes(tensor_parallel, kv_dtype)

    def window_read_bytes(self, tensor_parallel: int = 1, kv_dtype: str = "bf16") -> int:
        """What decoding reads of one window tail: every layer reads, also where it caches none of its own."""
        cached = self.window_layers - self.reused_window_layers
        return self.window_bytes(tensor_parallel, kv_dtype) * self.window_layers // cached if cached else 0

    def recurrent_bytes(self, state_dtype: str, tensor_parallel: int = 1) -> int:
        """Recurrent state and convolution of one sequence, all layers: what is copied when a snapshot is made or
        taken up, because it is overwritten as the sequence goes on. KV of a window is never overwritten."""
        return (self.state_bytes(state_dtype) + self.conv_bytes) // tensor_parallel

    def slot_bytes(self, state_dtype: str, tensor_parallel: int = 1, kv_dtype: str = "bf16") -> int:
        """Bytes of a slot, the record of one sequence: recurrent state, convolution and window tail, all layers.

        0 for a model with none of them. Running requests and snapshots have slots of the same size: SGLang's int8
        checkpoints beside states of bf16 would be two sizes, and are two pools there.
        """
        return self.recurrent_bytes(state_dtype, tensor_parallel) + self.window_bytes(tensor_parallel, kv_dtype)

    def weight_bytes(self, weight_dtype: str) -> int:
        """All parameters in `weight_dtype`."""
        return math.ceil(self.total_params * weight_number_bytes(weight_dtype))

    @property
    def counted_params(self) -> int:
        """All parameters of the matrices, by their widths: what is left out (norms, biases, convolutions) is small."""
        tables = 1 if self.tied_embeddings else 2
        own = self.shared_blocks / (self.attention_layers or 1) if self.shared_blocks else 1
        return round(self._params(tables, own, self.experts)) + self.lookup_params

    @property
    def counted_active_params(self) -> int:
        """Parameters that a token is multiplied with, by the widths: shared blocks at every call, one vocabulary."""
        return round(self._params(1, 1, self.experts_per_token))

    def _params(self, tables: int, own_weights: float, experts: int) -> float:
        """`own_weights`: the share of attention layers and MLPs that have weights of their own."""
        attention = self.attention_layers * (self.attention_in + self.attention_out)
        attention += self.window_layers * sum(self.window_projections)
        recurrent = self.recurrent_layers * (self.recurrent_in + self.recurrent_out)
        dense = self.dense_layers * self.mlp_matrices * self.dense_width
        router_and_shared = self.moe_layers * (self.experts + self.mlp_matrices * self.shared_width)
        columns = tables * self.vocabulary + own_weights * (attention + dense) + recurrent + router_and_shared
        routed = self.moe_layers * experts * self.mlp_matrices * self.expert_width * self.expert_input
        latent = 0 if self.expert_input == self.hidden_size else 2 * self.moe_layers * self.expert_input
        return self.hidden_size * (columns + latent) + routed


def _kv_numbers(heads: int, head_dim: int, tensor_parallel: int) -> int:
    """Numbers of one token's keys and values in one layer of one GPU."""
    return 2 * max(heads // tensor_parallel, 1) * head_dim


def _load_models() -> Mapping[str, HybridModel]:
    rows = json.loads(Path(__file__).with_name("models.json").read_text(encoding="utf-8"))
    for row in rows:
        row["state_shape"] = tuple(row["state_shape"])
        row["conv_shape"] = row["conv_shape"] and tuple(row["conv_shape"])
    return MappingProxyType({row["slug"]: HybridModel(**row) for row in rows})


MODELS = _load_models()


def find_model(slug: str) -> HybridModel:
    """The model named `slug`, or that of the config.json whose path it is; ValueError says what is wrong with it."""
    return _read_once(slug) if slug.endswith(".json") else pick(MODELS, slug, "model")


@functools.cache
def _read_once(path: str) -> HybridModel:
    from hbmgym.memory_backend.configs import read_config  # it builds the class of this module

    return read_config(Path(path))


def _main() -> None:
    from hbmgym.memory_backend.describe import main  # it needs the class of this module as it is imported by its name

    main()


if __name__ == "__main__":
    _main()
