"""Any csv with a column each for arrival, input and output; which ones is told, or seen by common names."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from hbmgym.envs.traces.formats.columns import request_columns
from hbmgym.envs.traces.formats.reading import name_of
from hbmgym.envs.traces.formats.table import Column, Labels, numbers_or_dates, plain_name, read_table, whole_numbers
from hbmgym.envs.traces.formats.times import PER_SECOND, since_first
from hbmgym.envs.traces.trace import Trace, TraceError
from hbmgym.envs.traces.validate import build_trace

ARRIVALS = tuple(f"arrival_{unit}" for unit in PER_SECOND)
KEYS = (*ARRIVALS, "input_tokens", "output_tokens", "session_id")
_ALIASES = {
    "arrival_s": ("arrival_s", "arrived_at", "arrival_time_s", "timestamp_s"),
    "arrival_ms": ("arrival_ms", "arrival_time_ms", "timestamp_ms"),
    "arrival_us": ("arrival_us", "arrival_time_us", "timestamp_us"),
    "arrival_ns": ("arrival_ns", "arrival_time_ns", "timestamp_ns"),
    "input_tokens": ("input_tokens", "input_length", "prompt_tokens", "num_prefill_tokens", "context_tokens"),
    "output_tokens": ("output_tokens", "output_length", "completion_tokens", "num_decode_tokens", "generated_tokens"),
    "session_id": ("session_id", "conversation_id"),
}


def parse_columns(text: str) -> dict[str, str]:
    """`arrival_s=time,input_tokens=prompt,...` as a mapping from keys to column names. Raises `TraceError`."""
    given: dict[str, str] = {}
    for item in text.split(","):
        key, equals, name = (part.strip() for part in item.partition("="))
        if key not in KEYS or not equals or not name or key in given:
            raise TraceError(f"--columns has {item!r}, expected key=column, each key once, of {', '.join(KEYS)}")
        given[key] = name
    if sum(key in given for key in ARRIVALS) != 1 or not {"input_tokens", "output_tokens"} <= given.keys():
        raise TraceError(
            f"--columns names {', '.join(given)}, expected input_tokens, output_tokens and one of {', '.join(ARRIVALS)}"
        )
    return given


def guess_columns(header: list[str]) -> dict[str, str] | None:
    """The mapping that common names of columns suggest; None where one is missing."""
    there = {plain_name(name): name for name in header}
    found = {
        key: there[plain_name(name)]
        for key, names in _ALIASES.items()
        for name in names[::-1]
        if plain_name(name) in there
    }
    arrival = next((key for key in ARRIVALS if key in found), None)
    if arrival is None or not {"input_tokens", "output_tokens"} <= found.keys():
        return None
    return {key: found[key] for key in (arrival, "input_tokens", "output_tokens", "session_id") if key in found}


def load_csv(path: Path, columns: Mapping[str, str]) -> Trace:
    """Read the csv, whose `columns` are named by keys of KEYS. Raises `TraceError`."""
    arrival = next(key for key in ARRIVALS if key in columns)
    unit = arrival.removeprefix("arrival_")
    parse = partial(numbers_or_dates, per_second=PER_SECOND[unit])
    wanted = [
        Column("arrival", (columns[arrival],), parse, f"a time >= 0 in {unit}, or a date and a time of day"),
        Column("input", (columns["input_tokens"],), whole_numbers, "an integer >= 0"),
        Column("output", (columns["output_tokens"],), whole_numbers, "an integer >= 0"),
    ]
    if "session_id" in columns:
        wanted.append(Column("session_id", (columns["session_id"],), Labels(), "a name"))
    table = read_table(path, wanted)
    column = dict(table.columns)
    moments, input_tokens, output_tokens = (column.pop(key) for key in ("arrival", "input", "output"))
    dates = moments.dtype.kind == "M"
    arrival_s = since_first(moments) if dates else moments / PER_SECOND[unit]
    return build_trace(
        request_columns(arrival_s, input_tokens, output_tokens, **column),
        name=name_of(path),
        kind="open-loop",
        block_size=0,
        path=str(path),
        where=lambda row: f"{path}:{table.lines[row]}",
        link=True,
        notices=table.notices,
    )
