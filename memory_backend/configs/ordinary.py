"""Models in which every layer attends to the whole context."""

from collections.abc import Mapping
from types import MappingProxyType

from hbmgym.memory_backend.configs.fields import Architecture, Fields, Shape
from hbmgym.memory_backend.configs.parts import attention, dense, moe, routed
from hbmgym.memory_backend.configs.qwen import qwen_moe


def _qwen3(c: Fields) -> Shape:
    layers = c.layers
    return {"attention_layers": layers, **attention(c), **dense(layers, c.count("intermediate_size"))}


def _qwen3_moe(c: Fields) -> Shape:
    return {"attention_layers": c.layers, **attention(c), **qwen_moe(c)}


def _minimax_m2(c: Fields) -> Shape:
    layers = c.layers
    experts = routed(c, "num_local_experts", "num_experts_per_tok", "intermediate_size")
    shared = c.count("shared_intermediate_size", 0, least=0)
    return {"attention_layers": layers, **attention(c), **moe(layers, **experts, shared=shared)}


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "qwen3": Architecture(_qwen3),
        "qwen3_moe": Architecture(_qwen3_moe),
        "minimax_m2": Architecture(_minimax_m2),
    }
)
