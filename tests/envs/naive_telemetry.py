"""The Telemetry record once more, in plain Python, from what the naive engine's requests and pools are like."""

import math
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.envs.naive_engine import Blocks, Job, NaiveEngine

WORST = 10.0


class NaiveTelemetry:
    """`close_window` at the end of every window."""

    def __init__(self, engine: "NaiveEngine"):
        self.engine = engine
        self.start_s = 0.0
        self.totals = dict.fromkeys(self.count(), 0.0)
        self.over_10s, self.over_100s = dict.fromkeys(self.totals, 0.0), dict.fromkeys(self.totals, 0.0)
        self.ratios: dict[str, float] = {}

    def close_window(self) -> dict[str, float]:
        """By field."""
        engine = self.engine
        seconds = max(engine.now_s - self.start_s, 1e-9)
        totals = self.count()
        grown = {name: total - self.totals[name] for name, total in totals.items()}
        for averages, time_s in ((self.over_10s, 10.0), (self.over_100s, 100.0)):
            for name, growth in grown.items():
                averages[name] -= math.expm1(-seconds / time_s) * (growth / seconds - averages[name])
        self.start_s, self.totals = engine.now_s, totals
        told = {"time_s": engine.now_s, "window_s": seconds}
        told |= self.constants() | self.pools() | self.requests() | self.growth(grown, seconds)
        return told | self.averages() | self.marginals()

    # --- counters

    def count(self) -> dict[str, float]:
        engine, totals = self.engine, self.engine.totals
        jobs = [job for job in engine.jobs if job.status not in ("future", "held")]
        started = [job for job in jobs if job.first_token_s is not None]
        ended = [job for job in jobs if job.status == "finished"]
        several = [job for job in ended if job.output > 1]
        counted = {
            "arrivals": len(jobs),
            "tokens": sum(job.input for job in jobs),
            "admitted": totals.admitted_tokens,
            "reused": totals.reused_tokens,
            "kv lost": totals.kv_loss_tokens,
            "ssm lost": totals.ssm_loss_tokens,
            "kv evicted": engine.kv.past.evictions,
            "ssm evicted": engine.ssm.past.evictions,
            "first tokens": len(started),
            "ttft": sum(map(self.ttft, started)),
            "several": len(several),
            "tpot": sum(map(self.tpot, several)),
            "cost": sum(map(self.cost, jobs)),
            "busy": totals.busy_s,
            "blocked on kv": totals.blocked_s["kv"],
            "blocked on ssm": totals.blocked_s["ssm"],
            "finished": len(ended),
            "met": totals.met,
            "missed": totals.missed,
            "preemptions": totals.preemptions,
            "rejected": sum(job.status == "rejected" for job in jobs),
            "moved": totals.moved_chunks,
            "relocated": totals.relocated_bytes,
        }
        return counted | engine.marginals.seconds

    def age(self, job: "Job") -> float:
        return (self.engine.now_s - job.arrival_s) / job.slo_s

    def ttft(self, job: "Job") -> float:
        return min((job.first_token_s - job.arrival_s) / job.slo_s, WORST)

    def tpot(self, job: "Job") -> float:
        return min((job.ended_s - job.first_token_s) / (job.output - 1) / self.engine.tpot_slo_s, WORST)

    def cost(self, job: "Job") -> float:
        if job.status == "rejected":
            return WORST
        if job.first_token_s is None:
            return min(self.age(job), WORST)
        is_slow = job.status == "finished" and job.output > 1
        return max(self.ttft(job), self.tpot(job) if is_slow else 0.0)

    # --- fields

    def constants(self) -> dict[str, float]:
        engine = self.engine
        least, most = engine.layout.share_bounds
        return {
            "budget_bytes": engine.layout.chunks * engine.layout.chunk_bytes,
            "slot_bytes": engine.layout.slot_bytes,
            "kv_token_bytes": engine.kv_token_bytes,
            "slots_per_request": engine.spr,
            "kv_share_min": least,
            "kv_share_max": most,
        }

    def pools(self) -> dict[str, float]:
        engine, kv, ssm = self.engine, self.engine.kv, self.engine.ssm
        kept = [[("id", i) for i in job.ids[: engine.pins.left[job]]] for job in engine.pins.ends_s]
        kept_pages, kept_states = (
            Counter(name for names in kept for name in names),
            Counter(names[-1] for names in kept),
        )
        kv_live, ssm_live = self.held_by_requests(kv, kept_pages), self.held_by_requests(ssm, kept_states)
        slots = engine.holding(0, len(kv.pins))[-1] if engine.in_one_buffer else ssm.limit
        return {
            "kv_share_requested": kv.target / engine.layout.chunks,
            "kv_share_effective": kv.chunks / engine.layout.chunks,
            "moving_chunks": abs(kv.target - kv.chunks),
            "kv_capacity": kv.capacity,
            "kv_live": kv_live,
            "kv_cached": len(kv.at) - kv_live,
            "kv_free": max(kv.limit - len(kv.at), 0),
            "ssm_capacity": ssm.capacity,
            "ssm_live": ssm_live,
            "ssm_cached": len(ssm.at) - ssm_live,
            "ssm_free": max(ssm.limit - len(ssm.at), 0),
            "concurrency_cap": slots // engine.spr,
        }

    def held_by_requests(self, blocks: "Blocks", kept: Counter) -> int:
        return sum(pins > kept[name] for name, pins in blocks.pins.items())

    def requests(self) -> dict[str, float]:
        engine = self.engine
        waiting = engine.queue + engine.aside
        unanswered = [job for job in waiting + engine.prefilling if job.first_token_s is None]
        return {
            "waiting": len(waiting),
            "running": len(engine.prefilling + engine.decoding),
            "aside": len(engine.aside),
            "kv_needed": engine.take_kv_needed(),
            "oldest_wait_over_slo": max((self.age(job) for job in unanswered if job in waiting), default=0.0),
            "mean_wait_over_slo": sum(min(self.age(job), WORST) for job in unanswered) / max(len(unanswered), 1),
        }

    def growth(self, grown: dict[str, float], seconds: float) -> dict[str, float]:
        return {
            "busy_fraction": grown["busy"] / seconds,
            "blocked_kv_fraction": grown["blocked on kv"] / seconds,
            "blocked_ssm_fraction": grown["blocked on ssm"] / seconds,
            "arrivals_per_s": grown["arrivals"] / seconds,
            "finished_per_s": grown["finished"] / seconds,
            "met": grown["met"],
            "missed": grown["missed"],
            "cost": grown["cost"],
            "preemptions": grown["preemptions"],
            "rejected": grown["rejected"],
            "moved_chunks": grown["moved"],
            "relocated_bytes": grown["relocated"],
        }

    def averages(self) -> dict[str, float]:
        ten, hundred = self.over_10s, self.over_100s
        for suffix, rates in (("10s", ten), ("100s", hundred)):
            pages = rates["tokens"] * self.engine.kv_token_bytes
            slots = rates["arrivals"] * self.engine.spr * self.engine.layout.slot_bytes
            self.tell_ratio(f"tokens_per_request_{suffix}", rates["tokens"], rates["arrivals"])
            self.tell_ratio(f"kv_demand_{suffix}", pages, pages + slots)
            self.tell_ratio(f"hit_rate_{suffix}", rates["reused"], rates["admitted"])
        self.tell_ratio("ttft_over_slo_10s", ten["ttft"], ten["first tokens"])
        self.tell_ratio("tpot_over_slo_10s", ten["tpot"], ten["several"])
        return self.ratios | {
            "arrivals_per_s_10s": ten["arrivals"],
            "arrivals_per_s_100s": hundred["arrivals"],
            "prompt_tokens_per_s_10s": ten["tokens"],
            "prompt_tokens_per_s_100s": hundred["tokens"],
            "kv_loss_tokens_per_s": ten["kv lost"],
            "ssm_loss_tokens_per_s": ten["ssm lost"],
            "kv_evictions_per_s": ten["kv evicted"],
            "ssm_evictions_per_s": ten["ssm evicted"],
        }

    def tell_ratio(self, name: str, part: float, whole: float) -> None:
        """Of what has all but ceased, the ratio stays as it was."""
        self.ratios[name] = part / whole if whole > 1e-100 else self.ratios.get(name, 0.0)

    def marginals(self) -> dict[str, float]:
        return {
            name + suffix: rates[name]
            for suffix, rates in (("", self.over_10s), ("_100s", self.over_100s))
            for name in self.engine.marginals.seconds
        }
