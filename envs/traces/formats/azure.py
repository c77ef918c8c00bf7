"""Azure's LLM inference traces, multimodal ones too, as csv: TIMESTAMP, ContextTokens, GeneratedTokens.

Neither sessions nor prefixes are recorded.
"""

from pathlib import Path

from hbmgym.envs.traces.formats.columns import request_columns
from hbmgym.envs.traces.formats.reading import name_of
from hbmgym.envs.traces.formats.table import Column, read_table, whole_numbers, whole_numbers_or_none
from hbmgym.envs.traces.formats.times import parse_datetimes, since_first
from hbmgym.envs.traces.trace import Trace
from hbmgym.envs.traces.validate import build_trace

_COLUMNS = (
    Column("arrival", ("TIMESTAMP",), parse_datetimes, "a date and a time of day"),
    Column("input", ("ContextTokens",), whole_numbers, "an integer >= 0"),
    Column("output", ("GeneratedTokens",), whole_numbers, "an integer >= 0"),
    Column("images", ("NumImages",), whole_numbers_or_none, "an integer >= 0", required=False),
)


def load_azure(path: Path) -> Trace:
    """Read the csv; its clock starts with the first request. Raises `TraceError`."""
    table = read_table(path, _COLUMNS)
    column = table.columns
    notices = table.notices
    if "images" in column and column["images"].any():
        notices.append(f"{path}: images are counted by what ContextTokens says of them and not otherwise")
    return build_trace(
        request_columns(since_first(column["arrival"]), column["input"], column["output"]),
        name=name_of(path),
        kind="open-loop",
        block_size=0,
        path=str(path),
        where=lambda row: f"{path}:{table.lines[row]}",
        link=True,
        notices=notices,
    )
