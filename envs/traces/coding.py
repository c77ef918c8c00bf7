"""The delta and run-length coding of block ids: encode, expand, recode after rows were dropped or moved."""

from collections.abc import Sequence
from itertools import chain

import numpy as np

from hbmgym.memory_backend.jit import kernel
from hbmgym.memory_backend.pools import NONE

IdColumns = dict[str, np.ndarray]


def no_ids(rows: int) -> IdColumns:
    """Id columns of a trace without ids."""
    return {
        "h_ref": np.full(rows, -1, np.int32),
        "h_lcp": np.zeros(rows, np.int32),
        "r_off": np.zeros(rows + 1, np.int64),
        "r_start": np.zeros(0, np.int64),
        "r_len": np.zeros(0, np.int32),
    }


@kernel
def write_shortcuts(h_ref: np.ndarray, h_lcp: np.ndarray, jump: np.ndarray) -> None:
    """Fill `jump`: for each row the nearest ancestor that itself adds ids below this row's h_lcp; -1 none."""
    for row in range(len(h_ref)):
        ancestor = h_ref[row] if h_lcp[row] > 0 else -1
        while ancestor >= 0 and h_lcp[ancestor] >= h_lcp[row]:
            ancestor = jump[ancestor]
        jump[row] = ancestor


def expand(
    row: int, h_ref: np.ndarray, h_lcp: np.ndarray, r_off: np.ndarray, r_start: np.ndarray, r_len: np.ndarray
) -> np.ndarray:
    """int64: the block ids of one row."""
    pieces: list[np.ndarray] = []
    depth: int | None = None
    while row >= 0 and depth != 0:
        runs = range(int(r_off[row]), int(r_off[row + 1]))
        own = [np.arange(r_start[run], r_start[run] + r_len[run], dtype=np.int64) for run in runs]
        added = np.concatenate([np.zeros(0, np.int64), *own])
        lcp = int(h_lcp[row])
        pieces.append(added if depth is None else added[: max(0, depth - lcp)])
        depth = lcp if depth is None else min(depth, lcp)
        row = int(h_ref[row])
    return np.concatenate(pieces[::-1])


def encode(rows: Sequence[Sequence[int]]) -> IdColumns:
    """Code the block ids of each row; see `encode_flat`."""
    row_end = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return encode_flat(np.fromiter(chain.from_iterable(rows), np.int64, int(row_end[-1])), row_end)


def encode_flat(ids: np.ndarray, row_end: np.ndarray) -> IdColumns:
    """Code rows of block ids, row i being `ids[row_end[i]:row_end[i + 1]]`; both int64, ids of any value.

    h_ref is the last row that held the deepest leading id seen before. Ids become dense in order of appearance. An id
    stands for a block and all before it: one that follows different ids in different places counts as different ids.
    """
    ids, width = _dense(ids)
    coded, h_ref, h_lcp = _coded(ids, row_end, width)
    if not coded:
        ids, width = _chained(ids, row_end)
        _, h_ref, h_lcp = _coded(ids, row_end, width)
    return new_ids(h_ref, h_lcp, np.diff(row_end) - h_lcp)


def new_ids(h_ref: np.ndarray, h_lcp: np.ndarray, own: np.ndarray) -> IdColumns:
    """Id columns of rows that continue the first h_lcp ids of row h_ref with `own` ids that no row before has."""
    return {
        "h_ref": np.where(h_lcp > 0, h_ref, NONE).astype(np.int32),
        "h_lcp": h_lcp.astype(np.int32),
        "r_off": np.concatenate(([0], np.cumsum(own > 0, dtype=np.int64))),
        "r_start": (np.cumsum(own, dtype=np.int64) - own)[own > 0],
        "r_len": own[own > 0].astype(np.int32),
    }


def _dense(ids: np.ndarray) -> tuple[np.ndarray, int]:
    """Equal ids stay equal, and all become >= 0 and less than the returned width, about the number of ids."""
    low, high = int(ids.min(initial=0)), int(ids.max(initial=0))
    if high - low <= max(1024, len(ids)):
        return ids - low if low else ids, high - low + 1
    unique, dense = np.unique(ids, return_inverse=True)
    return dense.astype(np.int64), len(unique)


def _coded(ids: np.ndarray, row_end: np.ndarray, width: int) -> tuple[bool, np.ndarray, np.ndarray]:
    rows = len(row_end) - 1
    h_ref, h_lcp = np.full(rows, NONE, np.int32), np.zeros(rows, np.int32)
    scratch = np.full(width, NONE, np.int32), np.full(width, NONE, np.int32)
    return bool(_code_rows(ids, row_end, *scratch, h_ref, h_lcp)), h_ref, h_lcp


def _chained(ids: np.ndarray, row_end: np.ndarray) -> tuple[np.ndarray, int]:
    """Ids that also tell what lies before them in their row, all less than the returned width."""
    width = 1 << (2 * len(ids)).bit_length()
    chained = np.empty_like(ids)
    _chain_rows(ids, row_end, np.full(width, NONE, np.int64), np.empty(width, np.int64), chained)
    return chained, width


@kernel
def _code_rows(ids, row_end, before, last_row, h_ref, h_lcp):
    """Fill h_ref and h_lcp; False, with neither finished, when an id follows two different ids.

    Scratch per id: the id before it, and the last row that held it; both hold NONE on entry.
    """
    for row in range(len(h_ref)):
        last = NONE
        for place in range(row_end[row], row_end[row + 1]):
            block = ids[place]
            if last_row[block] < 0:
                before[block] = last
            elif before[block] != last:
                return False
            else:
                h_ref[row] = last_row[block]
                h_lcp[row] += 1
            last_row[block] = row
            last = block
    return True


@kernel
def _chain_rows(ids, row_end, slot_before, slot_id, chained):
    """Fill `chained` with the slot of each pair (number before it, id) in a hash table.

    The table's length is a power of two, more than the number of pairs; `slot_before` holds NONE on entry.
    """
    mask = len(slot_id) - 1
    for row in range(len(row_end) - 1):
        before = 0
        for place in range(row_end[row], row_end[row + 1]):
            slot = (before * 1_327_217_885 + ids[place] * 1_181_783_497) & mask
            while slot_before[slot] >= 0 and (slot_before[slot] != before or slot_id[slot] != ids[place]):
                slot = (slot + 1) & mask
            slot_before[slot] = before
            slot_id[slot] = ids[place]
            chained[place] = slot
            before = slot + 1


def join(parts: Sequence[IdColumns], files: Sequence[str] | None = None) -> IdColumns:
    """Id columns of one part's rows after another's; parts share their ids only where they have the same of `files`."""
    names = list(map(str, range(len(parts)))) if files is None else files
    rows = np.cumsum([0, *(len(part["h_ref"]) for part in parts)])
    runs = np.cumsum([0, *(len(part["r_start"]) for part in parts)])
    spans = dict.fromkeys(names, 0)
    for name, part in zip(names, parts, strict=True):
        spans[name] = max(spans[name], int((part["r_start"] + part["r_len"]).max(initial=0)))
    base = dict(zip(spans, np.cumsum([0, *spans.values()]).tolist(), strict=False))
    refs = [np.where(part["h_ref"] >= 0, part["h_ref"] + row, -1) for part, row in zip(parts, rows, strict=False)]
    return {
        "h_ref": np.concatenate([no_ids(0)["h_ref"], *refs]),
        "h_lcp": np.concatenate([no_ids(0)["h_lcp"], *(part["h_lcp"] for part in parts)]),
        "r_off": np.concatenate(
            [no_ids(0)["r_off"], *(part["r_off"][1:] + run for part, run in zip(parts, runs, strict=False))]
        ),
        "r_start": np.concatenate(
            [no_ids(0)["r_start"], *(part["r_start"] + base[name] for part, name in zip(parts, names, strict=True))]
        ),
        "r_len": np.concatenate([no_ids(0)["r_len"], *(part["r_len"] for part in parts)]),
    }


def recode(ids: IdColumns, order: np.ndarray) -> IdColumns:
    """Id columns of the rows `order` (old row numbers, in their new order); every kept row keeps its blocks."""
    if not len(ids["r_start"]):
        return no_ids(len(order))
    old_ref, old_lcp, old_off = (ids[name].tolist() for name in ("h_ref", "h_lcp", "r_off"))
    starts, lengths = ids["r_start"].tolist(), ids["r_len"].tolist()
    place: dict[int, int] = {}
    h_ref, h_lcp, r_off = [], [], [0]
    runs: list[tuple[int, int]] = []
    for number, row in enumerate(order.tolist()):
        own = [(starts[run], lengths[run]) for run in range(old_off[row], old_off[row + 1])]
        ancestor, depth = old_ref[row], old_lcp[row]
        # An ancestor that is gone, or now comes later, hands its own ids down to this row.
        while depth and ancestor not in place:
            added = [(starts[run], lengths[run]) for run in range(old_off[ancestor], old_off[ancestor + 1])]
            own = _clip(added, depth - old_lcp[ancestor]) + own
            ancestor, depth = old_ref[ancestor], min(depth, old_lcp[ancestor])
        h_ref.append(place[ancestor] if depth else -1)
        h_lcp.append(depth)
        runs += own
        r_off.append(len(runs))
        place[row] = number
    return _columns(h_ref, h_lcp, r_off, runs)


def close_id_gaps(r_start: np.ndarray, r_len: np.ndarray) -> np.ndarray:
    """Runs moved down over ids that no run holds, so that a table indexed by id stays small."""
    if not len(r_start):
        return r_start
    order = np.argsort(r_start, kind="stable")
    start = r_start[order]
    reach = np.maximum.accumulate(start + r_len[order])
    gaps = np.maximum(0, start - np.concatenate(([0], reach[:-1])))
    closed = np.empty_like(r_start)
    closed[order] = start - np.cumsum(gaps)
    return closed


def _clip(runs: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    kept = []
    for start, length in runs:
        if count <= 0:
            break
        kept.append((start, min(length, count)))
        count -= length
    return kept


def _columns(h_ref: list[int], h_lcp: list[int], r_off: list[int], runs: list[tuple[int, int]]) -> IdColumns:
    table = np.array(runs, np.int64).reshape(-1, 2)
    return {
        "h_ref": np.array(h_ref, np.int32),
        "h_lcp": np.array(h_lcp, np.int32),
        "r_off": np.array(r_off, np.int64),
        "r_start": table[:, 0].copy(),
        "r_len": table[:, 1].astype(np.int32),
    }
