"""Rows that are fast to serve, and the figures that a known engine gives them; for the tests of the calibration."""

import csv
import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hbmgym.envs.serving.engines import ENGINE_PROFILES, HOST_CONSTANTS, EngineProfile
from hbmgym.eval.calibration.closed_loop import replay
from hbmgym.eval.calibration.fit import starting_profile
from hbmgym.eval.calibration.rows import Row, make_row

FIELDS: Mapping[str, Any] = {
    "model": "qwen3-next-80b-a3b",
    "gpu": "h200",
    "tensor_parallel": 1,
    "expert_parallel": 1,
    "weight_dtype": "fp8",
    "kv_dtype": "bf16",
    "state_dtype": "fp32",
    "engine": "vLLM",
    "version": "0.18.0",
    "date": "2026-04-01",
    "input_tokens": 1024,
    "output_tokens": 64,
    "length_range": "0.8-1.0",
    "concurrency": 4,
    "requests": 40,
    "ttft_ms": 100.0,
    "tpot_ms": 10.0,
}
"""A row from which nothing is missing."""
WORKLOADS = ((1024, 1), (8192, 1), (1024, 16), (8192, 16), (2048, 4), (4096, 2))
"""Prompt tokens and clients; calibrate.py fits four of them, which show every constant."""
DEPLOYMENTS: Mapping[str, Mapping[str, Any]] = {
    "vLLM, mixed": {},
    "vLLM, two GPUs": {"model": "qwen3.5-27b", "tensor_parallel": 2, "state_dtype": "bf16"},
    "vLLM, without states": {"model": "minimax-m2.5", "tensor_parallel": 4, "expert_parallel": 4},
    "SGLang, exclusive": {"engine": "SGLang", "version": "0.5.9"},
    "SGLang, graphs": {"engine": "SGLang", "version": "0.5.16", "gpu": "b200", "recv_interval": 10},
}
CONSTANTS = {"prefill_factor": 1.3, "layer_s": 80e-6, "prefill_floor_s": 2.2e-3, "request_s": 40e-3}
"""Of the host that made the figures; no bundled profile is near them."""
VLLM = ENGINE_PROFILES["vllm-graph"]
SGLANG = ENGINE_PROFILES["sglang-eager"]


def fields(**changes: Any) -> dict[str, Any]:
    """FIELDS with changes; None leaves a column out."""
    return {name: value for name, value in {**FIELDS, **changes}.items() if value is not None}


def row(**changes: Any) -> Row:
    """The row of such fields."""
    made = make_row("rows.csv row 1", fields(**changes))
    assert made is not None
    return made


def truth_for(made: Row) -> EngineProfile:
    """The bundled engine that such a row is of, with a host of CONSTANTS."""
    return dataclasses.replace(starting_profile(made.deployment), **CONSTANTS)


def measured_fields(**changes: Any) -> list[dict[str, Any]]:
    """The rows of a deployment over WORKLOADS, with the figures that CONSTANTS give."""
    found = []
    for tokens, clients in WORKLOADS:
        own = fields(input_tokens=tokens, concurrency=clients, requests=10 * clients, **changes)
        made = row(**own)
        times = replay(made).figures(truth_for(made))
        found.append({**own, **{f"{name}_ms": value for name, value in times.items()}})
    return found


def rows_of(content: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Rows of a file with such rows."""
    made = [make_row(f"rows.csv row {number}", own) for number, own in enumerate(content, start=1)]
    return [one for one in made if one is not None]


def write_csv(path: Path, content: Iterable[Mapping[str, Any]]) -> Path:
    """As a spreadsheet writes it."""
    content = list(content)
    columns = dict.fromkeys(name for own in content for name in own)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerows(content)
    return path


def constants(profile: EngineProfile | Mapping[str, Any]) -> dict[str, float]:
    """What a calibration finds."""
    facts = profile if isinstance(profile, Mapping) else dataclasses.asdict(profile)
    return {name: facts[name] for name in HOST_CONSTANTS}
