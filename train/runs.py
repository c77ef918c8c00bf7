"""Run folders: config.json, checkpoints/, best/, policy.npz, progress.csv, evaluations.npz, events, cells, summary."""

import dataclasses
import fcntl
import json
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hbmgym.envs.workload import DEFAULT_SCENARIO
from hbmgym.eval.cells import claimed, write_json
from hbmgym.eval.provenance import provenance
from hbmgym.streams import say
from hbmgym.train.options import TrainOptions

RUNS = Path("runs")
_PACKAGES = ("hbmgym", "gymnasium", "stable-baselines3", "torch", "numpy", "numba")


class CannotGoOn(Exception):
    """What a run has saved does not serve to continue it; the message says why."""


def new_run(options: TrainOptions) -> Path:
    """Make the run's folder; ValueError when the one that was named is in use."""
    folder = Path(options.out) if options.out else _next_free("-".join(["ppo", *_traffic(options)]))
    facts = {"options": dataclasses.asdict(options), **provenance(_PACKAGES)}
    with claimed(folder):
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


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep a run's folder from other processes, which would overwrite what this one saves; ValueError when one has it
    already. Not every file system has locks: there a line says so."""
    with (folder / "config.json").open("rb+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder} is in use by another process: wait until it has ended, or stop it") from None
        except OSError as error:
            say(f"{folder} cannot be locked ({error.strerror}): start no other process on it")
        yield


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole model of a run, None when it has not saved one; CannotGoOn when all are damaged."""
    models = sorted((folder / "checkpoints").glob("model_*.zip"), key=lambda path: int(path.stem.split("_")[1]))
    if not models:
        return None
    whole = [model for model in models if _is_whole(model)]
    if not whole:
        raise CannotGoOn(f"{models[-1]} is damaged, and there is no other")
    if whole[-1] != models[-1]:
        print(f"{models[-1]} is damaged; going on from {whole[-1].name}", file=sys.stderr)
    return whole[-1]


def _is_whole(model: Path) -> bool:
    try:
        with zipfile.ZipFile(model) as archive:
            # Half a model may end with a whole archive: that of its weights.
            return "data" in archive.namelist() and archive.testzip() is None
    except (zipfile.BadZipFile, zlib.error, EOFError):
        return False
