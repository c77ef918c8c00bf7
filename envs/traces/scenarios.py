"""Generated scenarios: one line each in `SCENARIOS`; `generate` is a pure function of its arguments."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from zlib import crc32

import numpy as np

from hbmgym.envs.traces import classes
from hbmgym.envs.traces.arrivals import Bursts, Diurnal, MixBursts, Pattern, Phases, Piece, Steady, Trend, draw_starts_s
from hbmgym.envs.traces.avmp_traffic import PAPER_SCENARIOS, PaperTraffic
from hbmgym.envs.traces.generators import TrafficClass, sessions
from hbmgym.envs.traces.seeds import part_of_seed
from hbmgym.envs.traces.trace import Trace, TraceError

STEADY = Steady()


@dataclass(frozen=True)
class Scenario:
    """Who arrives when."""

    classes: tuple[TrafficClass, ...]
    pattern: Pattern = STEADY
    load: float = 1.0
    """Of the calibrated rates."""

    @property
    def has_phases(self) -> bool:
        """Whether at every time the sessions of one class alone start; those that run go on."""
        return len(self.classes) > 1 and isinstance(self.pattern, (Phases, MixBursts))


_SHIFT = (classes.CHAT, classes.BOOK)
_AZURE_BURSTS = Bursts(low=1.02, high=8.77, burst_s=60.0, calm_s=240.0)

SCENARIOS: Mapping[str, Scenario] = {
    "mix-shift": Scenario(_SHIFT, Phases(240.0, 360.0)),
    "mix-shift-60": Scenario(_SHIFT, Phases(48.0, 72.0)),
    "mix-shift-900": Scenario(_SHIFT, Phases(720.0, 1080.0)),
    "mix-burst": Scenario((classes.BOOK, classes.CHAT), MixBursts(30.0, 120.0, 180.0)),
    "adversarial": Scenario(_SHIFT, Phases(10.0, 10.0)),  # two windows of 5 s: over when a controller has answered
    "shift-documents": Scenario((classes.SHORT_CHAT, classes.DOCUMENTS), Phases(240.0, 360.0)),
    # A sequence of a swarm holds some 30 times the tokens of a chat's; a swarm lasts 12 minutes (p50).
    "shift-swarm": Scenario((classes.CHAT, classes.SWARM), Phases(720.0, 1080.0)),
    "steady-chat": Scenario((classes.CHAT,)),
    "edited-chat": Scenario((classes.EDITED_CHAT,)),
    "steady-conversation": Scenario((classes.CONVERSATION,)),
    "steady-assistant": Scenario((classes.ASSISTANT,)),
    "steady-short-chat": Scenario((classes.SHORT_CHAT,)),
    "steady-documents": Scenario((classes.DOCUMENTS,)),
    "steady-agent": Scenario((classes.AGENT,)),
    "swarm": Scenario((classes.SWARM,)),
    "steady-code": Scenario((classes.CODE,)),
    "trend": Scenario((classes.ASSISTANT, classes.DOCUMENTS), Trend()),
    "burst": Scenario((classes.CODE,), _AZURE_BURSTS),
    "diurnal": Scenario((classes.CONVERSATION, classes.DOCUMENTS), Diurnal()),
    "overload": Scenario((classes.CONVERSATION,), load=1.6),
    "idle": Scenario((classes.CONVERSATION,), load=0.1),
    "inelastic": Scenario((classes.CODE,), load=0.5),  # nothing to reuse, and room for all that runs
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
    pieces = _pieces(scenario, rng, span_s)
    plan = []
    for index, group in enumerate(scenario.classes):
        rate_per_s = class_rates[group.name] * load * scenario.load / group.mean_requests
        plan.append((group, draw_starts_s(pieces[index], rate_per_s, rng)))
    return sessions(plan, rng, name=name, span_s=span_s)


def generate_class(
    group: TrafficClass | PaperTraffic, seed: int, rate_per_s: float, warmup_s: float, measured_s: float
) -> Trace:
    """Trace of one class alone at a steady rate of requests per second, as `generate` makes it."""
    part_of_seed(seed)
    span_s = warmup_s + measured_s
    if isinstance(group, PaperTraffic):
        return group.trace(seed, rate_per_s, span_s)
    rng = np.random.default_rng([seed, crc32(group.name.encode())])
    starts_s = draw_starts_s([(-group.lead_s, span_s, 1.0)], rate_per_s / group.mean_requests, rng)
    return sessions([(group, starts_s)], rng, name=group.name, span_s=span_s)


def phase_schedule(name: str, seed: int, span_s: float) -> list[tuple[float, float, int]]:
    """The phases of `generate(name, seed, ...)` in order of time: (begin, end, class); for oracles and plots only."""
    rng = np.random.default_rng([seed, crc32(name.encode())])
    pieces = _pieces(find_scenario(name), rng, span_s)
    return sorted((max(begin, 0.0), end, index) for index, own in enumerate(pieces) for begin, end, _ in own if end > 0)


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


def _pieces(scenario: Scenario, rng: np.random.Generator, span_s: float) -> list[list[Piece]]:
    lead_s = max(group.lead_s for group in scenario.classes)
    return scenario.pattern.pieces(len(scenario.classes), rng, -lead_s, span_s)
