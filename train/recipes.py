"""Recipes: trainings that are more than one platform under one traffic, in one word."""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from hbmgym.envs.platforms import find_platform
from hbmgym.envs.traces.scenarios import SCENARIOS
from hbmgym.envs.traces.seeds import seeds_for
from hbmgym.envs.workload import ScenarioWorkload, Workload, open_workloads
from hbmgym.eval.statics import UNSERVED
from hbmgym.train.domains import Domain, Traffic, VariedLoad

LEAST_REQUESTS = 100
"""Workloads with fewer rows in an episode teach little."""
_TRIED_EPISODES = 6


@dataclass(frozen=True)
class Recipe:
    """Which platforms (see `find_platform`) are trained on, which ones choose the policy, and how long."""

    training: tuple[str, ...]
    validation: tuple[str, ...]
    scenarios: tuple[str, ...]
    loads: tuple[float, float]
    """An episode's load is between these, times the scenario's; validation has the scenario's."""
    move_costs: tuple[float, ...]
    """Seconds to move a chunk, times the cost model's; environments take turns."""
    settings: tuple[tuple[str, float], ...]
    """Fields of TrainOptions that differ from their defaults."""


# No split matters in an idle engine; where nothing is reused it only says how many requests run at once, which HELM's
# layer for that decides (controllers/helm/cap.py).
_WITHOUT_CHOICE = ("idle", "steady-code", "burst", "inelastic")

_SHIFTING = tuple(name for name, scenario in SCENARIOS.items() if scenario.has_phases)

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
            "falcon-h1-7b@h100@20",
        ),
        validation=("qwen3-next-80b-a3b@h200", "falcon-h1-34b@h100", "qwen3-next-80b-a3b@h200@24"),
        scenarios=tuple(name for name in SCENARIOS if name not in _WITHOUT_CHOICE),
        loads=(0.75, 1.1),
        move_costs=(0.25, 1.0, 4.0),
        settings=(
            ("total_timesteps", 600_000),
            ("n_envs", 120),
            ("n_steps", 64),
            ("batch_size", 3840),
            ("n_epochs", 5),
            ("learning_rate", 7e-4),
            ("eval_freq", 100_000),
            ("save_freq", 200_000),
            ("eval_episodes", 2),
        ),
    ),
}
# What traffic that stays as it is teaches: compare the two.
RECIPES["shifting"] = dataclasses.replace(RECIPES["release"], scenarios=_SHIFTING)


def open_traffic(
    platforms: Sequence[str], scenarios: Sequence[str], loads: tuple[float, float] | None = None
) -> list[Traffic]:
    """Each platform with those scenarios that it has enough requests of; the others leave a line."""
    traffic = []
    for name in platforms:
        config = find_platform(name).config
        workloads = []
        for scenario in scenarios:
            try:
                workload = _enough(open_workloads(config, scenarios=[scenario])[0])
            except ValueError as reason:
                print(f"{scenario} on {name} is left out: {reason}", file=sys.stderr)
                continue
            assert isinstance(workload, ScenarioWorkload)
            workloads.append(VariedLoad(workload, *loads) if loads else workload)
        if not workloads:
            raise ValueError(f"platform {name}: no scenario of the recipe is left for it")
        traffic.append(Traffic(config, tuple(workloads)))
    return traffic


def _enough(workload: Workload) -> Workload:
    rows = min(len(workload.episode("train", seed).rows) for seed in seeds_for("train", _TRIED_EPISODES))
    if rows < LEAST_REQUESTS:
        raise ValueError(f"{rows} requests in an episode, fewer than {LEAST_REQUESTS}")
    return workload


def at_costs(domains: Sequence[Domain], factors: Sequence[float]) -> list[Domain]:
    """Every domain once per factor, with moves that cost so many times as much.

    Its references hold, since fixed splits move nothing.
    """
    return [
        dataclasses.replace(
            domain, config=dataclasses.replace(domain.config, chunk_move_s=factor * domain.config.chunk_move_s)
        )
        for factor in factors
        for domain in domains
    ]


def served(domain: Domain) -> Domain:
    """Without workloads that no fixed split serves."""
    return domain.only([name for name, found in domain.references.items() if found.unserved <= UNSERVED])
