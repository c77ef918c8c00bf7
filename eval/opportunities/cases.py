"""What the opportunity map looks at: scenarios and recorded traces on platforms."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hbmgym.envs.calibration import trace_load
from hbmgym.envs.platforms import Platform
from hbmgym.envs.traces.load import load_trace
from hbmgym.envs.workload import TraceWorkload, Workload, open_workloads


@dataclass(frozen=True)
class Case:
    """One line of the map."""

    platform: Platform
    scenario: str = ""
    trace: str = ""
    """File of a recorded trace, where there is no scenario."""
    load: float = 1.0
    """Of a recorded trace."""
    spread: bool = True
    """Whether a recorded trace's rounded arrivals are spread (`load_trace`)."""

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
        load = trace_load(load_trace(self.trace, spread=self.spread), self.platform.config)
        return dataclasses.replace(self, load=load)

    def workload(self) -> Workload:
        """Where its episodes come from."""
        config = self.platform.config
        if self.scenario:
            return open_workloads(config, scenarios=(self.scenario,))[0]
        return TraceWorkload(load_trace(self.trace, spread=self.spread), self.load, config.page_tokens)


def cases(
    scenarios: Sequence[str], traces: Sequence[str], platforms: Sequence[Platform], spread: bool = True
) -> list[Case]:
    """All pairs."""
    named = [Case(platform, scenario=name) for platform in platforms for name in scenarios]
    return named + [Case(platform, trace=path, spread=spread) for platform in platforms for path in traces]
