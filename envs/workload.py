"""Workload: where episodes come from, a generated scenario or recorded traces, at a stated load."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hbmgym.envs.calibration import class_rate, class_rates
from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.traces.avmp_traffic import PaperTraffic, find_traffic
from hbmgym.envs.traces.compose import LEAST_LOAD, MOST_LOAD, compose, compose_generated
from hbmgym.envs.traces.episode import LOOPS, Episode, Loop
from hbmgym.envs.traces.load import load_trace
from hbmgym.envs.traces.scenarios import find_scenario, generate, generate_class
from hbmgym.envs.traces.seeds import Part, check_seed
from hbmgym.envs.traces.trace import Trace, TraceError

DEFAULT_SCENARIO = "mix-shift"
LEAST_TICK_S, MOST_TICK_S = 1e-4, 1e4
WARMUP_S = 300.0
MEASURED_S = 1500.0
MOST_TRIES = 4
"""Seeds of rare traffic that are tried for every one that is wanted."""


class Workload(Protocol):
    """A source of episodes; equal part and seed give equal episodes."""

    @property
    def name(self) -> str:
        """As tables print it."""
        ...

    def episode(self, part: Part, seed: int) -> Episode:
        """The episode of a seed, which must belong to `part`."""
        ...


@dataclass(frozen=True)
class ScenarioWorkload:
    """A generated scenario at calibrated class rates (requests per second) times `load`."""

    name: str
    rates: Mapping[str, float]
    load: float
    page_tokens: int
    loop: Loop = "open"

    def episode(self, part: Part, seed: int) -> Episode:
        """Generated from the seed alone; raises SeedError when the seed is not of `part`."""
        check_seed(part, seed)
        trace = generate(self.name, seed, self.rates, self.load, WARMUP_S, MEASURED_S)
        return compose_generated(trace, seed=seed, page_tokens=self.page_tokens, warmup_s=WARMUP_S, loop=self.loop)


@dataclass(frozen=True)
class PaperTrafficWorkload:
    """A workload of the AVMP paper at `rate_per_s` requests per second."""

    traffic: PaperTraffic
    rate_per_s: float
    page_tokens: int

    @property
    def name(self) -> str:
        """Without the file that its lengths may come from."""
        return self.traffic.name

    @property
    def tick_s(self) -> float:
        """Seconds that the paper's tick lasts."""
        return self.traffic.requests_per_tick / self.rate_per_s

    def episode(self, part: Part, seed: int) -> Episode:
        """Generated from the seed alone; raises SeedError when the seed is not of `part`, and TraceError."""
        check_seed(part, seed)
        trace = generate_class(self.traffic, seed, self.rate_per_s, WARMUP_S, MEASURED_S)
        return compose_generated(trace, seed=seed, page_tokens=self.page_tokens, warmup_s=WARMUP_S)


@dataclass(frozen=True)
class TraceWorkload:
    """A recorded trace at `load` times its recorded rate."""

    trace: Trace
    load: float
    page_tokens: int
    loop: Loop = "open"

    @property
    def name(self) -> str:
        """The trace's own name."""
        return self.trace.name

    def episode(self, part: Part, seed: int) -> Episode:
        """A slice of `part`; the seed varies jitter and start. Raises TraceError and SeedError."""
        return compose(
            self.trace,
            part=part,
            seed=seed,
            page_tokens=self.page_tokens,
            load=self.load,
            warmup_s=WARMUP_S,
            loop=self.loop,
        )


def episodes_with_rows(workload: Workload, part: Part, seeds: Sequence[int], count: int) -> Iterator[Episode]:
    """The first `count` episodes that have rows, since of rare traffic some have none. TraceError where MOST_TRIES
    times as many of the seeds have too few."""
    left, nothing = count, TraceError(f"{workload.name}: {len(seeds)} seeds are fewer than {count} episodes")
    for seed in seeds[: MOST_TRIES * count]:
        try:
            episode = workload.episode(part, seed)
        except TraceError as error:
            nothing = error
            continue
        yield episode
        left -= 1
        if not left:
            return
    raise nothing


def open_workloads(
    config: ServingConfig,
    *,
    scenarios: Sequence[str] = (),
    traces: Sequence[str | Path] = (),
    load: float = 1.0,
    tick_s: float | None = None,
    loop: Loop = "open",
    spread: bool = True,
) -> list[Workload]:
    """One workload per scenario and per trace file; the default scenario if there is neither.

    `tick_s`: how long a tick of the avmp- scenarios lasts at load 1; None has it calibrated like other rates.
    `loop`: whether turns arrive on the trace's clock or follow the end of the turn before (closed).
    `spread`: whether arrivals that a trace's format rounds are spread again (`load_trace`).
    A scenario whose rates are not known for this configuration is calibrated first, once, which takes about a minute.
    """
    if not LEAST_LOAD <= load <= MOST_LOAD:
        raise ValueError(f"load is {load}, expected a number from {LEAST_LOAD:g} to {MOST_LOAD:g}")
    if loop not in LOOPS:
        raise ValueError(f"loop is {loop!r}, expected one of: {', '.join(LOOPS)}")
    scenarios = scenarios if scenarios or traces else (DEFAULT_SCENARIO,)
    recorded = [TraceWorkload(load_trace(path, spread=spread), load, config.page_tokens, loop) for path in traces]
    traffic = {name: found for name in scenarios if (found := find_traffic(name)) is not None}
    for name in scenarios:
        if name not in traffic:
            find_scenario(name)
    if loop == "closed" and traffic:
        raise ValueError(f"loop is 'closed', but no request of {', '.join(traffic)} follows another one")
    if tick_s is not None:
        _check_tick(tick_s, bool(traffic))
    names = [*(traffic[name].name if name in traffic else name for name in scenarios), *(w.name for w in recorded)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"workload {', '.join(twice)} is given twice: rows of a table go by name, so rename one")

    def open_scenario(name: str) -> Workload:
        if name not in traffic:
            return ScenarioWorkload(name, class_rates(name, config), load, config.page_tokens, loop)
        group = traffic[name]
        rate_per_s = class_rate(group, config) if tick_s is None else group.requests_per_tick / tick_s
        return PaperTrafficWorkload(group, load * rate_per_s, config.page_tokens)

    return [*map(open_scenario, scenarios), *recorded]


def _check_tick(tick_s: float, used: bool) -> None:
    if not LEAST_TICK_S <= tick_s <= MOST_TICK_S:
        raise ValueError(f"tick_s is {tick_s}, expected a number from {LEAST_TICK_S:g} to {MOST_TICK_S:g}")
    if not used:
        raise ValueError(f"tick_s is {tick_s}, but only avmp- scenarios have ticks, and none is given")
