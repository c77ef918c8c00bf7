"""Kimi Delta Attention beside multi-head latent attention: Kimi Linear and Kimi K3."""

from collections.abc import Mapping
from types import MappingProxyType

from hbmgym.memory_backend.configs.fields import Architecture, Fields, Shape
from hbmgym.memory_backend.configs.parts import dense, latent_attention, moe, routed


def kimi_delta_attention(
    hidden: int, layers: int, heads: int, head_dim: int, kernel: int, full_rank_gates: int
) -> Shape:
    """Decay and output gates are each of two factors, down to one head's width and up to all heads, or of one matrix:
    `full_rank_gates` of the two."""
    width, low_rank = heads * head_dim, 2 - full_rank_gates
    gates = full_rank_gates * width + low_rank * head_dim + round(low_rank * head_dim * width / hidden)
    return {
        "recurrent_layers": layers,
        "state_shape": (heads, head_dim, head_dim),
        "conv_shape": (3 * width, kernel - 1),
        "recurrent_in": 3 * width + heads + gates,
        "recurrent_out": width,
    }


def _kimi(c: Fields) -> Shape:
    linear, layers = c.part("linear_attn_config"), c.layers
    attends, recurs = (linear.layer_numbers(name, layers, first=1) for name in ("full_attn_layers", "kda_layers"))
    if attends & recurs or len(attends | recurs) != layers:
        raise ValueError(f"{c.path}: full_attn_layers and kda_layers do not share out the {layers} layers")
    plain, period = c.count("first_k_dense_replace", least=0), c.count("moe_layer_freq", 1)
    sparse = sum(i >= plain and i % period == 0 for i in range(layers))
    heads = c.count("num_attention_heads")
    gate = heads * c.count("v_head_dim") if c.flag("mla_use_output_gate", False) else 0
    return {
        "attention_layers": len(attends),
        **latent_attention(c, gate),
        **kimi_delta_attention(
            c.count("hidden_size"),
            len(recurs),
            linear.count("num_heads"),
            linear.count("head_dim"),
            linear.count("short_conv_kernel_size", least=2),
            int(linear.flag("use_full_rank_gate", False)),
        ),
        **dense(layers - sparse, c.count("intermediate_size")),
        **_experts(c, sparse),
    }


def _experts(c: Fields, layers: int) -> Shape:
    experts = routed(c, "num_experts", "num_experts_per_token", "moe_intermediate_size")
    experts["read"] = c.count("routed_expert_hidden_size", c.count("hidden_size"))
    return moe(layers, **experts, shared=c.count("num_shared_experts", least=0) * experts["width"])


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {"kimi_linear": Architecture(_kimi), "kimi_k3": Architecture(_kimi)}
)
