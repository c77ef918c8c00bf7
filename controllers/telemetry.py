"""What an engine tells a controller once per window: TELEMETRY_TABLE, from which all else about the record follows.

The dtype, the counters that the simulator keeps and what it makes of them (`envs/serving/telemetry.py`), and the table
in docs/telemetry.md, which `python -m hbmgym.controllers.telemetry` prints.

A request that is held because what it needs still runs has not been received: until then nothing here knows of it. Its
age counts from the time of its trace, as for whoever waits for the answer. One thing is early: a held request that no
split could ever hold counts as arrived and rejected from the time of its trace on.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

MARGINAL_STEPS = (0.02, 0.05, 0.1, 0.2)
"""Parts of the budget: Telemetry says what so much more or less would be worth to a pool (`*_gain_*`, `*_cost_*`)."""

# When a field is taken, or over what a counter is averaged.
ONCE, NOW, SUM, WINDOW, FAST, SLOW = "once", "now", "sum", "window", "10 s", "100 s"
AVERAGES = (SUM, WINDOW, FAST, SLOW)
"""What becomes of a counter: its growth in the window, that per second, and averages of the latter over windows, whose
weights fall with age by FAST_S and SLOW_S."""
FAST_S, SLOW_S = 10.0, 100.0

# Where a live engine has it from.
SETUP = "known before traffic starts"
ENGINE = "counted by the engine or its scheduler"
MOVER = "told by what divides the memory"
GHOST = "needs a ghost list of what was evicted"
ORDER = "needs places in the order of eviction"

KV_DEMAND = "received_tokens in pages / received_tokens in pages and received in slots, by bytes"


class Field(NamedTuple):
    """One field of the record."""

    name: str
    unit: str
    average: str
    """ONCE, NOW or one of AVERAGES."""
    source: str
    """Of AVERAGES: a counter; two of them, "part / whole", of whose averages it is the ratio; or KV_DEMAND. Else ""."""
    live: str
    """SETUP, ENGINE, MOVER, GHOST or ORDER."""
    meaning: str

    @property
    def counters(self) -> tuple[str, ...]:
        """One, or the two of a ratio; none where the source is no counter."""
        is_counted = self.average in AVERAGES and self.source != KV_DEMAND
        return tuple(self.source.split(" / ")) if is_counted else ()


_TELLS = {
    "gain": (GHOST, "prefill that so many % of the budget more would have saved this pool"),
    "cost": (ORDER, "prefill that so many % of the budget less would have cost this pool"),
}


def _marginals(average: str, suffix: str) -> Iterator[Field]:
    for pool in ("kv", "ssm"):
        for side, (live, meaning) in _TELLS.items():
            for step in MARGINAL_STEPS:
                counter = f"{pool}_{side}_{round(100 * step)}pct"
                meaning_as_lru = f"{meaning}; as lru would have it, whatever the order of eviction"
                yield Field(counter + suffix, "s/s", average, counter, live, meaning_as_lru)


_MARGINALS = (*_marginals(FAST, ""), *_marginals(SLOW, "_100s"))
MARGINAL_FIELDS = tuple(field.name for field in _MARGINALS)
"""The last ones of a record."""

TELEMETRY_TABLE: tuple[Field, ...] = (
    Field("time_s", "s", NOW, "", ENGINE, "simulated clock"),
    Field("window_s", "s", NOW, "", ENGINE, "length of the window"),
    Field("budget_bytes", "bytes", ONCE, "", SETUP, "both pools together"),
    Field("slot_bytes", "bytes", ONCE, "", SETUP, "one sequence's record: recurrent state, window tail, all layers"),
    Field("kv_token_bytes", "bytes", ONCE, "", SETUP, "KV of one token, all attention layers"),
    Field("slots_per_request", "slots", ONCE, "", SETUP, "slots a running request holds"),
    Field("kv_share_requested", "1", NOW, "", MOVER, "KV chunks / all chunks that was last asked for, as realised"),
    Field("kv_share_effective", "1", NOW, "", MOVER, "KV chunks / all chunks"),
    Field("kv_share_min", "1", ONCE, "", SETUP, "smallest share that may be asked for"),
    Field("kv_share_max", "1", ONCE, "", SETUP, "largest share that may be asked for"),
    Field("moving_chunks", "chunks", NOW, "", MOVER, "chunks still to be moved for the requested split"),
    Field("kv_capacity", "pages", NOW, "", MOVER, "pages that the mapped chunks hold"),
    Field("kv_live", "pages", NOW, "", ENGINE, "pages pinned by running requests"),
    Field("kv_cached", "pages", NOW, "", ENGINE,
          "pages that no running request holds: evictable, or kept for a session (pin=ttl)"),
    Field("kv_free", "pages", NOW, "", ENGINE, "pages that may be handed out without eviction"),
    Field("ssm_capacity", "slots", NOW, "", MOVER, "slots that the mapped chunks hold"),
    Field("ssm_live", "slots", NOW, "", ENGINE, "slots held by running requests"),
    Field("ssm_cached", "slots", NOW, "", ENGINE, "snapshots, evictable or kept for a session (pin=ttl)"),
    Field("ssm_free", "slots", NOW, "", ENGINE, "slots that may be handed out without eviction"),
    Field("waiting", "requests", NOW, "", ENGINE, "requests that wait for admission"),
    Field("running", "requests", NOW, "", ENGINE, "admitted, not finished"),
    Field("aside", "requests", NOW, "", ENGINE,
          "those waiting ones that outgrow the KV pool of the present split, so that others pass"),
    Field("kv_needed", "pages", NOW, "", ENGINE,
          "what the largest request will hold at its end, of those set aside, at the queue's head, running, or served "
          "by a split that an idle engine took; 0 where shortages move the split"),
    Field("concurrency_cap", "requests", NOW, "", ENGINE, "requests that the slots allow to run at once"),
    Field("oldest_wait_over_slo", "1", NOW, "", ENGINE,
          "most of age / TTFT SLO over waiting requests without a first token; 0 if none"),
    Field("mean_wait_over_slo", "1", NOW, "", ENGINE,
          "mean over requests without a first token of min(age / TTFT SLO, 10); 0 if none"),
    Field("busy_fraction", "1", WINDOW, "busy_s", ENGINE, "share of time in which iterations ran"),
    Field("blocked_kv_fraction", "1", WINDOW, "blocked_kv_s", ENGINE,
          "share of time in which the queue's head, or one set aside, waited for pages"),
    Field("blocked_ssm_fraction", "1", WINDOW, "blocked_ssm_s", ENGINE,
          "share of time in which the queue's head waited for slots"),
    Field("arrivals_per_s", "1/s", WINDOW, "received", ENGINE, "requests received"),
    Field("arrivals_per_s_10s", "1/s", FAST, "received", ENGINE, "requests received"),
    Field("arrivals_per_s_100s", "1/s", SLOW, "received", ENGINE, "requests received"),
    Field("prompt_tokens_per_s_10s", "tokens/s", FAST, "received_tokens", ENGINE, "their prompt tokens"),
    Field("prompt_tokens_per_s_100s", "tokens/s", SLOW, "received_tokens", ENGINE, "their prompt tokens"),
    Field("tokens_per_request_10s", "tokens", FAST, "received_tokens / received", ENGINE, "prompt tokens of one"),
    Field("tokens_per_request_100s", "tokens", SLOW, "received_tokens / received", ENGINE, "prompt tokens of one"),
    Field("kv_demand_10s", "1", FAST, KV_DEMAND, ENGINE, "KV's part of the bytes that arrivals ask for"),
    Field("kv_demand_100s", "1", SLOW, KV_DEMAND, ENGINE, "KV's part of the bytes that arrivals ask for"),
    Field("hit_rate_10s", "1", FAST, "reused_tokens / admitted_tokens", ENGINE,
          "of the prompt tokens of requests admitted for the first time, those reused"),
    Field("hit_rate_100s", "1", SLOW, "reused_tokens / admitted_tokens", ENGINE,
          "of the prompt tokens of requests admitted for the first time, those reused"),
    Field("kv_loss_tokens_per_s", "tokens/s", FAST, "kv_loss_tokens", GHOST,
          "tokens recomputed because their pages had been evicted"),
    Field("ssm_loss_tokens_per_s", "tokens/s", FAST, "ssm_loss_tokens", ENGINE,
          "tokens recomputed under resident pages for want of a snapshot"),
    Field("kv_evictions_per_s", "pages/s", FAST, "kv_evictions", ENGINE, "pages evicted for want of room"),
    Field("ssm_evictions_per_s", "slots/s", FAST, "ssm_evictions", ENGINE,
          "snapshots evicted for want of room, or with their pages"),
    Field("finished_per_s", "1/s", WINDOW, "finished", ENGINE, "requests finished"),
    Field("met", "requests", SUM, "met", ENGINE, "finished requests that met both SLOs"),
    Field("missed", "requests", SUM, "missed", ENGINE,
          "SLO misses, once each: when the age passes the TTFT SLO, at rejection or finish"),
    Field("cost", "1", SUM, "cost", ENGINE,
          "sum over requests of min(max(TTFT / SLO, TPOT / SLO), 10), age counted while it passes"),
    Field("preemptions", "requests", SUM, "preemptions", ENGINE, "requests thrown back to the queue"),
    Field("rejected", "requests", SUM, "rejected", ENGINE, "requests given up"),
    Field("ttft_over_slo_10s", "1", FAST, "ttft_over_slo / first_tokens", ENGINE,
          "mean of min(TTFT / TTFT SLO, 10) over first tokens"),
    Field("tpot_over_slo_10s", "1", FAST, "tpot_over_slo / tpots", ENGINE,
          "mean of min(TPOT / TPOT SLO, 10) over finished requests of several tokens"),
    Field("moved_chunks", "chunks", SUM, "moved_chunks", MOVER, "chunks that changed pools"),
    Field("relocated_bytes", "bytes", SUM, "relocated_bytes", MOVER,
          "bytes copied to clear the top of a shrinking pool"),
    *_MARGINALS,
)  # fmt: skip

TELEMETRY = np.dtype([(field.name, "f8") for field in TELEMETRY_TABLE])

COUNTERS = tuple(dict.fromkeys(name for field in TELEMETRY_TABLE for name in field.counters))
"""What has to be counted over the whole episode; those of MARGINAL_FIELDS last."""


def markdown() -> str:
    """TELEMETRY_TABLE as docs/telemetry.md has it."""
    rows = [("field", "unit", "average", "of", "live", "meaning"), ("---",) * len(Field._fields)]
    rows += [(f"`{field.name}`", *field[1:]) for field in TELEMETRY_TABLE]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    print(markdown(), end="")
