"""Gpu: the rates of one GPU as its vendor states them, and what the kernels of two engines make of them.

gpus.json beside this file has the figures, each with its source. Kernels were measured by NVIDIA (aiconfigurator-core
0.12.0, Apache-2.0); the constants here are fits of the forms in kernels.py to its tables. A share `e_f` is of the bf16
FLOP rate also for narrower dtypes, so it may exceed 1.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hbmgym.memory_backend.geometry import pick

FILE = Path(__file__).with_name("gpus.json")
HEAD_DIMS = (64, 128, 256)
"""Attention was measured for heads of these widths."""
ENGINES = ("vllm", "sglang")
"""Whose kernels were measured."""
GEMM_DTYPES, EXPERT_DTYPES, KV_DTYPES = ("bf16", "fp8"), ("bf16", "fp8", "fp4"), ("bf16", "fp8")
US, NS = 1e-6, 1e-9


@dataclass(frozen=True)
class Gemm:
    """A dense matrix product: `t0_s` and the p-norm of reading its operands and of computing."""

    t0_s: float
    e_bw: float
    e_f: float
    p: float


@dataclass(frozen=True)
class Experts:
    """The routed experts of one layer: as Gemm. `coverage` tokens of uniform routing touch as many experts as one of
    real, skewed routing; what goes in and out of experts is read or written `passes` times."""

    t0_s: float
    e_bw: float
    e_f: float
    coverage: float
    p: float
    passes: float


@dataclass(frozen=True)
class Kernels:
    """Kernels whose speed depends on the engine."""

    experts: Mapping[str, Experts]
    """By dtype of the weights: bf16, fp8, fp4."""
    attention_t0_s: float
    """Decode attention of one layer at small batch."""
    attention_e_bw: Mapping[str, tuple[float, ...]]
    """Share of the bandwidth at which decode reads KV, by its dtype (bf16, fp8) and by HEAD_DIMS."""
    attention_e_f: Mapping[str, tuple[float, ...]]
    """Share of the FLOP rate that prefill attention reaches at 4k to 16k tokens, likewise."""
    scan_t0_s: float
    """Prefill recurrence of one layer at a few tokens; then seconds per token, and per token and head."""
    scan_token_s: float
    scan_token_head_s: float


@dataclass(frozen=True, eq=False)
class Gpu:
    """One GPU; equal only to itself."""

    slug: str
    name: str
    memory_bytes: float
    """All HBM: weights and both pools have to fit in it."""
    bandwidth: float
    """HBM bytes per second."""
    flops: float
    """Dense bf16 FLOP per second."""
    pcie: float
    """Bytes per second in one direction between host and GPU."""
    state_e_bw: float
    """Share of the bandwidth at which the decode step of the recurrence reads and writes states."""
    state_t0_s: float
    """Decode step of one recurrent layer, convolution included, at small batch."""
    convolution_s: float
    """Short convolution in prefill: seconds per token and channel."""
    gemm: Mapping[str, Gemm]
    """By dtype of the weights: bf16, fp8."""
    all_reduce: Mapping[int, tuple[float, float]]
    """Seconds of a small message, and bytes of a message per second, by number of GPUs."""
    kernels: Mapping[str, Kernels]
    """By engine."""
    sources: Mapping[str, str]
    """Where each group of figures comes from, and what is assumed."""

    @property
    def is_estimate(self) -> bool:
        """Nothing was measured on it."""
        return "gemm" not in self.sources


def _gpu(row: Mapping[str, Any]) -> Gpu:
    rates = {name: row[name] for name in ("memory_bytes", "bandwidth", "flops", "pcie", "state_e_bw")}
    if wrong := [name for name, value in rates.items() if not is_number(value)]:
        raise ValueError(f"{wrong[0]} has {rates[wrong[0]]!r}, expected a number")
    return Gpu(
        slug=str(row["slug"]),
        name=str(row["name"]),
        state_t0_s=row["state_t0_us"] * US,
        convolution_s=row["convolution_ns_per_token_and_kchannel"] * NS / 1000,
        gemm={dtype: _gemm(*row["gemm"][dtype]) for dtype in GEMM_DTYPES},
        all_reduce={int(n): (t0 * US, rate * 1e9) for n, (t0, rate) in row["all_reduce"].items()},
        kernels={engine: _kernels(row["engines"][engine]) for engine in ENGINES},
        sources=row["sources"],
        **rates,
    )


def _gemm(t0_us: float, e_bw: float, e_f: float, p: float) -> Gemm:
    return Gemm(t0_us * US, e_bw, e_f, p)


def _experts(t0_us: float, e_bw: float, e_f: float, coverage: float, p: float, passes: float) -> Experts:
    return Experts(t0_us * US, e_bw, e_f, coverage, p, passes)


def _by_kv_dtype(shares: Mapping[str, list[float]]) -> dict[str, tuple[float, ...]]:
    """ValueError unless there is one share for each of HEAD_DIMS."""
    found = {dtype: tuple(shares[dtype]) for dtype in KV_DTYPES}
    if any(len(own) != len(HEAD_DIMS) for own in found.values()):
        raise ValueError(f"attention has {shares}, expected shares for heads of {HEAD_DIMS}")
    return found


def _kernels(row: Mapping[str, Any]) -> Kernels:
    scan = row["scan"]
    return Kernels(
        experts={dtype: _experts(*row["experts"][dtype]) for dtype in EXPERT_DTYPES},
        attention_t0_s=row["decode_attention"]["t0_us"] * US,
        attention_e_bw=_by_kv_dtype(row["decode_attention"]["e_bw"]),
        attention_e_f=_by_kv_dtype(row["prefill_attention"]["e_f"]),
        scan_t0_s=scan["t0_us"] * US,
        scan_token_s=scan["ns_per_token"] * NS,
        scan_token_head_s=scan["ns_per_token_and_head"] * NS,
    )


LEAST, MOST = 1e-6, 1e18
_MAY_BE_0 = ("ns_per_token", "ns_per_token_and_head", "convolution_ns_per_token_and_kchannel")


def _check_numbers(value: Any, name: str = "the entry") -> None:
    """ValueError unless every number in an entry of gpus.json is finite, and above 0 where it divides."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in ("slug", "name", "sources"):
                _check_numbers(inner, str(key))
    elif isinstance(value, list):
        for inner in value:
            _check_numbers(inner, name)
    elif not is_number(value) or not (LEAST <= value <= MOST or (value == 0 and name in _MAY_BE_0)):
        raise ValueError(f"{name} has {str(value)[:40]!r}, expected numbers from {LEAST:g} to {MOST:g}")


def is_number(value: object) -> bool:
    """True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


GPUS: Mapping[str, Gpu] = MappingProxyType(
    {row["slug"]: _gpu(row) for row in json.loads(FILE.read_text(encoding="utf-8"))}
)


def find_gpu(name: str) -> Gpu:
    """The GPU of that slug, or the one in a file of that name (*.json); ValueError in one line."""
    return read_gpu(Path(name)) if name.endswith(".json") else pick(GPUS, name, "GPU")


@functools.cache
def read_gpu(path: Path) -> Gpu:
    """Read a GPU of your own: one entry of gpus.json, whose fields it takes. Read once; ValueError in one line."""
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(row, dict):
            raise ValueError("expected one object, for one GPU")
        _check_numbers(row)
        return _gpu(row)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except KeyError as error:
        raise ValueError(f"{path}: lacks {error}, which an entry of envs/serving/gpus.json has") from error
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        reason = error if isinstance(error, ValueError) else "a part has another shape"
        raise ValueError(f"{path}: is no entry as in envs/serving/gpus.json: {reason}") from error
