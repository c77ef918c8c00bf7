"""Which of several trained policies is kept: more episodes than an evaluation in training can afford."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hbmgym.envs.traces.seeds import SEED_RANGES
from hbmgym.eval.cells import Bench, Runner, Task
from hbmgym.train.domains import Domain

EPISODES = 12
"""With two, the best of eight policies cost 2 % more over all cases of the opportunity map than another one of them."""
SEEDS = SEED_RANGES["validation"][-EPISODES:]


def scores(policies: Sequence[Path], domains: Sequence[Domain], jobs: int, progress: bool) -> list[float]:
    """Mean over all workloads of each policy's cost / cost of the best fixed split; `domains` have SEEDS."""
    relative = [_relative_costs(policies, domain, jobs, progress) for domain in domains]
    return [float(score) for score in np.concatenate(relative, axis=1).mean(axis=1)]


def _relative_costs(policies: Sequence[Path], domain: Domain, jobs: int, progress: bool) -> np.ndarray:
    """float64 (policies, workloads)."""
    tasks = [
        Task(f"ppo:{policy}", place, seed)
        for policy in policies
        for place in range(len(domain.workloads))
        for seed in domain.seeds
    ]
    with Runner(Bench(domain.config, domain.workloads, domain.part), min(jobs, len(tasks)), progress) as runner:
        costs = [rollout.cell["cost"] for rollout in runner.run(tasks, f"policies on {domain.platform}")]
    means = np.reshape(costs, (len(policies), len(domain.workloads), len(domain.seeds))).mean(axis=2)
    return means / [domain.references[workload.name].cost for workload in domain.workloads]
