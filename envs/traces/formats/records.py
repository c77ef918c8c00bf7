"""Fields of JSON records: a value of the right kind, or the one line that says where it is not.

`place` is a line's number, or what else finds the record in its file. A field that is missing is `Damaged`, for those
who read logs that nobody edits; a wrong value is not.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from hbmgym.envs.traces.formats.damage import Damaged
from hbmgym.envs.traces.formats.times import epoch_hint
from hbmgym.envs.traces.trace import TraceError
from hbmgym.envs.traces.validate import MAX_SECONDS, refuse

MAX_TOKENS = 2**31 - 1
_MISSING = frozenset({"", "nan", "null", "none", "n/a", "na", "<na>"})
_SHORT = 8
"""Longer texts need no closer look, which would take as long as reading them."""
Record = Mapping[str, Any]


def is_missing(value: Any) -> bool:
    """Whether a value says that there is none: null and NaN, as such or as texts, and an empty text."""
    if type(value) is str:
        return (len(value) < _SHORT or value.isspace()) and value.strip().lower() in _MISSING
    return value is None or value != value


def whole(record: Record, field: str, path: Path, place: int | str) -> int:
    """A number of tokens: an integer from 0 to MAX_TOKENS, also written as 640.0. Raises `TraceError`."""
    value = record.get(field)
    if type(value) is float and value.is_integer():
        value = int(value)
    # bool is a subclass of int.
    if type(value) is not int or not 0 <= value <= MAX_TOKENS:
        refuse_value(f"{path}:{place}", field, value, f"an integer from 0 to {MAX_TOKENS}")
    return value


def seconds(record: Record, field: str, path: Path, place: int | str, *, per_second: float = 1.0) -> float:
    """A time that the record gives in 1 / `per_second` seconds, in seconds. Raises `TraceError`."""
    value: Any = record.get(field)
    # NaN fails the comparison, as do both infinities.
    if type(value) not in (int, float) or not 0 <= value <= MAX_SECONDS * per_second:
        expected = f"a time from 0 to {MAX_SECONDS * per_second:g} {'ms' if per_second == 1e3 else 's'}"
        refuse_value(f"{path}:{place}", field, value, expected)
    return value / per_second


def seconds_or_nan(record: Record, field: str, path: Path, place: int | str, *, per_second: float = 1.0) -> float:
    """Like `seconds`; NaN where the record has no such field, or one that `is_missing`. Raises `TraceError`."""
    return math.nan if is_missing(record.get(field)) else seconds(record, field, path, place, per_second=per_second)


def name_or_none(record: Record, field: str, path: Path, place: int | str) -> str | int | None:
    """A text or integer that names something; None where there is none. Raises `TraceError`."""
    value = record.get(field)
    if type(value) is int or (type(value) is str and not is_missing(value)):
        return value
    if is_missing(value):
        return None
    refuse(f"{path}:{place}", field, value, "a text or an integer", "correct the value")


def block_list_or_none(record: Record, path: Path, place: int | str) -> list[str | int] | None:
    """The record's hash_ids, integers or texts; None where there are none. Raises `TraceError`."""
    value = record.get("hash_ids")
    if type(value) is list and set(map(type, value)) <= {int, str}:
        return value
    if is_missing(value):
        return None
    refuse(f"{path}:{place}", "hash_ids", value, "a list of integers", "one id per block of the prompt")


def refuse_value(place: str, field: str, value: Any, expected: str) -> NoReturn:
    """Raise the line of a value that is wrong or, as `Damaged`, missing."""
    if value is not None:
        refuse(place, field, value, expected, epoch_hint(value) or "correct the value")
    try:
        refuse(place, field, value, expected, "the field is missing; add it")
    except TraceError as error:
        raise Damaged(str(error)) from None
