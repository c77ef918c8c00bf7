"""The platforms that scenarios are judged on: models on GPUs, with a budget that follows from both."""

import math
from dataclasses import dataclass

from hbmgym.envs.serving.config import GIB, ServingConfig
from hbmgym.envs.serving.gpus import find_gpu
from hbmgym.memory_backend.geometry import find_model

MEMORY_SHARE = 0.875
"""Of a GPU's memory, for weights and both pools; the rest is for activations. It gives the default platform 40 GiB."""


@dataclass(frozen=True)
class Platform:
    """A model on a GPU, with whatever memory its weights leave."""

    model: str
    gpu: str
    hbm_gib: float | None = None
    """Another budget than that."""

    @property
    def name(self) -> str:
        return f"{self.model}@{self.gpu}" + (f"@{self.hbm_gib:g}" if self.hbm_gib else "")

    @property
    def config(self) -> ServingConfig:
        """The defaults, with a budget of whole GiB (tenths below 10) unless it is given."""
        if self.hbm_gib:
            return ServingConfig(model=self.model, gpu=self.gpu, hbm_gib=self.hbm_gib)
        free = MEMORY_SHARE * find_gpu(self.gpu).memory_bytes - find_model(self.model).weight_bytes("fp8")
        digits = 0 if free >= 10 * GIB else 1
        hbm_gib = math.floor(free / GIB * 10**digits) / 10**digits
        return ServingConfig(model=self.model, gpu=self.gpu, hbm_gib=hbm_gib)


PLATFORMS = (
    Platform("qwen3-next-80b-a3b", "h200"),
    Platform("qwen3.5-27b", "h100"),
    Platform("falcon-h1-34b", "h100"),
    Platform("qwen3.5-9b", "rtx3060"),
)


def find_platform(name: str) -> Platform:
    """From model@gpu or model@gpu@GiB; ValueError in one line."""
    model, _, rest = name.partition("@")
    gpu, _, gib = rest.partition("@")
    try:
        platform = Platform(model, gpu, float(gib) if gib else None)
        _ = platform.config
    except ValueError as reason:
        raise ValueError(f"platform {name!r}: {reason}; expected model@gpu or model@gpu@GiB") from None
    return platform
