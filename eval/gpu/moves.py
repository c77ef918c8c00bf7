"""What moving memory costs: copies of its bytes, migrations as the backend's driver makes them, a whole episode."""

import dataclasses
import time

from hbmgym.controllers.registry import make_controller
from hbmgym.envs.serving.config import GIB, ServingConfig
from hbmgym.envs.traces.seeds import seeds_for
from hbmgym.envs.workload import open_workloads
from hbmgym.eval.gpu.device import Device, figures
from hbmgym.eval.gpu.plan import RUNS, Facts, Plan
from hbmgym.eval.replay import excerpt, replay
from hbmgym.memory_backend.oplog import KV, SSM
from hbmgym.memory_backend.split import CHUNK_BYTES, Layout
from hbmgym.memory_backend.vmm import Vmm, open_vmm
from hbmgym.memory_backend.vmm.ownership import top_moves

REPLAY_GIB = 2.0
"""The scenario's rates are shipped for this budget; for a smaller one they are found first."""
REPLAY_SCENARIO = "mix-shift"
REPLAY_CONTROLLER = "demand"


def measure_copies(plan: Plan) -> Facts:
    """Copies inside the device's memory, from chunk mappings to chunk mappings; bytes/s counts each byte once."""
    device, most = Device(), max(RUNS)
    source, target = (device.mapped(most) for _ in range(2))
    facts: Facts = {}
    for count in RUNS:
        device.copy_s(target, source, count * CHUNK_BYTES)  # the first one warms up
        spent = [device.copy_s(target, source, count * CHUNK_BYTES) for _ in range(plan.repeats)]
        found = figures(spent)
        facts[f"{count}_chunks"] = {**found, "gb_per_s": 1e-3 * count * CHUNK_BYTES / found["p50_us"]}
    return facts


def measure_migrations(plan: Plan) -> Facts:
    """Runs of chunks from pool to pool and back: wall time of one `execute`, after work on a stream was noted."""
    chunks = int(plan.gib * GIB) // CHUNK_BYTES
    facts: Facts = {}
    with open_vmm("cuda", plain_layout(chunks), chunks // 2) as vmm:
        for count in RUNS:
            spent = [_migrate(vmm, pool, count) for _ in range(plan.repeats) for pool in (KV, SSM)]
            facts[f"{count}_chunks"] = {**figures(spent), "per_chunk_us": figures(spent)["p50_us"] / count}
        vmm.check()
        facts["chunks_moved"] = vmm.chunks_moved
    return facts


def _migrate(vmm: Vmm, pool: int, count: int) -> float:
    """Seconds until the top `count` chunks of `pool` are in the other one."""
    ops = top_moves(vmm, pool, count)
    vmm.end_batch()
    started = time.perf_counter()
    vmm.execute(ops)
    return time.perf_counter() - started


def plain_layout(chunks: int) -> Layout:
    """So many chunks, and blocks of half a chunk in both pools."""
    block_bytes = CHUNK_BYTES // 2
    return Layout(chunks * CHUNK_BYTES, CHUNK_BYTES, block_bytes, block_bytes, min_slots=1, min_pages=1)


def replay_episode(plan: Plan) -> Facts:
    """An excerpt of a generated episode on the GPU beside the same one on accounting; their metrics must be equal."""
    config = ServingConfig(hbm_gib=min(plan.gib, REPLAY_GIB))
    workload = open_workloads(config, scenarios=(REPLAY_SCENARIO,))[0]
    episode = excerpt(workload.episode("validation", seeds_for("validation", 1)[0]), plan.excerpt_s)
    found = replay(make_controller(REPLAY_CONTROLLER), config, episode, "cuda")
    if not found.metrics_equal:
        raise AssertionError(*found.lines)
    return {"requests": len(episode.rows), **dataclasses.asdict(found)}
