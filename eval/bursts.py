"""How soon bursts are found, how often none was there, and what that is worth: `python eval/bursts.py --help`.

The truth comes from the scenario's own schedule, which no controller sees.
"""

import sys

try:
    from hbmgym.cli import command, option, parse_options, user_errors
except ModuleNotFoundError as error:
    print(f"{error}: run `make train` once, or use .venv/bin/python {__file__}", file=sys.stderr)
    raise SystemExit(2) from None

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np

from hbmgym.controllers.base import Controller, Decision, Setup
from hbmgym.controllers.helm.controller import HelmController
from hbmgym.controllers.helm.parameters import HelmParameters
from hbmgym.controllers.helm.policy import Policy
from hbmgym.controllers.helm.variants import shipped_policy
from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.serving.core import Core
from hbmgym.envs.traces.arrivals import Bursts, MixBursts
from hbmgym.envs.traces.scenarios import SCENARIOS, find_scenario
from hbmgym.envs.traces.seeds import seeds_for
from hbmgym.envs.workload import open_workloads
from hbmgym.eval.intervals import Interval, relative_difference
from hbmgym.eval.rollout import run_episode

Span = tuple[float, float]
"""(begin, end) in seconds."""

GRACE_S = 15.0
"""An alarm up to so long after a burst is late, not false: a window, and arrivals that are still running down."""


@dataclass(frozen=True)
class BurstOptions:
    """What is measured."""

    scenarios: str = option("mix-burst,burst,steady-chat,steady-conversation,steady-code", "comma-separated")
    seeds: int = option(20, "validation episodes per scenario, half an hour each")


@dataclass(frozen=True)
class Detection:
    """What a detector found in some time."""

    delays_s: tuple[float, ...]
    """Of the bursts that were found."""
    missed: int
    false_alarms: int
    calm_s: float
    """Time in which an alarm is false."""

    def __add__(self, other: "Detection") -> "Detection":
        return Detection(
            self.delays_s + other.delays_s,
            self.missed + other.missed,
            self.false_alarms + other.false_alarms,
            self.calm_s + other.calm_s,
        )

    @property
    def false_alarms_per_h(self) -> float:
        return 3600.0 * self.false_alarms / self.calm_s if self.calm_s else 0.0


class OracleBursts:
    """A HelmController that is told when there is a burst: what a perfect detector would be worth."""

    fixed_share: float | None = None

    def __init__(self, controller: HelmController, bursts: Sequence[Span]) -> None:
        self.name = f"{controller.name}-oracle-bursts"
        self._controller, self._bursts = controller, bursts

    def reset(self, setup: Setup) -> None:
        self._controller.reset(setup)

    def act(self, telemetry: np.record) -> Decision:
        now_s = float(telemetry["time_s"])
        self._controller.tell_burst(any(begin <= now_s < end for begin, end in self._bursts))
        return self._controller.act(telemetry)


class _Alarms(HelmController):
    """Notes when bursts begin in its eyes."""

    def reset(self, setup: Setup) -> None:
        super().reset(setup)
        self.alarms_s: list[float] = []

    def act(self, telemetry: np.record) -> Decision:
        before = self.burst_state
        decision = super().act(telemetry)
        if self.burst_state == "burst" != before:
            self.alarms_s.append(float(telemetry["time_s"]))
        return decision


def has_bursts(name: str) -> bool:
    """Is a scenario one of bursts?"""
    return isinstance(find_scenario(name).pattern, MixBursts | Bursts)


def true_bursts(name: str, seed: int, span_s: float) -> list[Span]:
    """When a scenario of bursts has them within [0, span_s), drawn as its generator draws them; none in others."""
    scenario = find_scenario(name)
    lead_s = max(group.lead_s for group in scenario.classes)
    rng = np.random.default_rng([seed, crc32(name.encode())])
    pieces = scenario.pattern.pieces(len(scenario.classes), rng, -lead_s, span_s)
    if isinstance(scenario.pattern, MixBursts):
        found = [(begin, end) for begin, end, _ in pieces[1]]
    elif isinstance(scenario.pattern, Bursts):
        found = [(begin, end) for begin, end, factor in pieces[0] if factor == scenario.pattern.factors[1]]
    else:
        found = []
    return [(max(begin, 0.0), end) for begin, end in found if end > 0.0]


def judge_alarms(alarms_s: Sequence[float], bursts: Sequence[Span], begin_s: float, end_s: float) -> Detection:
    """Alarms against the bursts that begin within [begin_s, end_s); others before and after are left out of account."""
    delays, missed = [], 0
    for begin, end in bursts:
        if begin_s <= begin < end_s:
            found = [alarm - begin for alarm in alarms_s if begin <= alarm < end + GRACE_S]
            delays += found[:1]
            missed += not found
    calm = [alarm for alarm in alarms_s if begin_s <= alarm < end_s]
    false = sum(not any(begin <= alarm < end + GRACE_S for begin, end in bursts) for alarm in calm)
    return Detection(tuple(delays), missed, false, _calm_s(bursts, begin_s, end_s))


def _calm_s(bursts: Sequence[Span], begin_s: float, end_s: float) -> float:
    """Time within [begin_s, end_s) without a burst and its grace; where those of two bursts overlap counts once."""
    calm_s, busy_until = 0.0, begin_s
    for begin, end in sorted(bursts):
        calm_s += max(min(begin, end_s) - busy_until, 0.0)
        busy_until = max(busy_until, end + GRACE_S)
    return calm_s + max(end_s - busy_until, 0.0)


def measure_detection(name: str, seeds: Sequence[int], parameters: HelmParameters | None = None) -> Detection:
    """The detector on validation episodes of a scenario; the split stays at .5."""
    config = ServingConfig()
    core, workload = Core(config), open_workloads(config, scenarios=(name,))[0]
    watcher = _Alarms(None, parameters)
    found = Detection((), 0, 0, 0.0)
    for seed in seeds:
        episode = workload.episode("validation", seed)
        run_episode(watcher, core, episode)
        bursts = true_bursts(name, seed, episode.horizon_s)
        found += judge_alarms(watcher.alarms_s, bursts, 2.0 * watcher.parameters.settle_s, episode.horizon_s)
    return found


def measure_worth(name: str, seeds: Sequence[int], policy: Policy | None) -> dict[str, Interval]:
    """Cost on validation episodes of a base with the burst layer over that without, less 1: as the CUSUM finds the
    bursts, and told of them as they are."""
    core, workload = Core(ServingConfig()), open_workloads(ServingConfig(), scenarios=(name,))[0]
    layer = HelmParameters(most_residual=0.0, caps=False, least_strange=0.0)
    costs: dict[str, list[float]] = {"without": [], "found": [], "told": []}
    for seed in seeds:
        episode = workload.episode("validation", seed)
        told = OracleBursts(HelmController(policy, layer), true_bursts(name, seed, episode.horizon_s))
        without = HelmController(policy, dataclasses.replace(layer, bursts=False))
        controllers: tuple[Controller, ...] = (without, HelmController(policy, layer), told)
        for own, controller in zip(costs.values(), controllers, strict=True):
            own.append(run_episode(controller, core, episode).cell["cost"])
    return {kind: relative_difference(costs[kind], costs["without"]) for kind in ("found", "told")}


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """One line per scenario; for those with bursts, two more of what the layer is worth to a base."""
    options = parse_options(BurstOptions, (__doc__ or "").splitlines()[0], arguments)
    with user_errors():
        if options.seeds < 1:
            raise ValueError(f"--seeds is {options.seeds}, expected an integer >= 1")
        for name in options.scenarios.split(","):
            if name not in SCENARIOS:
                raise ValueError(f"scenario is {name!r}, expected one of {', '.join(SCENARIOS)}")
        seeds = seeds_for("validation", options.seeds)
        for name in options.scenarios.split(","):
            print(_line(name, measure_detection(name, seeds)), flush=True)
            if has_bursts(name):
                for base, policy in (("shipped base", shipped_policy()), ("static .5", None)):
                    print(f"  {base}: {_worth(measure_worth(name, seeds, policy))}", flush=True)


def _worth(found: dict[str, Interval]) -> str:
    parts = (f"bursts {kind} {own.text('+.1%')}" for kind, own in found.items())
    return f"cost over that without the layer: {', '.join(parts)}"


def _line(name: str, found: Detection) -> str:
    line = f"{name:20} {found.false_alarms_per_h:5.2f} false alarms per hour of {found.calm_s / 3600.0:.1f}"
    if bursts := len(found.delays_s) + found.missed:
        p50, p90 = np.percentile(found.delays_s or (np.nan,), (50, 90))
        line += f"; {len(found.delays_s)} of {bursts} bursts found, after {p50:.0f} s (p50), {p90:.0f} s (p90)"
    return line


if __name__ == "__main__":
    main()
