"""Distances from eviction against the order itself, walked from its front."""

import numpy as np

from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.serving.core import Core
from hbmgym.envs.workload import open_workloads
from hbmgym.memory_backend.ages import slack
from hbmgym.memory_backend.eviction import eviction_order
from hbmgym.memory_backend.jit import kernel
from hbmgym.memory_backend.pools import NONE


@kernel
def _slack(pool, joined):
    return slack(pool, joined, 1 << 40)


def errors(core: Core) -> list[tuple[int, int, int]]:
    """(found, exact, capacity) of every cached snapshot, and of every cached page that ends in one."""
    memory, found = core.memory, []
    for pool, clock in ((memory.ssm, "joined"), (memory.kv, "page_joined")):
        free = max(int(pool.meta.limit - pool.meta.live - pool.meta.cached), 0)
        for place, entry in enumerate(eviction_order(pool)):
            key = pool.entries[entry].key
            snapshot = memory.ids[key].snapshot if key != NONE else NONE
            if snapshot != NONE:
                estimate = _slack(pool, memory.marks[snapshot][clock])
                found.append((int(estimate), place + free, int(pool.meta.capacity)))
    return found


def test_distances_are_those_of_the_order():
    """Of snapshots to a hundredth of the pool, of pages to a tenth on average: what ran last may have no mark of it."""
    config = ServingConfig()
    core = Core(config)
    core.reset(open_workloads(config, scenarios=("steady-chat",))[0].episode("validation", 10_000), 0.4)
    off: dict[int, list[float]] = {}
    for window in range(120):
        core.run_window()
        if window > 40 and window % 10 == 0:
            for found, exact, capacity in errors(core):
                off.setdefault(capacity, []).append(abs(found - exact) / capacity)
    slots, pages = sorted(off)
    assert len(off[slots]) > 1000 and max(off[slots]) <= 0.01
    assert len(off[pages]) > 1000 and np.mean(off[pages]) <= 0.1
