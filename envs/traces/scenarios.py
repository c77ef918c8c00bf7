"""Generated scenarios: one line each in `SCENARIOS`; `generate` is a pure function of its arguments."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from zlib import crc32

import numpy as np

from hbmgym.envs.traces.avmp_traffic import PAPER_SCENARIOS, PaperTraffic
from hbmgym.envs.traces.generators import LogNormal, SessionClass, sessions
from hbmgym.envs.traces.seeds import part_of_seed
from hbmgym.envs.traces.trace import Trace, TraceError

# Chat wants slots: many sessions with little text, whose next turn comes soon. Documents want KV: few sessions, each
# as long as a small book. Sessions are short against a phase, so that a phase's demand is its own.
CHAT = SessionClass(
    name="chat",
    first_prompt=LogNormal(7.2, 0.6, 4096),
    later_text=((0.7, LogNormal(3.06, 1.06)), (0.3, LogNormal(5.0, 1.0))),
    output=LogNormal(3.4, 0.6, 1024),
    gap_s=LogNormal(2.7, 0.8),
    geometric_turns=4.0,
    max_turns=20,
)
DOCUMENT = SessionClass(
    name="document",
    first_prompt=LogNormal(11.0, 0.25, 131072),
    later_text=((1.0, LogNormal(5.0, 0.8)),),
    output=LogNormal(5.7, 0.5, 2048),
    gap_s=LogNormal(2.0, 0.7),
    geometric_turns=4.0,
    max_turns=20,
)


@dataclass(frozen=True)
class Scenario:
    """Classes that take turns; without `phase_s` all of them start sessions all the time."""

    classes: tuple[SessionClass, ...]
    phase_s: tuple[float, float] | None = None
    """Length of a phase: U(low, high) seconds."""


SCENARIOS: Mapping[str, Scenario] = {
    "mix-shift": Scenario((CHAT, DOCUMENT), phase_s=(240.0, 360.0)),
    "steady-chat": Scenario((CHAT,)),
}


def generate(
    name: str,
    seed: int,
    class_rates: Mapping[str, float],
    load: float = 1.0,
    warmup_s: float = 300.0,
    measured_s: float = 1800.0,
) -> Trace:
    """Trace of one episode over [0, warmup_s + measured_s).

    `class_rates`: requests per second (turns counted) that a class offers while its sessions start, from a
    calibration; `load` multiplies them. Raises `TraceError` and `SeedError`.
    """
    scenario = find_scenario(name)
    part_of_seed(seed)
    span_s = warmup_s + measured_s
    _check_numbers(scenario, class_rates, load, warmup_s, measured_s)
    rng = np.random.default_rng([seed, crc32(name.encode())])
    phases = _phases(scenario, rng, span_s)
    plan = []
    for index, group in enumerate(scenario.classes):
        rate_per_s = class_rates[group.name] * load / group.mean_turns
        plan.append((group, _starts_s(phases[index], rate_per_s, rng)))
    return sessions(plan, rng, name=name, span_s=span_s)


def generate_class(
    group: SessionClass | PaperTraffic, seed: int, rate_per_s: float, warmup_s: float, measured_s: float
) -> Trace:
    """Trace of one class alone at a steady rate of requests per second, as `generate` makes it."""
    part_of_seed(seed)
    span_s = warmup_s + measured_s
    if isinstance(group, PaperTraffic):
        return group.trace(seed, rate_per_s, span_s)
    rng = np.random.default_rng([seed, crc32(group.name.encode())])
    starts_s = _starts_s([(0.0, span_s)], rate_per_s / group.mean_turns, rng)
    return sessions([(group, starts_s)], rng, name=group.name, span_s=span_s)


def phase_schedule(name: str, seed: int, span_s: float) -> list[tuple[float, float, int]]:
    """The phases of `generate(name, seed, ...)` in order of time: (begin, end, class); for oracles and plots only."""
    rng = np.random.default_rng([seed, crc32(name.encode())])
    phases = _phases(find_scenario(name), rng, span_s)
    return sorted((begin, end, index) for index, pieces in enumerate(phases) for begin, end in pieces)


def find_scenario(name: str) -> Scenario:
    """The scenario of that name; TraceError lists the known ones."""
    if name not in SCENARIOS:
        raise TraceError(f"scenario is {name!r}, expected one of {', '.join((*SCENARIOS, *PAPER_SCENARIOS))}")
    return SCENARIOS[name]


def _check_numbers(
    scenario: Scenario, class_rates: Mapping[str, float], load: float, warmup_s: float, measured_s: float
) -> None:
    names = [group.name for group in scenario.classes]
    if sorted(class_rates) != sorted(names):
        raise TraceError(f"class_rates has {sorted(class_rates)}, expected exactly {sorted(names)} (calibrate them)")
    positive = {"load": load, "measured_s": measured_s} | {f"rate of {name}": class_rates[name] for name in names}
    for field, value in (positive | {"warmup_s": warmup_s}).items():
        if not math.isfinite(value) or value < 0.0 or (value == 0.0 and field in positive):
            raise TraceError(f"{field} is {value!r}, expected a finite number {'>' if field in positive else '>='} 0")


def _phases(scenario: Scenario, rng: np.random.Generator, span_s: float) -> list[list[tuple[float, float]]]:
    """For each class the times in which its sessions start."""
    count = len(scenario.classes)
    phases: list[list[tuple[float, float]]] = [[] for _ in range(count)]
    if scenario.phase_s is None:
        return [[(0.0, span_s)] for _ in range(count)]
    begin_s, turn = 0.0, int(rng.integers(count))
    while begin_s < span_s:
        end_s = begin_s + rng.uniform(*scenario.phase_s)
        phases[turn % count].append((begin_s, min(end_s, span_s)))
        begin_s, turn = end_s, turn + 1
    return phases


def _starts_s(phases: list[tuple[float, float]], rate_per_s: float, rng: np.random.Generator) -> np.ndarray:
    """Sorted arrivals of a Poisson process that runs during `phases` only."""
    pieces = [np.sort(rng.uniform(begin, end, rng.poisson(rate_per_s * (end - begin)))) for begin, end in phases]
    return np.concatenate([np.zeros(0), *pieces])
