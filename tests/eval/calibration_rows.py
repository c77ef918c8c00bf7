"""Published rows that are easy to serve, for the tests of the calibration."""

import dataclasses

from hbmgym.envs.serving.constants import CostConstants
from hbmgym.eval.calibration.closed_loop import serve
from hbmgym.eval.calibration.rows import PublishedRow

ROW = PublishedRow(
    model="qwen3.5-4b",
    gpu="h200",
    tensor_parallel=1,
    weight_dtype="bf16",
    kv_dtype="bf16",
    state_dtype="fp32",
    engine="ours",
    input_tokens=1024,
    output_tokens=64,
    concurrency=4,
    requests=8,
    ttft_ms=1.0,
    tpot_ms=1.0,
    output_tokens_per_s=None,
    source="made up",
)
BIG = {"model": "qwen3.5-27b", "weight_dtype": "fp8"}
LONG = {"input_tokens": 40_000, "concurrency": 8, "requests": 8}
MANY = {"input_tokens": 64, "concurrency": 64, "requests": 64}
VARIED = (
    {},
    {"tensor_parallel": 2},
    BIG,
    {**BIG, "tensor_parallel": 4},
    LONG,
    {**BIG, **LONG},
    MANY,
    {**MANY, "state_dtype": "bf16"},
    {**BIG, **MANY, "tensor_parallel": 8},
    {"concurrency": 1, "requests": 2},
)
"""Changes of ROW that together show every unknown."""


def made_by(constants: CostConstants) -> list[PublishedRow]:
    """VARIED, as an engine with these constants would publish them."""
    rows = [dataclasses.replace(ROW, **changes) for changes in VARIED]  # type: ignore[arg-type]
    return [dataclasses.replace(row, **serve(row, constants)) for row in rows]
