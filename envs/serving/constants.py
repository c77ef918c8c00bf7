"""The cost model's constants that a calibration may replace, and the calibration that is loaded.

`calibration.json` beside this file is written by `python eval/calibrate.py`. It holds the constants that are loaded:
fitted ones if the fit passed its rule (`eval/calibrate.py`), else the priors below. What it says about rows and errors
is in docs/calibration.md.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST_S = 1.0
"""No constant is longer; a larger one is in another unit."""
FILE = Path(__file__).with_name("calibration.json")


@dataclass(frozen=True)
class CostConstants:
    """Seconds, and shares of a GPU's peak rates. The defaults are the priors; cost_model.py names their sources."""

    t_fix_s: float = 126e-6
    """Every iteration."""
    t_fix_per_layer_s: float = 32e-6
    """Every iteration and layer."""
    t_seq_s: float = 4e-6
    """Every decoding request and iteration."""
    e_w: float = 0.71
    """Of the bandwidth, reading weights."""
    e_k: float = 0.53
    """Of the bandwidth, reading KV."""
    e_s: float | None = None
    """Of the bandwidth, reading and writing recurrent state; None: as measured on the GPU's kernels (gpus.py)."""
    e_c: float = 0.5
    """Of the FLOP rate, in all but attention."""
    t_comm_s: float = 0.0
    """Every iteration and layer, times (g - 1) / g under tensor parallelism g; 0: communication is not modelled."""
    block_copy_s_per_byte: float | None = None
    """Copying a block inside the HBM of one GPU, as measured by eval/gpu_check.py; None: by bandwidth and e_s."""

    def __post_init__(self) -> None:
        for name in ("e_w", "e_k", "e_s", "e_c"):
            if not _is_within(value := getattr(self, name), 1.0) and (value is not None or name != "e_s"):
                raise ValueError(f"constant {name} is {value!r}, expected a number above 0 and at most 1")
        for name in ("t_fix_s", "t_fix_per_layer_s", "t_seq_s", "t_comm_s"):
            if not _is_within(value := getattr(self, name), MOST_S) and value != 0:
                raise ValueError(f"constant {name} is {value!r}, expected seconds from 0 to {MOST_S:g}")
        if (value := self.block_copy_s_per_byte) is not None and not _is_within(value, MOST_S):
            raise ValueError(f"constant block_copy_s_per_byte is {value!r}, expected seconds up to {MOST_S:g}")


def _is_within(value: object, most: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= most


PRIORS = CostConstants()


@dataclass(frozen=True)
class Calibration:
    """What a calibration found: the constants to load, and which models on which GPUs it had published rows for."""

    constants: CostConstants
    accepted: bool
    """Whether `constants` are fitted; otherwise they are the priors."""
    rows: frozenset[tuple[str, str]]
    """(model, GPU) slugs."""

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> "Calibration":
        """From the content of a file that `eval/calibrate.py` wrote."""
        rows = frozenset((row["model"], row["gpu"]) for row in facts["rows"])
        return cls(CostConstants(**facts["constants"]), facts["accepted"], rows)

    def notice(self, model: str, gpu: str) -> str | None:
        """One line for a model on a GPU that no published row stands for, None where there is one."""
        if (model, gpu) in self.rows:
            return None
        kind = "fitted to rows of other models or GPUs" if self.accepted else "priors"
        return f"{model} on {gpu}: no published measurement stands behind its times, whose constants are {kind}"


LOADED = Calibration.from_json(json.loads(FILE.read_text(encoding="utf-8")))
