"""How fast is it: engine, windows, learning, decisions, memory; per CPU-second. `python eval/bench.py --help`."""

import sys

try:
    from hbmgym.cli import command, option, parse_options, user_errors, words
except ModuleNotFoundError as error:
    print(f"{error}: run `make train` once, or use .venv/bin/python {__file__}", file=sys.stderr)
    raise SystemExit(2) from None

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hbmgym.controllers.base import Controller, Setup
from hbmgym.controllers.floor import floored
from hbmgym.controllers.helm.ppo import PpoController
from hbmgym.controllers.helm.variants import VARIANTS, make_variant, shipped_policy
from hbmgym.controllers.registry import MOVING_CONTROLLERS, make_controller
from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.serving.core import Core
from hbmgym.envs.traces.jitter import SPREAD
from hbmgym.envs.traces.load import load_trace
from hbmgym.envs.workload import open_workloads
from hbmgym.eval.bench_engine import (
    measure_engine,
    measure_eviction,
    measure_pricing,
    measure_scaling,
    measure_start,
    measure_trace,
    measure_windows,
)
from hbmgym.eval.bench_memory import measure_memory
from hbmgym.eval.cells import write_json
from hbmgym.eval.options import say_notices

AT_LEAST = {
    "chat_requests_per_cpu_s": 300_000,
    "agents_requests_per_cpu_s": 200_000,
    "lpb_over_lru": 0.5,
    "windows_per_cpu_s": 10_000,
    "ppo_steps_per_cpu_s": 6_000,
    "ppo_steps_per_s_two_threads": 10_000,
    "memory_page_ops_per_s": 1_000_000,
    "memory_blocks_per_s": 20_000_000,
    "memory_calls_per_s_64_live": 1_000_000,
    "memory_calls_per_s_256_live": 1_000_000,
    "memory_move_speedup_128": 5,
}
AT_MOST = {
    "sessions_page_time_growth": 1.2,
    "trace_memory_over_references": 1.0,
    "priced_us_per_request_lru": 2,
    "priced_us_per_request_lpb": 2,
    "scaling_spread": 1.2,
    "start_cold_cpu_s": 15,
    "start_cached_cpu_s": 1,
    "decision_us_p99": 10,
    "decision_us_p50_helm": 3,
    "decision_us_p99_helm": 6,
    "adapter_us_p50": 5,
    **{f"decision_us_p99_{name}": 100 for name in MOVING_CONTROLLERS},
    "decision_us_p99_convex": 20,
    "memory_mappings_grown": 0,
    "memory_mappings_per_chunk": 1.0,
    "memory_resident_over_budget": 1.01,
    "memory_memfd_over_budget": 1.01,
}
Figures = dict[str, float]


@dataclass(frozen=True)
class BenchOptions:
    """What is measured, how often, and where the figures go."""

    parts: tuple[str, ...] = words(
        "what to measure (default: all): engine, eviction, pricing, scaling, windows, start, ppo, decision, memory",
        "PART",
    )
    repeats: int = option(3, "times each part is measured; medians are printed")
    trace: str = option("", "recorded trace that part engine replays as well, e.g. a session library")
    spread: bool = option(True, SPREAD)
    out: str = option("", "file for the figures as JSON")


def measure_ppo() -> Figures:
    """Steps of PPO per CPU-second with the trainer's own settings, what all its training episodes cost once included,
    per second with two threads, and where the time goes."""
    import torch

    from hbmgym.train.collect import RolloutPPO
    from hbmgym.train.domains import Domain, Reference
    from hbmgym.train.learn import make_envs, make_model
    from hbmgym.train.options import TrainOptions
    from hbmgym.train.pool import Pool

    torch.set_num_threads(1)
    options = TrainOptions()
    workloads = tuple(options.workloads(options.serving_config()))
    domain = Domain(options.serving_config(), workloads, "train", (), {workloads[0].name: Reference(0.5, 1.0, 0.0)})
    envs = make_envs(options, [domain])
    model = make_model(options, envs)
    rollout = options.n_envs * options.n_steps
    model.learn(rollout)
    started = time.process_time()
    for seed in Pool(options.episodes, options.seed).seeds:
        envs.envs[0].reset(options={"episode_seed": seed})
    episodes_s = time.process_time() - started
    model = make_model(options, envs)
    with _Stopwatch(RolloutPPO, "collect_rollouts") as collect, _Stopwatch(RolloutPPO, "train") as update:
        model.learn(4 * rollout)
        spent_s = collect.spent_s + update.spent_s
        step_s = spent_s / (4 * rollout) + episodes_s / options.total_timesteps
        figures = {
            "ppo_steps_per_cpu_s": 1.0 / step_s,
            "ppo_share_of_rollouts": collect.spent_s / (4 * rollout) / step_s,
            "ppo_share_of_updates": update.spent_s / (4 * rollout) / step_s,
            "ppo_share_of_episodes": episodes_s / options.total_timesteps / step_s,
        }
    model.threads = 2
    started = time.perf_counter()
    model.learn(4 * rollout)
    seconds = (time.perf_counter() - started) / (4 * rollout) + episodes_s / 2 / options.total_timesteps
    episode = workloads[0].episode("train", 0)
    windows = episode.horizon_s / options.serving_config().window_s
    return {
        **figures,
        "ppo_steps_per_s_two_threads": 1.0 / seconds,
        "ppo_requests_per_window": len(episode.rows) / windows,
    }


class _Stopwatch:
    """Adds up the CPU time of a method while the context lasts."""

    def __init__(self, owner: type, method: str) -> None:
        self._owner, self._method = owner, method
        self._function: Callable[..., object] = getattr(owner, method)
        self.spent_s = 0.0

    def __enter__(self) -> "_Stopwatch":
        def timed(*arguments: object, **named: object) -> object:
            started = time.process_time()
            try:
                return self._function(*arguments, **named)
            finally:
                self.spent_s += time.process_time() - started

        setattr(self._owner, self._method, timed)
        return self

    def __exit__(self, *_: object) -> None:
        setattr(self._owner, self._method, self._function)


def measure_decision() -> Figures:
    """Microseconds of one decision of the learned controller, observation included, and of every other that moves."""
    config = ServingConfig()
    core = Core(config)
    core.reset(open_workloads(config)[0].episode("train", 0))
    records = [core.run_window().copy() for _ in range(200)]
    policy = shipped_policy()
    learned = _time_decisions(PpoController(policy), core.setup, records, 20_000)
    figures = {f"decision_us_{key}": value for key, value in learned.items()}
    for name in VARIANTS:
        spent = _time_decisions(make_variant(name, policy), core.setup, records, 20_000)
        figures |= {f"decision_us_{key}_{name}": value for key, value in spent.items()}
    figures["adapter_us_p50"] = figures["decision_us_p50_helm-residual"] - figures["decision_us_p50_helm-base"]
    for name in MOVING_CONTROLLERS:
        spent = _time_decisions(make_controller(name), core.setup, records, 2_000)
        figures |= {f"decision_us_{key}_{name}": value for key, value in spent.items()}
    return figures


def _time_decisions(controller: Controller, setup: Setup, records: Sequence[np.record], count: int) -> Figures:
    """p50 and p99 of `count` decisions over a floor, after one round through `records` that may compile."""
    controller = floored(controller)
    controller.reset(setup)
    for record in records:
        controller.act(record)
    spent_us = []
    gc.disable()
    for record in itertools.islice(itertools.cycle(records), count):
        started = time.perf_counter_ns()
        controller.act(record)
        spent_us.append((time.perf_counter_ns() - started) / 1e3)
    gc.enable()
    return {key: float(np.percentile(spent_us, q)) for key, q in (("p50", 50), ("p99", 99))}


PARTS: dict[str, Callable[[], Figures]] = {
    "engine": measure_engine,
    "eviction": measure_eviction,
    "pricing": measure_pricing,
    "scaling": measure_scaling,
    "windows": measure_windows,
    "start": measure_start,
    "ppo": measure_ppo,
    "decision": measure_decision,
    "memory": measure_memory,
}


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print medians beside the marks that are to be reached."""
    options = parse_options(BenchOptions, __doc__ or "", arguments)
    with user_errors():
        if unknown := set(options.parts) - set(PARTS):
            raise ValueError(f"part {', '.join(sorted(unknown))} is unknown, expected one of: {', '.join(PARTS)}")
        if options.repeats < 1:
            raise ValueError(f"--repeats is {options.repeats}, expected an integer >= 1")
        if options.trace:
            say_notices([load_trace(options.trace, spread=options.spread)])
    figures: Figures = {}
    for name in options.parts or PARTS:
        runs = [_measure(name, options.trace, options.spread) for _ in range(options.repeats)]
        for key in runs[0]:
            figures[key] = statistics.median(run[key] for run in runs)
            print(_line(key, figures[key], [run[key] for run in runs]), flush=True)
    if options.out:
        write_json(Path(options.out), figures)


def _measure(name: str, trace: str, spread: bool) -> Figures:
    figures = PARTS[name]()
    return figures | measure_trace(trace, spread) if name == "engine" and trace else figures


def _line(key: str, value: float, runs: Sequence[float]) -> str:
    line = f"{key:35} {value:14,.3f}   from {min(runs):,.3f} to {max(runs):,.3f}"
    if key in AT_LEAST:
        return f"{line}   mark >= {AT_LEAST[key]:,}: {'reached' if value >= AT_LEAST[key] else 'MISSED'}"
    if key in AT_MOST:
        return f"{line}   mark <= {AT_MOST[key]:,}: {'reached' if value <= AT_MOST[key] else 'MISSED'}"
    return line


if __name__ == "__main__":
    main()
