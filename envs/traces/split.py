"""train, validation and test rows of a trace: by arrival time, in a session library by family of sources."""

from functools import lru_cache

import numpy as np

from hbmgym.envs.traces.jitter import buckets_of
from hbmgym.envs.traces.seeds import Part
from hbmgym.envs.traces.trace import Trace, TraceError

_FRACTIONS = {"train": (0.0, 0.6), "validation": (0.6, 0.8), "test": (0.8, 1.0), "all": (0.0, 1.0)}
FAMILY_SHARE = 0.2
"""Sources that share this part of the smaller one's ids stay together."""


def split(trace: Trace, part: Part) -> np.ndarray:
    """int64: the rows of one part, ascending; train, validation and test are disjoint and together are 'all'."""
    if trace.trace_kind == "session-library":
        _check_part(part)
        return np.flatnonzero(np.isin(sources(trace), part_sources(trace, part)))
    start_s, end_s = part_bounds(trace, part)
    arrival_s, _ = buckets_of(trace.arrival_s, trace.clock)
    return np.flatnonzero((arrival_s >= start_s) & (arrival_s < end_s))


def part_bounds(trace: Trace, part: Part) -> tuple[float, float]:
    """Start and end of a part on the trace's clock, seconds; raises `TraceError` where there is no such clock."""
    _check_part(part)
    if trace.trace_kind != "open-loop":
        raise TraceError(f"{trace.name}: trace is {trace.trace_kind}, expected open-loop (it is not split by time)")
    first, span = float(trace.arrival_s[0]), trace.end_s - float(trace.arrival_s[0])
    marks = [fraction * span for fraction in _FRACTIONS[part]]
    if not trace.quantum_s:
        return first + marks[0], first + marks[1]
    start_s, end_s = (_between_buckets(trace, round(mark / trace.quantum_s) * trace.quantum_s) for mark in marks)
    return start_s, end_s


def _between_buckets(trace: Trace, mark_s: float) -> float:
    """Where an edge near `mark_s` after the first arrival may lie: spreading must not move a row into another part."""
    starts_s, width_s = buckets_of(trace.arrival_s, trace.clock)
    edge_s = float(starts_s[0]) + mark_s
    start_s = float(starts_s[np.searchsorted(starts_s, edge_s, side="right") - 1])
    if edge_s >= start_s + width_s:
        return edge_s
    return start_s + width_s * (edge_s - start_s > width_s / 2)


def sources(trace: Trace) -> np.ndarray:
    """int64 (n,): the recording that each row of a library was taken from."""
    source = trace.session_id if trace.s_source_id is None else trace.s_source_id[trace.session_id]
    return np.asarray(source, np.int64)


def part_sources(trace: Trace, part: Part) -> np.ndarray:
    """int64: the sources of one part of a library, ascending."""
    labels = _library_parts(trace)
    if part == "all":
        return np.array(sorted(labels), np.int64)
    return np.array(sorted(source for source, owner in labels.items() if owner == part), np.int64)


def _check_part(part: str) -> None:
    if part not in _FRACTIONS:
        raise TraceError(f"part is {part!r}, expected one of {', '.join(_FRACTIONS)} (final is for generated traces)")


@lru_cache(maxsize=8)
def _library_parts(trace: Trace) -> dict[int, str]:
    """Each source's part: large families first, each to the part that lacks most of its 60/20/20."""
    members = families(trace)
    total = sum(map(len, members))
    lacking = {part: (end - start) * total for part, (start, end) in _FRACTIONS.items() if part != "all"}
    labels: dict[int, str] = {}
    for family in sorted(members, key=lambda family: (-len(family), _scatter(family[0]))):
        part = max(lacking, key=lambda name: lacking[name])
        lacking[part] -= len(family)
        labels |= dict.fromkeys(family, part)
    return labels


def _scatter(source: int) -> int:
    """A fixed order that ignores how the file was sorted (Knuth's multiplicative hash)."""
    return source * 2654435761 % 2**32


def families(trace: Trace) -> list[list[int]]:
    """Sources of a library, those that share >= 20 % of the smaller one's ids together; ascending."""
    names, label = np.unique(sources(trace), return_inverse=True)
    sharing, shared, sizes = _shared_ids(trace, label, len(names))
    close = shared >= FAMILY_SHARE * np.minimum.outer(sizes, sizes)
    close &= (shared > 0) & ~np.eye(len(sharing), dtype=bool)
    root = np.arange(len(names))
    for one, other in sharing[np.argwhere(np.triu(close))]:
        if root[one] != root[other]:
            root[root == root[other]] = root[one]
    order = np.argsort(root, kind="stable")
    starts = np.flatnonzero(np.diff(root[order])) + 1
    return [family.tolist() for family in np.split(names[order], starts)]


def _shared_ids(trace: Trace, label: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The m sources that share any id, ids that each pair of them shares, float64 (m, m), and each one's own, (m,)."""
    pairs = np.sort(_id_and_source(trace, label))
    pairs = pairs[np.diff(pairs, prepend=-1) > 0]
    ids, holder = pairs // (count + 1), pairs % (count + 1)
    sizes = np.bincount(holder, minlength=count).astype(np.float64)
    same_as_next = np.diff(ids, append=-1) == 0
    several = same_as_next | np.roll(same_as_next, 1)
    ids, holder = ids[several], holder[several]
    sharing, holder = np.unique(holder, return_inverse=True)
    dense = np.cumsum(np.diff(ids, prepend=-1) > 0) - 1
    shared = np.zeros((len(sharing), len(sharing)))
    for start in range(0, int(dense.max(initial=-1)) + 1, 4096):
        chunk = (dense >= start) & (dense < start + 4096)
        table = np.zeros((len(sharing), 4096), np.float32)
        table[holder[chunk], dense[chunk] - start] = 1.0
        shared += table @ table.T
    return sharing, shared, sizes[sharing]


def _id_and_source(trace: Trace, label: np.ndarray) -> np.ndarray:
    """int64: id * (sources + 1) + source, for every id that a row adds or takes from another source's row."""
    width = int(label.max()) + 2
    row_of_run = np.repeat(np.arange(len(trace)), np.diff(trace.r_off))
    steps = np.concatenate(([0], np.cumsum(trace.r_len, dtype=np.int64)))
    ids = np.arange(steps[-1]) + np.repeat(trace.r_start - steps[:-1], trace.r_len)
    pieces = [ids * width + np.repeat(label[row_of_run], trace.r_len)]
    foreign = np.flatnonzero((trace.h_ref >= 0) & (label[trace.h_ref] != label))
    pieces += [trace.blocks(int(row)) * width + label[row] for row in foreign]
    return np.concatenate(pieces)
