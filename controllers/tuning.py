"""Numbers of the controllers that may be tuned: where they are sought, and the table of those found (eval/tune.py)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hbmgym.controllers.telemetry import MARGINAL_STEPS

TABLE = Path(__file__).with_name("tuned.json")
"""By controller: `parameters`, and what they were judged by."""


@dataclass(frozen=True)
class Range:
    """From low to high, both included, whole numbers if both are; with `log`, ratios count and not differences."""

    low: float
    high: float
    log: bool = False

    @property
    def is_whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def __contains__(self, value: object) -> bool:
        kinds = int if self.is_whole else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool) and self.low <= value <= self.high


Choice = tuple[float, ...]
"""Where only some numbers make sense."""

_THRESHOLDS: Mapping[str, Range | Choice] = {
    "threshold_low": Range(0.005, 0.2, log=True),
    "threshold_high": Range(0.21, 0.6),
}
_CLAIMS: Mapping[str, Range | Choice] = {**_THRESHOLDS, "claim_s": Range(3.0, 300.0, log=True)}

RANGES: Mapping[str, Mapping[str, Range | Choice]] = {
    "threshold": _THRESHOLDS,
    "threshold-b1": _CLAIMS,
    "threshold-b128": _CLAIMS,
    "sglang-balance": {
        "measured_requests": Range(20, 2000, log=True),
        "ratio_change": Range(1.01, 3.0, log=True),
    },
    "moving-average": {
        "moving_average_decay": (0.9, 0.97, 0.99, 0.997, 0.999, 0.9997, 0.9999),
        "min_sampled_kv_caches": Range(20, 5000, log=True),
        "target_ratio_update_interval": Range(5, 500, log=True),
        "cooldown_secs": Range(5.0, 300.0, log=True),
        "ratio_threshold": Range(1.01, 2.0, log=True),
    },
    "tail-blame": {
        "tax_per_s": Range(0.0004, 0.06, log=True),
        "least_blame": Range(0.0005, 0.1, log=True),
    },
    "gradient": {
        "ghost": MARGINAL_STEPS,
        "tail": MARGINAL_STEPS,
        "credit_per_s": Range(0.003, 3.0, log=True),
        "tail_weight": Range(0.0, 2.0),
        "demand_per_s": Range(0.0003, 0.1, log=True),
        "max_step_per_s": Range(0.001, 0.06, log=True),
    },
    "bandit": {
        "exploration": Range(0.01, 3.0, log=True),
        "ridge": Range(0.1, 30.0, log=True),
        "memory": Range(0.95, 1.0),
        "longest_epoch": Range(1, 32, log=True),
        "context_change": Range(0.02, 0.5, log=True),
        "least_gain": Range(0.002, 0.2, log=True),
    },
    # move_s_per_budget is left out: only its ratio to horizon_s counts.
    "convex": {
        "average_s": Range(5.0, 300.0, log=True),
        "horizon_s": Range(5.0, 600.0, log=True),
        "blocked_s": Range(0.05, 20.0, log=True),
        "margin": Range(0.0, 0.5),
        "cooldown_s": Range(1.0, 120.0, log=True),
        "least_gain": Range(0.0, 0.5),
    },
}
"""By controller and parameter. A row whose name says a number (the batch of b1 and b128) keeps it."""


def check_tunable(name: str) -> None:
    """ValueError in one line for a controller without numbers to tune."""
    if name not in RANGES:
        raise ValueError(f"controller {name!r} has no numbers to tune, expected one of: {', '.join(RANGES)}")


def read_table(path: Path) -> dict[str, Any]:
    """What has been tuned, by controller, nothing when there is no file; ValueError in one line for another one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error}): remove it and tune again") from None
    if not isinstance(found, dict) or not all(isinstance(entry, dict) for entry in found.values()):
        raise ValueError(f"{path}: is no table of tuned controllers: remove it and tune again")
    return found


def tuned_parameters(name: str) -> dict[str, float]:
    """The parameters found for a controller; ValueError in one line that names the command that finds them."""
    check_tunable(name)
    ranges, values = RANGES[name], read_table(TABLE).get(name, {}).get("parameters")
    command = f"run python eval/tune.py --controller {name}"
    if values is None:
        raise ValueError(f"controller '{name}:tuned' has not been tuned: {command}")
    # Parameters and ranges may have changed since.
    if (
        not isinstance(values, dict)
        or set(values) != set(ranges)
        or not all(values[key] in ranges[key] for key in ranges)
    ):
        raise ValueError(f"controller '{name}:tuned': {TABLE} does not fit what may be tuned: {command}")
    return values
