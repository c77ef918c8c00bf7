"""The cases of the opportunity map on which rows are judged: those that a static split can serve."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hbmgym.controllers.static import StaticController, static_name
from hbmgym.envs.platforms import find_platform
from hbmgym.envs.traces.load import load_trace
from hbmgym.envs.traces.scenarios import SCENARIOS
from hbmgym.eval.opportunities.cases import Case
from hbmgym.eval.options import say_notices
from hbmgym.eval.statics import UNSERVED, WORST_CLASS

Row = dict[str, Any]


@dataclass(frozen=True)
class SaneCase:
    """Traffic on a platform, and what the map knows of it."""

    traffic: Case
    rho: float
    best_share: float
    """Of the static split that was best on the map's episodes."""
    last_seed: int
    """Of the map's episodes, whose seeds are the first of the validation part that have traffic."""

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
        """The split that could have been set: the map's."""
        return static_name(self.best_share)


def sane_cases(
    path: Path,
    platforms: Sequence[str] = (),
    scenarios: Sequence[str] = (),
    traces: Sequence[str] = (),
    spread: bool = True,
) -> list[SaneCase]:
    """The map's sane cases: of all scenarios, of these, or of files whose name without what follows a dot is a case of
    the map, at the load that its recipe finds. ValueError in one line for a bad file or when no case is left."""
    files, read = _by_name(traces), [load_trace(trace, spread=spread) for trace in traces]
    rows = _sane_rows(path, files)
    wanted = {*files, *(scenarios if scenarios or traces else SCENARIOS)}
    chosen = [row for row in rows if row["case"] in wanted and (not platforms or row["platform"] in platforms)]
    if not chosen:
        known = ", ".join(sorted({row["platform"] for row in rows}))
        raise ValueError(f"no sane case of the map is left: its platforms are {known}")
    say_notices(read)
    return [_case(row, files.get(row["case"], ""), spread) for row in chosen]


def _by_name(traces: Sequence[str]) -> dict[str, str]:
    files = {Path(path).name.split(".")[0]: path for path in traces}
    if len(files) < len(traces):
        raise ValueError("--trace names one case of the map twice")
    return files


def _sane_rows(path: Path, files: Mapping[str, str]) -> list[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        recorded = {row["case"] for row in rows} - set(SCENARIOS)
        sane = [row for row in rows if _is_sane(row)]
        for row in sane:
            StaticController(_case(row).best_share)  # refuses what is no share
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; run eval/opportunity.py, or give its map.json as --map") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: is no map of this version's eval/opportunity.py ({error}): run it again") from None
    if unknown := [file for name, file in files.items() if name not in recorded]:
        raise ValueError(f"--trace {unknown[0]}: the map's recorded traces are {', '.join(sorted(recorded)) or 'none'}")
    return sane


def _is_sane(row: Row) -> bool:
    return row["rho"] is not None and row["rho"] < 1.0 and row[WORST_CLASS] <= UNSERVED


def _case(row: Row, trace: str = "", spread: bool = True) -> SaneCase:
    platform = find_platform(row["platform"])  # refuses what it does not know
    traffic = Case(platform, trace=trace, spread=spread).calibrated() if trace else Case(platform, scenario=row["case"])
    return SaneCase(traffic, row["rho"], row["best_static_share"], row["last_seed"])
