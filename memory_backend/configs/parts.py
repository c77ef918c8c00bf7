"""Parts of a layer that several families have: attention, MLPs, experts."""

from typing import Any

from hbmgym.memory_backend.configs.fields import Fields, Shape


def heads_of(c: Fields, query: str = "num_attention_heads", key_value: str = "num_key_value_heads") -> tuple[int, int]:
    """Query and KV heads by these field names; KV heads are as many where the config does not say."""
    q_heads = c.count(query)
    kv_heads = c.count(key_value, q_heads)
    if q_heads % kv_heads:
        raise c.wrong(key_value, f"a divisor of {query}, {q_heads}")
    return q_heads, kv_heads


def divided(c: Fields, width: int, heads: str = "num_attention_heads") -> int:
    """Width of one of the heads that share `width` out; `heads` is the field that has their number."""
    if c.count(heads) > width:
        raise c.wrong(heads, f"at most {width}, the width that they share out")
    return width // c.count(heads)


def head_width(c: Fields) -> int:
    """Width of a head; its part of the residual stream's where the config does not say."""
    name = c.first("head_dim", "attention_head_dim")
    return c.count(name) if c.has(name) else divided(c, c.count("hidden_size"))


def attention(c: Fields, *, gated: bool = False) -> Shape:
    """Grouped-query attention; `gated` where the Q projection gives an output gate of the same width."""
    q_heads, kv_heads = heads_of(c)
    head_dim = head_width(c)
    return {
        "q_heads": q_heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "attention_in": ((1 + gated) * q_heads + 2 * kv_heads) * head_dim,
        "attention_out": q_heads * head_dim,
    }


def latent_attention(c: Fields, gate: int = 0) -> Shape:
    """Multi-head latent attention: K and V expanded from a latent, Q too where q_lora_rank is given.

    `gate`: columns of an output gate.
    """
    heads, rope, value = c.count("num_attention_heads"), c.count("qk_rope_head_dim"), c.count("v_head_dim")
    key, latent, query = c.count("qk_nope_head_dim"), c.count("kv_lora_rank"), c.count("q_lora_rank", 0, least=0)
    queries, hidden = heads * (key + rope), c.count("hidden_size")
    expansion = (latent * heads * (key + value) + query * queries) / hidden
    return {
        "q_heads": heads,
        "kv_heads": None,
        "head_dim": (key + rope + value) // 2,
        "mla_dim": latent + rope,
        "attention_in": (query or queries) + latent + rope + round(expansion) + gate,
        "attention_out": heads * value,
    }


def dense(layers: int, width: int) -> Shape:
    return {"dense_layers": layers, "dense_width": width} if layers else {}


def moe(layers: int, experts: int, per_token: int, width: int, read: int, shared: int = 0) -> Shape:
    """Experts of `width`, `per_token` of them for each token, that read `read` numbers; `shared`: width of all shared
    ones together."""
    return {
        "moe_layers": layers,
        "experts": experts,
        "experts_per_token": per_token,
        "expert_width": width,
        "expert_input": read,
        "shared_width": shared,
    }


def routed(c: Fields, experts: str, per_token: str, width: str) -> dict[str, Any]:
    """`experts`, `per_token` and `width` of `moe` by their names in the config, for experts that read hidden states."""
    count, chosen = c.count(experts), c.count(per_token)
    if chosen > count:
        raise c.wrong(per_token, f"at most {experts}, {count}")
    return {"experts": count, "per_token": chosen, "width": c.count(width), "read": c.count("hidden_size")}


def every(c: Fields, period: int, *, tail: bool = False) -> list[bool]:
    """Of each layer, whether it is the last of a group of `period`; with `tail`, also whether it is in none."""
    layers = c.layers
    whole = layers // period * period
    return [(i + 1) % period == 0 or (tail and i >= whole) for i in range(layers)]
