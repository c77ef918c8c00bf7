"""The workloads of "Asymmetric Virtual Memory Paging" (arXiv 2605.22416): how long requests are and when they arrive.

Lengths are tokens, arrivals are ticks of that paper's simulator, in which one tick decodes or prefills one token.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hbmgym.envs.traces.trace import TraceError

SHAREGPT = "sharegpt_replay"
BURST_GAP = 0.1
"""Mean ticks between two arrivals of agentic_burst."""


@dataclass(frozen=True, eq=False)
class PaperRequests:
    """n requests in order of arrival, int64 columns."""

    arrival: np.ndarray
    """Tick, ascending."""
    prompt: np.ndarray
    """Tokens, >= 1."""
    generated: np.ndarray
    """Tokens, >= 1."""

    def __len__(self) -> int:
        return len(self.arrival)


@dataclass(frozen=True)
class PaperWorkload:
    """How many requests a workload draws, its base seed, how fast they arrive, and the draws."""

    requests: int
    base_seed: int
    requests_per_tick: float
    draw: Callable[[np.random.Generator, int, np.ndarray], PaperRequests]


def paper_requests(name: str, replicate: int, prompt_pool: np.ndarray | None = None) -> PaperRequests:
    """Replicate 0, 1, 2, ... of a workload; equal arguments give equal requests.

    `prompt_pool`: int64 prompt lengths in file order, which only sharegpt_replay draws from. Raises `TraceError`.
    """
    if name not in PAPER_WORKLOADS:
        raise TraceError(f"workload is {name!r}, expected one of {', '.join(PAPER_WORKLOADS)}")
    if name == SHAREGPT and prompt_pool is None:
        raise TraceError(f"workload {name} draws from recorded prompt lengths: name their file")
    workload = PAPER_WORKLOADS[name]
    rng = np.random.default_rng(workload.base_seed + replicate)
    return workload.draw(rng, workload.requests, np.zeros(0, np.int64) if prompt_pool is None else prompt_pool)


def load_prompt_pool(path: Path) -> np.ndarray:
    """int64 prompt lengths from a JSON list, in file order; raises `TraceError` with one line."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{path}: is not JSON ({error}): expected a list of prompt lengths") from error
    if isinstance(values, dict):
        values = values.get("prompt_tokens")
    if not isinstance(values, list) or not values:
        raise TraceError(f"{path}: expected a list of prompt lengths, or an object with one under prompt_tokens")
    for place, value in enumerate(values):
        if type(value) is not int or not 1 <= value <= 2**31:
            raise TraceError(f"{path}: prompt length {place} is {value!r}, expected an integer from 1 to {2**31}")
    return np.array(values, np.int64)


def _uniform_short(rng: np.random.Generator, n: int, _: np.ndarray) -> PaperRequests:
    prompt = rng.integers(128, 1025, n)
    return PaperRequests(np.arange(n), prompt, rng.integers(64, 257, n))


def _mixed_long(rng: np.random.Generator, n: int, _: np.ndarray) -> PaperRequests:
    chance = rng.random(n)
    short = rng.integers(512, 4097, n)
    long = rng.integers(16384, 65537, n)
    return PaperRequests(np.arange(n), np.where(chance < 0.2, long, short), rng.integers(128, 513, n))


def _agentic_burst(rng: np.random.Generator, n: int, _: np.ndarray) -> PaperRequests:
    gaps = rng.exponential(BURST_GAP, n)
    prompt = np.clip(rng.lognormal(8.5, 1.0, n).astype(np.int64), 64, 65536)
    arrival = np.ceil(np.cumsum(gaps)).astype(np.int64)
    return PaperRequests(arrival, prompt, rng.integers(64, 257, n))


def _sharegpt_replay(rng: np.random.Generator, n: int, pool: np.ndarray) -> PaperRequests:
    prompt = np.clip(rng.choice(pool, n, replace=True), 16, 4096)
    generated = np.clip(rng.lognormal(4.5, 1.0, n).astype(np.int64), 32, 2048)
    return PaperRequests(np.arange(n), prompt, generated)


PAPER_WORKLOADS = {
    "uniform_short": PaperWorkload(512, 1, 1.0, _uniform_short),
    "mixed_long": PaperWorkload(256, 2, 1.0, _mixed_long),
    "agentic_burst": PaperWorkload(256, 3, 1.0 / BURST_GAP, _agentic_burst),
    SHAREGPT: PaperWorkload(512, 4, 1.0, _sharegpt_replay),
}
