"""How many snapshots are stale: a deeper one on the same prefix is there, so only a branch could ask for them."""

from dataclasses import dataclass

import numpy as np

from hbmgym.controllers.registry import make_controller
from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.serving.core import Core
from hbmgym.envs.traces.episode import Episode
from hbmgym.eval.rollout import run_episode
from hbmgym.memory_backend.pools import NONE
from hbmgym.memory_backend.prefix_cache import Memory

WINDOWS_PER_LOOK = 12


@dataclass(frozen=True)
class Staleness:
    """Means over the measured part of an episode."""

    of_slots: float
    """Stale snapshots / slots."""
    of_snapshots: float
    """Stale snapshots / snapshots."""


def parents_of(episode: Episode) -> np.ndarray:
    """int32 (id_count,): the page id before each one in its prefix, NONE for a first page."""
    parents = np.full(episode.id_count, NONE, np.int32)
    for row in episode.rows:
        ids = episode.refs[row.ref_off : row.ref_off + row.known_ids]
        parents[ids[1:]] = ids[:-1]
    return parents


def count_stale(memory: Memory, parents: np.ndarray) -> tuple[int, int]:
    """(stale snapshots, snapshots) that are cached now."""
    snapshots = np.flatnonzero(memory.ids["snapshot"][: len(parents)] != NONE)
    above = np.zeros(len(parents), bool)  # ids with a snapshot further down
    for page_id in snapshots:
        page_id = parents[page_id]
        while page_id != NONE and not above[page_id]:
            above[page_id] = True
            page_id = parents[page_id]
    return int(np.count_nonzero(above[snapshots])), len(snapshots)


def measure_staleness(config: ServingConfig, episode: Episode, split: str) -> Staleness:
    """How much of the slots and of the snapshots is stale under one static split."""
    core, parents, looks, windows = Core(config), parents_of(episode), [], 0

    def look(telemetry: np.record) -> None:
        nonlocal windows
        windows += 1
        if episode.warmup_s < telemetry.time_s <= episode.horizon_s and windows % WINDOWS_PER_LOOK == 0:
            stale, snapshots = count_stale(core.memory, parents)
            looks.append((stale / telemetry.ssm_capacity, stale / max(snapshots, 1)))

    run_episode(make_controller(split), core, episode, look)
    return Staleness(*np.mean(looks, axis=0)) if looks else Staleness(np.nan, np.nan)
