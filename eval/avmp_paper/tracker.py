"""The LRU tracker of a pool: which request holds which pages, and who was served least recently."""

from typing import NamedTuple

import numpy as np

from hbmgym.memory_backend.jit import subkernel

NONE = -1  # ends the lists
TRACKER = np.dtype([("oldest", "i4"), ("newest", "i4")], align=True)


class Tracker(NamedTuple):
    """A request has an entry while it holds a page; entries are linked by the last allocation that succeeded.

    The prototype stamps entries with a clock. A new stamp is always the largest, so the order of the links is the
    order of the stamps.
    """

    head: np.record
    holder: np.ndarray
    """int32 per page: the request whose entry it is in."""
    before: np.ndarray
    """int32 per page: its neighbours in that entry, in the order of allocation."""
    after: np.ndarray
    first: np.ndarray
    """int32 per request: the ends of its entry, NONE without one."""
    last: np.ndarray
    older: np.ndarray
    """int32 per request: the neighbours of its entry."""
    newer: np.ndarray


def make_tracker(pages: int, requests: int) -> Tracker:
    """A tracker without entries."""
    head = np.zeros(1, TRACKER).view(np.recarray)[0]
    head.oldest = head.newest = NONE
    per_page = [np.full(max(pages, 1), NONE, np.int32) for _ in range(3)]
    per_request = [np.full(requests, NONE, np.int32) for _ in range(4)]
    return Tracker(head, *per_page, *per_request)


@subkernel
def add_page(tracker: Tracker, request: int, page: int) -> None:
    """Append a page to the request's entry; `touch` the request first."""
    tail = tracker.last[request]
    tracker.holder[page] = request
    tracker.before[page] = tail
    tracker.after[page] = NONE
    if tail == NONE:
        tracker.first[request] = page
    else:
        tracker.after[tail] = page
    tracker.last[request] = page


@subkernel
def remove_page(tracker: Tracker, page: int) -> None:
    """Take a page out of its holder's entry; the entry goes with its last page."""
    request, before, after = tracker.holder[page], tracker.before[page], tracker.after[page]
    tracker.holder[page] = NONE
    if before == NONE:
        tracker.first[request] = after
    else:
        tracker.after[before] = after
    if after == NONE:
        tracker.last[request] = before
    else:
        tracker.before[after] = before
    if tracker.first[request] == NONE:
        _unlink(tracker, request)


@subkernel
def touch(tracker: Tracker, request: int) -> None:
    """The request was served just now."""
    if tracker.first[request] != NONE:
        _unlink(tracker, request)
    newest = tracker.head.newest
    tracker.older[request] = newest
    tracker.newer[request] = NONE
    if newest == NONE:
        tracker.head.oldest = request
    else:
        tracker.newer[newest] = request
    tracker.head.newest = request


@subkernel
def _unlink(tracker: Tracker, request: int) -> None:
    older, newer = tracker.older[request], tracker.newer[request]
    if older == NONE:
        tracker.head.oldest = newer
    else:
        tracker.newer[older] = newer
    if newer == NONE:
        tracker.head.newest = older
    else:
        tracker.older[newer] = older
