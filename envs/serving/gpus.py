"""Gpu: the rates of one GPU that the cost model needs, as vendors state them, and one measured efficiency."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from hbmgym.memory_backend.geometry import pick


@dataclass(frozen=True)
class Gpu:
    """Peak rates of one GPU; the cost model multiplies them by efficiencies."""

    slug: str
    name: str
    memory_bytes: float
    """All HBM: weights and both pools have to fit in it."""
    bandwidth: float
    """HBM bytes per second."""
    flops: float
    """Dense bf16 FLOP per second; fp8 weights are computed at this rate."""
    pcie: float
    """Bytes per second in one direction between host and GPU."""
    state_efficiency: float
    """Share of `bandwidth` that the decode step of the recurrence reaches (e_s)."""
    sources: str


_AICONFIGURATOR = "e_s: aiconfigurator gdn_perf tables, Qwen3.5-35B-A3B, fp32 state"
_GA106 = "NVIDIA RTX 3060 data sheet; FLOP rate with fp32 accumulation, half of that with fp16"

GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        gpu.slug: gpu
        for gpu in (
            Gpu("h200", "H200", 141e9, 4.8e12, 989e12, 64e9, 0.86, f"NVIDIA H200 data sheet; {_AICONFIGURATOR}"),
            Gpu("h100", "H100 SXM", 80e9, 3.35e12, 989e12, 64e9, 0.895, f"NVIDIA H100 data sheet; {_AICONFIGURATOR}"),
            Gpu("a100", "A100 80G SXM", 80e9, 2.039e12, 312e12, 32e9, 0.86, "NVIDIA A100 data sheet; e_s assumed"),
            Gpu("rtx3060", "RTX 3060 12G", 12e9, 0.36e12, 25e12, 32e9, 0.86, f"{_GA106}; e_s assumed"),
        )
    }
)


def find_gpu(slug: str) -> Gpu:
    """The GPU named `slug`; ValueError lists the known ones."""
    return pick(GPUS, slug, "GPU")
