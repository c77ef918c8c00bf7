"""A run of a benchmark through our engine: closed loop, as it was measured."""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from hbmgym.envs.serving.config import GIB, ServingConfig
from hbmgym.envs.serving.core import LEAST_SLOT_BYTES, Core, cost_of, make_layout, window_workspace_bytes
from hbmgym.envs.serving.engines import EngineProfile
from hbmgym.envs.serving.gpus import find_gpu
from hbmgym.envs.serving.metrics import tpot_s, ttft_s
from hbmgym.envs.serving.state import FINISHED
from hbmgym.envs.traces.episode import ROW, Episode, link
from hbmgym.eval.calibration.rows import Row, locate_model
from hbmgym.memory_backend.geometry import find_model
from hbmgym.memory_backend.split import CHUNK_BYTES

PAGE_TOKENS = 64
PATIENCE = 1e9
"""No client of a benchmark gives up."""
MEMORY_SHARE = 0.9
"""Of a GPU's memory, that engines use by default."""
EDGE_BYTES = 4 * CHUNK_BYTES
"""What both pools lose to whole chunks."""
SEED = 0
"""Of lengths that a row only gives the range of."""


@dataclass(frozen=True)
class Replay:
    """A row, ready to be served under any profile."""

    row: Row
    episode: Episode
    config: ServingConfig
    kv_share: float

    def figures(self, engine: EngineProfile) -> dict[str, float]:
        """TTFT and TPOT in milliseconds, mean or median over requests as the row has it; keys as `rows.FIGURES`.
        There is no TPOT where no request has a second token.

        Raises ValueError for a request that is larger than the memory that the weights leave.
        """
        core = Core(dataclasses.replace(self.config, engine=engine))
        core.reset(self.episode, self.kv_share)
        while not core.done:
            core.run_window()
        requests = core.requests
        if not (requests["status"] == FINISHED).all():
            raise ValueError(f"{self.row.where}: a request is larger than the memory that the weights leave")
        centre = np.median if self.row.statistic == "median" else np.mean
        tpots = tpot_s(self.episode.rows, requests)[self.episode.rows["output_tokens"] > 1]
        by_figure = {"ttft": ttft_s(requests), "tpot": tpots}
        return {name: 1e3 * float(centre(seconds)) for name, seconds in by_figure.items() if len(seconds)}


def replay(row: Row) -> Replay:
    """The row's requests as an episode, and a platform that holds as many at once as the GPU does.

    Raises ValueError, which names the row, for a deployment that cannot be: one that does not fit its GPUs, or whose
    GPUs cannot share the model out.
    """
    episode = closed_loop(row)
    try:
        config, kv_share = _platform(row, episode)
        make_layout(config)
        cost_of(config)
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from error
    return Replay(row, episode, config, kv_share)


def closed_loop(row: Row) -> Episode:
    """`concurrency` clients; each sends its next request when its last one has ended. No prompt shares a page."""
    inputs, outputs = _lengths(row)
    rows = np.zeros(len(inputs), ROW)
    rows["input_tokens"], rows["output_tokens"], rows["measured"] = inputs, outputs, 1
    later = np.arange(row.concurrency, len(rows))
    followers = link(rows, later - row.concurrency, later)
    ids = np.zeros(1, np.int32)
    rows.flags.writeable = ids.flags.writeable = False
    return Episode(row.name, 0, rows.view(np.recarray), ids, 0, PAGE_TOKENS, 0.0, 1.0, followers, "closed")


def _lengths(row: Row) -> tuple[np.ndarray, np.ndarray]:
    """Prompt and output tokens of every request, as they were sent or drawn from the row's range."""
    if row.lengths is not None:
        inputs, outputs = row.lengths
        return np.array(inputs, np.int64), np.array(outputs, np.int64)
    generator = np.random.default_rng(SEED)
    return _drawn(row.input_tokens, row, generator), _drawn(row.output_tokens, row, generator)


def _drawn(nominal: int, row: Row, generator: np.random.Generator) -> np.ndarray:
    """Lengths within the row's range. Where it is not stated, uniform with the nominal length as mean: equal ones would
    keep the clients in step, which no engine's do."""
    low, high = (0.0, 2.0) if row.shortest is None else (row.shortest, 1.0)
    return generator.integers(max(int(low * nominal), 1), int(high * nominal), row.requests, endpoint=True)


def _platform(row: Row, episode: Episode) -> tuple[ServingConfig, float]:
    """A budget that holds all concurrent requests, as far as the GPU has it, with a slot each as nothing is reused; and
    its split."""
    deployment = row.deployment
    model, gpu = find_model(locate_model(deployment.model)), find_gpu(deployment.gpu)
    parallel = deployment.tensor_parallel
    page = model.page_bytes(deployment.kv_dtype, PAGE_TOKENS, parallel)
    slot = max(model.slot_bytes(deployment.state_dtype, parallel, deployment.kv_dtype), LEAST_SLOT_BYTES)
    weights = model.weight_bytes(deployment.weight_dtype) / parallel
    workspace = window_workspace_bytes(model, row.prefill_chunk, parallel, deployment.kv_dtype)
    free = MEMORY_SHARE * gpu.memory_bytes - weights - workspace - EDGE_BYTES
    tokens = episode.rows["input_tokens"] + episode.rows["output_tokens"]
    held = min(row.concurrency, int(free // (slot + math.ceil(tokens.mean() / PAGE_TOKENS) * page)))
    if held < 1:
        raise ValueError(
            f"{deployment.model} has {weights / 1e9:.1f} GB of weights per GPU, beside which {MEMORY_SHARE:.0%} of the "
            f"{gpu.memory_bytes / 1e9:.0f} GB of {gpu.slug} hold no request: check weight_dtype and tensor_parallel"
        )
    pages = row.concurrency * math.ceil(int(tokens.max()) / PAGE_TOKENS) + row.prefill_chunk // PAGE_TOKENS + 2
    slot_bytes = held * slot + EDGE_BYTES // 2
    kv_bytes = min(pages * page + EDGE_BYTES // 2, free + EDGE_BYTES // 2 - held * slot)
    config = ServingConfig(
        model=locate_model(deployment.model),
        gpu=deployment.gpu,
        hbm_gib=(kv_bytes + slot_bytes + workspace) / GIB,
        tensor_parallel=parallel,
        expert_parallel=min(deployment.expert_parallel, parallel),  # some published rows say more
        weight_dtype=deployment.weight_dtype,
        kv_dtype=deployment.kv_dtype,
        state_dtype=deployment.state_dtype,
        page_tokens=PAGE_TOKENS,
        prefill_budget=row.prefill_chunk,
        receive_interval=row.receive_interval,
        slots_per_request=1,
        max_preemptions=2**30,
        deadline_slos=PATIENCE,
        window_s=3600.0,
    )
    return config, kv_bytes / (kv_bytes + slot_bytes)
