"""Poisson traffic through the engine, as a server in use sees it; for the tests of what its metrics say."""

import functools
from typing import NamedTuple

import numpy as np

from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.serving.core import Core
from hbmgym.envs.serving.engines import EngineProfile
from hbmgym.envs.traces.episode import ROW, Episode, link
from hbmgym.eval.calibration.host import under

from .calibration_rows import FIELDS

CONFIG = ServingConfig(
    model=FIELDS["model"], hbm_gib=30.0, slots_per_request=1, max_preemptions=2**30, deadline_slos=1e9, window_s=3600.0
)
"""Memory for all of them, so that none waits for it."""


class Load(NamedTuple):
    """Requests that are alike, so many a second."""

    prompt_tokens: int
    output_tokens: int
    per_s: float

    def __str__(self) -> str:
        return f"{self.prompt_tokens}/{self.output_tokens} at {self.per_s:g}"


LOADS = (Load(1000, 20, 0.1), Load(8000, 20, 0.1), Load(1000, 400, 0.2), Load(1000, 300, 1.0), Load(3000, 200, 0.5))
"""Light ones: of single prompts, and of decoding beside others."""


class Served(NamedTuple):
    """The requests that ended in a window, and how long it was."""

    columns: dict[str, np.ndarray]
    """Per request; names as those of a MetricsWindow, `itl_s` the mean of a request's gaps."""
    seconds: float


@functools.cache
def served(load: Load, engine: EngineProfile, count: int = 600) -> Served:
    """So many requests that come by chance, the first sixth of which is left to fill the engine."""
    rows = np.zeros(count, ROW)
    rows["arrival_s"] = np.cumsum(np.random.default_rng(0).exponential(1.0 / load.per_s, count))
    rows["input_tokens"], rows["output_tokens"], rows["measured"] = load.prompt_tokens, load.output_tokens, 1
    nobody, ids = np.zeros(0, np.int64), np.zeros(1, np.int32)
    followers = link(rows, nobody, nobody)
    rows.flags.writeable = ids.flags.writeable = False
    core = Core(under(CONFIG, engine))
    page_tokens, span_s = CONFIG.page_tokens, float(rows["arrival_s"][-1])
    core.reset(Episode("", 0, rows.view(np.recarray), ids, 0, page_tokens, 0.0, span_s, followers, "open"))
    while not core.done:
        core.run_window()
    begin, end = float(rows["arrival_s"][count // 6]), span_s
    within = (core.requests["ended_s"] > begin) & (core.requests["ended_s"] <= end)
    requests, own = core.requests[within], rows[within]
    columns = {
        "ttft_s": requests["first_token_s"] - requests["arrival_s"],
        "queue_s": requests["admitted_s"] - requests["arrival_s"] - engine.request_s,
        "prefill_s": requests["first_token_s"] - requests["admitted_s"],
        "itl_s": (requests["ended_s"] - requests["first_token_s"]) / (own["output_tokens"] - 1),
        "e2e_s": requests["ended_s"] - requests["arrival_s"],
        "prompt_tokens": own["input_tokens"].astype(float),
        "output_tokens": own["output_tokens"].astype(float),
    }
    return Served(columns, end - begin)
