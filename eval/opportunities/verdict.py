"""What the episodes of a case say together: the best static split, the cliff beside it, the room above it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from hbmgym.envs.serving.shortage import ONE_BUFFER
from hbmgym.eval.intervals import Interval, relative_difference
from hbmgym.eval.statics import JUDGED, UNSERVED, WORST_CLASS, best_costs, best_static

ROOM = 0.15
"""Room worth having: so much of p99 TTFT or violations."""
CLIFF = 2.0
"""A cliff: the default's p99 TTFT over the best static's."""
OFFSETS = (-0.2, -0.1, 0.1, 0.2)
ROOM_FIGURES = ("cost", "ttft_mean_s", "ttft_p99_s", "slo_violation_rate")


@dataclass(frozen=True)
class CaseResult:
    """All episodes of a case."""

    name: str
    platform: str
    rho: float
    episodes: Sequence[dict[str, Any]]

    @cached_property
    def shares(self) -> list[float]:
        return [static["share"] for static in self.episodes[0]["statics"]]

    def _of_statics(self, figure: str) -> np.ndarray:
        """float64 (shares, episodes)."""
        return np.array([[static[figure] for static in episode["statics"]] for episode in self.episodes]).T

    @cached_property
    def static_costs(self) -> np.ndarray:
        """float64 (shares,): mean cost over the episodes."""
        return np.asarray(self._of_statics("cost").mean(axis=1))

    @cached_property
    def best(self) -> int:
        """Place of the one best static share (`eval.statics`)."""
        return self.best_in("cost")

    def of_static(self, place: int, figure: str) -> list[float]:
        """One value per episode."""
        return [episode["statics"][place][figure] for episode in self.episodes]

    def of(self, who: str, figure: str) -> list[float]:
        """One value per episode of default, a rule of ONE_BUFFER, dynamic or both_full."""
        return [episode[who][figure] for episode in self.episodes]

    @property
    def chosen_per_episode(self) -> float:
        """Mean over the episodes of the cost of each one's own best static: what of the room needs no moving."""
        return float(best_costs(*map(self._of_statics, JUDGED)).mean())

    def wrong_by(self, offset: float) -> float | None:
        """Cost at the best share plus `offset` over the best cost; None beyond the bounds of the budget."""
        share = self.shares[self.best] + offset
        if not self.shares[0] <= share <= self.shares[-1]:
            return None
        place = int(np.abs(np.array(self.shares) - share).argmin())
        return float(self.static_costs[place] / self.static_costs[self.best])

    def default_over_best(self, figure: str) -> Interval:
        """Ratio of SGLang's default to the best static."""
        value, low, high = relative_difference(self.of("default", figure), self.of_static(self.best, figure))
        return Interval(1.0 + value, 1.0 + low, 1.0 + high)

    def floating_over_best(self, rule: str) -> Interval:
        """Cost of one floating pool over that of the best static - 1."""
        return relative_difference(self.of(rule, "cost"), self.of_static(self.best, "cost"))

    def best_in(self, figure: str) -> int:
        """Place of the static share with the least mean of a figure, of those that serve what the machine can hold."""
        return best_static(*(self._of_statics(key).mean(axis=1) for key in (figure, WORST_CLASS)))

    def room(self, figure: str) -> Interval:
        """1 - dynamic oracle / the static share that is best in this very figure. The oracle is one path, chosen for
        its cost."""
        return _saving(self.of("dynamic", figure), self.of_static(self.best_in(figure), figure))

    @property
    def room_beyond_floating(self) -> Interval:
        """1 - cost of the dynamic oracle / that of the cheaper floating pool."""
        rule = min(ONE_BUFFER, key=lambda rule: np.mean(self.of(rule, "cost")))
        return _saving(self.of("dynamic", "cost"), self.of(rule, "cost"))

    @property
    def has_cliff(self) -> bool:
        """The default is off by CLIFF in p99 TTFT, and its interval excludes equality."""
        ratio, low, _ = self.default_over_best("ttft_p99_s")
        return ratio >= CLIFF and low > 1.0

    @property
    def has_room(self) -> bool:
        """ROOM in p99 TTFT or violations, with an interval above 0."""
        rooms = [self.room(figure) for figure in ("ttft_p99_s", "slo_violation_rate")]
        return any(value >= ROOM and low > 0.0 for value, low, _ in rooms)

    @property
    def unserved(self) -> float:
        """Part of the tokens that every static split leaves unserved, in the class where it is most."""
        return float(self._of_statics(WORST_CLASS).mean(axis=1).min())

    @property
    def verdict(self) -> str:
        """overloaded, turns away, cliff, room, cliff and room, or none."""
        if self.rho >= 1.0:
            return "overloaded"
        if self.unserved > UNSERVED:
            return "turns away"
        found = [word for word, holds in (("cliff", self.has_cliff), ("room", self.has_room)) if holds]
        return " and ".join(found) or "none"

    def as_json(self) -> dict[str, Any]:
        """What is kept of a case."""
        return {
            "case": self.name,
            "platform": self.platform,
            "rho": self.rho if np.isfinite(self.rho) else None,
            "episodes": len(self.episodes),
            "last_seed": self.episodes[-1]["seed"],
            "best_static_share": self.shares[self.best],
            "best_static_cost": float(self.static_costs[self.best]),
            "best_static_p99_s": float(np.mean(self.of_static(self.best, "ttft_p99_s"))),
            "cost_when_wrong_by": {f"{offset:+.1f}": self.wrong_by(offset) for offset in OFFSETS},
            "default_share": float(np.mean(self.of("default", "kv_share_mean"))),
            "default_over_best": {figure: self.default_over_best(figure).known for figure in ROOM_FIGURES},
            "floating_over_best": {rule: self.floating_over_best(rule).known for rule in ONE_BUFFER},
            "room": {figure: self.room(figure).known for figure in ROOM_FIGURES},
            "room_beyond_floating": self.room_beyond_floating.known,
            "best_static_cost_chosen_per_episode": self.chosen_per_episode,
            "both_full_cost": float(np.mean(self.of("both_full", "cost"))),
            WORST_CLASS: self.unserved,
            "verdict": self.verdict,
        }


def _saving(values: Sequence[float], reference: Sequence[float]) -> Interval:
    value, low, high = relative_difference(values, reference)
    return Interval(-value, -high, -low)
