"""BurstGPT's csv, by column name: the third release adds Session ID and Elapsed time. Prefixes are not recorded."""

from pathlib import Path

import numpy as np

from hbmgym.envs.traces.formats.columns import request_columns
from hbmgym.envs.traces.formats.reading import name_of
from hbmgym.envs.traces.formats.table import Column, Labels, numbers, numbers_or_nan, read_table, whole_numbers
from hbmgym.envs.traces.trace import Trace
from hbmgym.envs.traces.validate import build_trace


def load_burstgpt(path: Path) -> Trace:
    """Read the csv; requests without a response failed and are dropped. Raises `TraceError`."""
    table = read_table(
        path,
        (
            Column("arrival_s", ("Timestamp",), numbers, "a time >= 0 in seconds"),
            Column("input", ("Request tokens",), whole_numbers, "an integer >= 0"),
            Column("output", ("Response tokens",), whole_numbers, "an integer >= 0"),
            Column("session_id", ("Session ID",), Labels(), "a name", required=False),
            Column("service_s", ("Elapsed time",), numbers_or_nan, "a time >= 0 in seconds", required=False),
        ),
        silent=("Model", "Total tokens", "Log Type"),
    )
    column = dict(table.columns)
    arrival_s, input_tokens, output_tokens = (column.pop(key) for key in ("arrival_s", "input", "output"))
    notices = table.notices
    if failed := int(np.count_nonzero(output_tokens == 0)):
        notices.append(f"{path}: {failed} requests failed (0 response tokens)")
    return build_trace(
        request_columns(arrival_s, input_tokens, output_tokens, **column),
        name=name_of(path),
        kind="open-loop",
        block_size=0,
        path=str(path),
        where=lambda row: f"{path}:{table.lines[row]}",
        link=True,
        notices=notices,
        clock="BurstGPT",
    )
