"""The arrays of one core: what the engine's kernels read and write."""

from typing import NamedTuple

import numpy as np

from hbmgym.envs.serving.cost_model import COST
from hbmgym.envs.serving.marginal import make_marginal, step_blocks
from hbmgym.envs.serving.retention import ALL, Overlaps, Retention, make_overlaps
from hbmgym.envs.traces.episode import ROW, Episode
from hbmgym.memory_backend.pools import NONE
from hbmgym.memory_backend.prefix_cache import EXAMPLE_MEMORY, Memory
from hbmgym.memory_backend.table import equal_records, table_reader

FUTURE, HELD, WAITING, PREFILLING, DECODING, FINISHED, REJECTED = range(7)
STATUS_NAMES = ("future", "held", "waiting", "prefilling", "decoding", "finished", "rejected")
NOT_REJECTED, DOES_NOT_FIT, DEADLINE = range(3)
WORST_RATIO = 10.0  # no request counts for more than so many times its SLO
REJECT_NAMES = ("", "does_not_fit", "deadline")

# Who of those that wait is tried next, and whether by forecast (queueing.py).
FCFS, LPM, SLO, PAST_FUTURE = range(4)

# Of the answers that finished last: lengths by their end, and ascending (forecast.py).
RECENT, SORTED = range(2)
HISTORY = 200

# What becomes of a queue's head by price (on_shortage=priced); without a choice it waits as in any engine.
OWN_FREE, CROSS_FREE, OWN_EVICT, CROSS_EVICT, DEFER, NO_CHOICE = range(6)
ACTION_NAMES = ("own_free", "cross_free", "own_evict", "cross_evict", "defer", "no_choice")
RATIOS = 16
AS_LONG_AS_IT_LASTS = -1.0  # a deferral weight

OVERLAPPED, STALL, SUSPEND = range(3)
TRANSFERS = {"overlapped": OVERLAPPED, "stall": STALL, "suspend": SUSPEND}

REQUEST = np.dtype(
    [
        ("status", "i4"),
        ("reject_reason", "i4"),
        ("preemptions", "i4"),
        ("deferrals", "i4"),  # by choice
        ("missed", "i4"),  # 1 once its SLO miss is booked
        ("prev", "i4"),  # neighbours in the one list that holds the request
        ("next", "i4"),
        ("heap_place", "i4"),  # in the one heap that holds the request
        ("unmet", "i4"),  # needs that have not ended
        ("goal", "i4"),  # tokens to prefill: the prompt, after a preemption also what was generated
        ("computed", "i4"),  # tokens of the goal whose KV is there
        ("chunk", "i4"),  # tokens that this iteration adds
        ("generated", "i4"),  # output tokens when the request joined the decoding ones
        ("published", "i4"),  # leading pages that are held by id
        ("first_page", "i4"),  # private pages, in order, linked by entry.next
        ("last_page", "i4"),
        ("pages", "i4"),  # published and private
        ("working", "i4"),  # slot of the running state
        ("reserved", "i4"),  # slot of the request's own latest snapshot, NONE with one slot per request
        ("idle_slots", "i4"),  # further slots, linked by entry.next
        ("reserved_depth", "i4"),  # pages under the reserved snapshot, 0: none
        ("branch_depth", "i4"),  # pages after which prefill stops to save a branch snapshot, 0: none
        ("reused_tokens", "i4"),  # at the first admission
        ("offloaded", "i4"),  # tokens whose KV, and the state after them, host memory holds; 0: none
        ("left_pages", "i4"),  # pages under the latest snapshot that the finished turn left, where pins are taken
        ("follows", "i4"),  # the turn whose pages it goes on from, NONE: it has not ended, or there is none
        ("followed", "i4"),  # 1 once such a request has come
        ("joined_at", "i8"),  # iteration count at which the request joined the decoding ones
        ("event_key", "i8"),
        ("ttft_slo_s", "f8"),
        ("arrival_s", "f8"),  # NaN while it is not known
        ("waits_since_s", "f8"),
        ("admitted_s", "f8"),  # first admission; NaN until then, as the next two
        ("first_token_s", "f8"),
        ("ended_s", "f8"),  # finished or rejected
        ("pin_ends_s", "f8"),  # of what is kept for the session's next turn
    ],
    align=True,
)

ENGINE = np.dtype(
    [
        ("now_s", "f8"),
        ("iterations", "i8"),
        ("next_row", "i8"),  # the next row whose arrival is fixed
        ("next_receipt_s", "f8"),  # when the next row as far as is known reaches the engine, inf: none
        ("listens_at", "i8"),  # iteration count at which a decoding engine looks for new rows next
        ("decoding", "i8"),
        ("context_tokens", "i8"),  # of the decoding requests together
        ("prefilling", "i8"),
        ("waiting", "i8"),  # in the queue
        ("aside", "i8"),  # out of it until the KV pool grows
        ("idle_pages", "i8"),  # for which an idle engine took another split in this window, 0: it did not
        ("aside_deadline_s", "f8"),  # when the first of those gives up, inf: none
        ("held", "i8"),
        ("finished", "i8"),
        ("rejected", "i8"),
        ("head_tried", "i8"),  # 1 while the queue's head is known to be blocked
        ("refused_now", "i8"),  # the forecast has refused the head at this edge: the next one asks again
        ("reorder_s", "f8"),  # when the order of those that wait changes by itself, inf: it does not
        ("queue_deadline_s", "f8"),  # before which none of them gives up, where not the head alone is judged
        ("lengths_seen", "i8"),  # answers whose length was noted
        ("blocked_on", "i8"),  # KV or SSM while the head is blocked, else NONE
        ("preempted_now", "i8"),  # this iteration preempted, so it admits nobody
        ("chunk_tokens", "i8"),  # prefill plan of this iteration: tokens, and sum of c (x + c / 2)
        ("chunk_attention", "f8"),
        ("debt_s", "f8"),  # state copies and stalls, charged to the next iteration
        ("epoch_end_s", "f8"),  # when hits age next; NEVER where no order counts them
        ("epoch_s", "f8"),
        ("allocations", "i8"),  # pages and slots taken
        ("next_migration", "i8"),  # allocations from which on a shortage may migrate again
        ("migrated_now", "i8"),  # a shortage has migrated at this iteration edge
        ("states_out", "i8"),  # what has to go before the head that was chosen to get in takes memory, and
        ("pages_out", "i8"),
        ("split_to_take", "i8"),  # slots of the split to take then, NONE: as it is
        ("pin_ends_s", "f8"),  # when the next pin ends, inf: none
        ("pinned_pages", "i8"),  # of all pins, a page of two twice
        ("turns", "i8"),  # finished ones that left something to go on from
        ("host_bytes", "i8"),  # of preempted requests, in host memory
        # settings
        ("closed", "i8"),  # 1: a row with needs arrives its gap after the last of them has ended
        ("slots_per_request", "i8"),
        ("page_tokens", "i8"),
        ("admission", "i8"),  # FCFS, LPM, SLO or PAST_FUTURE
        ("reorders", "i8"),  # 1: not always the one that has joined the queue first is tried next
        ("arrivals_matter", "i8"),  # 1: an arrival may change what becomes of a blocked head
        ("request_budget", "i8"),  # most prompt tokens of one request in an iteration
        ("max_long_prefills", "i8"),  # most requests with more than that left that prefill at once, 0: no bound
        ("exclusive", "i8"),  # 1: an iteration with prefill decodes nothing
        ("receive_interval", "i8"),  # decode iterations from one look for new rows to the next
        ("decode_snapshot_tokens", "i8"),
        ("retention", "i8"),  # ALL, LATEST, INTERVAL, PATH_CAP or OPTIMAL
        ("retained", "i8"),  # pages of an interval, or snapshots of a path
        ("share_min", "f8"),  # the controller's bounds
        ("share_max", "f8"),
        ("max_pages", "i8"),  # of the largest split within them
        ("max_preemptions", "i8"),
        ("pins_sessions", "i8"),  # 1: a finished turn may be kept for the session's next one
        ("pin_price", "f8"),
        ("host_limit", "i8"),  # bytes of host memory for preempted requests; 0: they recompute
        ("transfers", "i8"),  # OVERLAPPED, STALL or SUSPEND
        ("on_shortage", "i8"),  # of shortage.SHORTAGE_RULES
        ("migration_low", "f8"),
        ("migration_high", "f8"),
        ("migration_chunks", "i8"),
        ("migration_interval", "i8"),
        ("horizon_s", "f8"),  # of prices
        ("curvature", "f8"),
        ("deferral_weight", "f8"),
        ("max_deferrals", "i8"),
        ("worker_chunk_s", "f8"),  # seconds until a chunk arrives, 0 when it stalls the iteration instead
        ("deadline_slos", "f8"),
        ("tpot_slo_s", "f8"),
        # counters of the whole episode
        ("preemptions", "i8"),
        ("recomputed_tokens", "i8"),
        ("pins", "i8"),  # taken
        ("pins_used", "i8"),  # by a request that went on from there
        ("pins_given_up", "i8"),  # for want of room
        ("offloads", "i8"),
        ("offloaded_bytes", "i8"),
        ("restored_bytes", "i8"),
        ("skipped_snapshots", "i8"),
        ("saved_snapshots", "i8"),
        ("busy_s", "f8"),
        ("blocked_kv_s", "f8"),
        ("blocked_ssm_s", "f8"),
        ("received", "i8"),  # arrived and not held
        ("received_tokens", "i8"),
        ("admitted_tokens", "i8"),  # prompt tokens at first admission
        ("reused_tokens", "i8"),
        ("kv_loss_tokens", "i8"),
        ("ssm_loss_tokens", "i8"),
        ("met", "i8"),
        ("missed", "i8"),
        ("first_tokens", "i8"),
        ("ttft_over_slo", "f8"),  # sums of min(ratio, 10)
        ("tpot_over_slo", "f8"),
        ("tpots", "i8"),
        ("cost", "f8"),  # what is certain by now of the sum of min(SLO ratio, 10)
    ],
    align=True,
)

# Lists of requests: the queue, those set aside, those held for their needs, then the running ones: prefilling, and one
# list per residue of the iteration count at which a decoding request needs its next page.
QUEUE, ASIDE, HOLD, PREFILL, GROWTH = range(5)

# Heaps of requests: decoding ones by the iteration after which something happens to them; in a closed loop rows that
# have not arrived and whose needs have ended, by age; finished ones whose pages are kept, by the end of their pins.
DECODE_EVENTS, RELEASES, PINS, HEAPS = range(4)

THINK_BINS = 25


class State(NamedTuple):
    """Everything a kernel needs, one per environment."""

    memory: Memory
    rows: np.ndarray
    followers: np.ndarray
    refs: np.ndarray
    requests: np.recarray
    ends: np.ndarray
    """int32, shape (lists, 2): first and last request of each list."""
    heaps: np.ndarray
    """int32, shape (HEAPS, n)."""
    heap_sizes: np.ndarray
    """int64, shape (HEAPS,)."""
    engine: np.record
    cost: np.record
    step_blocks: np.ndarray
    """As `marginal.step_blocks` returns them."""
    overlaps: Overlaps
    marginal: np.ndarray
    """As `marginal.make_marginal` returns it."""
    actions: np.ndarray
    """int64, shape (NO_CHOICE + 1,): how often each was taken by price."""
    think_times: np.ndarray
    """int64, shape (THINK_BINS,): turns by the time after which a request went on from there (`pins.py`)."""
    ratios: np.ndarray
    """int64, shape (RATIOS,): decisions by log2 of how many times dearer the second cheapest action was; the last place
    has all beyond it, and those in which the cheapest cost nothing."""
    lengths: np.ndarray
    """int64, shape (2, HISTORY): by RECENT or SORTED, the output lengths that past-future admission remembers."""
    forecast: np.ndarray
    """int64, shape (slots + 1, 4): its scratch, a line for each running request and one for the head."""


def make_requests(count: int) -> np.recarray:
    """`count` requests that have not arrived."""
    nowhere = dict.fromkeys(("prev", "next", "heap_place", "first_page", "last_page", "follows"), NONE)
    slots = dict.fromkeys(("working", "reserved", "idle_slots"), NONE)
    times = dict.fromkeys(("arrival_s", "admitted_s", "first_token_s", "ended_s"), np.nan)
    return equal_records(REQUEST, count, **nowhere, **slots, **times)


def make_state(memory: Memory, episode: Episode, cost: np.record, retention: Retention) -> State:
    """The state before anything has arrived; most settings in its ENGINE record are still to be written."""
    requests = make_requests(len(episode.rows))
    requests["unmet"][: len(episode.rows)] = episode.rows["needs"]
    engine = _record(ENGINE)
    engine.page_tokens = episode.page_tokens
    engine.closed = int(episode.loop == "closed")
    engine.next_receipt_s = episode.rows["arrival_s"][0] + cost.request_s if len(episode.rows) else np.inf
    engine.aside_deadline_s = engine.queue_deadline_s = engine.reorder_s = engine.pin_ends_s = np.inf
    engine.blocked_on = engine.split_to_take = NONE
    ends = np.full((GROWTH + episode.page_tokens, 2), NONE, np.int32)
    heaps, heap_sizes = np.zeros((HEAPS, len(requests)), np.int32), np.zeros(HEAPS, np.int64)
    kv, ssm = memory.kv.meta, memory.ssm.meta
    steps = step_blocks(int(memory.split.chunks * kv.chunk_bytes), int(kv.block_bytes), int(ssm.block_bytes))
    most_pages = int(episode.rows["known_ids"].max(initial=0))
    overlaps = make_overlaps(retention, len(episode.rows), episode.id_count, most_pages)
    actions, ratios = np.zeros(NO_CHOICE + 1, np.int64), np.zeros(RATIOS, np.int64)
    think_times = np.zeros(THINK_BINS, np.int64)
    rows, followers, refs = map(_read_only, (episode.rows, episode.followers, episode.refs))
    return State(
        memory,
        rows,
        followers,
        refs,
        requests,
        ends,
        heaps,
        heap_sizes,
        engine,
        cost,
        steps,
        overlaps,
        make_marginal(),
        actions,
        think_times,
        ratios,
        lengths=np.zeros((2, HISTORY), np.int64),
        forecast=np.zeros((int(memory.split.max_slots) + 1, 4), np.int64),
    )


def _read_only(array: np.ndarray) -> np.ndarray:
    """A view that cannot be written: kernels are compiled for one kind of array only."""
    view = array.view()
    view.flags.writeable = False
    return view


def _record(dtype: np.dtype) -> np.record:
    return equal_records(dtype, 1)[0]


_NO_ROWS = Episode("", 0, np.zeros(0, ROW).view(np.recarray), np.zeros(0, np.int32), 0, 1, 0.0, 0.0)
EXAMPLE_STATE = make_state(EXAMPLE_MEMORY, _NO_ROWS, _record(COST), Retention(ALL))
state_at = table_reader(EXAMPLE_STATE)
