"""Fields of JSON records: a value of the right kind, or the one line that says where it is not.

`place` is a line's number, or what else finds the record in its file.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hbmgym.envs.traces.validate import MAX_SECONDS, refuse

MAX_TOKENS = 2**31 - 1
Record = Mapping[str, Any]


def whole(record: Record, field: str, path: Path, place: int | str) -> int:
    """A number of tokens: an integer from 0 to MAX_TOKENS. Raises `TraceError`."""
    value = record.get(field)
    # bool is a subclass of int.
    if type(value) is not int or not 0 <= value <= MAX_TOKENS:
        refuse(f"{path}:{place}", field, value, f"an integer from 0 to {MAX_TOKENS}", _remedy(value))
    return value


def seconds(record: Record, field: str, path: Path, place: int | str, *, per_second: float = 1.0) -> float:
    """A time that the record gives in 1 / `per_second` seconds, in seconds. Raises `TraceError`."""
    value: Any = record.get(field)
    # NaN fails the comparison, as do both infinities.
    if type(value) not in (int, float) or not 0 <= value <= MAX_SECONDS * per_second:
        refuse(f"{path}:{place}", field, value, "a finite time >= 0", _remedy(value))
    return value / per_second


def seconds_or_nan(record: Record, field: str, path: Path, place: int | str, *, per_second: float = 1.0) -> float:
    """Like `seconds`; NaN where the record has no such field, or null. Raises `TraceError`."""
    return math.nan if record.get(field) is None else seconds(record, field, path, place, per_second=per_second)


def name_or_none(record: Record, field: str, path: Path, place: int | str) -> str | int | None:
    """A text or integer that names something; None where there is none. Raises `TraceError`."""
    value = record.get(field)
    if value is None or type(value) in (str, int):
        return value
    refuse(f"{path}:{place}", field, value, "a text or an integer", "correct the value")


def block_list_or_none(record: Record, path: Path, place: int | str) -> list[str | int] | None:
    """The record's hash_ids, integers or texts; None where there are none. Raises `TraceError`."""
    value = record.get("hash_ids")
    if value is None:
        return None
    if type(value) is not list or not set(map(type, value)) <= {int, str}:
        refuse(f"{path}:{place}", "hash_ids", value, "a list of integers", "one id per block of the prompt")
    return value


def _remedy(value: Any) -> str:
    return "the field is missing; add it" if value is None else "correct the value"
