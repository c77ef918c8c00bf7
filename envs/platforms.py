"""The platforms that scenarios are judged on: models on GPUs, with a budget that follows from both."""

import math
from dataclasses import dataclass

from hbmgym.envs.serving.config import GIB, ServingConfig
from hbmgym.envs.serving.engines import DEFAULT_ENGINE, find_engine
from hbmgym.envs.serving.gpus import find_gpu
from hbmgym.memory_backend.geometry import find_model

MEMORY_SHARE = 0.875
"""Of a GPU's memory, for weights and both pools; the rest is for activations. It gives the default platform 40 GiB."""


@dataclass(frozen=True)
class Platform:
    """A model on a GPU under an engine, with whatever memory its weights leave."""

    model: str
    gpu: str
    hbm_gib: float | None = None
    """Another budget than that."""
    engine: str = DEFAULT_ENGINE

    @property
    def name(self) -> str:
        gib = [f"{self.hbm_gib:g}"] if self.hbm_gib else []
        engine = [self.engine] if self.engine != DEFAULT_ENGINE else []
        return "@".join((self.model, self.gpu, *gib, *engine))

    @property
    def config(self) -> ServingConfig:
        """The defaults, with a budget of whole GiB (tenths below 10) unless it is given."""
        if self.hbm_gib:
            return self._with(self.hbm_gib)
        free = MEMORY_SHARE * find_gpu(self.gpu).memory_bytes - find_model(self.model).weight_bytes("fp8")
        digits = 0 if free >= 10 * GIB else 1
        hbm_gib = math.floor(free / GIB * 10**digits) / 10**digits
        return self._with(hbm_gib)

    def _with(self, hbm_gib: float) -> ServingConfig:
        return ServingConfig(model=self.model, gpu=self.gpu, engine=find_engine(self.engine), hbm_gib=hbm_gib)


PLATFORMS = (
    Platform("qwen3-next-80b-a3b", "h200"),
    Platform("qwen3.5-27b", "h100"),
    Platform("falcon-h1-34b", "h100"),
    Platform("qwen3.5-9b", "rtx3060"),
)


def find_platform(name: str) -> Platform:
    """From model@gpu, with @GiB or @engine or both behind it; ValueError in one line."""
    model, *rest = name.split("@")
    gpu = rest[0] if rest else ""
    try:
        gib = float(rest[1]) if len(rest) > 1 and rest[1][:1].isdigit() else None
        others = rest[1 if gib is None else 2 :]
        if len(others) > 1:
            raise ValueError(f"{others[1]!r} follows the engine")
        platform = Platform(model, gpu, gib, *others)
        _ = platform.config
    except ValueError as reason:
        raise ValueError(f"platform {name!r}: {reason}; expected model@gpu[@GiB][@engine]") from None
    return platform
