"""Gated DeltaNet beside attention: Qwen3-Next, Qwen3.5, 3.6, 3.8 and OLMo Hybrid."""

from collections.abc import Mapping
from types import MappingProxyType

from hbmgym.memory_backend.configs.fields import Architecture, Fields, Shape
from hbmgym.memory_backend.configs.parts import attention, dense, every, moe, routed


def _gated_delta_net(c: Fields, layers: int, key_heads: int, value_heads: int, key_dim: int, value_dim: int) -> Shape:
    keys, values = key_heads * key_dim, value_heads * value_dim
    return {
        "recurrent_layers": layers,
        "state_shape": (value_heads, value_dim, key_dim),
        "conv_shape": (2 * keys + values, c.count("linear_conv_kernel_dim", least=2) - 1),
        "recurrent_in": 2 * keys + 2 * values + 2 * value_heads,
        "recurrent_out": values,
    }


def _attends(c: Fields) -> list[bool]:
    """Of each layer, whether it attends: every n-th does where the config does not list them."""
    if c.has("layer_types"):
        return [kind == "full_attention" for kind in c.kinds("layer_types", "linear_attention", "full_attention")]
    return every(c, c.count("full_attention_interval", 4))


def qwen_moe(c: Fields) -> Shape:
    """Experts in every n-th layer but those that are named."""
    layers, step = c.layers, c.count("decoder_sparse_step", 1)
    plain = c.layer_numbers("mlp_only_layers", layers, [])
    sparse = sum((i + 1) % step == 0 and i not in plain for i in range(layers))
    experts = routed(c, "num_experts", "num_experts_per_tok", "moe_intermediate_size")
    shared = c.count("shared_expert_intermediate_size", 0, least=0)
    mlps = dense(layers - sparse, c.count("intermediate_size")) if sparse < layers else {}
    return {**mlps, **moe(sparse, **experts, shared=shared)}


def _qwen_hybrid(c: Fields) -> Shape:
    attends = _attends(c)
    heads = c.count("linear_num_key_heads"), c.count("linear_num_value_heads")
    widths = c.count("linear_key_head_dim"), c.count("linear_value_head_dim")
    experts = c.count("num_experts", 0, least=0)
    return {
        "attention_layers": attends.count(True),
        **attention(c, gated=c.flag("attn_output_gate", True)),
        **_gated_delta_net(c, attends.count(False), *heads, *widths),
        **(qwen_moe(c) if experts else dense(len(attends), c.count("intermediate_size"))),
    }


def _olmo_hybrid(c: Fields) -> Shape:
    """Widths that the config leaves out follow from the hidden size, as in transformers' OlmoHybridConfig."""
    attends, q_heads = _attends(c), c.count("num_attention_heads")
    key_heads, value_heads = c.count("linear_num_key_heads", q_heads), c.count("linear_num_value_heads", q_heads)
    key_dim = c.count("linear_key_head_dim", max(3 * c.count("hidden_size") // (4 * key_heads), 1))
    value_dim = c.count("linear_value_head_dim", 2 * key_dim)
    return {
        "attention_layers": attends.count(True),
        **attention(c),
        **_gated_delta_net(c, attends.count(False), key_heads, value_heads, key_dim, value_dim),
        **dense(len(attends), c.count("intermediate_size")),
    }


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "qwen3_next": Architecture(_qwen_hybrid),
        "qwen3_5": Architecture(_qwen_hybrid),
        "qwen3_5_moe": Architecture(_qwen_hybrid),
        "olmo_hybrid": Architecture(_olmo_hybrid, {"linear_conv_kernel_dim": 4}),
    }
)
