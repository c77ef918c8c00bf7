"""The cases of the opportunity map on which controllers are judged: those that a static split can serve."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hbmgym.envs.platforms import find_platform
from hbmgym.envs.traces.scenarios import SCENARIOS
from hbmgym.eval.opportunities.cases import Case
from hbmgym.eval.opportunities.verdict import TURNED_AWAY

Row = dict[str, Any]


@dataclass(frozen=True)
class SaneCase:
    """Traffic on a platform, and what the map knows of it."""

    traffic: Case
    rho: float
    best_share: float
    cost_room: float
    """1 - cost of the replayed dynamic oracle / cost of the best static."""
    p99_room: float
    """The same of the p99 TTFT, against the share that is best in it."""
    best_cost: float
    """Of the best static, over so many episodes:"""
    episodes: int

    @property
    def name(self) -> str:
        return self.traffic.workload_name

    @property
    def platform(self) -> str:
        return self.traffic.platform.name

    @property
    def is_recorded(self) -> bool:
        return bool(self.traffic.trace)

    @property
    def best_static(self) -> str:
        return static_name(self.best_share)


def static_name(share: float) -> str:
    """Of the controller that holds a share."""
    return f"static-{share:.6f}"


def sane_cases(path: Path, platforms: Sequence[str] = (), scenarios: Sequence[str] = ()) -> list[SaneCase]:
    """The map's sane cases of generated scenarios; ValueError in one line for a bad file or when none is left."""
    rows = _sane_rows(path)
    wanted = set(scenarios or SCENARIOS)
    chosen = [row for row in rows if row["case"] in wanted and (not platforms or row["platform"] in platforms)]
    if not chosen:
        known = ", ".join(sorted({row["platform"] for row in rows}))
        raise ValueError(f"no sane case of the map is left: its platforms are {known}")
    return [_case(row) for row in chosen]


def _sane_rows(path: Path) -> list[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        sane = [row for row in rows if _is_sane(row)]
        for row in sane:
            _case(row)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; run eval/opportunity.py, or give its map.json as --map") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: is no map of eval/opportunity.py ({error})") from None
    return sane


def _is_sane(row: Row) -> bool:
    return row["rho"] is not None and row["rho"] < 1.0 and row["best_static_rejected_share"] <= TURNED_AWAY


def _case(row: Row) -> SaneCase:
    platform = find_platform(row["platform"])  # refuses what it does not know
    traffic = Case(platform, scenario=row["case"])
    cost_room, p99_room = (row["room"][figure][0] or 0.0 for figure in ("cost", "ttft_p99_s"))
    best = row["best_static_share"]
    return SaneCase(traffic, row["rho"], best, cost_room, p99_room, row["best_static_cost"], row["episodes"])
