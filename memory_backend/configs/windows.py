"""Sliding windows beside attention to the whole context: gpt-oss, Gemma, MiMo, Step, OLMo 3, EXAONE 4, Command."""

from collections.abc import Mapping
from types import MappingProxyType

from hbmgym.memory_backend.configs.fields import Architecture, Fields, Shape
from hbmgym.memory_backend.configs.parts import attention, dense, every, heads_of, moe, routed

_FULL, _SLIDING = "full_attention", "sliding_attention"


def _attends(c: Fields, spare: int = 0) -> list[bool]:
    """Of each layer, whether it attends to the whole context; every n-th does where the config does not list them."""
    if c.has("layer_types"):
        return [kind == _FULL for kind in c.kinds("layer_types", _FULL, _SLIDING, spare=spare)]
    return every(c, c.count(c.first("sliding_window_pattern", "_sliding_window_pattern")))


def _layers(c: Fields, attends: list[bool]) -> Shape:
    """How many layers of either kind; the window's length is asked for only where there is one."""
    layers: Shape = {"attention_layers": attends.count(True)}
    if not all(attends):
        layers["window_layers"] = attends.count(False)
        layers["window_tokens"] = c.count(c.first("sliding_window_size", "sliding_window"))
    return layers


def _plain(c: Fields) -> Shape:
    """Equal heads and MLPs in all layers: Gemma 3, OLMo 3, EXAONE 4, Command R7B and A."""
    attends = _attends(c)
    return {**_layers(c, attends), **attention(c), **dense(len(attends), c.count("intermediate_size"))}


def _gpt_oss(c: Fields) -> Shape:
    attends = _attends(c)
    experts = routed(c, "num_local_experts", "num_experts_per_tok", "intermediate_size")
    return {**_layers(c, attends), **attention(c), **moe(len(attends), **experts)}


def _gemma4(c: Fields) -> Shape:
    """The last layers may read the KV of layers before them. A table has an embedding for each layer."""
    attends = _attends(c)
    readers = c.count("num_kv_shared_layers", 0, least=0)
    own = attends[: len(attends) - readers]
    if readers and set(attends[len(own) :]) - set(own):
        raise c.wrong("num_kv_shared_layers", "layers of every kind before those that read their KV")
    per_layer = c.count("hidden_size_per_layer_input", 256, least=0)
    rows = c.count("vocab_size_per_layer_input", c.count("vocab_size")) if per_layer else 0
    return {
        **_layers(c, attends),
        **_gemma4_attention(c, attends, own),
        "reused_kv_layers": attends.count(True) - own.count(True),
        "reused_window_layers": attends.count(False) - own.count(False),
        "lookup_params": rows * len(attends) * per_layer,
        **_gemma4_mlps(c, len(attends), readers, per_layer),
    }


def _gemma4_attention(c: Fields, attends: list[bool], own: list[bool]) -> Shape:
    """Layers of either kind have heads of their own; those beyond `own` have no projection of keys and values.

    K and V are cached apart even where one projection gives both (`attention_k_eq_v`), because only K is rotated and
    each has its own norm.
    """
    q_heads, kv_heads = heads_of(c)
    one_projection = c.flag("attention_k_eq_v", False)
    full_kv = c.count("num_global_key_value_heads", kv_heads) if one_projection else kv_heads
    full_dim, window_dim = c.count("global_head_dim", 512), c.count("head_dim", 256)
    full_columns, window_columns = (2 - one_projection) * full_kv * full_dim, 2 * kv_heads * window_dim
    return {
        "q_heads": q_heads,
        "kv_heads": full_kv,
        "head_dim": full_dim,
        "attention_in": q_heads * full_dim + _mean(full_columns, own.count(True), attends.count(True)),
        "attention_out": q_heads * full_dim,
        "window_kv_heads": kv_heads,
        "window_head_dim": window_dim,
        "window_in": q_heads * window_dim + _mean(window_columns, own.count(False), attends.count(False)),
        "window_out": q_heads * window_dim,
    }


def _mean(columns: int, own: int, layers: int) -> int:
    """Mean of `columns` over `layers` layers of which `own` have them."""
    return round(columns * own / layers) if layers else 0


def _gemma4_mlps(c: Fields, layers: int, readers: int, per_layer: int) -> Shape:
    """Experts work beside the MLP of their layer, which counts as a shared one.

    The gate, the projection and the share in the model's projection of an embedding per layer are as large as a gated
    MLP of its width. Layers that read the KV of others may have MLPs twice as wide.
    """
    width = c.count("intermediate_size")
    if c.flag("use_double_wide_mlp", False):
        width = round(width * (layers + readers) / layers)
    if not c.flag("enable_moe_block", False):
        return dense(layers, width + per_layer)
    experts = routed(c, "num_experts", "top_k_experts", "moe_intermediate_size")
    return moe(layers, **experts, shared=width + per_layer)


def _mimo(c: Fields) -> Shape:
    """A key's head is wider than a value's. The patterns say 1 for a window, and 1 for experts."""
    attends = [kind == 0 for kind in c.kinds("hybrid_layer_pattern", 0, 1)]
    sparse = c.kinds("moe_layer_freq", 0, 1).count(1)
    full = _mimo_heads(c, "num_attention_heads", "num_key_value_heads", "head_dim", "v_head_dim")
    swa = ("swa_num_attention_heads", "swa_num_key_value_heads", "swa_head_dim", "swa_v_head_dim")
    window = _mimo_heads(c, *swa)
    window_names = ("window_q_heads", "window_kv_heads", "window_head_dim", "window_in", "window_out")
    experts = routed(c, "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
    shared = c.count("n_shared_experts", 0, least=0)
    return {
        **_layers(c, attends),
        **dict(zip(("q_heads", "kv_heads", "head_dim", "attention_in", "attention_out"), full, strict=True)),
        **dict(zip(window_names, window, strict=True)),
        **dense(len(attends) - sparse, c.count("intermediate_size")),
        **moe(sparse, **experts, shared=shared * experts["width"]),
    }


def _mimo_heads(c: Fields, query: str, key_value: str, key_width: str, value_width: str) -> tuple[int, ...]:
    q_heads, kv_heads = heads_of(c, query, key_value)
    key, value = c.count(key_width), c.count(value_width)
    return q_heads, kv_heads, (key + value) // 2, q_heads * key + kv_heads * (key + value), q_heads * value


def _step(c: Fields) -> Shape:
    """Layers of a window may have more query heads; a gate has one column per head. Experts begin at the fourth layer
    where the config does not list them, and layers that predict further tokens may be listed, too."""
    attends = _attends(c, spare=c.count("num_nextn_predict_layers", 0, least=0))
    layers, gated = len(attends), c.flag("use_head_wise_attn_gate", False)
    q_heads, kv_heads = heads_of(c, key_value=c.first("num_attention_groups", "num_key_value_heads"))
    head_dim = c.count("head_dim")
    window_q, window_kv = q_heads, kv_heads
    if c.has("attention_other_setting"):
        other = c.part("attention_other_setting")
        window_q, window_kv = other.count("num_attention_heads", q_heads), other.count("num_attention_groups", kv_heads)
    experts = routed(
        c,
        c.first("moe_num_experts", "n_routed_experts", "num_experts"),
        c.first("moe_top_k", "num_experts_per_tok"),
        "moe_intermediate_size",
    )
    sparse = len(_step_sparse(c, layers))
    return {
        **_layers(c, attends),
        "q_heads": q_heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "attention_in": (q_heads + 2 * kv_heads) * head_dim + gated * q_heads,
        "attention_out": q_heads * head_dim,
        "window_q_heads": window_q,
        "window_kv_heads": window_kv,
        "window_in": (window_q + 2 * window_kv) * head_dim + gated * window_q,
        "window_out": window_q * head_dim,
        **dense(layers - sparse, c.count("intermediate_size")),
        **moe(sparse, **experts, shared=c.count(c.first("share_expert_dims", "share_expert_dim"))),
    }


def _step_sparse(c: Fields, layers: int) -> set[int]:
    if c.has("mlp_layer_types"):
        return {i for i, kind in enumerate(c.kinds("mlp_layer_types", "sparse", "dense")) if kind == "sparse"}
    plain = min(c.count("first_k_dense_replace", 3, least=0), layers)
    return c.layer_numbers("moe_layers_enum", layers, list(range(plain, layers)))


_GEMMA3 = {
    "head_dim": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "sliding_window_pattern": 6,
    "tie_word_embeddings": True,
    "vocab_size": 262208,
}
_GEMMA4 = {"sliding_window_pattern": 6, "tie_word_embeddings": True, "vocab_size": 262144}

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "gpt_oss": Architecture(_gpt_oss, {"sliding_window_pattern": 2}),
        "gemma3": Architecture(_plain, _GEMMA3),
        "gemma4": Architecture(_gemma4, _GEMMA4),
        "gemma4_unified": Architecture(_gemma4, _GEMMA4),
        "mimo_v2_flash": Architecture(_mimo),
        "mimo_v2": Architecture(_mimo),
        "step3p5": Architecture(_step),
        "step3p7": Architecture(_step),
        "olmo3": Architecture(_plain, {"sliding_window_pattern": 4}),
        "exaone4": Architecture(_plain, {"sliding_window_pattern": 4}),
        "cohere2": Architecture(_plain, {"sliding_window_pattern": 4, "tie_word_embeddings": True}),
    }
)
