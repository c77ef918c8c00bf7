"""What a loader may mend, each with a notice: empty rows, zero outputs in session libraries, unsorted rows."""

import numpy as np

from hbmgym.envs.traces.coding import close_id_gaps, recode
from hbmgym.envs.traces.trace import ID_COLUMNS, ROW_COLUMNS, Kind

Columns = dict[str, np.ndarray]


def raise_outputs(columns: Columns, path: str, notices: list[str]) -> Columns:
    """Outputs of 0 become 1: a library's row is a step of its session and must stay."""
    empty = columns["output_tokens"] < 1
    if empty.any():
        notices.append(f"{path}: {int(empty.sum())} rows had output_tokens 0, set to 1")
    return columns | {"output_tokens": np.maximum(columns["output_tokens"], 1)}


def drop_empty_rows(columns: Columns, path: str, notices: list[str]) -> Columns:
    """Without the rows that have no input or no output tokens; also closes gaps in the ids."""
    kept = (columns["input_tokens"] > 0) & (columns["output_tokens"] > 0)
    if not kept.all():
        notices.append(f"{path}: dropped {int((~kept).sum())} rows with 0 input or output tokens")
        columns = _with_rows(columns, np.flatnonzero(kept))
    return columns | {"r_start": close_id_gaps(columns["r_start"], columns["r_len"])}


def sort_rows(columns: Columns, kind: Kind, path: str, notices: list[str]) -> Columns:
    """Rows by arrival, in a session library by session first; equal keys keep the file's order."""
    keys: tuple[np.ndarray, ...] = (columns["arrival_s"],)
    if kind == "session-library":
        keys += (columns["session_id"],)
    order = np.lexsort(keys)
    moved = int((order != np.arange(len(order))).sum())
    if not moved:
        return columns
    notices.append(f"{path}: rows were not sorted by {'session and ' * (len(keys) > 1)}arrival, moved {moved}")
    return _with_rows(columns, order)


def _with_rows(columns: Columns, order: np.ndarray) -> Columns:
    """The rows `order`; a row whose parent is gone follows its nearest ancestor that is left, idle time unknown."""
    place = np.full(len(columns["arrival_s"]), -1, np.int64)
    place[order] = np.arange(len(order))
    parent = columns["parent"]
    ancestor = parent.copy()
    while (gone := (ancestor >= 0) & (place[ancestor] < 0)).any():
        ancestor[gone] = parent[ancestor[gone]]
    rows = {name: columns[name][order] for name in ROW_COLUMNS}
    rows["parent"] = np.where(ancestor >= 0, place[ancestor], -1)[order].astype(np.int32)
    rows["gap_s"] = np.where(ancestor != parent, np.float32(np.nan), columns["gap_s"])[order]
    ids = recode({name: columns[name] for name in ID_COLUMNS}, order)
    return columns | rows | ids
