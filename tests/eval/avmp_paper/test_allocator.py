"""The ladder that a failing allocation climbs down, per family."""

import pytest

from hbmgym.eval.avmp_paper.allocator import KV, SSM, allocate, free
from hbmgym.eval.avmp_paper.variants import (
    AVMP_STATIC_MR05,
    FIXED_DUAL_MR05,
    PADDED_UNIFIED,
    avmp_dynamic,
)

from .paper import entry, free_pages, small_allocator

two_pools = pytest.mark.parametrize("variant", [FIXED_DUAL_MR05, AVMP_STATIC_MR05, avmp_dynamic(1)])


@two_pools
def test_the_request_that_was_served_least_recently_is_evicted(variant):
    allocator = small_allocator(variant, 6, 4)
    for request, count in ((0, 2), (1, 2), (0, 1)):
        assert allocate(allocator, request, KV, count)
    assert allocate(allocator, 2, KV, 3)
    assert (entry(allocator.kv, 0), entry(allocator.kv, 1)) == ([0, 1, 4], [])
    assert len(entry(allocator.kv, 2)) == 3
    assert allocator.requests.lost.tolist()[:3] == [0, KV, 0]


@two_pools
def test_a_request_may_evict_itself(variant):
    allocator = small_allocator(variant, 4, 4)
    assert allocate(allocator, 0, KV, 3)
    assert allocate(allocator, 0, KV, 2)
    assert (len(entry(allocator.kv, 0)), allocator.requests[0].lost) == (2, KV)


@pytest.mark.parametrize("variant", [FIXED_DUAL_MR05, AVMP_STATIC_MR05])
def test_one_victim_has_to_do_and_stays_evicted(variant):
    allocator = small_allocator(variant, 6, 4)
    for request in range(3):
        assert allocate(allocator, request, KV, 2)
    assert not allocate(allocator, 3, KV, 3)
    assert [len(entry(allocator.kv, request)) for request in range(4)] == [0, 2, 2, 0]


def test_a_victim_is_sought_in_the_pool_that_fails():
    allocator = small_allocator(FIXED_DUAL_MR05, 6, 2)
    allocate(allocator, 0, KV, 2)
    allocate(allocator, 1, SSM, 2)
    assert allocate(allocator, 2, SSM, 1)
    assert (entry(allocator.kv, 0), entry(allocator.ssm, 1)) == ([0, 1], [])


def test_an_evicted_page_is_not_freed_again_by_its_former_holder():
    allocator = small_allocator(AVMP_STATIC_MR05, 2, 2)
    allocate(allocator, 0, KV, 2)
    allocate(allocator, 1, KV, 2)
    free(allocator, 0)
    assert entry(allocator.kv, 1) and not free_pages(allocator.kv)


def test_padded_unified_frees_pages_that_belong_to_another_by_now():
    allocator = small_allocator(PADDED_UNIFIED, 4, 4)
    allocate(allocator, 0, KV, 3)
    allocate(allocator, 1, SSM, 2)  # evicts request 0 and takes two of its pages
    held = entry(allocator.kv, 1)
    free(allocator, 0)
    assert entry(allocator.kv, 1) == [page for page in held if page not in (0, 1, 2)]
    assert allocator.head.foreign_frees == len(set(held) & {0, 1, 2}) > 0
    free(allocator, 1)  # what is left, and no page twice
    assert sorted(free_pages(allocator.kv)) == [0, 1, 2, 3]


def test_both_kinds_share_the_padded_pool():
    allocator = small_allocator(PADDED_UNIFIED, 3, 3)
    assert allocate(allocator, 0, KV, 2) and allocate(allocator, 0, SSM, 1)
    assert entry(allocator.ssm, 0) == [0, 1, 2]


def test_only_after_the_eviction_a_rebalance_is_tried():
    allocator = small_allocator(avmp_dynamic(1), 8, 8)
    allocate(allocator, 0, KV, 4)
    allocate(allocator, 1, KV, 4)
    assert allocate(allocator, 2, KV, 4)
    assert (allocator.rebalancer.accepted, allocator.kv.table.head.total) == (0, 8)
    # One eviction leaves 4 pages; a block of the other pool adds 4.
    assert allocate(allocator, 3, KV, 8)
    assert (allocator.rebalancer.accepted, allocator.rebalancer.to_kv) == (1, 1)
    assert (allocator.kv.table.head.total, allocator.ssm.table.head.total) == (12, 7)


def test_a_rebalance_stays_when_it_was_not_enough():
    allocator = small_allocator(avmp_dynamic(1), 4, 8)
    assert not allocate(allocator, 0, KV, 20)
    assert (allocator.rebalancer.accepted, allocator.kv.table.head.total) == (1, 8)
