"""The platforms that scenarios are judged on: models on GPUs, with a budget that follows from both."""

import math
from dataclasses import dataclass

from hbmgym.envs.serving.config import GIB, ServingConfig
from hbmgym.envs.serving.engines import DEFAULT_ENGINE, find_engine
from hbmgym.envs.serving.gpus import find_gpu
from hbmgym.memory_backend.geometry import WEIGHT_BYTES, find_model

DEFAULT_DTYPE = ServingConfig.weight_dtype
MEMORY_SHARE = 0.875
"""Of a GPU's memory, for weights and both pools; the rest is for activations. It gives the default platform 40 GiB."""
LEAST_GIB = 0.1
"""Stands for a budget where the weights leave none, so that what is refused is refused by its layout."""


def hbm_gib_left(model: str, gpu: str, weight_dtype: str = "fp8", tensor_parallel: int = 1) -> float:
    """What the weights leave of MEMORY_SHARE of each GPU: whole GiB, tenths below 10, at least LEAST_GIB."""
    weights = find_model(model).weight_bytes(weight_dtype) // max(tensor_parallel, 1)
    free = MEMORY_SHARE * find_gpu(gpu).memory_bytes - weights
    digits = 0 if free >= 10 * GIB else 1
    return max(math.floor(free / GIB * 10**digits) / 10**digits, LEAST_GIB)


@dataclass(frozen=True)
class Platform:
    """A model on a GPU under an engine, with whatever memory its weights leave."""

    model: str
    gpu: str
    hbm_gib: float | None = None
    """Another budget than that."""
    engine: str = DEFAULT_ENGINE
    weight_dtype: str = DEFAULT_DTYPE

    @property
    def name(self) -> str:
        gib = [f"{self.hbm_gib:g}"] if self.hbm_gib else []
        engine = [self.engine] if self.engine != DEFAULT_ENGINE else []
        dtype = [self.weight_dtype] if self.weight_dtype != DEFAULT_DTYPE else []
        return "@".join((self.model, self.gpu, *gib, *engine, *dtype))

    @property
    def config(self) -> ServingConfig:
        """The defaults, with a budget of whole GiB (tenths below 10) unless it is given."""
        if self.hbm_gib:
            return self._with(self.hbm_gib)
        return self._with(hbm_gib_left(self.model, self.gpu, self.weight_dtype))

    def _with(self, hbm_gib: float) -> ServingConfig:
        return ServingConfig(
            model=self.model,
            gpu=self.gpu,
            engine=find_engine(self.engine),
            weight_dtype=self.weight_dtype,
            hbm_gib=hbm_gib,
        )


PLATFORMS = (
    Platform("qwen3-next-80b-a3b", "h200"),
    Platform("qwen3.5-27b", "h100"),
    Platform("falcon-h1-34b", "h100"),
    Platform("qwen3.5-9b", "rtx3060"),
    Platform("qwen3.5-122b-a10b", "b200"),
    # Sliding windows instead of recurrent states: a tail as small as 128 tokens of full KV, and one of 10,240.
    Platform("gpt-oss-120b", "h100", weight_dtype="mxfp4"),
    Platform("gemma-4-31b", "h100"),
)


def find_platform(name: str) -> Platform:
    """From model@gpu, then @GiB, @engine and @dtype of the weights, or some of them; ValueError in one line."""
    model, *rest = name.split("@")
    gpu = rest[0] if rest else ""
    try:
        gib = float(rest[1]) if len(rest) > 1 and rest[1][:1].isdigit() else None
        others = rest[1 if gib is None else 2 :]
        dtypes = [other for other in others if other in WEIGHT_BYTES]
        engines = [other for other in others if other not in WEIGHT_BYTES]
        if len(dtypes) > 1 or len(engines) > 1:
            raise ValueError(f"{'@'.join(others)!r} names more than one engine or dtype")
        platform = Platform(model, gpu, gib, *(engines or [DEFAULT_ENGINE]), *dtypes)
        _ = platform.config
    except ValueError as reason:
        raise ValueError(f"platform {name!r}: {reason}; expected model@gpu[@GiB][@engine][@dtype]") from None
    return platform
