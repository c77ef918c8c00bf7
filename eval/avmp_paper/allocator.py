"""The five allocators as one: pools, and the ladder that an allocation climbs down when it fails."""

from typing import NamedTuple

import numpy as np

from hbmgym.eval.avmp_paper.page_table import PageTable, give_back, make_page_table, take, taken
from hbmgym.eval.avmp_paper.rebalance import REBALANCER, rebalance
from hbmgym.eval.avmp_paper.sizes import (
    ATTENTION_LAYERS,
    KV_PAGE_BYTES,
    PAGE_TOKENS,
    SSM_LAYERS,
    PaperModel,
    split_bytes,
)
from hbmgym.eval.avmp_paper.tracker import NONE, Tracker, add_page, make_tracker, remove_page, touch
from hbmgym.eval.avmp_paper.variants import Variant
from hbmgym.memory_backend.jit import kernel, subkernel

KV, SSM = 1, 2  # bits, so that a request can have lost both

REQUEST = np.dtype(
    [
        ("arrival", "i8"),
        ("prompt", "i8"),
        ("generated", "i8"),
        ("active", "i8"),
        ("ooms", "i8"),
        ("lost", "i8"),  # KV | SSM: pages that were taken from it while it was live, and are not restored
        ("ever_lost", "i8"),
        ("first_id", "i8"),  # padded_unified: its stretch of Allocator.ids
        ("ids", "i8"),
    ],
    align=True,
)
ALLOCATOR = np.dtype(
    [
        ("unified", "i8"),  # one pool for both kinds; pages are named by their number
        ("one_at_a_time", "i8"),  # AVMP, see page_table.take
        ("evictions", "i8"),
        ("foreign_frees", "i8"),  # padded_unified: pages freed by a former holder
    ],
    align=True,
)


class Pool(NamedTuple):
    """Pages of one size."""

    table: PageTable
    tracker: Tracker


class Allocator(NamedTuple):
    """Both pools (padded_unified: twice the same one) and what is known of each request."""

    head: np.record
    rebalancer: np.record
    kv: Pool
    ssm: Pool
    requests: np.recarray
    ids: np.ndarray
    """int32: the pages that each request ever got, in order; padded_unified frees by these."""


def make_allocator(variant: Variant, model: PaperModel, pool_bytes: int, requests: np.recarray) -> Allocator:
    """A variant on a budget, with every page free."""
    head = np.zeros(1, ALLOCATOR).view(np.recarray)[0]
    rebalancer = np.zeros(1, REBALANCER).view(np.recarray)[0]
    head.unified, head.one_at_a_time = variant.unified, variant.virtual
    rebalancer.enabled = variant.dynamic
    for name in ("batch", "low", "high", "interval", "obeys_low", "obeys_high", "obeys_interval"):
        rebalancer[name] = getattr(variant, name)
    most_ids = ATTENTION_LAYERS * -(-(requests.prompt + requests.generated) // PAGE_TOKENS) + SSM_LAYERS
    requests.first_id = np.cumsum(most_ids) - most_ids
    ids = np.zeros(int(most_ids.sum()) if variant.unified else 1, np.int32)
    if variant.unified:
        pool = _make_pool(pool_bytes, pool_bytes, model.padded_page_bytes, len(requests))
        return Allocator(head, rebalancer, pool, pool, requests, ids)
    kv_bytes, ssm_bytes = split_bytes(pool_bytes, variant.mamba_ratio)
    # Each of AVMP's stores is backed by a tensor as large as the whole budget.
    kv_store, ssm_store = (pool_bytes, pool_bytes) if variant.virtual else (kv_bytes, ssm_bytes)
    kv = _make_pool(kv_bytes, kv_store, KV_PAGE_BYTES, len(requests))
    ssm = _make_pool(ssm_bytes, ssm_store, model.ssm_block_bytes, len(requests))
    return Allocator(head, rebalancer, kv, ssm, requests, ids)


def _make_pool(usable_bytes: int, store_bytes: int, page_bytes: int, requests: int) -> Pool:
    most = store_bytes // page_bytes
    return Pool(make_page_table(usable_bytes // page_bytes, most, page_bytes), make_tracker(most, requests))


@kernel
def allocate(allocator: Allocator, request: int, kind: int, count: int) -> bool:
    """Give the request `count` >= 1 pages of the pool for `kind`; False is the paper's OOM.

    What was evicted on the way stays evicted and what was migrated stays migrated, whatever comes of it.
    """
    if _try(allocator, request, kind, count):
        return True
    _evict_one(allocator, kind)
    if _try(allocator, request, kind, count):
        return True
    if not allocator.rebalancer.enabled:
        return False
    pool, other = _pools(allocator, kind)
    if not rebalance(allocator.rebalancer, pool.table, other.table):
        return False
    if kind == KV:
        allocator.rebalancer.to_kv += 1
    return _try(allocator, request, kind, count)


@kernel
def free(allocator: Allocator, request: int) -> None:
    """Free every id that the request ever got."""
    allocator.rebalancer.operations += 1
    release(allocator, request, KV | SSM)


@subkernel
def release(allocator: Allocator, request: int, kinds: int) -> None:
    """Give up what is left of the pages of `kinds`: handles of evicted pages are dead, entries hold the others."""
    if allocator.head.unified:
        _free_ids(allocator, request)
        return
    if kinds & KV:
        _release_entry(allocator.kv, request)
    if kinds & SSM:
        _release_entry(allocator.ssm, request)


@subkernel
def _pools(allocator: Allocator, kind: int) -> tuple[Pool, Pool]:
    """The pool for `kind`, and the other one."""
    if kind == KV:
        return allocator.kv, allocator.ssm
    return allocator.ssm, allocator.kv


@subkernel
def _try(allocator: Allocator, request: int, kind: int, count: int) -> bool:
    pool, _ = _pools(allocator, kind)
    if not take(pool.table, count, allocator.head.one_at_a_time):
        return False
    touch(pool.tracker, request)
    for i in range(count):
        page = taken(pool.table, count, i)
        add_page(pool.tracker, request, page)
        if allocator.head.unified:
            record = allocator.requests[request]
            allocator.ids[record.first_id + record.ids] = page
            record.ids += 1
    allocator.rebalancer.operations += 1
    return True


@subkernel
def _evict_one(allocator: Allocator, kind: int) -> None:
    """Take all pages of this pool from the request that was served least recently: nobody is told."""
    pool, _ = _pools(allocator, kind)
    victim = pool.tracker.head.oldest
    if victim == NONE:
        return
    _release_entry(pool, victim)
    allocator.head.evictions += 1
    _book_loss(allocator, victim, kind)


@subkernel
def _release_entry(pool: Pool, request: int) -> None:
    page = pool.tracker.first[request]
    while page != NONE:
        after = pool.tracker.after[page]
        remove_page(pool.tracker, page)
        give_back(pool.table, page)
        page = after


@subkernel
def _free_ids(allocator: Allocator, request: int) -> None:
    """Free by page number: a page that was evicted and handed out again is taken from whoever holds it now."""
    pool, record = allocator.kv, allocator.requests[request]
    for place in range(record.first_id, record.first_id + record.ids):
        page = allocator.ids[place]
        holder = pool.tracker.holder[page]
        if holder == NONE:
            continue
        remove_page(pool.tracker, page)
        give_back(pool.table, page)
        if holder != request:
            allocator.head.foreign_frees += 1
            _book_loss(allocator, holder, KV)
    record.ids = 0


@subkernel
def _book_loss(allocator: Allocator, request: int, kind: int) -> None:
    lost = KV | SSM if allocator.head.unified else kind
    allocator.requests[request].lost |= lost
    allocator.requests[request].ever_lost |= lost
