"""Hindsight references. They see the trace, so they are not controllers and live here.

- The per-phase best is one share for each class of a scenario with phases, switched exactly at the phase edges, equal
  for all seeds.
- The dynamic oracle has a share for every segment of an episode, each episode its own: the cheapest path by dynamic
  programming through what the static splits cost in each segment, replayed. What counts is what the replay achieves, as
  the costs of static splits know nothing of refilling a cache after a move.

What they gain over the best static split is the room that traffic leaves to any dynamic controller. Neither is an upper
bound: a better path may exist that no static split hints at.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from hbmgym.controllers.base import Decision, Setup
from hbmgym.controllers.static import StaticController
from hbmgym.envs.serving.core import Core
from hbmgym.envs.serving.metrics import request_costs
from hbmgym.envs.traces.episode import Episode
from hbmgym.envs.traces.scenarios import phase_schedule
from hbmgym.eval.rollout import run_episode
from hbmgym.eval.statics import WORST_CLASS, best_static

ORACLE = "oracle-phases"
DYNAMIC = "oracle-dynamic"
SEGMENTS_S = (10.0, 30.0, 60.0, 120.0)
PRICES = (0.0, 0.001, 0.005, 0.02, 0.05)
"""Cost of moving the whole budget once, as the dynamic program sees it. Moving takes a second or two, which is nothing;
the price stands for the refilling that static costs do not show, and replays find which one fits."""


class ScheduleOracle:
    """Requests each share at the last decision before its time begins."""

    def __init__(self, name: str, begin_s: Sequence[float], shares: Sequence[float]) -> None:
        assert len(begin_s) == len(shares) and begin_s[0] <= 0.0
        self.name = name
        self.fixed_share: float | None = None
        self._begin_s = np.asarray(begin_s)
        self._shares = shares

    def reset(self, setup: Setup) -> None:
        """Remember how far ahead a decision reaches."""
        self._window_s = setup.window_s

    def act(self, telemetry: np.record) -> Decision:
        """The share that most of the next window has."""
        middle_s = telemetry.time_s + 0.5 * self._window_s
        return Decision(kv_share=self._shares[int(np.searchsorted(self._begin_s, middle_s, side="right")) - 1])


def phase_oracle(scenario: str, shares: Sequence[float], seed: int, span_s: float) -> ScheduleOracle:
    """The one with `shares[class]` during each phase of that class."""
    schedule = phase_schedule(scenario, seed, span_s)
    return ScheduleOracle(ORACLE, [begin_s for begin_s, _, _ in schedule], [shares[group] for _, _, group in schedule])


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


def arrival_costs(core: Core, episode: Episode) -> np.ndarray:
    """float64 (rows,): what each row of a finished episode adds to its mean cost; 0 for those that are not measured."""
    measured = episode.rows["measured"] == 1
    costs = request_costs(episode.rows, core.requests, core.setup.tpot_slo_s)
    return np.where(measured, costs, 0.0) / measured.sum()


def segment_starts_s(episode: Episode, segment_s: float) -> np.ndarray:
    """float64 (segments,): when the segments of an episode begin; the last one ends at its horizon."""
    return np.arange(0.0, episode.horizon_s, segment_s)


def segment_sums(episode: Episode, segment_s: float, values: np.ndarray) -> np.ndarray:
    """float64 (segments,): sums of `values`, one per row, over the rows that arrive in each segment."""
    begin_s = segment_starts_s(episode, segment_s)
    segment = np.searchsorted(begin_s, episode.rows["arrival_s"], side="right") - 1
    return np.bincount(segment, values, minlength=len(begin_s))


def cheapest_path(costs: np.ndarray, move: np.ndarray) -> tuple[list[int], float]:
    """The choices that minimise the sum of `costs` (segments, choices) and `move` (choices, choices), and that sum.

    V_w(r) = J_w(r) + min over r' of V_{w+1}(r') + move(r, r'), solved backwards.
    """
    segments, choices = costs.shape
    after = np.zeros((segments, choices), np.int64)
    value = costs[-1].copy()
    for w in range(segments - 2, -1, -1):
        onward = value + move
        after[w] = onward.argmin(axis=1)
        value = costs[w] + onward.min(axis=1)
    path = [int(value.argmin())]
    for w in range(segments - 1):
        path.append(int(after[w][path[-1]]))
    return path, float(value.min())


def dynamic_candidates(
    episode: Episode, shares: Sequence[float], costs: np.ndarray, unserved: np.ndarray
) -> Iterator[ScheduleOracle]:
    """Paths to replay, each only once: the episode's best static share, held; and for every length of segment and price
    of moving the cheapest one.

    `costs`, shape (shares, rows): `arrival_costs` under the static splits at `shares`; `unserved`, shape (shares,): the
    part of the tokens that each of these leaves unserved (`statics.serves`).
    """
    distance = np.abs(np.subtract.outer(shares, shares))
    best = best_static(costs.sum(axis=1), unserved)
    seen: set[tuple[tuple[float, int], ...]] = {((0.0, best),)}
    yield ScheduleOracle(DYNAMIC, [0.0], [shares[best]])
    for segment_s in SEGMENTS_S:
        begin_s = segment_starts_s(episode, segment_s)
        sums = np.array([segment_sums(episode, segment_s, own) for own in costs])
        for price in PRICES:
            path, _ = cheapest_path(sums.T, price * distance)
            changes = [0, *(1 + np.flatnonzero(np.diff(path))).tolist()]
            key = tuple((float(begin_s[i]), path[i]) for i in changes)
            if key not in seen:
                seen.add(key)
                yield ScheduleOracle(DYNAMIC, [at_s for at_s, _ in key], [shares[place] for _, place in key])


def best_path(
    core: Core, episode: Episode, shares: Sequence[float], costs: np.ndarray, unserved: np.ndarray
) -> ScheduleOracle:
    """The candidate that costs least when it is replayed."""
    candidates = dynamic_candidates(episode, shares, costs, unserved)
    return min(candidates, key=lambda oracle: float(run_episode(oracle, core, episode).cell["cost"]))


def dynamic_oracle(core: Core, episode: Episode, shares: Sequence[float]) -> ScheduleOracle:
    """`best_path` through what the static splits at `shares` cost in this episode, which are run for it."""
    costs, unserved = [], []
    for share in shares:
        cell = run_episode(StaticController(share), core, episode).cell
        costs.append(arrival_costs(core, episode))
        unserved.append(cell[WORST_CLASS])
    return best_path(core, episode, shares, np.array(costs), np.array(unserved))
