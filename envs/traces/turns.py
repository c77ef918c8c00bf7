"""Turns of sessions whose rows carry nothing but their session: linked in order of arrival."""

import numpy as np

Columns = dict[str, np.ndarray]


def link_turns(columns: Columns) -> Columns:
    """With `turn`, `parent` and `gap_s` of rows in order; a row continues the one before it in its session.

    Where that one was still being served, and no idle time is recorded, the two ran side by side: no parent then.
    """
    session, arrival_s = columns["session_id"], columns["arrival_s"]
    rows = len(session)
    order = np.argsort(session, kind="stable")
    follows = np.diff(session[order], prepend=-2) == 0
    follows &= session[order] >= 0
    before = np.full(rows, -1, np.int64)
    before[order[follows]] = order[np.flatnonzero(follows) - 1]
    place = np.arange(rows)
    first = np.maximum.accumulate(np.where(follows, 0, place))
    turn = np.full(rows, -1, np.int32)
    turn[order] = np.where(session[order] >= 0, place - first, -1)
    idle_s = np.where(before >= 0, arrival_s - (arrival_s + columns["service_s"])[before], np.nan)
    recorded = ~np.isnan(columns["gap_s"])
    linked = (before >= 0) & (recorded | ~(idle_s < 0))
    gap_s = np.where(recorded, columns["gap_s"], idle_s)
    return columns | {
        "turn": turn,
        "parent": np.where(linked, before, -1).astype(np.int32),
        "gap_s": np.where(linked, gap_s, np.nan).astype(np.float32),
    }
