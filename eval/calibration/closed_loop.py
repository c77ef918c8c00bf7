"""A published row through our engine: closed loop, as the benchmark ran it."""

import math

import numpy as np

from hbmgym.envs.serving.config import GIB, ServingConfig
from hbmgym.envs.serving.constants import CostConstants
from hbmgym.envs.serving.core import Core
from hbmgym.envs.serving.metrics import tpot_s, ttft_s
from hbmgym.envs.serving.state import FINISHED
from hbmgym.envs.traces.episode import ROW, Episode, link
from hbmgym.eval.calibration.rows import PublishedRow
from hbmgym.memory_backend.geometry import find_model
from hbmgym.memory_backend.split import CHUNK_BYTES

PAGE_TOKENS = 64
SPARE_PAGES = ServingConfig().prefill_budget // PAGE_TOKENS + 2
"""The fewest a KV pool may have; the rounding of chunks fits in as well."""
PATIENCE = 1e9
"""No client of a benchmark gives up."""


def closed_loop(row: PublishedRow) -> Episode:
    """`concurrency` clients; each sends its next request when the last one has ended. No prompt shares a page."""
    rows = np.zeros(row.requests, ROW)
    rows["input_tokens"], rows["output_tokens"], rows["measured"] = row.input_tokens, row.output_tokens, 1
    later = np.arange(row.concurrency, row.requests)
    followers = link(rows, later - row.concurrency, later)
    ids = np.zeros(1, np.int32)
    rows.flags.writeable = ids.flags.writeable = False
    return Episode(row.name, 0, rows.view(np.recarray), ids, 0, PAGE_TOKENS, 0.0, 1.0, followers, "closed")


def serve(row: PublishedRow, constants: CostConstants) -> dict[str, float]:
    """TTFT and TPOT (means, ms) and output tokens per second as the engine reports them: `rows.FIGURES`.

    Raises ValueError when weights and requests do not fit the GPU.
    """
    config, kv_share = _setup(row, constants)
    core = Core(config)
    episode = closed_loop(row)
    core.reset(episode, kv_share)
    while not core.done:
        core.run_window()
    requests = core.requests
    assert (requests["status"] == FINISHED).all() and core.counters.preemptions == 0, f"{row.name}: memory ran short"
    return {
        "ttft_ms": 1e3 * float(ttft_s(requests).mean()),
        "tpot_ms": 1e3 * float(tpot_s(episode.rows, requests).mean()),
        "output_tokens_per_s": row.requests * row.output_tokens / float(requests["ended_s"].max()),
    }


def _setup(row: PublishedRow, constants: CostConstants) -> tuple[ServingConfig, float]:
    """A budget that holds all concurrent requests, a slot each as nothing is reused, and its split."""
    model = find_model(row.model)
    pages = row.concurrency * math.ceil((row.input_tokens + row.output_tokens) / PAGE_TOKENS) + SPARE_PAGES
    kv_bytes = pages * model.page_bytes(row.kv_dtype, PAGE_TOKENS, row.tensor_parallel) + 2 * CHUNK_BYTES
    slot_bytes = row.concurrency * model.slot_bytes(row.state_dtype, row.tensor_parallel) + 2 * CHUNK_BYTES
    config = ServingConfig(
        model=row.model,
        gpu=row.gpu,
        hbm_gib=(kv_bytes + slot_bytes) / GIB,
        tensor_parallel=row.tensor_parallel,
        weight_dtype=row.weight_dtype,
        kv_dtype=row.kv_dtype,
        state_dtype=row.state_dtype,
        page_tokens=PAGE_TOKENS,
        slots_per_request=1,
        deadline_slos=PATIENCE,
        window_s=3600.0,
        constants=constants,
    )
    return config, kv_bytes / (kv_bytes + slot_bytes)
