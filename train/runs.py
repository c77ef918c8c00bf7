"""Run folders: config.json, checkpoints/, best/, policy.npz, progress.csv, evaluations.npz, events, cells, summary."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from hbmgym.envs.workload import DEFAULT_SCENARIO
from hbmgym.eval.cells import claim_folder, write_json
from hbmgym.eval.provenance import provenance
from hbmgym.train.options import TrainOptions

RUNS = Path("runs")
_PACKAGES = ("hbmgym", "gymnasium", "stable-baselines3", "torch", "numpy", "numba")


def new_run(options: TrainOptions) -> Path:
    """Make the run's folder; ValueError when the one that was named is in use."""
    folder = Path(options.out) if options.out else _next_free("-".join(["ppo", *_traffic(options)]))
    facts = {"options": dataclasses.asdict(options), **provenance(_PACKAGES)}
    claim_folder(folder)
    (folder / "checkpoints").mkdir()
    (folder / "best").mkdir()
    write_json(folder / "config.json", facts)
    return folder


def _traffic(options: TrainOptions) -> list[str]:
    if options.recipe:
        return [options.recipe]
    return [*options.scenario, *(Path(trace).name.split(".")[0] for trace in options.trace)] or [DEFAULT_SCENARIO]


def _next_free(stem: str) -> Path:
    number = 1
    while (RUNS / f"{stem}-{number}").exists():
        number += 1
    return RUNS / f"{stem}-{number}"


def read_options(folder: Path) -> TrainOptions:
    """The options of a run; ValueError in one line when `folder` is not one."""
    try:
        stored: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))["options"]
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in stored.items()}
        return TrainOptions(**values)
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"--resume {folder}: config.json cannot be read ({error}): name the folder of a run"
        ) from error


def last_checkpoint(folder: Path) -> Path | None:
    """The newest model of a run, None when it has not saved one."""
    models = sorted((folder / "checkpoints").glob("model_*.zip"), key=lambda path: int(path.stem.split("_")[1]))
    return models[-1] if models else None
