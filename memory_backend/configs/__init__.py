"""read_config: the HybridModel of a Hugging Face config.json.

A module per family of models, each with the functions that read its configs and its part of one table, ARCHITECTURES,
from `model_type` to such a function. Field names, defaults and layer layouts are those of the models' classes in
transformers and vLLM.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hbmgym.memory_backend.configs import kimi, lfm2, lightning, mamba, ordinary, qwen, windows
from hbmgym.memory_backend.configs.fields import Architecture, Fields
from hbmgym.memory_backend.geometry import HybridModel

_FAMILIES = (qwen, kimi, mamba, lightning, lfm2, windows, ordinary)
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {name: architecture for family in _FAMILIES for name, architecture in family.ARCHITECTURES.items()}
)
REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "deepseek_v4": "keeps three kinds of cache (compressed tokens, window tails, states of the compressor), "
        "and there are two pools here",
    }
)
"""Why models of these architectures cannot be had."""
_NEEDED = (
    "hidden_size, vocab_size, num_hidden_layers; which layers attend to the whole context, with num_attention_heads, "
    "num_key_value_heads, head_dim or the ranks of a latent; which attend to a sliding_window; which keep a state, "
    "with its heads, its two dimensions and the kernel of its convolution; intermediate_size of MLPs, or number and "
    "width of experts and how many a token takes"
)
_TORCH_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_NO_RECURRENCE: Mapping[str, Any] = MappingProxyType(
    {"recurrent_layers": 0, "state_shape": (0, 0, 0), "conv_shape": None, "recurrent_in": 0, "recurrent_out": 0}
)


def read_config(path: Path) -> HybridModel:
    """The model of the config.json at `path`; its slug and name are taken from the file name.

    A file called just config.json gives the name of its folder. Parameters are counted from the widths. ValueError
    names the file and the architecture or field that is unknown, missing or odd.
    """
    fields = Fields.read(path, ARCHITECTURES, REFUSED)
    if fields.architecture in REFUSED:
        raise ValueError(f"{path}: architecture {fields.architecture!r} {REFUSED[fields.architecture]}")
    if fields.architecture not in ARCHITECTURES:
        raise ValueError(
            f"{path}: model_type {fields.architecture!r} is not known; a reader of this architecture would need "
            f"{_NEEDED}; known are {', '.join(ARCHITECTURES)}"
        )
    name = _name(path)
    model = HybridModel(
        **{
            "slug": name.lower(),
            "name": name,
            "hidden_size": fields.count("hidden_size"),
            "vocabulary": fields.count("vocab_size"),
            "tied_embeddings": fields.flag("tie_word_embeddings", False),
            "mla_dim": None,
            "state_dtype": _state_dtype(fields),
            "mlp_matrices": 3,
            "total_params": 0,
            "active_params": 0,
            "shape_verified": True,
            "source": "config.json",
            **_NO_RECURRENCE,
            **ARCHITECTURES[fields.architecture].read(fields),
        }
    )
    if model.attention_layers <= model.reused_kv_layers:
        raise ValueError(f"{path}: no layer caches the whole context, so that a KV pool would hold nothing")
    return replace(model, total_params=model.counted_params, active_params=model.counted_active_params)


def _name(path: Path) -> str:
    stem = path.resolve().parent.name if path.name == "config.json" else path.name.removesuffix(".json")
    return stem.removesuffix("_config").split("--")[-1]


def _state_dtype(fields: Fields) -> str:
    dtype = fields.text(fields.first("mamba_ssm_dtype", "mamba_ssm_cache_dtype"), "float32")
    if dtype not in _TORCH_DTYPES:
        raise ValueError(f"{fields.path}: state dtype {dtype!r} is not known: known are {', '.join(_TORCH_DTYPES)}")
    return _TORCH_DTYPES[dtype]
