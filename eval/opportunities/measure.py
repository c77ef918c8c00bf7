"""One episode of one case: all static splits, SGLang's default, floating pools, the dynamic oracle, twice the bytes."""

import dataclasses
from typing import Any

import numpy as np

from hbmgym.controllers.base import Controller
from hbmgym.controllers.registry import make_controller
from hbmgym.controllers.static import StaticController
from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.serving.core import Core
from hbmgym.envs.serving.shortage import ONE_BUFFER
from hbmgym.envs.traces.episode import Episode
from hbmgym.eval.advising.settings import default_controller
from hbmgym.eval.comparison import static_shares
from hbmgym.eval.oracle import arrival_costs, best_path
from hbmgym.eval.rollout import Rollout, run_episode
from hbmgym.eval.statics import WORST_CLASS

FIGURES = (
    *("cost", "token_cost", "ttft_mean_s", "ttft_p99_s", "slo_violation_rate", "unserved_tokens", WORST_CLASS),
    *("hit_rate", "bytes_migrated", "kv_share_mean"),
)
"""Of the cell."""
Figures = dict[str, float]


def measure(config: ServingConfig, episode: Episode) -> dict[str, Any]:
    """Figures of each static share (`statics`), of the `default`, of the rules of ONE_BUFFER, of `dynamic` and of
    `both_full`."""
    core = Core(config)
    default = default_controller(config)
    shares = static_shares(core.layout)
    statics, costs = [], []
    for share in shares:
        statics.append({"share": share, **_figures(run_episode(StaticController(share), core, episode))})
        costs.append(arrival_costs(core, episode))
    unserved = [figures[WORST_CLASS] for figures in statics]
    return {
        "seed": episode.seed,
        "requests": int((episode.rows["measured"] == 1).sum()),
        "statics": statics,
        "default": _run(make_controller(default), core, episode),
        **{rule: _run(make_controller(default), floating(config, rule), episode) for rule in ONE_BUFFER},
        "dynamic": _run(best_path(core, episode, shares, np.array(costs), np.array(unserved)), core, episode),
        "both_full": _run(StaticController(0.5), both_pools_full(config), episode),
    }


def floating(config: ServingConfig, rule: str) -> Core:
    """A core with one pool, which needs no split and no controller."""
    return Core(dataclasses.replace(config, policies=dataclasses.replace(config.policies, on_shortage=rule)))


def both_pools_full(config: ServingConfig) -> Core:
    """A core whose pools at kv_share .5 have as many bytes each as the whole budget.

    No split has that. It is no bound on cost: where memory abounds, larger batches can cost TPOT.
    """
    core = Core(config)
    core.layout = dataclasses.replace(core.layout, budget_bytes=2 * core.layout.budget_bytes)
    core.setup = dataclasses.replace(core.setup, layout=core.layout, kv_share_bounds=core.layout.share_bounds)
    return core


def _run(controller: Controller, core: Core, episode: Episode) -> Figures:
    return _figures(run_episode(controller, core, episode))


def _figures(rollout: Rollout) -> Figures:
    return {name: float(rollout.cell[name]) for name in FIGURES}
