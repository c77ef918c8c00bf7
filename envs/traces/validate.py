"""From raw columns to a Trace: every loader ends here, so that bad input means the same line everywhere."""

import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

import numpy as np

from hbmgym.envs.traces.coding import close_id_gaps
from hbmgym.envs.traces.repair import drop_empty_rows, move_sub_agents, raise_outputs, sort_rows
from hbmgym.envs.traces.trace import ID_COLUMNS, ROW_COLUMNS, SESSION_COLUMNS, Kind, Trace, TraceError
from hbmgym.envs.traces.turns import link_turns

Columns = dict[str, np.ndarray]
Where = Callable[[int], str]

MAX_SECONDS = 1e12
"""Thirty thousand years: times that end anywhere near fit 64 bits in any unit."""
RATES_PER_S, RATE_ROWS = (1 / 3600, 1000.0), 20
"""Between which rates a trace of so many rows or more is believed: outside, milliseconds were likely taken for seconds,
or seconds for milliseconds."""
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100
_LOWEST = {"session_id": -1, "turn": -1, "parent": -1, "h_ref": -1, "s_parent_session": -1, "r_len": 1}
_MAY_BE_NAN = frozenset({"gap_s", "service_s"})


def build_trace(
    raw: Mapping[str, np.ndarray],
    *,
    name: str,
    kind: Kind,
    block_size: int,
    path: str,
    where: Where,
    link: bool = False,
    notices: Iterable[str] = (),
    repaired: bool = False,
    id_file: str = "",
    clock: str = "",
) -> Trace:
    """Check, repair and freeze raw columns; `where(row)` names a row's place in the file. Raises `TraceError`.

    `link`: turn and parent follow from session and arrival. `notices`: what the loader has to say itself.
    `repaired`: the rows have been through here before, so no repair is tried that could find something twice.
    `id_file`, `clock`: as in `Trace`; ids that mean the same in another trace keep their numbers.
    """
    columns = _typed({**raw, **_unlinked(raw)} if link else raw, path, where)
    _check_relations(columns, kind, where)
    _check_ids(columns, block_size, path, where)
    notices = list(notices)
    if kind == "session-library":
        columns = raise_outputs(columns, path, notices)
    columns = drop_empty_rows(columns, path, notices)
    columns = columns if id_file else columns | {"r_start": close_id_gaps(columns["r_start"], columns["r_len"])}
    columns = sort_rows(columns, kind, path, notices)
    columns = link_turns(columns) if link else columns
    if kind == "session-library" and not repaired:
        columns = move_sub_agents(columns, path, notices)
    if not len(columns["arrival_s"]):
        raise TraceError(f"{path}: 0 rows are left, expected at least 1 ({'; '.join(notices) or 'the trace is empty'})")
    if kind == "open-loop" and not repaired:
        notices += _rate_notices(columns["arrival_s"], path)
    return Trace(
        name=name,
        trace_kind=kind,
        block_size=block_size,
        id_file=id_file,
        clock=clock,
        notices=tuple(notices),
        **columns,  # type: ignore[arg-type]
    )


def _rate_notices(arrival_s: np.ndarray, path: str) -> Iterator[str]:
    span_s = float(arrival_s[-1] - arrival_s[0])
    if len(arrival_s) >= RATE_ROWS and span_s and not RATES_PER_S[0] <= len(arrival_s) / span_s <= RATES_PER_S[1]:
        rate = f"{len(arrival_s):,} requests in {span_s:,.4g} s"
        yield f"{path}: {rate}: are its times given in another unit than the format's?"


def refuse(place: str, field: str, value: Any, expected: str, remedy: str) -> NoReturn:
    """Raise the one line that every bad value gets."""
    shown = _SHORT.repr(value.item() if isinstance(value, np.generic) else value)
    raise TraceError(f"{place}: {field} is {shown}, expected {expected} ({remedy})")


def _unlinked(raw: Mapping[str, np.ndarray]) -> Columns:
    unknown = np.full(np.shape(raw.get("arrival_s", ())), -1, np.int32)
    return {"turn": unknown, "parent": unknown}


def _typed(raw: Mapping[str, np.ndarray], path: str, where: Where) -> Columns:
    wanted = ROW_COLUMNS | ID_COLUMNS | SESSION_COLUMNS
    for name in raw:
        if name not in wanted:
            refuse(path, "column", name, f"one of {', '.join(wanted)}", "rename or remove the column")
    for name in [*ROW_COLUMNS, *ID_COLUMNS]:
        if name not in raw:
            refuse(path, "column", name, "it to be present", "the column is missing; add it")
    rows, runs = len(np.atleast_1d(raw["arrival_s"])), len(np.atleast_1d(raw["r_start"]))
    sessions = max((raw[name].size for name in SESSION_COLUMNS if name in raw), default=0)
    lengths = {"r_off": rows + 1, "r_start": runs, "r_len": runs} | dict.fromkeys(SESSION_COLUMNS, sessions)
    columns = {}
    for name, values in raw.items():
        length = lengths.get(name, rows)
        if values.shape != (length,):
            refuse(path, f"shape of {name}", values.shape, f"({length},)", "every column holds one value per row")
        _check_values(name, values, path, None if name in lengths else where)
        columns[name] = values.astype(wanted[name])
    return {name: column for name, column in columns.items() if name not in ("s_tool_tokens", "s_system_tokens")}


def _check_values(name: str, values: np.ndarray, path: str, where: Where | None) -> None:
    dtype = np.dtype((ROW_COLUMNS | ID_COLUMNS | SESSION_COLUMNS)[name])
    if values.dtype.kind not in ("f" if dtype.kind == "f" else "") + "iu":
        refuse(path, f"dtype of {name}", str(values.dtype), f"{dtype}", "convert the column")
    if values.dtype.kind == "f":
        values = values.astype(np.float64)
    lowest = _LOWEST.get(name, 0)
    # int64 columns are added to each other, so their upper half is not for use.
    highest = 2 ** min(62, 8 * dtype.itemsize - (dtype.kind == "i")) - 1 if dtype.kind != "f" else MAX_SECONDS
    good = (values >= lowest) & (values <= highest)
    if name in _MAY_BE_NAN:
        good |= np.isnan(values)
    if name == "kind":
        good &= values <= 2
    if not good.all():
        row = int(np.argmin(good))
        place = where(row) if where else f"{path}:{row}"
        number = "a finite number" if dtype.kind == "f" else "an integer"
        limit = 2 if name == "kind" else highest
        refuse(place, name, values[row], f"{number} >= {lowest} and <= {limit:.0f}", "correct the value")


def _check_relations(columns: Columns, kind: Kind, where: Where) -> None:
    rows = np.arange(len(columns["arrival_s"]))
    parent, arrival_s = columns["parent"], columns["arrival_s"]
    for name in ("parent", "h_ref"):
        _first_bad(columns[name] < rows, name, columns[name], "-1 or an earlier row", "order the rows", where)
    causal = (parent < 0) | (arrival_s[parent] <= arrival_s) if len(rows) else rows == rows
    _first_bad(causal, "arrival_s", arrival_s, "a time not before its parent's arrival", "correct arrival_s", where)
    session = columns["session_id"]
    sessions = min((len(columns[name]) for name in SESSION_COLUMNS if name in columns), default=2**31)
    if kind == "session-library":
        known = (session >= 0) & (session < sessions)
        _first_bad(known, "session_id", session, "a session of the library", "give every row its session", where)
        own = (parent < 0) | (session[parent] == session)
        _first_bad(own, "parent", parent, "a row of the same session", "a sub-agent's first row has none", where)
    _first_bad(session < sessions, "session_id", session, f"below {sessions}", "describe every session", where)
    _check_sub_agents(columns, where)


def _check_sub_agents(columns: Columns, where: Where) -> None:
    starter = columns.get("s_parent_session")
    if starter is None:
        return
    good = starter < len(starter)
    if "s_source_id" in columns:
        source = columns["s_source_id"]
        good &= (starter < 0) | (source[np.where(good, starter, 0)] == source)
    remedy = "a sub-agent's parent comes from the same recording"
    _first_bad(good, "s_parent_session", starter, "-1 or a session of the same source", remedy, where)


def _check_ids(columns: Columns, block_size: int, path: str, where: Where) -> None:
    r_off = columns["r_off"]
    if r_off[0] != 0 or r_off[-1] != len(columns["r_start"]) or (np.diff(r_off) < 0).any():
        ends, runs = (int(r_off[0]), int(r_off[-1])), len(columns["r_start"])
        refuse(path, "first and last r_off", ends, f"0 rising to {runs}", "recode the ids")
    total = np.concatenate(([0], np.cumsum(columns["r_len"], dtype=np.int64)))
    counts = columns["h_lcp"] + total[r_off[1:]] - total[r_off[:-1]]
    available = np.where(columns["h_ref"] >= 0, counts[columns["h_ref"]] if len(counts) else 0, 0)
    lcp_fits = columns["h_lcp"] <= available
    _first_bad(lcp_fits, "h_lcp", columns["h_lcp"], "at most the ids of row h_ref", "recode the ids", where)
    tokens = columns["input_tokens"]
    floor, ceil = (tokens // block_size, -(-tokens // block_size)) if block_size else (0 * tokens, 0 * tokens)
    remedy = f"one id per {block_size} tokens of input" if block_size else "block_size 0 means no ids"
    for row in np.flatnonzero((counts != floor) & (counts != ceil))[:1]:
        expected = f"{floor[row]} or {ceil[row]} for an input of {tokens[row]} tokens"
        refuse(where(int(row)), "number of block ids", int(counts[row]), expected, remedy)


def _first_bad(good: np.ndarray, field: str, values: np.ndarray, expected: str, remedy: str, where: Where) -> None:
    for row in np.flatnonzero(~good)[:1]:
        refuse(where(int(row)), field, values[row], expected, remedy)
