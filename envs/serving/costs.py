"""Measured costs: what eval/gpu_check.py found on a GPU, in place of the cost model's assumptions."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from hbmgym.envs.serving.config import ServingConfig

NAMES = ("chunk_move_s", "block_copy_s_per_byte")
MOST_S = 1.0
"""No constant is longer; a larger one is in another unit."""


@dataclass(frozen=True)
class MeasuredCosts:
    """The content of a costs.json."""

    path: Path
    values: Mapping[str, float]
    """Seconds, by constant of the cost model; some of NAMES."""
    measured_on: str

    def applied_to(self, config: ServingConfig) -> ServingConfig:
        """The configuration with the measured values; what was not measured stays as it is."""
        return replace(
            config,
            chunk_move_s=self.values.get("chunk_move_s", config.chunk_move_s),
            block_copy_s_per_byte=self.values.get("block_copy_s_per_byte", config.block_copy_s_per_byte),
        )

    @property
    def line(self) -> str:
        """What a script prints, so that a GPU that was not meant is seen."""
        found = ", ".join(f"{name} {value:.3g}" for name, value in self.values.items())
        return f"{self.path}: {found}, measured on {self.measured_on}"


def read_costs(path: Path) -> MeasuredCosts:
    """Read a costs.json that `eval/gpu_check.py` wrote; ValueError names file, constant and value in one line."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        values, measured_on = dict(content["constants"].items()), str(content["measured_on"]["name"])
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: is no costs.json: give the one that eval/gpu_check.py wrote") from error
    if not values:
        raise ValueError(f"{path}: has no constants: run eval/gpu_check.py with the parts migrations and copies")
    for name, value in values.items():
        if name not in NAMES:
            raise ValueError(f"{path}: constant is {name!r}, expected one of: {', '.join(NAMES)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= MOST_S:
            raise ValueError(f"{path}: {name} is {value!r}, expected seconds above 0 and at most {MOST_S:g}")
    return MeasuredCosts(path, values, measured_on)
