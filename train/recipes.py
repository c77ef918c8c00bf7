"""Recipes: trainings that are more than one platform under one traffic, in one word."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from hbmgym.envs.platforms import find_platform
from hbmgym.envs.traces.scenarios import SCENARIOS
from hbmgym.envs.traces.seeds import seeds_for
from hbmgym.envs.workload import Workload, open_workloads
from hbmgym.eval.opportunities.verdict import TURNED_AWAY
from hbmgym.train.domains import Domain, Traffic

LEAST_REQUESTS = 100
"""Workloads with fewer rows in an episode teach little."""
_TRIED_EPISODES = 6


@dataclass(frozen=True)
class Recipe:
    """Which platforms (see `find_platform`) are trained on, which ones choose the policy, and how long."""

    training: tuple[str, ...]
    validation: tuple[str, ...]
    scenarios: tuple[str, ...]
    settings: tuple[tuple[str, float], ...]
    """Fields of TrainOptions that differ from their defaults."""


RECIPES = {
    # Slots hold 24 times as many tokens' worth of bytes in one model as in another, budgets differ by a factor of ten;
    # falcon-h1-34b and the budget of 24 GiB are seen by no gradient, jamba-1.5-mini and others by nobody.
    "release": Recipe(
        training=(
            "qwen3-next-80b-a3b@h200",
            "qwen3-next-80b-a3b@h200@30",
            "qwen3-next-80b-a3b@h200@56",
            "qwen3.5-27b@h100",
            "kimi-linear-48b-a3b@h100",
            "granite-4.0-h-small@h100",
            "nemotron-h-8b@h100@24",
            "zamba2-2.7b@rtx3060",
            "qwen3.5-4b@rtx3060",
        ),
        validation=("qwen3-next-80b-a3b@h200", "falcon-h1-34b@h100", "qwen3-next-80b-a3b@h200@24"),
        scenarios=tuple(name for name in SCENARIOS if name != "idle"),
        settings=(
            ("total_timesteps", 1_200_000),
            ("n_envs", 54),
            ("n_steps", 128),
            ("batch_size", 3456),
            ("n_epochs", 5),
            ("learning_rate", 7e-4),
            ("eval_freq", 100_000),
            ("save_freq", 200_000),
            ("eval_episodes", 2),
        ),
    ),
}


def open_traffic(platforms: Sequence[str], scenarios: Sequence[str]) -> list[Traffic]:
    """Each platform with those scenarios that it has enough requests of; the others leave a line."""
    traffic = []
    for name in platforms:
        config = find_platform(name).config
        workloads = []
        for scenario in scenarios:
            try:
                workloads.append(_enough(open_workloads(config, scenarios=[scenario])[0]))
            except ValueError as reason:
                print(f"{scenario} on {name} is left out: {reason}", file=sys.stderr)
        if not workloads:
            raise ValueError(f"platform {name}: no scenario of the recipe is left for it")
        traffic.append(Traffic(config, tuple(workloads)))
    return traffic


def _enough(workload: Workload) -> Workload:
    rows = min(len(workload.episode("train", seed).rows) for seed in seeds_for("train", _TRIED_EPISODES))
    if rows < LEAST_REQUESTS:
        raise ValueError(f"{rows} requests in an episode, fewer than {LEAST_REQUESTS}")
    return workload


def served(domain: Domain) -> Domain:
    """Without workloads whose best fixed split turns requests away."""
    return domain.only([name for name, found in domain.references.items() if found.rejected <= TURNED_AWAY])
