"""What happened to the requests of an episode: each metric is defined here and nowhere else.

All are taken over the measured rows. A request without a first token (rejected, never finished, or in a closed loop
never sent) enters the TTFT figures with WORST_RATIO times its TTFT SLO, which is also what it costs. `unserved_tokens`
is the part of all tokens, prompts and outputs, whose requests were rejected or have not finished;
`worst_class_unserved` is that part of the class of traffic of which it is largest, so that nobody is given up for the
others; `token_cost` is the mean cost with each request weighted by its tokens.
"""

import numpy as np

from hbmgym.envs.serving.state import DOES_NOT_FIT, FINISHED, REJECTED, WORST_RATIO
from hbmgym.envs.traces.episode import Episode


def ttft_s(requests: np.ndarray) -> np.ndarray:
    """Seconds from arrival to first token, shape (n,)."""
    measured = requests["first_token_s"] - requests["arrival_s"]
    return np.where(np.isnan(measured), WORST_RATIO * requests["ttft_slo_s"], measured)


def tpot_s(rows: np.ndarray, requests: np.ndarray) -> np.ndarray:
    """Seconds per output token after the first, shape (n,); NaN for unfinished requests and single tokens."""
    gaps = rows["output_tokens"] - 1
    finished = (requests["status"] == FINISHED) & (gaps > 0)
    spent = requests["ended_s"] - requests["first_token_s"]
    return np.where(finished, spent / np.maximum(gaps, 1), np.nan)


def slo_ratio(rows: np.ndarray, requests: np.ndarray, tpot_slo_s: float) -> np.ndarray:
    """max(TTFT / TTFT SLO, TPOT / TPOT SLO), shape (n,); inf for a request that did not finish."""
    ttft_ratio = ttft_s(requests) / requests["ttft_slo_s"]
    ratio = np.fmax(ttft_ratio, tpot_s(rows, requests) / tpot_slo_s)
    return np.where(requests["status"] == FINISHED, ratio, np.inf)


def request_costs(rows: np.ndarray, requests: np.ndarray, tpot_slo_s: float) -> np.ndarray:
    """min(SLO ratio, WORST_RATIO), shape (n,): an episode's cost is their mean over the measured rows."""
    return np.minimum(slo_ratio(rows, requests, tpot_slo_s), WORST_RATIO)


def token_counts(rows: np.ndarray) -> np.ndarray:
    """Tokens of prompt and output, shape (n,), float64."""
    return rows["input_tokens"].astype(np.float64) + rows["output_tokens"]


def worst_class_unserved(tokens: np.ndarray, unserved: np.ndarray, classes: np.ndarray | None) -> float:
    """Part of a class's tokens that is `unserved`, of the class where it is largest; all of shape (n,)."""
    of = np.zeros(len(tokens), np.uint8) if classes is None else classes
    whole, lost = np.bincount(of, tokens), np.bincount(of, tokens * unserved)
    return float((lost / np.maximum(whole, 1.0)).max())


def episode_metrics(episode: Episode, requests: np.ndarray, tpot_slo_s: float) -> dict[str, float]:
    """The metrics of one episode that has run to its end, as plain numbers."""
    measured = episode.rows["measured"] == 1
    rows, requests = episode.rows[measured], requests[measured]
    classes = None if episode.traffic_class is None else episode.traffic_class[measured]
    ratio = slo_ratio(rows, requests, tpot_slo_s)
    ttft, tpot = ttft_s(requests), tpot_s(rows, requests)
    tpot = tpot[~np.isnan(tpot)]
    met = ratio <= 1.0
    admitted = ~np.isnan(requests["admitted_s"])
    prompt_tokens = rows["input_tokens"][admitted].sum()
    tokens, costs = token_counts(rows), request_costs(rows, requests, tpot_slo_s)
    finished, rejected = requests["status"] == FINISHED, requests["status"] == REJECTED
    starved = (requests["preemptions"] > 0) | (requests["reject_reason"] == DOES_NOT_FIT)
    return {
        "requests": len(rows),
        "ttft_mean_s": float(ttft.mean()),
        "ttft_p50_s": float(np.percentile(ttft, 50)),
        "ttft_p99_s": float(np.percentile(ttft, 99)),
        "tpot_p99_s": float(np.percentile(tpot, 99)) if len(tpot) else 0.0,
        "slo_goodput_per_s": float(met.sum() / (episode.horizon_s - episode.warmup_s)),
        "slo_violation_rate": float(1.0 - met.mean()),
        "hit_rate": float(requests["reused_tokens"].sum() / max(prompt_tokens, 1)),
        "preemptions": int(requests["preemptions"].sum()),
        "oom_requests": int(starved.sum()),
        "rejected": int(rejected.sum()),
        "unfinished": int((~finished & ~rejected).sum()),
        "unserved_tokens": float(tokens[~finished].sum() / tokens.sum()),
        "worst_class_unserved": worst_class_unserved(tokens, ~finished, classes),
        "cost": float(costs.mean()),
        "token_cost": float(costs @ tokens / tokens.sum()),
    }
