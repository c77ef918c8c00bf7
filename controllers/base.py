"""The seam between a serving engine and whoever divides its memory: Telemetry in, Decision out.

A controller sees what a real engine could export at that moment, never the trace.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hbmgym.memory_backend.split import Layout

MARGINAL_STEPS = (0.02, 0.05, 0.1, 0.2)
"""Parts of the budget: Telemetry says what so much more or less would be worth to a pool (`*_gain_*`, `*_cost_*`)."""


def _marginal_rows(average: str, suffix: str) -> list[tuple[str, str, str]]:
    gain = f"{average}: prefill seconds per second that so many % of the budget more would have saved this pool"
    cost = f"{average}: prefill seconds per second that so many % of the budget less would have cost this pool"
    gain, cost = (f"{text}; as lru would have it, whatever the order of eviction" for text in (gain, cost))
    return [
        (f"{pool}_{name}_{round(100 * step)}pct{suffix}", "s/s", meaning)
        for pool in ("kv", "ssm")
        for name, meaning in (("gain", gain), ("cost", cost))
        for step in MARGINAL_STEPS
    ]


_MARGINAL_ROWS = (*_marginal_rows("10 s", ""), *_marginal_rows("100 s", "_100s"))
MARGINAL_FIELDS = tuple(name for name, _, _ in _MARGINAL_ROWS)
"""The last ones of a record."""

# name, unit, meaning. "window": sum or average over the last control window; "now": at its end;
# "10 s" / "100 s": exponentially weighted average with that time constant, updated once per window.
# A request that is held because what it needs still runs has not been received: until then nothing here knows of it.
# Its age counts from the time of its trace, as for whoever waits for the answer. One thing is early: a held request
# that no split could ever hold counts as arrived and rejected from the time of its trace on.
TELEMETRY_TABLE: tuple[tuple[str, str, str], ...] = (
    ("time_s", "s", "now: simulated clock"),
    ("window_s", "s", "length of the last window"),
    ("budget_bytes", "bytes", "both pools together"),
    ("slot_bytes", "bytes", "one sequence's record: recurrent state, window tail, all layers"),
    ("kv_token_bytes", "bytes", "KV of one token, all attention layers"),
    ("slots_per_request", "slots", "slots a running request holds"),
    ("kv_share_requested", "1", "now: KV chunks / all chunks that was last asked for, as realised"),
    ("kv_share_effective", "1", "now: KV chunks / all chunks"),
    ("kv_share_min", "1", "smallest share that may be asked for"),
    ("kv_share_max", "1", "largest share that may be asked for"),
    ("moving_chunks", "chunks", "now: chunks still to be moved for the requested split"),
    ("kv_capacity", "pages", "now: pages that the mapped chunks hold"),
    ("kv_live", "pages", "now: pages pinned by running requests"),
    ("kv_cached", "pages", "now: pages that no running request holds: evictable, or kept for a session (pin=ttl)"),
    ("kv_free", "pages", "now: pages that may be handed out without eviction"),
    ("ssm_capacity", "slots", "now: slots that the mapped chunks hold"),
    ("ssm_live", "slots", "now: slots held by running requests"),
    ("ssm_cached", "slots", "now: snapshots, evictable or kept for a session (pin=ttl)"),
    ("ssm_free", "slots", "now: slots that may be handed out without eviction"),
    ("waiting", "requests", "now: requests that wait for admission"),
    ("running", "requests", "now: admitted, not finished"),
    ("aside", "requests", "now: those waiting ones that outgrow the KV pool of the present split, so that others pass"),
    ("kv_needed", "pages", "now: what the largest request will hold at its end, of those set aside, at the queue's "
     "head, running, or served by a split that an idle engine took; 0 where shortages move the split"),
    ("concurrency_cap", "requests", "now: requests that the slots allow to run at once"),
    ("oldest_wait_over_slo", "1", "now: age of the oldest waiting request / its TTFT SLO"),
    ("mean_wait_over_slo", "1", "now: mean over requests without a first token of min(age / TTFT SLO, 10); 0 if none"),
    ("busy_fraction", "1", "window: share of time in which iterations ran"),
    ("blocked_kv_fraction", "1", "window: share of time in which the queue's head, or one set aside, waited for pages"),
    ("blocked_ssm_fraction", "1", "window: share of time in which the queue's head waited for slots"),
    ("arrivals_per_s", "1/s", "window"),
    ("arrivals_per_s_10s", "1/s", "10 s"),
    ("arrivals_per_s_100s", "1/s", "100 s"),
    ("prompt_tokens_per_s_10s", "tokens/s", "10 s: prompt tokens of arrivals"),
    ("prompt_tokens_per_s_100s", "tokens/s", "100 s: prompt tokens of arrivals"),
    ("tokens_per_request_10s", "tokens", "10 s: prompt tokens per arrival (ratio of the two averages)"),
    ("tokens_per_request_100s", "tokens", "100 s: prompt tokens per arrival"),
    ("kv_demand_10s", "1", "10 s: bytes of pages / bytes of pages and slots that arrivals ask for"),
    ("kv_demand_100s", "1", "100 s: the same"),
    ("hit_rate_10s", "1", "10 s: prompt tokens reused / prompt tokens admitted"),
    ("hit_rate_100s", "1", "100 s: the same"),
    ("kv_loss_tokens_per_s", "tokens/s", "10 s: tokens recomputed because their pages had been evicted"),
    ("ssm_loss_tokens_per_s", "tokens/s", "10 s: tokens recomputed under resident pages for want of a snapshot"),
    ("kv_evictions_per_s", "pages/s", "10 s"),
    ("ssm_evictions_per_s", "slots/s", "10 s"),
    ("finished_per_s", "1/s", "window: requests finished"),
    ("met", "requests", "window: finished requests that met both SLOs"),
    ("missed", "requests", "window: SLO misses, once each: when the age passes the TTFT SLO, at rejection or finish"),
    ("cost", "1", "window: growth of the sum of min(max(TTFT / SLO, TPOT / SLO), 10), age counted while it passes"),
    ("preemptions", "requests", "window"),
    ("rejected", "requests", "window"),
    ("ttft_over_slo_10s", "1", "10 s: mean of min(TTFT / TTFT SLO, 10) over first tokens"),
    ("tpot_over_slo_10s", "1", "10 s: mean of min(TPOT / TPOT SLO, 10) over finished requests"),
    ("moved_chunks", "chunks", "window: chunks that changed pools"),
    ("relocated_bytes", "bytes", "window: bytes copied to clear the top of a shrinking pool"),
    *_MARGINAL_ROWS,
)  # fmt: skip

TELEMETRY = np.dtype([(name, "f8") for name, _, _ in TELEMETRY_TABLE])

# As HiMA's, both pools together: what a byte is worth, in prefill seconds per second and byte; by how much that falls
# per byte that moves; seconds of work that a request in the queue waits for. Copied into the kernel as they are.
PRICES = np.dtype([("shadow_price", "f8"), ("curvature", "f8"), ("deferral_weight", "f8")])


@dataclass(frozen=True)
class Setup:
    """What a controller may know before traffic starts; never the trace."""

    layout: Layout
    """Budget, chunk and block sizes, and the splits that can be realised."""
    kv_token_bytes: int
    """KV bytes of one token, all attention layers."""
    slots_per_request: int
    window_s: float
    """Simulated seconds between two decisions."""
    kv_share_bounds: tuple[float, float]
    """Shares outside are clipped."""
    chunk_move_s: float
    """Modelled seconds to move one chunk."""
    tpot_slo_s: float


@dataclass(frozen=True)
class Decision:
    """None keeps what was last asked for."""

    kv_share: float | None = None
    prices: np.record | None = None


class Controller(Protocol):
    """Chooses the split once per window."""

    name: str
    fixed_share: float | None
    """The share it starts at and never changes, or None when it may move. The harness starts the episode there and,
    unless shortages move the split, rejects at arrival what does not fit."""

    def reset(self, setup: Setup) -> None:
        """Forget the past; called before every episode."""
        ...

    def act(self, telemetry: np.record) -> Decision:
        """`telemetry` is one TELEMETRY record, valid until the next call."""
        ...


HOLD = Decision()
