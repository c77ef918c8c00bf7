"""Print the shapes of models as JSON, one object a line: python -m hbmgym.memory_backend.geometry MODEL ...

A MODEL is a slug of models.json, or a config.json (or the folder of one) of an architecture that configs knows.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hbmgym.cli import command, option, parse_options, user_errors, words
from hbmgym.memory_backend.geometry import STATE_BYTES, HybridModel, dtype_bytes, find_model, state_number_bytes


@dataclass(frozen=True)
class DescribeOptions:
    """Which models, and in which dtypes their bytes are counted."""

    models: tuple[str, ...] = words("slug of models.json, or path of a config.json or of its folder", metavar="MODEL")
    kv_dtype: str = option("bf16", "dtype of the KV cache: bf16, fp16 or fp8")
    state_dtype: str = option("fp32", f"dtype of recurrent states: {', '.join(STATE_BYTES)}")
    tensor_parallel: int = option(1, "GPUs that share the model out; bytes are those of one of them")

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("name a model: a slug of models.json, or a config.json (see --help)")
        dtype_bytes(self.kv_dtype)
        state_number_bytes(self.state_dtype)


def describe(model: HybridModel, kv_dtype: str, state_dtype: str, tensor_parallel: int) -> dict[str, Any]:
    """Bytes per token and per slot, layers of each kind, parameters and all widths of a model."""
    kv_token_bytes = model.kv_token_bytes(kv_dtype, tensor_parallel)
    slot_bytes = model.slot_bytes(state_dtype, tensor_parallel, kv_dtype)
    widths = dataclasses.asdict(model)
    if model.window_layers:
        names = ("window_kv_heads", "window_q_heads", "window_head_dim", "window_in", "window_out")
        widths.update(zip(names, (*model.window_heads, *model.window_projections), strict=True))
    return {
        "slug": widths.pop("slug"),
        "name": widths.pop("name"),
        "kv_token_bytes": kv_token_bytes,
        "slot_bytes": slot_bytes,
        "slot_in_tokens": round(slot_bytes / kv_token_bytes, 1),
        "recurrent_bytes": model.recurrent_bytes(state_dtype, tensor_parallel),
        "window_bytes": model.window_bytes(tensor_parallel, kv_dtype),
        "window_token_bytes": model.window_token_bytes(tensor_parallel, kv_dtype),
        "kv_dtype": kv_dtype,
        "slot_dtype": state_dtype if model.state_elements else kv_dtype if model.window_layers else "bf16",
        "tensor_parallel": tensor_parallel,
        "layers": {kind: widths.pop(f"{kind}_layers") for kind in ("attention", "window", "recurrent", "dense", "moe")},
        "parameters": {"total": widths.pop("total_params"), "active": widths.pop("active_params")},
        "weight_bytes": {dtype: model.weight_bytes(dtype) for dtype in ("bf16", "fp8")},
        **widths,
    }


def _found(name: str) -> HybridModel:
    folder = Path(name)
    return find_model(str(folder / "config.json") if folder.is_dir() else name)


@command
def main() -> None:
    """The command line."""
    options = parse_options(DescribeOptions, __doc__ or "")
    for name in options.models:
        with user_errors():
            model = _found(name)
            model.require_shares(options.tensor_parallel)
        print(json.dumps(describe(model, options.kv_dtype, options.state_dtype, options.tensor_parallel)))
