"""How fast the serving engine is: requests, pages and windows per CPU-second, long episodes, the first call."""

import math
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc

import numpy as np

from hbmgym.envs.serving.config import Policies, ServingConfig
from hbmgym.envs.serving.core import Core
from hbmgym.envs.traces.compose import compose_generated
from hbmgym.envs.traces.distributions import GeometricTurns, LogNormal, Mixture
from hbmgym.envs.traces.episode import Episode
from hbmgym.envs.traces.load import load_trace
from hbmgym.envs.traces.scenarios import generate_class
from hbmgym.envs.traces.session_class import SessionClass
from hbmgym.envs.workload import TraceWorkload, open_workloads

Figures = dict[str, float]


def _session_class(name: str, first: int, text: int, output: int, turns: float, gap_s: float) -> SessionClass:
    """Sessions whose lengths in tokens are always the same; only their turns and the times between them vary."""
    always = [LogNormal(math.log(tokens), 0.0) for tokens in (first, text, output)]
    added = Mixture(((1.0, always[1]),))
    return SessionClass(name, always[0], added, always[2], LogNormal(gap_s, 0.5), GeometricTurns(turns, int(2 * turns)))


CHAT, CHAT_RATE = _session_class("bench-chat", 4300, 100, 200, 4.0, 1.5), 3.0
"""4.9k tokens in, 200 out, and requests per second."""
AGENTS, AGENTS_RATE = _session_class("bench-agents", 3200, 500, 400, 8.0, 1.0), 4.0
"""7.5k in, 400 out."""
SESSION_TOKENS = (50_000, 100_000, 200_000)
SESSION_PAGES_PER_S = 300.0
TRACE_LOAD = 0.2
PRICING_RUNS = 5


def _sessions(tokens: int) -> SessionClass:
    """As Claude Code's recorded sessions: about `tokens` in, 400 out, many turns that each add little."""
    return _session_class("bench-sessions", tokens * 73 // 100, tokens // 50 - 400, 400, 20.0, 1.0)


def measure_engine() -> Figures:
    """Requests per CPU-second: chat and agents with reuse, and sessions of 100k tokens with their rate per page."""
    return {
        **_figures("chat", _episode(CHAT, CHAT_RATE, 24_000), 0.5),
        **_figures("agents", _episode(AGENTS, AGENTS_RATE, 24_000), 0.5),
        **_session_figures(),
    }


def measure_trace(path: str, spread: bool) -> Figures:
    """The same figures for a recorded trace, at a load that one GPU can serve.

    And the most memory that loading it and making the episode take, against its page references at 4 bytes each.
    """
    tracemalloc.start()
    trace = load_trace(path, spread=spread)
    workload = TraceWorkload(trace, TRACE_LOAD, ServingConfig().page_tokens)
    episode = workload.episode("train", 0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    references = int(trace.block_counts.sum())
    return {
        **_figures("trace", episode, 0.85),
        "trace_references": references,
        "trace_episode_references": len(episode.refs),
        "trace_memory_mib": peak / 2**20,
        "trace_memory_over_references": peak / (4 * references),
    }


def measure_eviction() -> Figures:
    """Requests per CPU-second under lpb over those under lru: chat with reuse."""
    episode = _episode(CHAT, CHAT_RATE, 24_000)
    spent_s = {}
    for order in ("lru", "lpb"):
        spent_s[order], _ = replay(Core(ServingConfig(policies=Policies(eviction=order))), episode, 0.5)
    return {
        "lpb_requests_per_cpu_s": len(episode.rows) / spent_s["lpb"],
        "lpb_over_lru": spent_s["lru"] / spent_s["lpb"],
    }


def measure_pricing() -> Figures:
    """Microseconds per request that on_shortage=priced takes beyond evict, over a whole episode of mix-shift.

    They are what looking for prices takes, and what the other decisions do: chunks move, and more blocks are taken.
    """
    episode = open_workloads(ServingConfig(), scenarios=("mix-shift",))[0].episode("train", 0)
    figures = {}
    for order in ("lru", "lpb"):
        cores = [Core(ServingConfig(policies=Policies(order, on_shortage=rule))) for rule in ("evict", "priced")]
        # Each the best of some by turns: what is wanted is small beside what else a machine does.
        spent_s = np.min([[replay(core, episode, 0.5)[0] for core in cores] for _ in range(PRICING_RUNS)], axis=0)
        figures[f"priced_us_per_request_{order}"] = 1e6 * float(spent_s[1] - spent_s[0]) / len(episode.rows)
    return figures


def _session_figures() -> Figures:
    """At 100k tokens; and how much longer a page takes at 200k than at 50k, 1 or less if time is linear in pages."""
    figures, page_s = {}, []
    for tokens in SESSION_TOKENS:
        rate = SESSION_PAGES_PER_S * 64 / tokens
        measured = _figures("sessions", _episode(_sessions(tokens), rate, int(3e8 / tokens)), 0.85)
        page_s.append(1.0 / measured["sessions_pages_per_cpu_s"])
        if tokens == SESSION_TOKENS[1]:
            figures = measured
    return figures | {"sessions_page_time_growth": page_s[-1] / page_s[0]}


def measure_scaling() -> Figures:
    """CPU time of a chat request in episodes of ten thousand, a hundred thousand and a million."""
    spent_us = {}
    for count in (10_000, 100_000, 1_000_000):
        episode = _episode(CHAT, CHAT_RATE, count)
        spent_s, _ = replay(Core(ServingConfig()), episode, 0.5)
        spent_us[count] = 1e6 * spent_s / len(episode.rows)
    return {
        "scaling_us_per_request_1e4": spent_us[10_000],
        "scaling_us_per_request_1e6": spent_us[1_000_000],
        "scaling_spread": max(spent_us.values()) / min(spent_us.values()),
    }


def measure_windows() -> Figures:
    """One-second windows per CPU-second at steady-chat, Telemetry included."""
    config = ServingConfig(window_s=1.0)
    episode = open_workloads(config, scenarios=("steady-chat",))[0].episode("train", 0)
    spent_s, windows = replay(Core(config), episode, 0.5)
    return {"windows_per_cpu_s": windows / spent_s, "windows_requests_each": len(episode.rows) / windows}


def measure_start() -> Figures:
    """CPU-seconds from the start of a process to its first window, without and with compiled kernels in the cache."""
    with tempfile.TemporaryDirectory() as home:
        return {"start_cold_cpu_s": _start(home), "start_cached_cpu_s": _start(home)}


def _start(home: str) -> float:
    script = "from hbmgym.eval.bench_engine import first_window; first_window()"
    # Python's own bytecode is kept, as it is wherever nothing forbids it.
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env={**kept, "HOME": home},
        check=True,
        capture_output=True,
        text=True,
    )
    return float(ended.stdout)


def first_window() -> None:
    """Run one window and print the CPU time that this process has used."""
    core = Core(ServingConfig())
    core.reset(_episode(CHAT, CHAT_RATE, 1_000))
    core.run_window()
    print(time.process_time())


def _episode(group: SessionClass, rate_per_s: float, requests: int) -> Episode:
    """About so many requests of one class; longer than training may have them."""
    trace = generate_class(group, 0, rate_per_s, 0.0, requests / rate_per_s)
    return compose_generated(trace, seed=0, page_tokens=64, warmup_s=0.0, max_refs=50_000_000)


def _figures(name: str, episode: Episode, kv_share: float) -> Figures:
    core = Core(ServingConfig())
    spent_s, _ = replay(core, episode, kv_share)
    admitted = ~np.isnan(core.requests["admitted_s"])
    tokens = episode.rows["input_tokens"][admitted]
    return {
        f"{name}_requests_per_cpu_s": len(episode.rows) / spent_s,
        f"{name}_mean_input_tokens": float(episode.rows["input_tokens"].mean()),
        f"{name}_mean_output_tokens": float(episode.rows["output_tokens"].mean()),
        f"{name}_admitted_fraction": float(admitted.mean()),
        f"{name}_hit_rate": core.counters.reused_tokens / core.counters.admitted_tokens,
        f"{name}_pages_per_cpu_s": float((tokens // 64).sum()) / spent_s,
    }


def replay(core: Core, episode: Episode, kv_share: float) -> tuple[float, int]:
    """CPU-seconds and windows of an episode that has been replayed once before, to warm up."""
    for _ in range(2):
        core.reset(episode, kv_share)
        windows = 0
        started = time.process_time()
        while not core.done:
            core.run_window()
            windows += 1
    return time.process_time() - started, windows
