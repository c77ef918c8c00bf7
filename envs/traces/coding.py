"""The delta and run-length coding of block ids: encode, expand, recode after rows were dropped or moved."""

from collections.abc import Sequence

import numpy as np

from hbmgym.memory_backend.jit import kernel

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
    """Code prefix-chained ids; h_ref is the last row that held the deepest leading id seen before. Ids become dense."""
    dense: dict[int, int] = {}
    last_row: dict[int, int] = {}
    h_ref, h_lcp, r_off = [], [], [0]
    runs: list[tuple[int, int]] = []
    for number, ids in enumerate(rows):
        seen = next((depth for depth, block in enumerate(ids) if block not in last_row), len(ids))
        reference = last_row[ids[seen - 1]] if seen else -1
        shared = _common_prefix(ids, rows[reference]) if seen else 0
        runs += _runs([dense.setdefault(block, len(dense)) for block in ids[shared:]])
        last_row.update(dict.fromkeys(ids, number))
        h_ref.append(reference if shared else -1)
        h_lcp.append(shared)
        r_off.append(len(runs))
    return _columns(h_ref, h_lcp, r_off, runs)


def recode(ids: IdColumns, order: np.ndarray) -> IdColumns:
    """Id columns of the rows `order` (old row numbers, in their new order); every kept row keeps its blocks."""
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


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((depth for depth, (left, right) in pairs if left != right), min(len(one), len(other)))


def _runs(ids: Sequence[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for block in ids:
        if runs and sum(runs[-1]) == block:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((block, 1))
    return runs


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
