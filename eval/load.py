"""rho: how much of what the best static split could serve does the traffic offer?

A closed loop offers what is taken from it; its rho is that of the same rows in their open-loop order.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from hbmgym.controllers.static import StaticController
from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.serving.core import Core
from hbmgym.envs.traces.episode import Episode

COMPRESSION = 50.0
"""Arrivals come so many times faster, which keeps the queue full."""
PATIENCE_SLOS = 1e9
"""Nobody gives up while the capacity is measured."""
MAX_SLOWDOWN = 20.0
"""A split that needs so many times the episode's span is not the best one."""


def saturated(episode: Episode) -> Episode:
    """The same rows in an open loop, all arriving almost at once."""
    rows = episode.rows.copy().view(np.recarray)
    rows["arrival_s"] /= COMPRESSION
    return dataclasses.replace(episode, rows=rows, loop="open")


def rho_at(share: float, episode: Episode, config: ServingConfig) -> float:
    """Offered rate / completed rate of one static split with a full queue; inf where it rejects what others hold."""
    core = Core(dataclasses.replace(config, deadline_slos=PATIENCE_SLOS, window_s=60.0))
    controller = StaticController(share)
    core.reset(saturated(episode), controller.fixed_share, (share, share))
    while not core.done and core.now_s < MAX_SLOWDOWN * episode.horizon_s:
        core.run_window()
    tokens = episode.rows["input_tokens"].astype(np.int64) + episode.rows["output_tokens"] - 1
    holds = core.layout.pages(core.layout.min_slots)
    if core.counters.finished < np.count_nonzero(-(-tokens // config.page_tokens) <= holds):
        return float("inf")
    return float(core.requests["ended_s"].max()) / episode.horizon_s


def rho(shares: Sequence[float], episode: Episode, config: ServingConfig) -> float:
    """Offered rate / completed rate of the best of the static `shares` with a full queue."""
    return min(rho_at(share, episode, config) for share in shares)
