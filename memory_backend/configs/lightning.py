"""Lightning attention, or Kimi Delta Attention in its place: MiniMax-Text-01 and M1, Ling and Ring linear."""

from collections.abc import Mapping
from types import MappingProxyType

from hbmgym.memory_backend.configs.fields import Architecture, Fields, Shape
from hbmgym.memory_backend.configs.kimi import kimi_delta_attention
from hbmgym.memory_backend.configs.parts import (
    attention,
    dense,
    divided,
    every,
    head_width,
    latent_attention,
    moe,
    routed,
)


def _lightning_attention(layers: int, heads: int, head_dim: int) -> Shape:
    width = heads * head_dim
    return {
        "recurrent_layers": layers,
        "state_shape": (heads, head_dim, head_dim),
        "recurrent_in": 4 * width,
        "recurrent_out": width,
    }


def _minimax(c: Fields) -> Shape:
    """Softmax attention where the original config's `attn_type_list` says 1, lightning attention where it says 0."""
    if c.has("attn_type_list"):
        softmax = [kind == 1 for kind in c.kinds("attn_type_list", 0, 1)]
    else:
        softmax = [kind == "full_attention" for kind in c.kinds("layer_types", "linear_attention", "full_attention")]
    heads = c.count("num_attention_heads")
    experts = routed(c, "num_local_experts", "num_experts_per_tok", "intermediate_size")
    return {
        "attention_layers": softmax.count(True),
        **attention(c),
        **_lightning_attention(softmax.count(False), heads, head_width(c)),
        **moe(len(softmax), **experts),
    }


def _bailing_linear(c: Fields) -> Shape:
    """Ring and Ling linear 2.0: the last layer of a group has grouped-query attention, the others are linear.

    Linear layers divide the hidden size among their heads, whatever `head_dim` is.
    """
    attends = _last_of_groups(c)
    heads, head_dim = c.count("num_attention_heads"), divided(c, c.count("hidden_size"))
    return {
        "attention_layers": attends.count(True),
        **attention(c),
        **_lightning_attention(attends.count(False), heads, head_dim),
        **_bailing_mlps(c),
    }


def _bailing_hybrid(c: Fields) -> Shape:
    """Ling and Ring 2.5, 2.6 (lightning attention) and 3.0 (KDA): the last layer of a group is MLA.

    3.0 has no model_type of its own; its configs are those that give the kernel of a convolution.
    """
    attends = _last_of_groups(c)
    heads, head_dim = c.count("num_attention_heads"), head_width(c)
    recurs = attends.count(False)
    if c.has("short_conv_kernel_size"):
        kernel, full_rank = c.count("short_conv_kernel_size", least=2), c.flag("no_kda_lora", False)
        recurrence = kimi_delta_attention(c.count("hidden_size"), recurs, heads, head_dim, kernel, 2 * full_rank)
    else:
        recurrence = _lightning_attention(recurs, heads, head_dim)
    gates = {"": 0, "head_wise": heads, "element_wise": heads * c.count("v_head_dim")}
    granularity = c.text("gated_attention_proj_granularity_type", "")
    if granularity not in gates:
        raise c.wrong("gated_attention_proj_granularity_type", "head_wise or element_wise")
    return {
        "attention_layers": attends.count(True),
        **latent_attention(c, gates[granularity]),
        **recurrence,
        **_bailing_mlps(c),
    }


def _last_of_groups(c: Fields) -> list[bool]:
    return every(c, c.count("layer_group_size"), tail=True)


def _bailing_mlps(c: Fields) -> Shape:
    layers = c.layers
    plain = min(c.count("first_k_dense_replace", 0, least=0), layers)
    experts = routed(c, "num_experts", "num_experts_per_tok", "moe_intermediate_size")
    shared = c.count("num_shared_experts", 0, least=0)
    width = c.count("moe_shared_expert_intermediate_size", experts["width"])
    mlps = dense(plain, c.count("intermediate_size")) if plain else {}
    return {**mlps, **moe(layers - plain, **experts, shared=shared * width)}


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "minimax": Architecture(_minimax),
        "minimax_text_01": Architecture(_minimax),
        "minimax_m1": Architecture(_minimax),
        "bailing_moe_linear": Architecture(_bailing_linear),
        "bailing_hybrid": Architecture(_bailing_hybrid),
    }
)
