"""Who waits for whom in a trace, and how long (rule 13).

A turn waits for the turn before it. A sub-agent waits for the row that its parent had sent last, and the first row that
its parent sent after the sub-agent had ended waits for the sub-agent.
"""

from functools import lru_cache

import numpy as np

from hbmgym.envs.traces.service import ends_s
from hbmgym.envs.traces.trace import Trace

MAX_GAP_S = 600.0

Needs = tuple[np.ndarray, np.ndarray]
"""int64 (p,) each: row before[i] must have ended before row after[i] may start."""


def needs(trace: Trace) -> Needs:
    """Of all rows of a trace."""
    if trace.s_parent_session is None:
        return _turns(trace)
    return _turns_and_sub_agents(trace)


def gaps_s(trace: Trace) -> np.ndarray:
    """float64 (n,): idle seconds between the end of the last row that a row needs and its arrival, at most MAX_GAP_S.

    As recorded if the row needs its parent alone, else from the recorded times; 0 for a row that needs none.
    """
    before, after = needs(trace)
    last_end_s = np.full(len(trace), -np.inf)
    np.maximum.at(last_end_s, after, recorded_ends_s(trace)[before])
    count = np.bincount(after, minlength=len(trace))
    recorded = (count == 1) & (trace.parent >= 0) & ~np.isnan(trace.gap_s)
    idle_s = np.where(recorded, trace.gap_s, trace.arrival_s - last_end_s)
    return np.where(count > 0, np.clip(idle_s, 0.0, MAX_GAP_S), 0.0)


def recorded_ends_s(trace: Trace) -> np.ndarray:
    """float64 (n,): `service.ends_s` of all rows."""
    return ends_s(trace.arrival_s, trace.service_s, trace.output_tokens)


def _turns(trace: Trace) -> Needs:
    after = np.flatnonzero(trace.parent >= 0)
    return trace.parent[after].astype(np.int64), after


@lru_cache(maxsize=8)
def _turns_and_sub_agents(trace: Trace) -> Needs:
    assert trace.s_parent_session is not None
    session, ended_s = trace.session_id, recorded_ends_s(trace)
    starter = np.where(session >= 0, trace.s_parent_session[session], -1)
    # Rows of a session are in order of arrival, whether or not those of others lie between them.
    by_session = np.argsort(session, kind="stable")
    begins = np.searchsorted(session[by_session], np.arange(len(trace.s_parent_session) + 1))
    starts, goes_on = trace.parent < 0, np.isin(np.arange(len(trace)), trace.parent)
    before, after = [], []
    for row in np.flatnonzero((starter >= 0) & (starts | ~goes_on)).tolist():
        sent = by_session[begins[starter[row]] : begins[starter[row] + 1]]
        sent_s = trace.arrival_s[sent]
        last_sent = int(np.searchsorted(sent_s, trace.arrival_s[row], side="right")) - 1
        if starts[row] and last_sent >= 0:
            before.append(sent[last_sent])
            after.append(row)
        joins = int(np.searchsorted(sent_s, ended_s[row]))
        if not goes_on[row] and joins < len(sent):
            before.append(row)
            after.append(sent[joins])
    turns_before, turns_after = _turns(trace)
    return np.append(turns_before, before).astype(np.int64), np.append(turns_after, after).astype(np.int64)
