"""Runs of whole engines, as others published them or a user measured them: one row of a CSV or JSON file each.

rows.csv beside this file has the published ones that can be used, figures and settings only, each with its source.
"""

import csv
import io
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hbmgym.cli import integer
from hbmgym.envs.serving.gpus import find_gpu
from hbmgym.memory_backend.geometry import MODELS, dtype_bytes, find_model, state_number_bytes, weight_number_bytes

PUBLISHED = Path(__file__).with_name("rows.csv")
CONFIGS = Path(__file__).with_name("configs")
"""config.json files of published models that keep no recurrent state, so that the environment has no use for them."""
FIGURES = ("ttft", "tpot")
STATISTICS = ("mean", "median")
MOST = 10_000_000
"""Of tokens, requests and all else that is counted."""
TOO_MANY = "cells beyond the header"
WEIGHT_NAMES = {"fp8_block": "fp8"}
"""What rows call a dtype that our kernels know by another name."""
_RANGE = re.compile(r"(0(?:\.\d+)?|1(?:\.0+)?)-(1(?:\.0+)?)(?: uniform)?")


@dataclass(frozen=True)
class Deployment:
    """What a calibration is of: runs that differ in anything here have host constants of their own. ValueError for a
    model, GPU or dtype that is not known, and for GPUs that cannot share the model out."""

    model: str
    gpu: str
    tensor_parallel: int
    expert_parallel: int
    weight_dtype: str
    kv_dtype: str
    state_dtype: str
    engine: str
    """vLLM or SGLang."""
    version: str

    def __post_init__(self) -> None:
        find_model(locate_model(self.model)).require_shares(self.tensor_parallel)
        find_gpu(self.gpu)
        weight_number_bytes(self.weight_dtype)
        dtype_bytes(self.kv_dtype)
        state_number_bytes(self.state_dtype)

    @property
    def name(self) -> str:
        """Short, for tables."""
        parallel = f"TP{self.tensor_parallel}" + (f" EP{self.expert_parallel}" if self.expert_parallel > 1 else "")
        return f"{self.model} {self.weight_dtype} {self.gpu} {parallel} {self.engine} {self.version}".strip()


@dataclass(frozen=True, eq=False)
class Row:
    """One run: `concurrency` clients, each of which sends its next request when the last one has ended. Equal only to
    itself."""

    where: str
    """File and line, for messages."""
    deployment: Deployment
    date: str
    input_tokens: int
    """Nominal, as `output_tokens`: lengths are uniform between `shortest` times it and it."""
    output_tokens: int
    shortest: float | None
    """None: not stated."""
    concurrency: int
    requests: int
    prefill_chunk: int
    receive_interval: int
    statistic: str
    speculative: bool
    measured: Mapping[str, float]
    """Milliseconds by FIGURES, of those that may be used."""
    refused: Mapping[str, str]
    """Why others may not."""
    source: str
    lengths: tuple[tuple[int, ...], tuple[int, ...]] | None = field(default=None, repr=False)
    """Prompt and output tokens of every request in the order they were sent, where they are known."""

    @property
    def name(self) -> str:
        """Short, for tables."""
        return f"{self.input_tokens}/{self.output_tokens} c{self.concurrency}"


def locate_model(slug: str) -> str:
    """What `find_model` takes for a slug of MODELS or CONFIGS, or a path to a config.json."""
    bundled = CONFIGS / f"{slug}.json"
    return str(bundled) if slug not in MODELS and bundled.is_file() else slug


def by_deployment(rows: Sequence[Row]) -> dict[Deployment, list[Row]]:
    """In the order in which deployments first appear."""
    groups: dict[Deployment, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.deployment].append(row)
    return dict(groups)


def read_rows(path: Path) -> list[Row]:
    """The rows of a .csv or .json file that have a figure to use or to refuse; ValueError names file, row and what is
    wrong with it."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is no text: {error.reason} at byte {error.start}") from error
    rows = []
    for number, fields in enumerate(_records(path, text), start=1):
        where = f"{path.name} row {number}"
        try:
            row = make_row(where, fields)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: row {number}: {error}") from error
        if row is not None:
            rows.append(row)
    if not rows:
        raise ValueError(f"{path}: has no row to use: expected a header and at least one run with ttft_ms or tpot_ms")
    return rows


def _records(path: Path, text: str) -> list[Mapping[str, Any]]:
    if path.suffix.lower() == ".csv":
        try:
            return list(csv.DictReader(io.StringIO(text, newline=""), restkey=TOO_MANY))
        except csv.Error as error:
            raise ValueError(f"{path}: is not CSV: {error}") from error
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON: {error}") from error
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise ValueError(f"{path}: expected a list of objects, one per run")
    return content


_NEEDED = ("model", "gpu", "engine", "input_tokens", "output_tokens", "concurrency")
_KNOWN = (
    *_NEEDED,
    "tensor_parallel",
    "expert_parallel",
    "weight_dtype",
    "kv_dtype",
    "state_dtype",
    "version",
    "date",
    "length_range",
    "requests",
    "prefill_chunk",
    "recv_interval",
    "prefix_cache",
    "speculative",
    "statistic",
    "ttft_ms",
    "tpot_ms",
    "output_tokens_per_s",
    "hybrid",
    "quality",
    "use",
    "cold_ttft_ms",
    "cold_tpot_ms",
    "source",
    "note",
)
"""Columns of a file of rows; those that this reader does not use may stay in it."""


def make_row(where: str, fields: Mapping[str, Any]) -> Row | None:
    """A row from the columns of a file; None where it says itself that it is not to be used. ValueError says what is
    wrong with one."""
    if TOO_MANY in fields:
        raise ValueError(f"has more cells than the header, from {str(fields[TOO_MANY][0])[:40]!r} on")
    if unknown := [str(name) for name in fields if name not in _KNOWN]:
        raise ValueError(f"unknown column {', '.join(unknown)[:80]}: known are {', '.join(_KNOWN)}")
    texts = {name: str(value).strip() for name, value in fields.items() if value is not None}
    given = {name: text for name, text in texts.items() if text not in ("", "unknown")}
    if missing := [name for name in _NEEDED if name not in given]:
        raise ValueError(f"{', '.join(missing)} is missing")
    use = given.get("use", "both")
    if use not in ("both", "none", *FIGURES):
        raise ValueError(f"use is {use!r}, expected both, ttft, tpot or none")
    figures = {
        name: _number(given, f"{name}_ms") for name in FIGURES if f"{name}_ms" in given and use in ("both", name)
    }
    if not figures:
        return None
    refused = {name: reason for name, reason in _refusals(given).items() if name in figures}
    deployment = _deployment(given)
    concurrency = _count(given, "concurrency")
    row = Row(
        where=where,
        deployment=deployment,
        date=given.get("date", ""),
        input_tokens=_count(given, "input_tokens"),
        output_tokens=_count(given, "output_tokens", least=2),
        shortest=_shortest(given.get("length_range", "")),
        concurrency=concurrency,
        requests=_count(given, "requests", 10 * concurrency),
        prefill_chunk=_count(given, "prefill_chunk", 8192),
        receive_interval=_count(given, "recv_interval", 1),
        statistic=given.get("statistic", "mean"),
        speculative=_is_true(given.get("speculative", "0")),
        measured={name: value for name, value in figures.items() if name not in refused},
        refused=refused,
        source=given.get("source", ""),
    )
    if row.statistic not in STATISTICS:
        raise ValueError(f"statistic is {row.statistic!r}, expected one of: {', '.join(STATISTICS)}")
    if row.requests < row.concurrency:
        raise ValueError(f"requests is {row.requests}, expected at least concurrency {row.concurrency}")
    return row


_FOR_TTFT = (
    "length_range",
    "weight_dtype",
    "kv_dtype",
    "state_dtype",
    "tensor_parallel",
    "expert_parallel",
    "version",
    "date",
)


def _refusals(given: Mapping[str, str]) -> dict[str, str]:
    """Which figures say nothing about this model of an engine, and why."""
    refused = {}
    unstated = [name for name in _FOR_TTFT if name not in given]
    if unstated:
        refused["ttft"] = f"{', '.join(unstated)} {'is' if len(unstated) == 1 else 'are'} not stated"
    elif _shortest(given["length_range"]) is None:
        refused["ttft"] = f"length_range is {given['length_range']!r}, not 'fixed' or a range such as 0.8-1.0"
    if _is_true(given.get("speculative", "0")):
        refused["tpot"] = "speculative decoding: how many tokens were accepted is not known"
    if given.get("prefix_cache", "off") not in ("off", "0", "false"):
        refused |= dict.fromkeys(FIGURES, "a prefix cache was on: how much of a prompt it spared is not known")
    return refused


def _deployment(given: Mapping[str, str]) -> Deployment:
    weight_dtype = given.get("weight_dtype", "bf16")
    return Deployment(
        model=given["model"],
        gpu=given["gpu"],
        tensor_parallel=_count(given, "tensor_parallel", 1),
        expert_parallel=_count(given, "expert_parallel", 1),
        weight_dtype=WEIGHT_NAMES.get(weight_dtype, weight_dtype),
        kv_dtype=given.get("kv_dtype", "bf16"),
        state_dtype=given.get("state_dtype", "fp32"),
        engine=_engine(given["engine"]),
        version=given.get("version", ""),
    )


def _engine(text: str) -> str:
    known = {name.lower(): name for name in ("vLLM", "SGLang")}
    if text.lower() not in known:
        raise ValueError(f"engine is {text!r}, expected {' or '.join(known.values())}")
    return known[text.lower()]


def _shortest(text: str) -> float | None:
    """From '0.8-1.0', '0-1 uniform' or 'fixed': the least share of the nominal length."""
    if text == "fixed":
        return 1.0
    found = _RANGE.fullmatch(text)
    return float(found[1]) if found else None


def _is_true(text: str) -> bool:
    return text.lower() not in ("", "0", "false", "no", "off")


def _count(given: Mapping[str, str], name: str, default: int | None = None, least: int = 1) -> int:
    text = given.get(name)
    if text is None and default is not None:
        return default
    try:
        value = integer(text or "")
    except (ValueError, OverflowError):
        value = least - 1
    if not least <= value <= MOST:
        raise ValueError(f"{name} is {text!r}, expected an integer from {least} to {MOST}")
    return value


def _number(given: Mapping[str, str], name: str) -> float:
    try:
        value = float(given[name])
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} is {given[name]!r}, expected a number > 0, or nothing")
    return value
