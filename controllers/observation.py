"""observe(telemetry): what a policy sees of a Telemetry record, every entry within [-1, 1].

The normalisation is fixed, so that training, evaluation and service see the same numbers. Nothing tells the time of
day, the length of the episode or the trace.
"""

import math
from collections.abc import Mapping

import numpy as np

from hbmgym.controllers.telemetry import MARGINAL_FIELDS, TELEMETRY
from hbmgym.memory_backend.jit import kernel, subkernel

# Reference points of the logarithms: the middle of what is served, not limits.
TOKENS_REFERENCE = 4096.0
BUDGET_REFERENCE_BYTES = 32.0 * 2**30
CONCURRENCY_REFERENCE = 32.0

# name, formula over Telemetry fields. squash(x) = x / (1 + x); ratios are 0 where the whole is 0; all is clipped to
# [-1, 1]. Before the first arrival kv_demand counts as kv_share_effective.
OBSERVATION_GROUPS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "shares": (
        ("kv_share_effective", "2 kv_share_effective - 1"),
        ("kv_share_requested", "2 kv_share_requested - 1"),
        ("kv_share_pending", "5 (kv_share_requested - kv_share_effective)"),
        ("kv_share_position", "place of kv_share_requested between its bounds, -1 to 1"),
        ("kv_share_odds", "log(kv_share_requested / (1 - kv_share_requested)) / 6"),
        ("moving_chunks", "log(1 + moving_chunks) / 10"),
    ),
    "pools": (
        ("kv_live", "kv_live / kv_capacity"),
        ("kv_cached", "kv_cached / kv_capacity"),
        ("kv_free", "kv_free / kv_capacity"),
        ("ssm_live", "ssm_live / ssm_capacity"),
        ("ssm_cached", "ssm_cached / ssm_capacity"),
        ("ssm_free", "ssm_free / ssm_capacity"),
    ),
    "queue": (
        ("waiting", "log(1 + waiting) / 7"),
        ("running", "running / concurrency_cap"),
        ("concurrency_cap", "log(concurrency_cap / 32) / 5"),
        (
            "prompts_in_kv",
            "log(kv_share_effective budget_bytes / kv_token_bytes / (64 + tokens_per_request_100s) / 32) / 5",
        ),
        ("oldest_wait", "squash(oldest_wait_over_slo)"),
        ("mean_wait", "squash(mean_wait_over_slo)"),
    ),
    "arrivals": (
        ("arrivals_now", "log((1 + window_s arrivals_per_s) / (1 + window_s arrivals_per_s_10s)) / 3"),
        ("arrivals_trend", "log((1 + 10 s arrivals_per_s_10s) / (1 + 10 s arrivals_per_s_100s)) / 3"),
        ("finished_now", "log((1 + window_s finished_per_s) / (1 + window_s arrivals_per_s)) / 3"),
        ("token_rate_10s", "squash(prompt_tokens_per_s_10s 60 s kv_token_bytes / budget_bytes)"),
        ("token_rate_100s", "squash(prompt_tokens_per_s_100s 60 s kv_token_bytes / budget_bytes)"),
        ("tokens_per_request_10s", "log((64 + tokens_per_request_10s) / 4096) / 5"),
        ("tokens_per_request_100s", "log((64 + tokens_per_request_100s) / 4096) / 5"),
    ),
    "demand": (
        ("kv_demand_10s", "2 kv_demand_10s - 1"),
        ("kv_demand_100s", "2 kv_demand_100s - 1"),
        ("kv_demand_gap_10s", "kv_demand_10s - kv_share_effective"),
        ("kv_demand_gap_100s", "kv_demand_100s - kv_share_effective"),
        ("hit_rate_10s", "hit_rate_10s"),
        ("hit_rate_100s", "hit_rate_100s"),
        ("kv_loss", "squash(4 kv_loss_tokens_per_s / prompt_tokens_per_s_10s)"),
        ("ssm_loss", "squash(4 ssm_loss_tokens_per_s / prompt_tokens_per_s_10s)"),
        ("kv_evictions", "squash(kv_evictions_per_s 60 s / kv_capacity)"),
        ("ssm_evictions", "squash(ssm_evictions_per_s 60 s / ssm_capacity)"),
    ),
    "pressure": (
        ("blocked_kv", "blocked_kv_fraction"),
        ("blocked_ssm", "blocked_ssm_fraction"),
        ("preemptions", "squash(preemptions / (1 + window_s arrivals_per_s))"),
        ("rejected", "squash(rejected / (1 + window_s arrivals_per_s))"),
        ("busy_fraction", "busy_fraction"),
    ),
    "service": (
        ("ttft_over_slo", "squash(ttft_over_slo_10s)"),
        ("tpot_over_slo", "squash(tpot_over_slo_10s)"),
        ("met", "met / (1 + met + missed)"),
        ("missed", "missed / (1 + met + missed)"),
    ),
    "geometry": (
        ("tokens_per_slot", "log(slot_bytes / kv_token_bytes / 4096) / 5"),
        ("budget", "log(budget_bytes / 32 GiB) / 5"),
        ("slots_per_request", "slots_per_request / 8"),
    ),
    "marginals": tuple((name, f"squash(10 {name})") for name in MARGINAL_FIELDS),
}
"""By what they tell of; (name, formula) each."""
OBSERVATION_TABLE = tuple(row for rows in OBSERVATION_GROUPS.values() for row in rows)
OBSERVATION_NAMES = tuple(name for name, _ in OBSERVATION_TABLE)
OBSERVATION_SIZE = len(OBSERVATION_TABLE)

# Kernels reach the fields of flat arrays by name: passing a record from Python costs ten times as much.
_TELEMETRY = np.dtype((np.record, TELEMETRY))
_OBSERVATION = np.dtype((np.record, [(name, "f4") for name in OBSERVATION_NAMES]))


@subkernel
def _bounded(x):
    return min(max(x, -1.0), 1.0) if x == x else 0.0


@subkernel
def _squash(x):
    return x / (1.0 + abs(x)) if abs(x) < math.inf else _bounded(x)


@subkernel
def _ratio(part, whole):
    return part / whole if whole > 0.0 else 0.0


@subkernel
def _log_ratio(part, whole, scale):
    # Not math.log, which raises for 0 where there is no compiler.
    return _bounded(np.log(part / whole) / scale) if part > 0.0 and whole > 0.0 else 0.0


@subkernel
def _log1p(x):
    return math.log1p(x) if x > 0.0 else 0.0


@subkernel
def _known(demand, share):
    # Before the first arrival there is no demand, which must not look like a demand for slots only.
    return demand if demand > 0.0 else share


@subkernel
def _see_shares(t, o):
    o.kv_share_effective = _bounded(2.0 * t.kv_share_effective - 1.0)
    o.kv_share_requested = _bounded(2.0 * t.kv_share_requested - 1.0)
    o.kv_share_pending = _bounded(5.0 * (t.kv_share_requested - t.kv_share_effective))
    above, width = t.kv_share_requested - t.kv_share_min, t.kv_share_max - t.kv_share_min
    o.kv_share_position = _bounded(2.0 * above / width - 1.0) if width > 0.0 else 0.0
    o.kv_share_odds = _log_ratio(t.kv_share_requested, 1.0 - t.kv_share_requested, 6.0)
    o.moving_chunks = _bounded(_log1p(t.moving_chunks) / 10.0)


@subkernel
def _see_pools(t, o):
    o.kv_live = _bounded(_ratio(t.kv_live, t.kv_capacity))
    o.kv_cached = _bounded(_ratio(t.kv_cached, t.kv_capacity))
    o.kv_free = _bounded(_ratio(t.kv_free, t.kv_capacity))
    o.ssm_live = _bounded(_ratio(t.ssm_live, t.ssm_capacity))
    o.ssm_cached = _bounded(_ratio(t.ssm_cached, t.ssm_capacity))
    o.ssm_free = _bounded(_ratio(t.ssm_free, t.ssm_capacity))
    o.kv_evictions = _squash(60.0 * _ratio(t.kv_evictions_per_s, t.kv_capacity))
    o.ssm_evictions = _squash(60.0 * _ratio(t.ssm_evictions_per_s, t.ssm_capacity))
    o.blocked_kv = _bounded(t.blocked_kv_fraction)
    o.blocked_ssm = _bounded(t.blocked_ssm_fraction)


@subkernel
def _see_queue(t, o):
    o.waiting = _bounded(_log1p(t.waiting) / 7.0)
    o.running = _bounded(_ratio(t.running, t.concurrency_cap))
    o.concurrency_cap = _log_ratio(t.concurrency_cap, CONCURRENCY_REFERENCE, 5.0)
    prompts = _ratio(t.kv_share_effective * t.budget_bytes, t.kv_token_bytes * (64.0 + t.tokens_per_request_100s))
    o.prompts_in_kv = _log_ratio(prompts, CONCURRENCY_REFERENCE, 5.0)
    o.oldest_wait = _squash(t.oldest_wait_over_slo)
    o.mean_wait = _squash(t.mean_wait_over_slo)
    o.busy_fraction = _bounded(t.busy_fraction)


@subkernel
def _see_arrivals(t, o):
    arrived = 1.0 + t.window_s * t.arrivals_per_s
    # One request on either side keeps the noise of a few arrivals small.
    o.arrivals_now = _log_ratio(arrived, 1.0 + t.window_s * t.arrivals_per_s_10s, 3.0)
    o.arrivals_trend = _log_ratio(1.0 + 10.0 * t.arrivals_per_s_10s, 1.0 + 10.0 * t.arrivals_per_s_100s, 3.0)
    o.finished_now = _log_ratio(1.0 + t.window_s * t.finished_per_s, arrived, 3.0)
    o.preemptions = _squash(t.preemptions / arrived)
    o.rejected = _squash(t.rejected / arrived)
    budgets_per_token = 60.0 * _ratio(t.kv_token_bytes, t.budget_bytes)
    o.token_rate_10s = _squash(t.prompt_tokens_per_s_10s * budgets_per_token)
    o.token_rate_100s = _squash(t.prompt_tokens_per_s_100s * budgets_per_token)
    o.tokens_per_request_10s = _log_ratio(64.0 + t.tokens_per_request_10s, TOKENS_REFERENCE, 5.0)
    o.tokens_per_request_100s = _log_ratio(64.0 + t.tokens_per_request_100s, TOKENS_REFERENCE, 5.0)


@subkernel
def _see_demand(t, o):
    fast = _known(t.kv_demand_10s, t.kv_share_effective)
    slow = _known(t.kv_demand_100s, t.kv_share_effective)
    o.kv_demand_10s = _bounded(2.0 * fast - 1.0)
    o.kv_demand_100s = _bounded(2.0 * slow - 1.0)
    o.kv_demand_gap_10s = _bounded(fast - t.kv_share_effective)
    o.kv_demand_gap_100s = _bounded(slow - t.kv_share_effective)
    o.hit_rate_10s = _bounded(t.hit_rate_10s)
    o.hit_rate_100s = _bounded(t.hit_rate_100s)
    o.kv_loss = _squash(4.0 * _ratio(t.kv_loss_tokens_per_s, t.prompt_tokens_per_s_10s))
    o.ssm_loss = _squash(4.0 * _ratio(t.ssm_loss_tokens_per_s, t.prompt_tokens_per_s_10s))


@subkernel
def _see_service(t, o):
    o.ttft_over_slo = _squash(t.ttft_over_slo_10s)
    o.tpot_over_slo = _squash(t.tpot_over_slo_10s)
    judged = 1.0 + t.met + t.missed
    o.met = _bounded(t.met / judged)
    o.missed = _bounded(t.missed / judged)


@subkernel
def _see_geometry(t, o):
    o.tokens_per_slot = _log_ratio(t.slot_bytes, TOKENS_REFERENCE * t.kv_token_bytes, 5.0)
    o.budget = _log_ratio(t.budget_bytes, BUDGET_REFERENCE_BYTES, 5.0)
    o.slots_per_request = _bounded(t.slots_per_request / 8.0)


_MARGINALS = len(MARGINAL_FIELDS)  # the last ones of a record, and of an observation


@subkernel
def _see_marginals(values, observation):
    for i in range(_MARGINALS):
        observation[OBSERVATION_SIZE - _MARGINALS + i] = _squash(10.0 * values[len(values) - _MARGINALS + i])


@kernel
def observe_record(values, observation):
    """`observe` for kernels: float64[TELEMETRY_TABLE] to float32[OBSERVATION_SIZE]."""
    t = values.view(_TELEMETRY)[0]
    o = observation.view(_OBSERVATION)[0]
    _see_shares(t, o)
    _see_pools(t, o)
    _see_queue(t, o)
    _see_arrivals(t, o)
    _see_demand(t, o)
    _see_service(t, o)
    _see_geometry(t, o)
    _see_marginals(values, observation)


def observe(telemetry: np.record) -> np.ndarray:
    """One TELEMETRY record (no negative entries) as float32[OBSERVATION_SIZE], by OBSERVATION_TABLE."""
    observation = np.empty(OBSERVATION_SIZE, np.float32)
    observe_record(np.frombuffer(telemetry, np.float64), observation)
    return observation
