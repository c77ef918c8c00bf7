"""Which snapshots of a path stay when a deeper one is saved (rule 3): `--policies retention=...`.

| retention | as in | what stays of a path, its deepest snapshot always |
|---|---|---|
| all | SGLang's default | everything, until it is evicted |
| latest | vLLM's default, a retention interval of 0 | the last prompt's boundary, what was decoded since, junctions |
| interval-N | vLLM's retention interval of N tokens | as latest, and one per N prompt tokens, which are saved for it |
| path-cap-K | SGLang's --mamba-max-states-per-path K | the deepest K, and junctions |
| optimal-K | sparse prefix caching (arXiv 2605.05219) | as latest, and the K that save most by overlaps seen so far |

A path is what a request's leading page ids spell. A *junction* is a page that two different resident pages have
continued: a prefix that several requests share. What is dropped frees its slot; its pages stay. A snapshot that a
session's pin holds (pins.py) stays too.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hbmgym.memory_backend.jit import subkernel
from hbmgym.memory_backend.placement import Placement, make_placement, place_checkpoints
from hbmgym.memory_backend.pools import NONE
from hbmgym.memory_backend.prefix_cache import drop_snapshot, may_be_dropped

ALL, LATEST, INTERVAL, PATH_CAP, OPTIMAL = range(5)
_WITH_NUMBER = {"interval": INTERVAL, "path-cap": PATH_CAP, "optimal": OPTIMAL}
_PLAIN = {"all": ALL, "latest": LATEST}
RETENTION_FORMS = (*_PLAIN, "interval-N (tokens)", "path-cap-K", "optimal-K")
MAX_NUMBER = {"interval": 2**24, "path-cap": 2**20, "optimal": 64}
MOST_BEHIND = 4096
"""Pages: overlaps that end so far before a prompt's boundary, or farther, are counted together with those."""


@dataclass(frozen=True)
class Retention:
    """One of the rules above."""

    kind: int
    number: int = 0
    """Tokens of an interval, or how many snapshots."""

    @classmethod
    def parse(cls, text: str) -> "Retention":
        """From 'latest', 'interval-4096' and the like; ValueError in one line."""
        if text in _PLAIN:
            return cls(_PLAIN[text])
        name, _, number = text.rpartition("-")
        if name not in _WITH_NUMBER:
            raise ValueError(f"policy retention is {text!r}, expected one of: {', '.join(RETENTION_FORMS)}")
        if not (number.isascii() and number.isdigit() and 1 <= int(number) <= MAX_NUMBER[name]):
            raise ValueError(
                f"policy retention is {text!r}, expected {name}- and an integer from 1 to {MAX_NUMBER[name]}"
            )
        return cls(_WITH_NUMBER[name], int(number))

    def most_saved(self, prefill_pages: int) -> int:
        """Snapshots that an iteration of so many pages may save beside those at branches and boundaries: one a page."""
        return prefill_pages if self.kind in (INTERVAL, OPTIMAL) else 0


class Overlaps(NamedTuple):
    """What `optimal` knows, one place each under other rules."""

    boundary: np.ndarray
    """int32, by page id: pages of the prompt that went through it last."""
    counts: np.ndarray
    """int64, shape (MOST_BEHIND + 1,): overlaps so far by how many pages before that prompt's boundary they ended."""
    planned: np.ndarray
    """int32, shape (rows, K): pages after which a row's snapshots are saved and stay, 0: no more."""
    placement: Placement


def make_overlaps(retention: Retention, rows: int, id_count: int, most_pages: int) -> Overlaps:
    """Nothing seen so far, but that a prompt may be continued."""
    checkpoints = retention.number
    if retention.kind != OPTIMAL:
        rows = id_count = most_pages = checkpoints = 1
    counts = np.zeros(MOST_BEHIND + 1, np.int64)
    counts[0] = 1
    return Overlaps(
        np.zeros(max(id_count, 1), np.int32),
        counts,
        np.zeros((max(rows, 1), checkpoints), np.int32),
        make_placement(most_pages, checkpoints),
    )


@subkernel
def next_interval_depth(engine, depth):
    """Pages of the next multiple of the interval beyond `depth` pages."""
    return (depth // engine.retained + 1) * engine.retained


@subkernel
def next_planned_depth(state, row, depth):
    """The least planned depth of a row beyond `depth` pages; 0: there is none."""
    planned = state.overlaps.planned
    for k in range(planned.shape[1]):
        if planned[row, k] > depth:
            return planned[row, k]
    return 0


@subkernel
def drop_superseded(state, row, depth, boundary):
    """A row's path has a snapshot after `depth` pages now: drop what the rule does not keep of those before it.

    `boundary`: pages of the row's prompt.
    """
    engine = state.engine
    if engine.retention == ALL:
        return
    if engine.retention == PATH_CAP:
        _drop_excess(state, row, depth)
    elif depth == boundary or (depth > boundary and not _boundary_is_saved(state, row, boundary)):
        _drop_before(state, row, boundary)


@subkernel
def _boundary_is_saved(state, row, boundary):
    """Is there a snapshot at the prompt's boundary? Then what is superseded went with that one, before decoding."""
    if boundary == 0:
        return True
    return state.memory.ids[state.refs[state.rows[row].ref_off + boundary - 1]].snapshot != NONE


@subkernel
def _drop_excess(state, row, depth):
    """SGLang's cap: of a path with more than K snapshots the shallowest go, but for junctions."""
    ids, first = state.memory.ids, state.rows[row].ref_off
    excess = -state.engine.retained
    for j in range(depth):
        if ids[state.refs[first + j]].snapshot != NONE:
            excess += 1
    for j in range(depth - 1):
        if excess <= 0:
            return
        page_id = state.refs[first + j]
        if may_be_dropped(state.memory, page_id):
            drop_snapshot(state.memory, page_id)
            excess -= 1


@subkernel
def _drop_before(state, row, boundary):
    first = state.rows[row].ref_off
    for j in range(boundary - 1):
        page_id = state.refs[first + j]
        if may_be_dropped(state.memory, page_id) and not _is_wanted(state, row, j + 1):
            drop_snapshot(state.memory, page_id)


@subkernel
def _is_wanted(state, row, depth):
    if state.engine.retention == INTERVAL:
        return depth % state.engine.retained == 0
    return state.engine.retention == OPTIMAL and next_planned_depth(state, row, depth - 1) == depth


@subkernel
def plan_snapshots(state, row, reuse, overlap, boundary):
    """An admitted row resumes after `reuse` pages and shares `overlap`, evicted ones included, with earlier ones: count
    that, and plan where its prompt of `boundary` pages keeps snapshots."""
    if state.engine.retention != OPTIMAL:
        return
    if state.requests[row].preemptions == 0:
        _count_overlap(state, row, overlap, boundary)
    placement = state.overlaps.placement
    computed = max(reuse, state.requests[row].offloaded // state.engine.page_tokens)
    first = state.rows[row].ref_off
    for depth in range(1, boundary + 1):
        placement.before[depth] = state.overlaps.counts[min(boundary - depth, MOST_BEHIND)]
        there = state.memory.ids[state.refs[first + depth - 1]].snapshot != NONE
        placement.allowed[depth] = 1 if depth > computed or there else 0
    count = place_checkpoints(placement, boundary)
    for k in range(len(placement.chosen)):
        state.overlaps.planned[row, k] = placement.chosen[k] if k < count else 0


@subkernel
def _count_overlap(state, row, overlap, boundary):
    seen = state.overlaps.boundary
    first = state.rows[row].ref_off
    if overlap > 0:
        behind = max(np.int64(seen[state.refs[first + overlap - 1]]) - overlap, 0)
        state.overlaps.counts[min(behind, MOST_BEHIND)] += 1
    for j in range(boundary):
        seen[state.refs[first + j]] = boundary
