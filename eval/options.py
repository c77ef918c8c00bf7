"""The flags that training and comparison share: what is served, on what, under which traffic."""

from dataclasses import dataclass

from hbmgym.cli import option
from hbmgym.envs.serving.config import Policies, ServingConfig
from hbmgym.envs.workload import Workload, open_workloads


@dataclass(frozen=True)
class ServingOptions:
    """Model, GPU, memory, traffic and policies."""

    trace: tuple[str, ...] = option((), "trace file, repeatable: compact .npz or Mooncake .jsonl", metavar="PATH")
    scenario: tuple[str, ...] = option((), "generated scenario, repeatable: mix-shift (the default), steady-chat")
    model: str = option("qwen3-next-80b-a3b", "model served, lower-case slug")
    gpu: str = option("h200", "GPU: h200, h100 or a100")
    hbm_gib: float = option(40.0, "GiB of HBM for both pools together")
    load: float = option(1.0, "multiplies the arrival rate; 1 is as recorded, or as calibrated")
    kv_dtype: str = option("bf16", "dtype of the KV cache")
    state_dtype: str = option("fp32", "dtype of the recurrent state")
    policies: str = option(
        "eviction=lru,admission=fcfs,on_shortage=evict", "rules of the engine, equal for every controller"
    )

    def serving_config(self) -> ServingConfig:
        """Raises ValueError with one line."""
        return ServingConfig(
            model=self.model,
            gpu=self.gpu,
            hbm_gib=self.hbm_gib,
            kv_dtype=self.kv_dtype,
            state_dtype=self.state_dtype,
            policies=Policies.parse(self.policies),
        )

    def workloads(self, config: ServingConfig) -> list[Workload]:
        """One per scenario and trace; raises ValueError with one line."""
        return open_workloads(config, scenarios=self.scenario, traces=self.trace, load=self.load)
