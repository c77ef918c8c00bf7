"""Mamba beside attention: Nemotron-H, Falcon-H1, Granite 4, Bamba, Jamba and Zamba2."""

from collections.abc import Mapping
from types import MappingProxyType

from hbmgym.memory_backend.configs.fields import Architecture, Fields, Shape
from hbmgym.memory_backend.configs.parts import attention, dense, divided, heads_of, moe, routed


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
    if c.is_auto("mamba_d_head"):
        head_dim = divided(c, c.count("mamba_expand") * c.count("hidden_size"), "mamba_n_heads")
    else:
        head_dim = c.count("mamba_d_head")
    heads, state, groups = c.count("mamba_n_heads"), c.count("mamba_d_state"), c.count("mamba_n_groups")
    return _mamba2(layers, heads, head_dim, state, groups, c.count("mamba_d_conv", least=2))


def _mamba1(c: Fields, layers: int) -> Shape:
    """Mamba-1: the projections of B, C and dt read the inner width, not the hidden state."""
    hidden, state = c.count("hidden_size"), c.count("mamba_d_state")
    inner = c.count("mamba_expand") * hidden
    rank = -(-hidden // 16) if c.is_auto("mamba_dt_rank") else c.count("mamba_dt_rank")
    return {
        "recurrent_layers": layers,
        "state_shape": (inner, 1, state),
        "conv_shape": (inner, c.count("mamba_d_conv", least=2) - 1),
        "recurrent_in": 2 * inner + round(inner * (2 * rank + 2 * state) / hidden),
        "recurrent_out": inner,
    }


def _nemotron_h(c: Fields) -> Shape:
    """A layer is one of attention, Mamba-2, an MLP or experts; their activation, relu2, needs no gate."""
    kinds = _nemotron_layers(c)
    mamba = _mamba2(
        kinds.count("mamba"),
        c.count("mamba_num_heads"),
        c.count("mamba_head_dim"),
        c.count("ssm_state_size"),
        c.count("n_groups"),
        c.count("conv_kernel", least=2),
    )
    return {
        "attention_layers": kinds.count("attention"),
        "mlp_matrices": 2,
        **attention(c),
        **mamba,
        **(dense(kinds.count("mlp"), c.count("intermediate_size")) if "mlp" in kinds else {}),
        **(_nemotron_moe(c, kinds.count("moe")) if "moe" in kinds else {}),
    }


def _nemotron_layers(c: Fields) -> list[str]:
    letters = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
    if c.has("hybrid_override_pattern"):
        return [letters[letter] for letter in c.kinds("hybrid_override_pattern", *letters)]
    return c.kinds(c.first("layers_block_type", "layer_types"), *letters.values())


def _nemotron_moe(c: Fields, layers: int) -> Shape:
    experts = routed(c, "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
    experts["read"] = c.count("moe_latent_size", c.count("hidden_size"))
    shared = c.count("n_shared_experts", least=0)
    return moe(layers, **experts, shared=shared and shared * c.count("moe_shared_expert_intermediate_size"))


def _falcon_h1(c: Fields) -> Shape:
    """Attention and Mamba-2 side by side in every layer."""
    layers = c.layers
    return {
        "attention_layers": layers,
        **attention(c),
        **_mamba2_of_d_names(c, layers),
        **dense(layers, c.count("intermediate_size")),
    }


def _granite(c: Fields) -> Shape:
    """An MLP in every layer; in models with experts it is the shared one."""
    kinds = c.kinds(c.first("layer_types", "layers_block_type"), "mamba", "attention")
    shared = c.count("shared_intermediate_size")
    mlps = dense(len(kinds), shared)
    if c.count("num_local_experts", 0, least=0):
        experts = routed(c, "num_local_experts", "num_experts_per_tok", "intermediate_size")
        mlps = moe(len(kinds), **experts, shared=shared)
    return {
        "attention_layers": kinds.count("attention"),
        **attention(c),
        **_mamba2_of_d_names(c, kinds.count("mamba")),
        **mlps,
    }


def _bamba(c: Fields) -> Shape:
    layers = c.layers
    attends = len(c.layer_numbers("attn_layer_indices", layers))
    return {
        "attention_layers": attends,
        **attention(c),
        **_mamba2_of_d_names(c, layers - attends),
        **dense(layers, c.count("intermediate_size")),
    }


def _jamba(c: Fields) -> Shape:
    layers, width = c.layers, c.count("intermediate_size")
    attends = _periodic(c, "attn_layer_period", "attn_layer_offset")
    sparse = _periodic(c, "expert_layer_period", "expert_layer_offset") if c.count("num_experts") > 1 else 0
    experts = moe(sparse, **routed(c, "num_experts", "num_experts_per_tok", "intermediate_size")) if sparse else {}
    return {
        "attention_layers": attends,
        **attention(c),
        **_mamba1(c, layers - attends),
        **dense(layers - sparse, width),
        **experts,
    }


def _periodic(c: Fields, period: str, offset: str) -> int:
    """How many layers lie at `offset` of every `period` layers."""
    step, first = c.count(period), c.count(offset, least=0)
    return sum(i % step == first for i in range(c.layers))


def _zamba2(c: Fields) -> Shape:
    """Mamba-2 in every layer; at some, one of few shared blocks of attention and an MLP goes before it.

    Attention reads the hidden state and the embedding side by side, and a linear map leads from the block to the layer.
    """
    hidden = c.count("hidden_size")
    q_heads, kv_heads = heads_of(c)
    kinds = c.kinds("layers_block_type", "mamba", "hybrid")
    calls, head_dim = kinds.count("hybrid"), divided(c, 2 * hidden)
    mamba = _mamba2(
        len(kinds),
        c.count("n_mamba_heads"),
        divided(c, c.count("mamba_expand") * hidden, "n_mamba_heads"),
        c.count("mamba_d_state"),
        c.count("mamba_ngroups"),
        c.count("mamba_d_conv", least=2),
    )
    return {
        "attention_layers": calls,
        "shared_blocks": c.count("num_mem_blocks"),
        "q_heads": q_heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "attention_in": 2 * (q_heads + 2 * kv_heads) * head_dim + hidden,
        "attention_out": q_heads * head_dim,
        **mamba,
        **dense(calls, c.count("intermediate_size")),
    }


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "nemotron_h": Architecture(_nemotron_h),
        "falcon_h1": Architecture(_falcon_h1),
        "granitemoehybrid": Architecture(_granite),
        "bamba": Architecture(_bamba),
        "jamba": Architecture(_jamba),
        "zamba2": Architecture(_zamba2),
    }
)
