"""Loader for Mooncake's jsonl: timestamp (ms), input_length, output_length, hash_ids; sessions are not recorded."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from hbmgym.envs.traces.coding import encode
from hbmgym.envs.traces.trace import Trace, TraceError
from hbmgym.envs.traces.validate import build_trace, refuse

FIELDS = ("timestamp", "input_length", "output_length", "hash_ids")
BLOCK_TOKENS = 512
_MAX = 2**31 - 1


def load_mooncake(path: str | Path, *, block_size: int = BLOCK_TOKENS) -> Trace:
    """Read one request per line; blank lines are skipped. Raises `TraceError`."""
    numbers, records = [], []
    for number, line in enumerate(_lines(Path(path)), start=1):
        if line.strip():
            numbers.append(number)
            records.append(_record(line, f"{path}:{number}"))
    rows = len(records)
    unknown = np.full(rows, -1, np.int32)
    columns: dict[str, np.ndarray] = {
        "arrival_s": np.array([record["timestamp"] for record in records], np.float64) / 1000.0,
        "input_tokens": np.array([record["input_length"] for record in records], np.int32),
        "output_tokens": np.array([record["output_length"] for record in records], np.int32),
        "session_id": unknown,
        "turn": unknown,
        "parent": unknown,
        "gap_s": np.full(rows, np.nan, np.float32),
        "service_s": np.full(rows, np.nan, np.float32),
        "kind": np.zeros(rows, np.uint8),
        **encode([record["hash_ids"] for record in records]),
    }
    return build_trace(
        columns,
        name=Path(path).stem,
        kind="open-loop",
        block_size=block_size,
        path=str(path),
        where=lambda row: f"{path}:{numbers[row]}",
    )


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise TraceError(f"{path}: cannot be read: {reason} (expected Mooncake jsonl)") from error


def _record(line: str, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{place}: line is not JSON, expected one object per line (the file is damaged)") from error
    if not isinstance(record, dict):
        refuse(place, "line", type(record).__name__, "a JSON object", "one request per line")
    for field in record:
        if field not in FIELDS:
            refuse(place, "field", field, f"one of {', '.join(FIELDS)}", "remove the field")
    for field in FIELDS:
        if field not in record:
            refuse(place, field, None, "a value", "the field is missing; add it")
    for field in FIELDS[:3]:
        _check_number(record[field], field, place)
    ids = record["hash_ids"]
    if not isinstance(ids, list) or not all(type(block) is int for block in ids):
        refuse(place, "hash_ids", str(ids)[:40], "a list of integers", "one id per block of the prompt")
    return record


def _check_number(value: Any, field: str, place: str) -> None:
    whole = field != "timestamp"
    good = type(value) is int or (not whole and isinstance(value, float))
    # NaN fails the comparison, as do both infinities.
    if not good or not 0 <= value <= (_MAX if whole else 1e15):
        refuse(place, field, value, "an integer >= 0" if whole else "a finite time >= 0 in ms", "correct the value")
