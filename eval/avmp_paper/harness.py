"""The simulator: events that are all known beforehand. Nothing waits, nothing adapts, the allocator changes no time."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hbmgym.envs.traces.avmp_workloads import PaperRequests
from hbmgym.eval.avmp_paper.allocator import KV, REQUEST, SSM, Allocator, allocate, free, make_allocator, release
from hbmgym.eval.avmp_paper.sizes import ATTENTION_LAYERS, PAGE_TOKENS, SSM_LAYERS, PaperModel
from hbmgym.eval.avmp_paper.variants import Variant
from hbmgym.memory_backend.jit import kernel, subkernel

DEPARTURE, GROWTH, ARRIVAL = range(3)  # also the order within a tick
SAMPLE_EVENTS = 100

TALLY = np.dtype(
    [
        # settings
        ("attention_layers", "i8"),
        ("ssm_layers", "i8"),
        ("page_tokens", "i8"),
        ("recompute", "i8"),  # see `_restore`
        # counters
        ("active", "i8"),
        ("completed", "i8"),
        ("intact", "i8"),  # of these, requests that never lost anything
        ("kv_ooms", "i8"),  # failing calls at arrival
        ("ssm_ooms", "i8"),
        ("growth_ooms", "i8"),
        ("restores", "i8"),
        ("restore_ooms", "i8"),
        ("recomputed_tokens", "i8"),
    ],
    align=True,
)


class Events(NamedTuple):
    """By tick, then kind, then request; int64 columns."""

    tick: np.ndarray
    kind: np.ndarray
    request: np.ndarray


@dataclass(frozen=True)
class Outcome:
    """What one cell counts. Times are not simulated: the paper's goodput is the speed of its Python."""

    oom_count: int
    """Failing allocate calls, one per layer, not requests."""
    completed: int
    """Requests that saw no OOM."""
    submitted: int
    rebalance_count: int
    rebalance_rejected: int
    bytes_migrated: int
    bytes_wasted: int
    """Lost to alignment when migrated."""
    effective_batch_size_p50: float
    kv_ooms_at_arrival: int
    ssm_ooms_at_arrival: int
    ooms_at_growth: int
    ooms_at_restore: int
    rebalances_to_kv: int
    rebalances_withheld: int
    evictions: int
    foreign_frees: int
    intact: int
    """Completed requests that never lost KV or state while they were live."""
    restores: int
    recomputed_tokens: int


def simulate(
    variant: Variant, model: PaperModel, pool_bytes: int, requests: PaperRequests, *, recompute: bool = False
) -> Outcome:
    """Play `requests` through an allocator. `recompute`: an evicted live request must restore what it lost."""
    events = make_events(requests)
    records = np.zeros(len(requests), REQUEST).view(np.recarray)
    records.arrival, records.prompt, records.generated = requests.arrival, requests.prompt, requests.generated
    allocator = make_allocator(variant, model, pool_bytes, records)
    tally = np.zeros(1, TALLY).view(np.recarray)[0]
    tally.attention_layers, tally.ssm_layers, tally.page_tokens = ATTENTION_LAYERS, SSM_LAYERS, PAGE_TOKENS
    tally.recompute = recompute
    samples = np.zeros(len(events.tick) // SAMPLE_EVENTS + 1, np.int64)
    _play(events, allocator, tally, samples)
    rebalancer = allocator.rebalancer
    busy = samples[samples > 0]
    return Outcome(
        oom_count=int(records.ooms.sum()),
        completed=int(tally.completed),
        submitted=len(requests),
        rebalance_count=int(rebalancer.accepted),
        rebalance_rejected=int(rebalancer.rejected),
        bytes_migrated=int(rebalancer.bytes_migrated),
        bytes_wasted=int(rebalancer.bytes_wasted),
        effective_batch_size_p50=float(np.median(busy)) if len(busy) else 0.0,
        kv_ooms_at_arrival=int(tally.kv_ooms),
        ssm_ooms_at_arrival=int(tally.ssm_ooms),
        ooms_at_growth=int(tally.growth_ooms),
        ooms_at_restore=int(tally.restore_ooms),
        rebalances_to_kv=int(rebalancer.to_kv),
        rebalances_withheld=int(rebalancer.withheld),
        evictions=int(allocator.head.evictions),
        foreign_frees=int(allocator.head.foreign_frees),
        intact=int(tally.intact),
        restores=int(tally.restores),
        recomputed_tokens=int(tally.recomputed_tokens),
    )


def make_events(requests: PaperRequests) -> Events:
    """Arrivals, growths into another page, and departures: prefill takes a tick per prompt token, then decode too."""
    count = len(requests)
    rows = np.arange(count)
    departure = requests.arrival + requests.prompt + requests.generated
    grower, growth = _growths(requests)
    tick = np.concatenate((requests.arrival, growth, departure))
    kind = np.repeat((ARRIVAL, GROWTH, DEPARTURE), (count, len(growth), count))
    request = np.concatenate((rows, grower, rows))
    order = np.lexsort((request, kind, tick))
    return Events(tick[order], kind[order], request[order])


def _growths(requests: PaperRequests) -> tuple[np.ndarray, np.ndarray]:
    """Request and tick of every generated token that begins a page, its page being the first after the prompt's on."""
    held = -(-requests.prompt // PAGE_TOKENS)
    needed = -(-(requests.prompt + requests.generated) // PAGE_TOKENS)
    grown = needed - held
    grower = np.repeat(np.arange(len(requests)), grown)
    nth = np.arange(len(grower)) - np.repeat(np.cumsum(grown) - grown, grown)
    tokens = (held[grower] + nth) * PAGE_TOKENS + 1
    return grower, requests.arrival[grower] + tokens


@kernel
def _play(events: Events, allocator: Allocator, tally: np.record, samples: np.ndarray) -> None:
    for place in range(len(events.tick)):
        request = events.request[place]
        kind = events.kind[place]
        if kind == ARRIVAL:
            _arrive(allocator, tally, request)
        elif kind == DEPARTURE:
            _depart(allocator, tally, request)
        elif allocator.requests[request].active:
            _grow(allocator, tally, request, events.tick[place])
        if (place + 1) % SAMPLE_EVENTS == 0:
            samples[place // SAMPLE_EVENTS] = tally.active
    samples[len(samples) - 1] = tally.active


@subkernel
def _arrive(allocator: Allocator, tally: np.record, request: int) -> None:
    """A call per layer; one that fails is counted, and the request goes on with the next layer."""
    record = allocator.requests[request]
    record.active = 1
    tally.active += 1
    pages = max(1, -(-record.prompt // tally.page_tokens))
    tally.kv_ooms += _allocate_layers(allocator, request, KV, tally.attention_layers, pages)
    tally.ssm_ooms += _allocate_layers(allocator, request, SSM, tally.ssm_layers, 1)


@subkernel
def _grow(allocator: Allocator, tally: np.record, request: int, tick: int) -> None:
    """One more page per attention layer, also for a request that has lost its others."""
    record = allocator.requests[request]
    restored = 0
    if tally.recompute and record.lost and not record.ooms:
        restored = _restore(allocator, tally, request, tick - record.arrival)
    if not restored & KV:
        tally.growth_ooms += _allocate_layers(allocator, request, KV, tally.attention_layers, 1)


@subkernel
def _depart(allocator: Allocator, tally: np.record, request: int) -> None:
    record = allocator.requests[request]
    free(allocator, request)
    record.active = 0
    tally.active -= 1
    # Where requests must recompute what they lost, one that leaves without it has not finished.
    if not record.ooms and not (tally.recompute and record.lost):
        tally.completed += 1
        tally.intact += not record.ever_lost


@subkernel
def _allocate_layers(allocator: Allocator, request: int, kind: int, layers: int, pages: int) -> int:
    """One call per layer; returns how many of them failed."""
    failed = 0
    for _ in range(layers):
        if not allocate(allocator, request, kind, pages):
            failed += 1
    allocator.requests[request].ooms += failed
    return failed


@subkernel
def _restore(allocator: Allocator, tally: np.record, request: int, tokens: int) -> int:
    """Not in the paper: get back what was taken, and compute all `tokens` of the context again.

    What is left in a pool that took pages is given up and asked for anew, through the same ladder. The simulator's
    clock does not notice. Returns the kinds that were asked for.
    """
    record = allocator.requests[request]
    lost = record.lost
    record.lost = 0
    tally.restores += 1
    tally.recomputed_tokens += tokens
    release(allocator, request, lost)
    if lost & KV:
        pages = -(-tokens // tally.page_tokens)
        tally.restore_ooms += _allocate_layers(allocator, request, KV, tally.attention_layers, pages)
    if lost & SSM:
        tally.restore_ooms += _allocate_layers(allocator, request, SSM, tally.ssm_layers, 1)
    return lost
