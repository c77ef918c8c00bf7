"""What a loader may mend, each with a notice: empty rows, zero outputs in session libraries, unsorted rows, sub-agents
that are stamped with the time of their end."""

import numpy as np

from hbmgym.envs.traces.coding import recode
from hbmgym.envs.traces.service import ends_s
from hbmgym.envs.traces.trace import ID_COLUMNS, ROW_COLUMNS, Kind

Columns = dict[str, np.ndarray]

START_S = 10.0
"""A sub-agent sends its first row within so many seconds after the row of its parent that started it."""


def raise_outputs(columns: Columns, path: str, notices: list[str]) -> Columns:
    """Outputs of 0 become 1: a library's row is a step of its session and must stay."""
    empty = columns["output_tokens"] < 1
    if empty.any():
        notices.append(f"{path}: {int(empty.sum())} rows had output_tokens 0, set to 1")
    return columns | {"output_tokens": np.maximum(columns["output_tokens"], 1)}


def drop_empty_rows(columns: Columns, path: str, notices: list[str]) -> Columns:
    """Without the rows that have no input or no output tokens."""
    kept = (columns["input_tokens"] > 0) & (columns["output_tokens"] > 0)
    if not kept.all():
        notices.append(f"{path}: dropped {int((~kept).sum())} rows with 0 input or output tokens")
        columns = with_rows(columns, np.flatnonzero(kept))
    return columns


def order_by_arrival(columns: Columns, path: str, notices: list[str]) -> tuple[Columns, np.ndarray]:
    """Rows by arrival, however their parents lie, and where each of them was; a parent that comes later is given up."""
    order = np.argsort(columns["arrival_s"], kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    parent = columns["parent"]
    earlier = (parent >= 0) & (place[parent] < place)
    if given_up := int(((parent >= 0) & ~earlier).sum()):
        notices.append(f"{path}: {given_up} rows arrived before the turn that they continue, now they continue none")
    columns = columns | {"parent": np.where(earlier, parent, -1)}
    if moved := int((order != np.arange(len(order))).sum()):
        notices.append(f"{path}: rows were not sorted by arrival, moved {moved}")
        columns = with_rows(columns, order)
    return columns, order


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
    return with_rows(columns, order)


def with_rows(columns: Columns, order: np.ndarray) -> Columns:
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


def move_sub_agents(columns: Columns, path: str, notices: list[str]) -> Columns:
    """Sub-agents whose clock begins when they ended, moved to where they started; rows must be sorted.

    Such a sub-agent lies behind its parent's row by as long as it runs and few seconds more (40 of the 46 of
    kv-cache-tester's recordings: 2.1 to 7.8 s), and its parent's next row seems to overtake it.
    """
    starter = columns.get("s_parent_session")
    if starter is None:
        return columns
    session, stamped_s = columns["session_id"], columns["arrival_s"]
    ended_s = ends_s(stamped_s, columns["service_s"], columns["output_tokens"])
    arrival_s = stamped_s.copy()
    moved = 0
    for agent in np.flatnonzero(starter >= 0):
        own, parent = (np.flatnonzero(session == name) for name in (agent, starter[agent]))
        before = parent[stamped_s[parent] <= stamped_s[own[:1]]] if len(own) else own
        if not len(before):
            continue
        runs_s = ended_s[own].max() - stamped_s[own[0]]
        late_s = stamped_s[own[0]] - ended_s[before[-1]]
        if 0.0 <= late_s - runs_s <= START_S:
            arrival_s[own] -= runs_s
            moved += 1
    if moved:
        notices.append(f"{path}: {moved} sub-agents were stamped with the time of their end, moved to their start")
    return columns | {"arrival_s": arrival_s}
