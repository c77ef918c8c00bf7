"""Times as texts: dates with a time of day, and units of numbers."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np

PER_SECOND = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}
_EPOCH_S = (1e9, 4e9)
"""Seconds since 1970 in the years 2001 to 2096."""
_FIRST_YEAR, _LAST_YEAR = 1700, 2200
"""Nanoseconds since 1970 fit 64 bits for these."""
_PLAIN = re.compile(r"([0-9]{4})-[0-9]{2}-[0-9]{2}[ T][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?")
_UTC = re.compile(r"(Z|\+00:?00| UTC)$")


def parse_datetimes(texts: Sequence[str]) -> np.ndarray:
    """datetime64[ns] of dates like 2023-11-16 18:17:03.9799600, in UTC where they say nothing. Raises ValueError."""
    plain = [_UTC.sub("", text.strip()) for text in texts]
    matches = list(map(_PLAIN.fullmatch, plain))
    if all(matches):
        _check_years({int(match[1]) for match in matches if match})
        return np.array(plain, "datetime64[ns]")
    moments = [_in_utc(text.strip()) for text in texts]
    _check_years({moment.year for moment in moments})
    return np.array(moments, "datetime64[ns]")


def parse_datetime(text: str) -> float:
    """Seconds since 1970 of one date, in UTC where it says nothing. Raises ValueError."""
    return _in_utc(text).replace(tzinfo=UTC).timestamp()


def epoch_hint(value: object) -> str:
    """What to do about a number, or its text, that looks like a time since 1970 in small units; else empty."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return ""
    for unit, per_second in PER_SECOND.items():
        if per_second > 1.0 and _EPOCH_S[0] <= number / per_second <= _EPOCH_S[1]:
            return f"it looks like {unit} since 1970: convert it or, in a csv, name the column's unit by arrival_{unit}"
    return ""


def since_first(moments: np.ndarray) -> np.ndarray:
    """float64 seconds after the earliest of datetime64[ns]."""
    nanoseconds = moments.astype(np.int64)
    return (nanoseconds - nanoseconds.min(initial=np.iinfo(np.int64).max)) / 1e9


def _check_years(years: set[int]) -> None:
    if years and not _FIRST_YEAR <= min(years) <= max(years) <= _LAST_YEAR:
        raise ValueError("too long ago, or too far away")


def _in_utc(text: str) -> datetime:
    """Without its zone; raises ValueError."""
    moment = datetime.fromisoformat(text)
    try:
        return moment.astimezone(UTC).replace(tzinfo=None) if moment.tzinfo else moment
    except OverflowError as error:
        raise ValueError("before the first year, or after the last") from error
