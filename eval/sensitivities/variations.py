"""Variations of a configuration's costs: rates of the GPU and constants of the host halved and doubled, floors, copies,
moves, engines."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.serving.core import cost_of
from hbmgym.envs.serving.engines import ENGINE_PROFILES
from hbmgym.envs.serving.gpus import FILE as GPUS_FILE
from hbmgym.memory_backend.geometry import find_model

BASE = "base"
HALF, DOUBLE = 0.5, 2.0
COPIES, MOVES = (HALF, DOUBLE, 10.0), (HALF, DOUBLE, 10.0, 100.0, 400.0)
FLOORS_MS = (0.0, 25.0, 50.0, 120.0)
"""Of a whole prefill iteration."""


@dataclass(frozen=True)
class Variation:
    """One change of the costs."""

    name: str
    config: ServingConfig


def variations(config: ServingConfig, folder: Path) -> list[Variation]:
    """The base first; GPUs with other rates are written to `folder`."""
    found = [Variation(BASE, config)]
    for what, change in _GPU_TIMES.items():
        for factor in (HALF, DOUBLE):
            name = f"{what} x{factor:g}"
            gpu = _varied_gpu(config.gpu, change, factor, folder / f"{what.replace(' ', '-')}-{factor:g}.json")
            found.append(Variation(name, dataclasses.replace(config, gpu=gpu)))
    for field, what in _HOST.items():
        for factor in (HALF, DOUBLE):
            constants: dict[str, Any] = {field: factor * getattr(config.engine, field)}
            engine = dataclasses.replace(config.engine, **constants)
            found.append(Variation(f"{what} x{factor:g}", dataclasses.replace(config, engine=engine)))
    layers = find_model(config.model).blocks / 2
    for floor_ms in FLOORS_MS:
        engine = dataclasses.replace(config.engine, prefill_floor_s=1e-3 * floor_ms / layers)
        found.append(Variation(f"prefill floor {floor_ms:g} ms", dataclasses.replace(config, engine=engine)))
    copy_s = float(cost_of(config).block_copy_s_per_byte)
    for factor in COPIES:
        copies = dataclasses.replace(config, block_copy_s_per_byte=factor * copy_s)
        found.append(Variation(f"copies x{factor:g}", copies))
    for factor in MOVES:
        moves = dataclasses.replace(config, chunk_move_s=factor * config.chunk_move_s)
        found.append(Variation(f"chunk moves x{factor:g}", moves))
    for name, profile in ENGINE_PROFILES.items():
        if profile != config.engine:
            found.append(Variation(name, dataclasses.replace(config, engine=profile)))
    return found


_HOST = {
    "prefill_factor": "prefill factor",
    "layer_s": "time per layer",
    "request_s": "time per request",
}


def _slower(field: str) -> Callable[[dict[str, Any], float], None]:
    def change(gpu: dict[str, Any], factor: float) -> None:
        gpu[field] /= factor

    return change


def _slower_scan(gpu: dict[str, Any], factor: float) -> None:
    gpu["convolution_ns_per_token_and_kchannel"] *= factor
    for engine in gpu["engines"].values():
        engine["scan"] = {name: factor * value for name, value in engine["scan"].items()}


_GPU_TIMES: dict[str, Callable[[dict[str, Any], float], None]] = {
    "compute": _slower("flops"),
    "HBM": _slower("bandwidth"),
    "state reads": _slower("state_e_bw"),
    "prefill scan": _slower_scan,
}
"""What takes `factor` times as long."""


def _varied_gpu(slug: str, change: Callable[[dict[str, Any], float], None], factor: float, path: Path) -> str:
    rows = json.loads((Path(slug) if slug.endswith(".json") else GPUS_FILE).read_text(encoding="utf-8"))
    gpu = rows if isinstance(rows, dict) else next(row for row in rows if row["slug"] == slug)
    change(gpu, factor)
    path.write_text(json.dumps(gpu), encoding="utf-8")
    return str(path)
