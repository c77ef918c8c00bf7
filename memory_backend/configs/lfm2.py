"""Short convolutions beside attention: LFM2 and LFM2-MoE. What a convolution keeps is all the state they have."""

from collections.abc import Mapping
from types import MappingProxyType

from hbmgym.memory_backend.configs.fields import Architecture, Fields, Shape
from hbmgym.memory_backend.configs.parts import attention, dense, moe, routed


def _short_convolution(c: Fields, layers: int) -> Shape:
    hidden = c.count("hidden_size")
    return {
        "recurrent_layers": layers,
        "conv_shape": (hidden, c.count("conv_L_cache", least=2) - 1),
        "recurrent_in": 3 * hidden,
        "recurrent_out": hidden,
    }


def _mixers(c: Fields) -> Shape:
    if c.has("layer_types"):
        kinds = c.kinds("layer_types", "conv", "short_conv", "full_attention")
        layers, attends = len(kinds), kinds.count("full_attention")
    else:
        layers = c.layers
        attends = len(c.layer_numbers("full_attn_idxs", layers))
    return {"attention_layers": attends, **attention(c), **_short_convolution(c, layers - attends)}


def _lfm2(c: Fields) -> Shape:
    return {**_mixers(c), **dense(c.layers, _mlp_width(c))}


def _mlp_width(c: Fields) -> int:
    """Configs give a width of which two thirds are used, rounded up, unless `block_auto_adjust_ff_dim` is false."""
    width = c.count(c.first("block_ff_dim", "intermediate_size"))
    if not c.flag("block_auto_adjust_ff_dim", True):
        return width
    multiple = c.count("block_multiple_of", 256)
    return -(-int(c.ratio("block_ffn_dim_multiplier", 1.0) * (2 * width // 3)) // multiple) * multiple


def _lfm2_moe(c: Fields) -> Shape:
    layers = c.layers
    plain = min(c.count("num_dense_layers", least=0), layers)
    experts = routed(c, "num_experts", "num_experts_per_tok", "moe_intermediate_size")
    return {**_mixers(c), **dense(plain, c.count("intermediate_size")), **moe(layers - plain, **experts)}


_DEFAULTS = {"tie_word_embeddings": True, "conv_L_cache": 3, "num_key_value_heads": 8}

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {"lfm2": Architecture(_lfm2, _DEFAULTS), "lfm2_moe": Architecture(_lfm2_moe, _DEFAULTS)}
)
