"""Hindsight references. They see the trace, so they are not controllers and live here.

The per-phase best is one share for each class of a scenario, switched exactly at the phase edges, the same pair for
all seeds. Its gain over the best static split is the room that a scenario leaves to any dynamic controller.
"""

from collections.abc import Callable, Sequence

import numpy as np

from hbmgym.controllers.base import HOLD, Decision, Setup
from hbmgym.envs.traces.scenarios import phase_schedule

ORACLE = "oracle-phases"


class PhaseOracle:
    """Requests shares[class] at the last decision before each phase of that class begins."""

    def __init__(self, scenario: str, shares: Sequence[float], span_s: float) -> None:
        self.name = ORACLE
        self.fixed_share: float | None = None
        self._scenario = scenario
        self._shares = shares
        self._span_s = span_s
        self._schedule: list[tuple[float, float, int]] = []

    def see(self, seed: int) -> None:
        """Look at the phases of an episode."""
        self._schedule = phase_schedule(self._scenario, seed, self._span_s)

    def reset(self, setup: Setup) -> None:
        self._window_s = setup.window_s

    def act(self, telemetry: np.record) -> Decision:
        """Hold the share of the class that sends most of the next window."""
        middle_s = telemetry.time_s + 0.5 * self._window_s
        for begin_s, end_s, group in self._schedule:
            if begin_s <= middle_s < end_s:
                return Decision(kv_share=self._shares[group])
        return HOLD


def coordinate_descent(
    cost: Callable[[tuple[float, ...]], float], start: tuple[float, ...], choices: Sequence[float], rounds: int = 2
) -> tuple[tuple[float, ...], float]:
    """Best point found by improving one coordinate at a time over `choices`, and its cost."""
    best, best_cost = start, cost(start)
    for _ in range(rounds):
        before = best
        for axis in range(len(start)):
            for choice in choices:
                point = (*best[:axis], choice, *best[axis + 1 :])
                if point == best:
                    continue
                point_cost = cost(point)
                if point_cost < best_cost:
                    best, best_cost = point, point_cost
        if best == before:
            break
    return best, best_cost
