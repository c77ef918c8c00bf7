"""read_config: the HybridModel of a Hugging Face config.json.

One table, ARCHITECTURES, from `model_type` to the function that reads such a config. Field names and layer layouts are
those of the models' classes in transformers and vLLM.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hbmgym.memory_backend.geometry import HybridModel

_TORCH_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}

Shape = dict[str, Any]


class Fields:
    """The fields of one config.json, or of an object in it; a missing one is a ValueError that names file and field."""

    def __init__(self, path: Path, architecture: str, values: Mapping[str, Any]) -> None:
        self.path, self.architecture, self._values = path, architecture, values

    @classmethod
    def read(cls, path: Path) -> "Fields":
        """Those of the file, with those of `text_config` where the language model is nested there."""
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: no readable config.json ({error})") from None
        if not isinstance(config, dict):
            raise ValueError(f"{path}: a config.json is an object, this is a {type(config).__name__}")
        architecture = str(config.get("model_type", "")).removesuffix("_text")
        return cls(path, architecture, {**config, **(config.get("text_config") or {})})

    def __getitem__(self, name: str) -> Any:
        value = self.get(name)
        if value is None:
            raise ValueError(f"{self.path}: field {name!r} of architecture {self.architecture!r} is missing")
        return value

    def get(self, name: str, default: Any = None) -> Any:
        """The value of `name`, or `default` where it is missing or null."""
        value = self._values.get(name)
        return default if value is None else value

    def part(self, name: str) -> "Fields":
        """The object `name` of the config."""
        return Fields(self.path, self.architecture, self[name])

    def kinds(self, name: str, *known: str) -> list[str]:
        """The list `name`, a kind per layer, all of them among `known`."""
        kinds = list(self[name])
        strange = [kind for kind in kinds if kind not in known]
        if strange:
            raise ValueError(f"{self.path}: {name} has a layer {strange[0]!r}: known are {', '.join(known)}")
        return kinds


def read_config(path: Path) -> HybridModel:
    """The model of the config.json at `path`; its slug and name are taken from the file name.

    A file called just config.json gives the name of its folder. Parameters are counted from the widths. ValueError
    names the file and the architecture or field that is unknown or missing.
    """
    fields = Fields.read(path)
    if fields.architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"{path}: model_type {fields.architecture!r} is not known: known are {known}")
    name = _name(path)
    model = HybridModel(
        **{
            "slug": name.lower(),
            "name": name,
            "hidden_size": fields["hidden_size"],
            "vocabulary": fields["vocab_size"],
            "tied_embeddings": fields.get("tie_word_embeddings", False),
            "mla_dim": None,
            "state_dtype": _state_dtype(fields),
            "mlp_matrices": 3,
            "total_params": 0,
            "active_params": 0,
            "shape_verified": True,
            "source": "config.json",
            **_NO_RECURRENCE,
            **ARCHITECTURES[fields.architecture](fields),
        }
    )
    return replace(model, total_params=model.counted_params, active_params=model.counted_active_params)


def _name(path: Path) -> str:
    stem = path.resolve().parent.name if path.name == "config.json" else path.name.removesuffix(".json")
    return stem.removesuffix("_config").split("--")[-1]


def _state_dtype(fields: Fields) -> str:
    dtype = fields.get("mamba_ssm_dtype") or fields.get("mamba_ssm_cache_dtype", "float32")
    if dtype not in _TORCH_DTYPES:
        raise ValueError(f"{fields.path}: state dtype {dtype!r} is not known: known are {', '.join(_TORCH_DTYPES)}")
    return _TORCH_DTYPES[dtype]


# Parts that several architectures have.

_NO_RECURRENCE: Mapping[str, Any] = MappingProxyType(
    {"recurrent_layers": 0, "state_shape": (0, 0, 0), "conv_shape": None, "recurrent_in": 0, "recurrent_out": 0}
)


def _attention(c: Fields, *, gated: bool = False) -> Shape:
    """Grouped-query attention; `gated` where the Q projection gives an output gate of the same width."""
    q_heads, kv_heads = c["num_attention_heads"], c.get("num_key_value_heads", c["num_attention_heads"])
    head_dim = c.get("head_dim") or c.get("attention_head_dim") or c["hidden_size"] // q_heads
    return {
        "q_heads": q_heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "attention_in": ((1 + gated) * q_heads + 2 * kv_heads) * head_dim,
        "attention_out": q_heads * head_dim,
    }


def _latent_attention(c: Fields) -> Shape:
    """Multi-head latent attention: K and V expanded from a latent, Q too where q_lora_rank is given."""
    heads, rope, value = c["num_attention_heads"], c["qk_rope_head_dim"], c["v_head_dim"]
    key, latent, query = c["qk_nope_head_dim"], c["kv_lora_rank"], c.get("q_lora_rank", 0)
    queries, hidden = heads * (key + rope), c["hidden_size"]
    expansion = (latent * heads * (key + value) + query * queries) / hidden
    return {
        "q_heads": heads,
        "kv_heads": None,
        "head_dim": (key + rope + value) // 2,
        "mla_dim": latent + rope,
        "attention_in": (query or queries) + latent + rope + round(expansion),
        "attention_out": heads * value,
    }


def _gated_delta_net(c: Fields, layers: int) -> Shape:
    heads, key_dim, value_dim = c["linear_num_value_heads"], c["linear_key_head_dim"], c["linear_value_head_dim"]
    keys, values = c["linear_num_key_heads"] * key_dim, heads * value_dim
    return {
        "recurrent_layers": layers,
        "state_shape": (heads, value_dim, key_dim),
        "conv_shape": (2 * keys + values, c["linear_conv_kernel_dim"] - 1),
        "recurrent_in": 2 * keys + 2 * values + 2 * heads,
        "recurrent_out": values,
    }


def _mamba2(layers: int, heads: int, head_dim: int, state: int, groups: int, kernel: int) -> Shape:
    if not layers:
        return {}
    inner, shared = heads * head_dim, 2 * groups * state
    return {
        "recurrent_layers": layers,
        "state_shape": (heads, head_dim, state),
        "conv_shape": (inner + shared, kernel - 1),
        "recurrent_in": 2 * inner + shared + heads,
        "recurrent_out": inner,
    }


def _mamba2_of_d_names(c: Fields, layers: int) -> Shape:
    """Mamba-2 by the field names of Bamba, Falcon-H1 and Granite."""
    heads, head_dim = c["mamba_n_heads"], c["mamba_d_head"]
    if head_dim == "auto":
        head_dim = c["mamba_expand"] * c["hidden_size"] // heads
    return _mamba2(layers, heads, head_dim, c["mamba_d_state"], c["mamba_n_groups"], c["mamba_d_conv"])


def _mamba1(c: Fields, layers: int) -> Shape:
    """Mamba-1: the projections of B, C and dt read the inner width, not the hidden state."""
    inner, state, rank = c["mamba_expand"] * c["hidden_size"], c["mamba_d_state"], c["mamba_dt_rank"]
    return {
        "recurrent_layers": layers,
        "state_shape": (inner, 1, state),
        "conv_shape": (inner, c["mamba_d_conv"] - 1),
        "recurrent_in": 2 * inner + round(inner * (2 * rank + 2 * state) / c["hidden_size"]),
        "recurrent_out": inner,
    }


def _kimi_delta_attention(c: Fields, layers: int) -> Shape:
    """Its decay and output gates are each of two factors, down to one head's width and up to all heads."""
    linear = c.part("linear_attn_config")
    heads, head_dim = linear["num_heads"], linear["head_dim"]
    width = heads * head_dim
    return {
        "recurrent_layers": layers,
        "state_shape": (heads, head_dim, head_dim),
        "conv_shape": (3 * width, linear["short_conv_kernel_size"] - 1),
        "recurrent_in": 3 * width + heads + 2 * head_dim + round(2 * head_dim * width / c["hidden_size"]),
        "recurrent_out": width,
    }


def _lightning_attention(layers: int, heads: int, head_dim: int) -> Shape:
    width = heads * head_dim
    return {
        "recurrent_layers": layers,
        "state_shape": (heads, head_dim, head_dim),
        "recurrent_in": 4 * width,
        "recurrent_out": width,
    }


def _dense(layers: int, width: int) -> Shape:
    return {"dense_layers": layers, "dense_width": width} if layers else {}


def _moe(layers: int, experts: int, per_token: int, width: int, read: int, shared: int = 0) -> Shape:
    return {
        "moe_layers": layers,
        "experts": experts,
        "experts_per_token": per_token,
        "expert_width": width,
        "expert_input": read,
        "shared_width": shared,
    }


def _qwen_layers(c: Fields) -> list[str]:
    """Kinds of a Qwen hybrid's layers: every n-th attends where the config does not list them."""
    if c.get("layer_types"):
        return c.kinds("layer_types", "linear_attention", "full_attention")
    interval = c.get("full_attention_interval", 4)
    return ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(c["num_hidden_layers"])]


def _qwen_moe(c: Fields) -> Shape:
    step, plain = c.get("decoder_sparse_step", 1), c.get("mlp_only_layers", [])
    layers: int = c["num_hidden_layers"]
    sparse = sum((i + 1) % step == 0 and i not in plain for i in range(layers))
    return {
        **_dense(layers - sparse, c["intermediate_size"] if sparse < layers else 0),
        **_moe(
            sparse,
            c["num_experts"],
            c["num_experts_per_tok"],
            c["moe_intermediate_size"],
            c["hidden_size"],
            c.get("shared_expert_intermediate_size", 0),
        ),
    }


# One function per architecture.


def _qwen_hybrid(c: Fields) -> Shape:
    kinds = _qwen_layers(c)
    mlps = _qwen_moe(c) if c.get("num_experts") else _dense(len(kinds), c["intermediate_size"])
    return {
        "attention_layers": kinds.count("full_attention"),
        **_attention(c, gated=c.get("attn_output_gate", True)),
        **_gated_delta_net(c, kinds.count("linear_attention")),
        **mlps,
    }


def _qwen3(c: Fields) -> Shape:
    layers = c["num_hidden_layers"]
    return {"attention_layers": layers, **_attention(c), **_dense(layers, c["intermediate_size"])}


def _qwen3_moe(c: Fields) -> Shape:
    return {"attention_layers": c["num_hidden_layers"], **_attention(c), **_qwen_moe(c)}


def _minimax_m2(c: Fields) -> Shape:
    layers = c["num_hidden_layers"]
    shared = c.get("shared_intermediate_size", 0)
    return {
        "attention_layers": layers,
        **_attention(c),
        **_moe(
            layers, c["num_local_experts"], c["num_experts_per_tok"], c["intermediate_size"], c["hidden_size"], shared
        ),
    }


def _gpt_oss(c: Fields) -> Shape:
    kinds = c.kinds("layer_types", "full_attention", "sliding_attention")
    return {
        "attention_layers": kinds.count("full_attention"),
        "window_layers": kinds.count("sliding_attention"),
        "window_tokens": c["sliding_window"],
        **_attention(c),
        **_moe(len(kinds), c["num_local_experts"], c["num_experts_per_tok"], c["intermediate_size"], c["hidden_size"]),
    }


def _nemotron_h(c: Fields) -> Shape:
    """A layer is one of attention, Mamba-2, an MLP or experts; their activation, relu2, needs no gate."""
    kinds = _nemotron_layers(c)
    mamba = _mamba2(
        kinds.count("mamba"),
        c["mamba_num_heads"],
        c["mamba_head_dim"],
        c["ssm_state_size"],
        c["n_groups"],
        c["conv_kernel"],
    )
    return {
        "attention_layers": kinds.count("attention"),
        "mlp_matrices": 2,
        **_attention(c),
        **mamba,
        **(_dense(kinds.count("mlp"), c["intermediate_size"]) if "mlp" in kinds else {}),
        **(_nemotron_moe(c, kinds.count("moe")) if "moe" in kinds else {}),
    }


def _nemotron_layers(c: Fields) -> list[str]:
    letters = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
    if c.get("hybrid_override_pattern"):
        return [letters[letter] for letter in c.kinds("hybrid_override_pattern", *letters)]
    return c.kinds("layers_block_type", *letters.values())


def _nemotron_moe(c: Fields, layers: int) -> Shape:
    return _moe(
        layers,
        c["n_routed_experts"],
        c["num_experts_per_tok"],
        c["moe_intermediate_size"],
        c.get("moe_latent_size", c["hidden_size"]),
        c["n_shared_experts"] * c["moe_shared_expert_intermediate_size"],
    )


def _kimi_linear(c: Fields) -> Shape:
    linear, layers = c.part("linear_attn_config"), c["num_hidden_layers"]
    plain, every = c["first_k_dense_replace"], c.get("moe_layer_freq", 1)
    sparse = sum(i >= plain and i % every == 0 for i in range(layers))
    return {
        "attention_layers": len(linear["full_attn_layers"]),
        **_latent_attention(c),
        **_kimi_delta_attention(c, len(linear["kda_layers"])),
        **_dense(layers - sparse, c["intermediate_size"]),
        **_moe(
            sparse,
            c["num_experts"],
            c["num_experts_per_token"],
            c["moe_intermediate_size"],
            c["hidden_size"],
            c["num_shared_experts"] * c["moe_intermediate_size"],
        ),
    }


def _falcon_h1(c: Fields) -> Shape:
    """Attention and Mamba-2 side by side in every layer."""
    layers = c["num_hidden_layers"]
    return {
        "attention_layers": layers,
        **_attention(c),
        **_mamba2_of_d_names(c, layers),
        **_dense(layers, c["intermediate_size"]),
    }


def _granite(c: Fields) -> Shape:
    """An MLP in every layer; in models with experts it is the shared one."""
    kinds = c.kinds("layer_types", "mamba", "attention")
    shared, experts = c["shared_intermediate_size"], c.get("num_local_experts", 0)
    mlps = _dense(len(kinds), shared)
    if experts:
        per_token, width = c["num_experts_per_tok"], c["intermediate_size"]
        mlps = _moe(len(kinds), experts, per_token, width, c["hidden_size"], shared)
    return {
        "attention_layers": kinds.count("attention"),
        **_attention(c),
        **_mamba2_of_d_names(c, kinds.count("mamba")),
        **mlps,
    }


def _bamba(c: Fields) -> Shape:
    layers, attention = c["num_hidden_layers"], len(c["attn_layer_indices"])
    return {
        "attention_layers": attention,
        **_attention(c),
        **_mamba2_of_d_names(c, layers - attention),
        **_dense(layers, c["intermediate_size"]),
    }


def _jamba(c: Fields) -> Shape:
    layers, width = c["num_hidden_layers"], c["intermediate_size"]
    attention = sum(i % c["attn_layer_period"] == c["attn_layer_offset"] for i in range(layers))
    sparse = sum(i % c["expert_layer_period"] == c["expert_layer_offset"] for i in range(layers))
    return {
        "attention_layers": attention,
        **_attention(c),
        **_mamba1(c, layers - attention),
        **_dense(layers - sparse, width),
        **_moe(sparse, c["num_experts"], c["num_experts_per_tok"], width, c["hidden_size"]),
    }


def _zamba2(c: Fields) -> Shape:
    """Mamba-2 in every layer; at some, one of few shared blocks of attention and an MLP goes before it.

    Attention reads the hidden state and the embedding side by side, and a linear map leads from the block to the layer.
    """
    hidden, heads, mamba_heads = c["hidden_size"], c["num_attention_heads"], c["n_mamba_heads"]
    kinds = c.kinds("layers_block_type", "mamba", "hybrid")
    calls = kinds.count("hybrid")
    head_dim, kv_heads = 2 * hidden // heads, c.get("num_key_value_heads", heads)
    inner = c["mamba_expand"] * hidden
    mamba = _mamba2(
        len(kinds), mamba_heads, inner // mamba_heads, c["mamba_d_state"], c["mamba_ngroups"], c["mamba_d_conv"]
    )
    return {
        "attention_layers": calls,
        "shared_blocks": c["num_mem_blocks"],
        "q_heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "attention_in": 2 * (heads + 2 * kv_heads) * head_dim + hidden,
        "attention_out": heads * head_dim,
        **mamba,
        **_dense(calls, c["intermediate_size"]),
    }


def _minimax(c: Fields) -> Shape:
    """Softmax attention where the original config's `attn_type_list` says 1, lightning attention where it says 0."""
    softmax = (
        [kind == 1 for kind in c["attn_type_list"]]
        if c.get("attn_type_list")
        else [kind == "full_attention" for kind in c.kinds("layer_types", "linear_attention", "full_attention")]
    )
    experts, per_token = c["num_local_experts"], c["num_experts_per_tok"]
    return {
        "attention_layers": softmax.count(True),
        **_attention(c),
        **_lightning_attention(softmax.count(False), c["num_attention_heads"], c["head_dim"]),
        **_moe(len(softmax), experts, per_token, c["intermediate_size"], c["hidden_size"]),
    }


ARCHITECTURES: Mapping[str, Callable[[Fields], Shape]] = MappingProxyType(
    {
        "qwen3_next": _qwen_hybrid,
        "qwen3_5": _qwen_hybrid,
        "qwen3_5_moe": _qwen_hybrid,
        "qwen3": _qwen3,
        "qwen3_moe": _qwen3_moe,
        "nemotron_h": _nemotron_h,
        "gpt_oss": _gpt_oss,
        "minimax_m2": _minimax_m2,
        "kimi_linear": _kimi_linear,
        "falcon_h1": _falcon_h1,
        "granitemoehybrid": _granite,
        "bamba": _bamba,
        "jamba": _jamba,
        "zamba2": _zamba2,
        "minimax": _minimax,
        "minimax_text_01": _minimax,
    }
)
