"""What the opportunity map looks at: scenarios and recorded traces on platforms."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hbmgym.envs.calibration import LOAD_FACTOR, find_largest_load
from hbmgym.envs.serving.config import GIB, ServingConfig
from hbmgym.envs.serving.gpus import find_gpu
from hbmgym.envs.traces.load import load_trace
from hbmgym.envs.workload import TraceWorkload, Workload, open_workloads
from hbmgym.memory_backend.geometry import find_model

MEMORY_SHARE = 0.875
"""Of a GPU's memory, for weights and both pools; the rest is for activations. It gives the default platform 40 GiB."""


@dataclass(frozen=True)
class Platform:
    """A model on a GPU, with whatever memory its weights leave."""

    model: str
    gpu: str

    @property
    def name(self) -> str:
        return f"{self.model}@{self.gpu}"

    @property
    def config(self) -> ServingConfig:
        """The defaults, with a budget of whole GiB (tenths below 10)."""
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


@dataclass(frozen=True)
class Case:
    """One line of the map."""

    platform: Platform
    scenario: str = ""
    trace: str = ""
    """File of a recorded trace, where there is no scenario."""
    load: float = 1.0
    """Of a recorded trace."""

    @property
    def workload_name(self) -> str:
        return self.scenario or Path(self.trace).name.split(".")[0]

    @property
    def name(self) -> str:
        return f"{self.workload_name} on {self.platform.name}"

    def calibrated(self) -> "Case":
        """At the load that the recipe finds; ValueError in one line where none can be sustained."""
        if self.scenario:
            self.workload()  # finds rates that are not known yet, and keeps them
            return self
        load = LOAD_FACTOR * find_largest_load(load_trace(Path(self.trace)), self.platform.config)
        return dataclasses.replace(self, load=load)

    def workload(self) -> Workload:
        """Where its episodes come from."""
        config = self.platform.config
        if self.scenario:
            return open_workloads(config, scenarios=(self.scenario,))[0]
        return TraceWorkload(load_trace(Path(self.trace)), self.load, config.page_tokens)


def cases(scenarios: Sequence[str], traces: Sequence[str], platforms: Sequence[Platform]) -> list[Case]:
    """All pairs."""
    named = [Case(platform, scenario=name) for platform in platforms for name in scenarios]
    return named + [Case(platform, trace=path) for platform in platforms for path in traces]
