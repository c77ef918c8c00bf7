"""One way to measure a controller: run it over an episode and report what happened; used by training and comparison."""

import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hbmgym.controllers.base import Controller
from hbmgym.controllers.floor import floored
from hbmgym.envs.serving.config import GIB
from hbmgym.envs.serving.core import Core, setup_hash
from hbmgym.envs.serving.metrics import episode_metrics
from hbmgym.envs.traces.episode import Episode

MAX_DRAIN_S = 3600.0
"""After the horizon the engine drains for at most this long; what is unfinished then is a miss."""
MAX_CLOSED_SPANS = 20.0
"""A closed loop has no last arrival: its sessions may take so many times the horizon to come to their ends."""

Cell = dict[str, Any]
"""One row of cells.json: plain numbers and strings, equal for equal inputs whatever the executor."""


@dataclass
class Rollout:
    """What one episode under one controller left behind."""

    cell: Cell
    timing: Cell
    """Wall-clock figures of the same cell, and what its backend did: name, chunks moved, stamps read back."""
    history: dict[str, list[float]] = field(default_factory=dict)
    """Per window: the Telemetry fields of _HISTORY."""


_HISTORY = (
    "time_s",
    "kv_share_requested",
    "kv_share_effective",
    "concurrency_cap",
    "waiting",
    "running",
    "kv_live",
    "ssm_live",
    "blocked_kv_fraction",
    "blocked_ssm_fraction",
)


def run_episode(
    controller: Controller,
    core: Core,
    episode: Episode,
    on_window: Callable[[np.record], None] | None = None,
) -> Rollout:
    """Run an episode to its end, warm-up and drain included, with `controller`, over a ShareFloor, deciding after
    every window."""
    fixed = controller.fixed_share
    controller = floored(controller)
    controller.reset(core.setup)
    telemetry = core.reset(episode, fixed, None if fixed is None else (fixed, fixed))
    history: dict[str, list[float]] = {name: [] for name in _HISTORY}
    decisions_s: list[float] = []
    started = time.perf_counter()
    until_s = last_s(episode)
    while not core.done and core.now_s < until_s:
        before = time.perf_counter()
        decision = controller.act(telemetry)
        decisions_s.append(time.perf_counter() - before)
        if decision.kv_share is not None:
            core.request_split(decision.kv_share)
        if decision.prices is not None:
            core.set_prices(decision.prices)
        telemetry = core.run_window()
        for name, values in history.items():
            values.append(float(telemetry[name]))
        if on_window is not None:
            on_window(telemetry)
    wall_s = time.perf_counter() - started
    name = controller.name
    return Rollout(_cell(name, core, episode, history), _timing(name, core, episode, decisions_s, wall_s), history)


def last_s(episode: Episode) -> float:
    """Simulated time at which a rollout ends, finished or not; a row without a first token then costs the most."""
    if episode.loop == "closed":
        return MAX_CLOSED_SPANS * episode.horizon_s
    return episode.horizon_s + MAX_DRAIN_S


def _cell(name: str, core: Core, episode: Episode, history: dict[str, list[float]]) -> Cell:
    times = np.array(history["time_s"])
    measured = (times > episode.warmup_s) & (times <= episode.horizon_s + core.config.window_s)
    shares, caps = (np.array(history[name])[measured] for name in ("kv_share_effective", "concurrency_cap"))
    metrics = episode_metrics(episode, core.requests, core.setup.tpot_slo_s)
    setup = setup_hash(core.config)
    hours = times[-1] / 3600.0
    return {
        "controller": name,
        "trace": episode.name,
        "seed": episode.seed,
        "loop": episode.loop,
        "model": core.config.model,
        "budget_bytes": core.layout.budget_bytes,
        "mapped_chunks": core.mapped_chunks,
        **metrics,
        "recomputed_tokens": int(core.counters.recomputed_tokens),
        "snapshots_saved": int(core.counters.saved_snapshots),
        "snapshots_skipped": int(core.counters.skipped_snapshots),
        "bytes_migrated": core.migrated_bytes,
        "moves_per_hour": float(np.count_nonzero(np.diff(history["kv_share_requested"])) / hours),
        "gib_migrated_per_hour": float(core.migrated_bytes / GIB / hours),
        "kv_share_mean": float(shares.mean()),
        "kv_share_min": float(shares.min()),
        "kv_share_max": float(shares.max()),
        "concurrency_cap_mean": float(caps.mean()),
        "concurrency_cap_min": int(caps.min()),
        "policies": core.config.policies.text,
        "setup_hash": setup,
        "cell_hash": cell_hash(setup, episode),
        **(_admissions(core) if core.config.policies.on_shortage == "priced" else {}),
        **(_counted(core, _PINS) if core.config.policies.pin != "none" else {}),
        **(_counted(core, _COPIES) if core.config.policies.preemption == "offload" else {}),
    }


_PINS = ("pins", "pins_used", "pins_given_up")
_COPIES = ("offloads", "offloaded_bytes", "restored_bytes")


def _counted(core: Core, names: tuple[str, ...]) -> Cell:
    return {name: int(core.counters[name]) for name in names}


def _admissions(core: Core) -> Cell:
    """What on_shortage=priced did with the queue's heads, and log2 of the median ratio of its two least prices, rounded
    down; None where it never had a choice."""
    decisions = np.cumsum(core.price_ratios)
    median = int(np.searchsorted(decisions, decisions[-1] / 2)) if decisions[-1] else None
    return {**core.actions, "price_ratio_log2": median}


def cell_hash(setup: str, episode: Episode) -> str:
    """Of the setup and everything that arrives."""
    digest = hashlib.sha256(f"{setup} {episode.name} {episode.seed} {episode.loop}".encode())
    digest.update(episode.rows.tobytes())
    digest.update(episode.followers.tobytes())
    digest.update(episode.refs.tobytes())
    return digest.hexdigest()[:16]


def _timing(name: str, core: Core, episode: Episode, decisions_s: list[float], wall_s: float) -> Cell:
    assert core.vmm is not None
    # The first decision may compile or touch cold caches; it is not what a service sees.
    spent_us = 1e6 * np.array(decisions_s[1:] or [0.0])
    return {
        "controller": name,
        "trace": episode.name,
        "seed": episode.seed,
        "decision_us_p50": float(np.percentile(spent_us, 50)),
        "decision_us_p99": float(np.percentile(spent_us, 99)),
        "wall_s": wall_s,
        "backend": core.vmm.name,
        "chunks_moved": core.vmm.chunks_moved,
        "stamps_checked": core.vmm.stamps_checked,
        "move_s": core.vmm.measured_move_s,
    }


def evaluate(controller: Controller, core: Core, episodes: Iterable[Episode]) -> list[Rollout]:
    """One rollout per episode, all on the same core."""
    return [run_episode(controller, core, episode) for episode in episodes]
