"""The AVMP paper's workloads as traffic for the serving engine: its lengths and its arrivals, for as long as it takes.

A tick becomes a time, the draws go on beyond the paper's 256 or 512 requests, and seeds are this package's. The engine
does the rest, so prefill and decoding take their own time. No request has prefix ids, and none has a parent.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np

from hbmgym.envs.traces.avmp_workloads import PAPER_WORKLOADS, SHAREGPT, PaperRequests, load_prompt_pool
from hbmgym.envs.traces.jitter import spread_over
from hbmgym.envs.traces.trace import Trace, TraceError

MAX_REQUESTS = 1_000_000


@dataclass(frozen=True)
class PaperTraffic:
    """One of the paper's workloads."""

    workload: str
    """As in PAPER_WORKLOADS."""
    prompt_pool: tuple[int, ...] = ()
    """What sharegpt_replay draws its prompts from, tokens."""

    @property
    def name(self) -> str:
        """As a scenario."""
        return scenario_name(self.workload)

    @property
    def requests_per_tick(self) -> float:
        """On average."""
        return PAPER_WORKLOADS[self.workload].requests_per_tick

    def trace(self, seed: int, rate_per_s: float, span_s: float) -> Trace:
        """What arrives in [0, span_s); a tick lasts requests_per_tick / rate_per_s seconds. Raises `TraceError`."""
        tick_s = self.requests_per_tick / rate_per_s
        expected = span_s * rate_per_s
        # Six standard deviations more than a Poisson process needs to reach the end.
        count = math.ceil(expected + 6.0 * math.sqrt(expected) + 10.0)
        if count > MAX_REQUESTS:
            raise TraceError(
                f"{self.name}: a tick of {tick_s:.3g} s makes {count} requests in {span_s:g} s, expected at most "
                f"{MAX_REQUESTS} (a longer tick, or less load)"
            )
        rng = np.random.default_rng([seed, crc32(self.name.encode())])
        drawn = PAPER_WORKLOADS[self.workload].draw(rng, count, np.array(self.prompt_pool, np.int64))
        arrival_s = drawn.arrival * tick_s
        if (np.diff(drawn.arrival) == 0).any():
            # Requests share a tick because that clock is coarse: as with rounded timestamps, none comes with another.
            ticks = drawn.arrival - drawn.arrival[0]
            arrival_s = spread_over(arrival_s[0] + tick_s * ticks, tick_s, rng)
        arrival_s = arrival_s[arrival_s < span_s]
        if not len(arrival_s):
            raise TraceError(f"{self.name}: 0 requests arrive within {span_s:g} s (a shorter tick, or more load)")
        return _trace(self.name, drawn, arrival_s, span_s)


def scenario_name(workload: str) -> str:
    """uniform_short is avmp-uniform-short."""
    return "avmp-" + workload.replace("_", "-")


PAPER_SCENARIOS = {scenario_name(workload): workload for workload in PAPER_WORKLOADS}


def find_traffic(scenario: str) -> PaperTraffic | None:
    """The traffic of an avmp- scenario, None for any other.

    The one on ShareGPT names its file of prompt lengths: avmp-sharegpt-replay:PATH. Raises `TraceError`.
    """
    name, _, path = scenario.partition(":")
    workload = PAPER_SCENARIOS.get(name)
    if workload is None:
        return None
    if workload != SHAREGPT:
        if path:
            raise TraceError(f"scenario {scenario}: {name} reads no file, expected no colon")
        return PaperTraffic(workload)
    if not path:
        raise TraceError(f"scenario {name} draws from recorded prompt lengths: give {name}:FILE")
    return PaperTraffic(workload, tuple(load_prompt_pool(Path(path)).tolist()))


def _trace(name: str, drawn: PaperRequests, arrival_s: np.ndarray, span_s: float) -> Trace:
    rows = len(arrival_s)
    unknown = np.full(rows, -1, np.int32)
    return Trace(
        name=name,
        trace_kind="generated",
        block_size=0,
        arrival_s=arrival_s,
        input_tokens=drawn.prompt[:rows].astype(np.int32),
        output_tokens=drawn.generated[:rows].astype(np.int32),
        session_id=np.arange(rows, dtype=np.int32),
        turn=np.zeros(rows, np.int32),
        parent=unknown,
        gap_s=np.full(rows, np.nan, np.float32),
        service_s=np.full(rows, np.nan, np.float32),
        kind=np.zeros(rows, np.uint8),
        h_ref=unknown.copy(),
        h_lcp=np.zeros(rows, np.int32),
        r_off=np.zeros(rows + 1, np.int64),
        r_start=np.zeros(0, np.int64),
        r_len=np.zeros(0, np.int32),
        span_s=span_s,
    )
