"""How fast the classes of a generated scenario may arrive, so that the split matters and nothing is overloaded.

The recipe: fix the budget; for each class alone find the largest rate at which its own best static split keeps goodput
>= GOODPUT; a scenario then offers LOAD_FACTOR times that. Calibration uses training seeds only.
`python -m hbmgym.envs.calibration` finds the rates that are shipped; others are found when they are first asked for.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from hbmgym.cli import command
from hbmgym.envs.platforms import PLATFORMS
from hbmgym.envs.serving.config import ServingConfig, with_policies
from hbmgym.envs.serving.core import Core, setup_hash
from hbmgym.envs.serving.metrics import episode_metrics
from hbmgym.envs.traces.avmp_traffic import PaperTraffic
from hbmgym.envs.traces.compose import compose, compose_generated
from hbmgym.envs.traces.episode import Episode
from hbmgym.envs.traces.generators import TrafficClass
from hbmgym.envs.traces.scenarios import SCENARIOS, find_scenario, generate_class
from hbmgym.envs.traces.trace import Trace, TraceError
from hbmgym.files import locked, write_atomically
from hbmgym.private import cache_folder
from hbmgym.streams import say

GOODPUT = 0.95
LOAD_FACTOR = 0.85
SEEDS = (0, 1)
WARMUP_S = 300.0
MEASURED_S = 600.0
WINDOW_S = 5.0
PRECISION = 1.03
"""Rates are found to within this factor."""
SHIPPED_FOR = (*(platform.config for platform in PLATFORMS), ServingConfig(hbm_gib=2.0))
SHIPPED = Path(__file__).with_name("class_rates.json")
STARTING_RATE = 1.0
SMALLEST_RATE = STARTING_RATE / 4096
NO_RATE = 0.0
"""Stands where even a trickle misses its SLOs."""
SHARES = 12
"""Static splits that are tried, evenly spread."""


AnyTraffic = TrafficClass | PaperTraffic


def class_rates(scenario: str, config: ServingConfig) -> Mapping[str, float]:
    """Requests per second of each class of `scenario`: shipped, found earlier on this computer, or found now."""
    return {group.name: class_rate(group, config) for group in find_scenario(scenario).classes}


def class_rate(group: AnyTraffic, config: ServingConfig) -> float:
    """Requests per second of one class alone, as `class_rates` has it."""
    config = _as_calibrated(config)
    key, name = calibration_key(group, config), f"class {group.name}"
    return LOAD_FACTOR * _remembered(key, "requests_per_s", name, config, lambda: find_largest_rate(group, config))


def trace_load(trace: Trace, config: ServingConfig) -> float:
    """The load of a recorded trace: found earlier on this computer, or found now. ValueError where there is none."""
    config = _as_calibrated(config)
    key = _key("load", trace.digest, setup_hash(config))
    return LOAD_FACTOR * _remembered(key, "load", trace.name, config, lambda: find_largest_load(trace, config))


def _as_calibrated(config: ServingConfig) -> ServingConfig:
    """A static split never decides, so how often a controller may is no part of the question. Nor are policies: traffic
    must be the same under all of them."""
    default = ServingConfig()
    return dataclasses.replace(
        with_policies(config, default.policies),
        window_s=WINDOW_S,
        transfers=default.transfers,
        long_prefill_tokens=default.long_prefill_tokens,
        max_long_prefills=default.max_long_prefills,
        eviction_epoch_s=default.eviction_epoch_s,
        flop_weight=default.flop_weight,
    )


def _remembered(key: str, field: str, name: str, config: ServingConfig, find: Callable[[], float]) -> float:
    own = _own_table()
    for table in filter(None, (SHIPPED, own)):
        if key in (rates := _read(table)):
            return _usable(rates[key][field], name, config)
    where = f"{config.model} on {config.gpu} with {config.hbm_gib:g} GiB"
    say(f"calibrating {name} for {where} ({'once' if own else 'it cannot be kept for next time'})")
    rate = find()
    if own is not None:
        _remember(own, key, name, config, {field: rate})
    return _usable(rate, name, config)


def _usable(rate: float, name: str, config: ServingConfig) -> float:
    if rate == NO_RATE:
        raise ValueError(
            f"{name} misses its SLOs at any rate with {config.model} on {config.gpu} and {config.hbm_gib:g} GiB: raise "
            "hbm_gib or choose another model or GPU"
        )
    return rate


def _own_table() -> Path | None:
    """Of the rates that this user has found; None where nothing can be kept."""
    folder = cache_folder()
    return None if folder is None else folder / "class_rates.json"


def _read(table: Path) -> dict[str, dict[str, float]]:
    try:
        rates = json.loads(table.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return rates if isinstance(rates, dict) else {}


def calibration_key(group: AnyTraffic, config: ServingConfig) -> str:
    """Of everything that the rate depends on."""
    return _key(repr(group), setup_hash(config), WARMUP_S, MEASURED_S)


def _key(*facts: str | float) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def remember_rate(table: Path, group: AnyTraffic, config: ServingConfig, rate: float) -> None:
    """Add a rate to a table of rates."""
    _remember(table, calibration_key(group, config), f"class {group.name}", config, {"requests_per_s": rate})


def _remember(table: Path, key: str, name: str, config: ServingConfig, found: Mapping[str, float]) -> None:
    where = {"of": name, "model": config.model, "gpu": config.gpu, "hbm_gib": config.hbm_gib}
    try:
        with locked(table.parent):
            rates = _read(table) | {key: {**where, **found}}
            write_atomically(table, (json.dumps(rates, indent=1, sort_keys=True) + "\n").encode())
    except OSError as error:
        say(f"the rate could not be kept for next time: {error}")


def find_largest_rate(group: AnyTraffic, config: ServingConfig) -> float:
    """Requests per second that a class may offer; NO_RATE when even a trickle misses its SLOs."""

    def episodes(rate_per_s: float) -> list[Episode]:
        traces = ((seed, generate_class(group, seed, rate_per_s, WARMUP_S, MEASURED_S)) for seed in SEEDS)
        tokens = config.page_tokens
        return [compose_generated(trace, seed=seed, page_tokens=tokens, warmup_s=WARMUP_S) for seed, trace in traces]

    return _found(_Search(config, episodes))


def find_largest_load(trace: Trace, config: ServingConfig) -> float:
    """The multiplier of a recorded trace's rate up to which the best static split keeps the goodput, at most 1; NO_RATE
    when there is none."""

    def episodes(load: float) -> list[Episode]:
        return [compose(trace, part="train", seed=seed, page_tokens=config.page_tokens, load=load) for seed in SEEDS]

    return _found(_Search(config, episodes), at_most=1.0)


def _found(search: "_Search", at_most: float = float("inf")) -> float:
    try:
        return search.largest(at_most)
    except TraceError:  # sought down to where none arrives
        return NO_RATE


class _Search:
    """The largest rate, in any unit, at which a static split keeps the goodput. What did last time is tried first."""

    def __init__(self, config: ServingConfig, episodes: Callable[[float], list[Episode]]) -> None:
        self._core = Core(config)
        self._episodes = episodes
        low, high = self._core.layout.share_bounds
        self._shares = [low + (high - low) * (i + 0.5) / SHARES for i in range(SHARES)]
        self._best = 0.5

    def largest(self, at_most: float = float("inf")) -> float:
        """By bisection on a logarithmic scale; NO_RATE when none is sustained."""
        low = high = STARTING_RATE
        while high <= at_most and self._sustains(high):
            low, high = high, high * 2.0
        if high > at_most:
            return at_most
        while not self._sustains(low):
            low, high = low / 2.0, low
            if low < SMALLEST_RATE:
                return NO_RATE
        while high / low > PRECISION:
            middle = (low * high) ** 0.5
            low, high = (middle, high) if self._sustains(middle) else (low, middle)
        return float(f"{low:.4g}")

    def _sustains(self, rate: float) -> bool:
        episodes = self._episodes(rate)
        for share in sorted(self._shares, key=lambda share: abs(share - self._best)):
            if all(self._goodput(episode, share) >= GOODPUT for episode in episodes):
                self._best = share
                return True
        return False

    def _goodput(self, episode: Episode, share: float) -> float:
        core = self._core
        core.reset(episode, share, (share, share))
        most_misses = (1.0 - GOODPUT) * len(episode.rows)
        while not core.done and core.counters.missed <= most_misses:
            core.run_window()
        if not core.done:
            return 0.0
        return 1.0 - episode_metrics(episode, core.requests, core.setup.tpot_slo_s)["slo_violation_rate"]


@command
def main() -> None:
    """Find the rates that are shipped: every scenario's classes, for all platforms and for a budget of 2 GiB."""
    groups = {group.name: group for scenario in SCENARIOS.values() for group in scenario.classes}
    found = []
    for config in SHIPPED_FOR:
        config = dataclasses.replace(config, window_s=WINDOW_S)
        for group in groups.values():
            rate = find_largest_rate(group, config)
            found.append((group, config, rate))
            print(f"{group.name} for {config.model} on {config.gpu} with {config.hbm_gib:g} GiB: {rate:g} requests/s")
    SHIPPED.unlink(missing_ok=True)
    for group, config, rate in found:
        remember_rate(SHIPPED, group, config, rate)


if __name__ == "__main__":
    main()
