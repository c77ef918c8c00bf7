"""Dense page ids of an episode, rows that continue each other on one stretch: the part that runs at every reset."""

import math
from dataclasses import dataclass

import numpy as np

from hbmgym.envs.traces.episode import ROW, Episode, Loop, is_measured, link
from hbmgym.envs.traces.page_kernels import lay_out, write_owners
from hbmgym.envs.traces.precedence import Needs, gaps_s, needs
from hbmgym.envs.traces.trace import Trace, TraceError

MAX_RAW_IDS = 2**28
"""Entries of the table that renumbers ids: 1 GiB."""


@dataclass(frozen=True)
class Selection:
    """Rows of a trace in their order of arrival on an episode's clock."""

    source: np.ndarray
    """int64 (n,): row of the trace."""
    copy: np.ndarray
    """int64 (n,): 0 for the first play; later plays of one row get ids of their own."""
    arrival_s: np.ndarray
    """float64 (n,), sorted, from 0."""


@dataclass(frozen=True)
class PageRule:
    """How b-token block ids become p-token page ids: both are made of parts of gcd(b, p) tokens, and a page is known by
    its last part."""

    parts_per_block: int
    parts_per_page: int

    def pages_of(self, blocks: np.ndarray) -> np.ndarray:
        """Full pages that so many leading blocks cover."""
        return blocks * self.parts_per_block // self.parts_per_page


def page_rule(trace: Trace, page_tokens: int) -> PageRule:
    """Raises `TraceError` for a page without tokens."""
    if page_tokens < 1:
        raise TraceError(f"page_tokens is {page_tokens}, expected an integer >= 1")
    part = math.gcd(trace.block_size, page_tokens)
    return PageRule(max(1, trace.block_size // part), page_tokens // part)


def assemble(
    trace: Trace,
    selection: Selection,
    *,
    seed: int,
    page_tokens: int,
    warmup_s: float,
    horizon_s: float,
    max_refs: int,
    loop: Loop,
) -> Episode:
    """The episode of a selection; raises `TraceError` when it is empty or all warm-up, holds more than `max_refs` page
    ids, or is to be replayed in a closed loop that nothing would close."""
    rule = page_rule(trace, page_tokens)
    source = selection.source
    if not len(source):
        raise TraceError(f"{trace.name}: the episode has 0 rows, expected at least 1 (longer part or higher load)")
    rows = np.zeros(len(source), ROW)
    rows["arrival_s"] = selection.arrival_s
    rows["input_tokens"] = trace.input_tokens[source]
    rows["output_tokens"] = trace.output_tokens[source]
    place = _places(selection, len(trace))
    before, after = _needs(trace, place)
    followers = link(rows, before, after)
    if loop == "closed":
        _set_gaps(rows, trace, source)
    rows["measured"] = is_measured(rows, before, after, warmup_s, loop)
    if not rows["measured"].any():
        raise TraceError(
            f"{trace.name}: 0 of the episode's {len(rows)} rows are measured, expected at least 1 (longer part, higher"
            " load or shorter warm-up)"
        )
    reference = _find(place, trace.h_ref[source], selection.copy)
    parent = _find(place, trace.parent[source], selection.copy)
    # A trace that records no parents at all is continued by whichever row comes first.
    continues = (reference >= 0) & ((parent == reference) | bool((trace.parent < 0).all()))
    _set_prompt_ids(rows, trace.block_counts[source], rule, page_tokens)
    shared = np.minimum(rule.pages_of(trace.h_lcp[source]), rows["prompt_ids"])
    rows["known_ids"] = (rows["input_tokens"] + rows["output_tokens"]) // page_tokens
    successor = _successors(rows, shared, reference, continues, page_tokens)
    refs, id_count = _dense_refs(trace, selection, rows, successor, rule, max_refs)
    rows.flags.writeable = refs.flags.writeable = False
    return Episode(
        name=trace.name,
        seed=seed,
        rows=rows.view(np.recarray),
        refs=refs,
        id_count=id_count,
        page_tokens=page_tokens,
        warmup_s=warmup_s,
        horizon_s=horizon_s,
        followers=followers,
        loop=loop,
        traffic_class=(trace.kind if trace.traffic_class is None else trace.traffic_class)[source],
    )


def output_id_fraction(episode: Episode) -> float:
    """Part of the pages filled by generated tokens that a prompt of the episode goes on from; NaN without such
    pages."""
    rows = episode.rows
    asked = np.zeros(max(episode.id_count, 1), bool)
    asked[episode.refs[_covered(rows["ref_off"], rows["prompt_ids"], len(episode.refs)) > 0]] = True
    first = rows["input_tokens"] // episode.page_tokens
    generated = _covered(rows["ref_off"] + first, rows["known_ids"] - first, len(episode.refs))
    return float(generated[asked[episode.refs]].sum() / generated.sum()) if generated.any() else float("nan")


def _covered(first: np.ndarray, count: np.ndarray, length: int) -> np.ndarray:
    """int64 (length,): how many of the stretches of `count` places from `first` on cover each place."""
    edges = np.zeros(length + 1, np.int64)
    np.add.at(edges, first, 1)
    np.add.at(edges, first + count, -1)
    return edges[:-1].cumsum()


def _places(selection: Selection, trace_rows: int) -> np.ndarray:
    """Episode row of each (copy, trace row), -1 where it does not appear."""
    place = np.full((int(selection.copy.max()) + 1, trace_rows), -1, np.int64)
    place[selection.copy, selection.source] = np.arange(len(selection.source))
    return place


def _find(place: np.ndarray, trace_row: np.ndarray, copy: np.ndarray) -> np.ndarray:
    """Episode rows of trace rows, -1 where there is none or it does not come earlier."""
    found = np.where(trace_row >= 0, place[copy, trace_row], -1)
    return np.where(found < np.arange(len(found)), found, -1)


def _needs(trace: Trace, place: np.ndarray) -> Needs:
    """Who waits for whom among the rows of an episode, all copies of the trace's rows."""
    before, after = (place[:, rows].ravel() for rows in needs(trace))
    kept = (before >= 0) & (before < after)
    return before[kept], after[kept]


def _set_gaps(rows: np.ndarray, trace: Trace, source: np.ndarray) -> None:
    """Seconds from the end of the last row that a row needs to its arrival."""
    if not len(needs(trace)[0]):
        raise TraceError(f"{trace.name}: loop is 'closed', but no row follows another one (take loop 'open')")
    rows["gap_s"] = np.where(rows["needs"] > 0, gaps_s(trace)[source], 0.0)


def _set_prompt_ids(rows: np.ndarray, blocks: np.ndarray, rule: PageRule, page_tokens: int) -> None:
    """Full pages of the prompt that block ids cover; what comes after them has ids of its own."""
    rows["prompt_ids"] = np.minimum(rows["input_tokens"] // page_tokens, rule.pages_of(blocks))


def _successors(
    rows: np.ndarray, shared: np.ndarray, reference: np.ndarray, continues: np.ndarray, page_tokens: int
) -> np.ndarray:
    """int64 (n,): the row whose prompt has all full pages of a row, generated ones included, so that both lie on one
    stretch; -1: there is none.

    `shared`: pages that a row takes from the row `reference`, `continues`: it is that row's child.
    """
    tokens = rows["input_tokens"] + rows["output_tokens"]
    child = _first_by_reference(continues, reference)
    has_all = (child >= 0) & (shared[child] >= rows["input_tokens"] // page_tokens)
    has_all &= (rows["input_tokens"][child] >= tokens) & (rows["prompt_ids"][child] >= rows["known_ids"])
    return np.where(has_all, child, -1)


def _first_by_reference(eligible: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """For each row the first eligible row that refers to it, -1 none."""
    first = np.full(len(reference), -1, np.int64)
    later = np.flatnonzero(eligible)[::-1]
    # Of several assignments to one index the last stays, here the earliest row.
    first[reference[later]] = later
    return first


def _dense_refs(
    trace: Trace, selection: Selection, rows: np.ndarray, successor: np.ndarray, rule: PageRule, max_refs: int
) -> tuple[np.ndarray, int]:
    """Fill ref_off; the page ids of all stretches, and how many ids there are."""
    owner = np.empty(len(rows), np.int64)
    write_owners(successor, owner)
    stored = int(rows["known_ids"][owner == np.arange(len(owner))].sum(dtype=np.int64))
    raw_ids = (int(selection.copy.max()) + 1) * trace.id_span * rule.parts_per_block
    for count, limit, what in ((stored, max_refs, "page ids"), (raw_ids, MAX_RAW_IDS, "ids before renumbering")):
        if count > limit:
            raise TraceError(
                f"{trace.name}: the episode holds {count} {what}, expected at most {limit}"
                " (shorter part, larger page_tokens or lower load)"
            )
    refs = np.empty(stored, np.int32)
    dense = np.full(raw_ids, -1, np.int32)
    id_count = lay_out(
        selection.source, selection.copy * trace.id_span, owner,
        rows["prompt_ids"], rows["known_ids"], rows["ref_off"], refs, dense,
        np.full(len(rows), -1, np.int64), np.zeros(len(rows), np.int64),
        trace.h_jump, trace.h_lcp, trace.r_off, trace.r_start, trace.r_len, rule.parts_per_block, rule.parts_per_page,
    )  # fmt: skip
    return refs, int(id_count)
