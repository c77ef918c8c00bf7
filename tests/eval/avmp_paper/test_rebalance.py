"""Capacity that changes hands, and the rules that the paper states for it."""

import dataclasses

import pytest

from hbmgym.eval.avmp_paper.allocator import KV, SSM, allocate
from hbmgym.eval.avmp_paper.rebalance import rebalance
from hbmgym.eval.avmp_paper.variants import AVMP_DYNAMIC_B128, Variant, avmp_dynamic

from .paper import small_allocator


def totals(allocator) -> tuple[int, int]:
    return int(allocator.kv.table.head.total), int(allocator.ssm.table.head.total)


def to_kv(allocator) -> bool:
    return bool(rebalance(allocator.rebalancer, allocator.kv.table, allocator.ssm.table))


def to_ssm(allocator) -> bool:
    return bool(rebalance(allocator.rebalancer, allocator.ssm.table, allocator.kv.table))


def test_the_batch_counts_units_of_the_donor():
    allocator = small_allocator(avmp_dynamic(2), 8, 8)
    assert to_kv(allocator)
    assert totals(allocator) == (16, 6)
    assert allocator.rebalancer.bytes_migrated == 2 * 262_144


def test_a_batch_below_a_block_destroys_capacity_and_counts_as_success():
    allocator = small_allocator(avmp_dynamic(3), 8, 8)
    assert to_ssm(allocator)
    assert totals(allocator) == (5, 8)
    assert allocator.rebalancer.accepted == 1
    assert allocator.rebalancer.bytes_wasted == allocator.rebalancer.bytes_migrated == 3 * 65_536


def test_one_block_in_use_at_the_top_rejects_a_batch():
    allocator = small_allocator(avmp_dynamic(4), 8, 8)
    allocate(allocator, 0, SSM, 5)
    assert not to_kv(allocator)
    assert (totals(allocator), allocator.rebalancer.rejected, allocator.rebalancer.accepted) == ((8, 8), 1, 0)


def test_a_batch_beyond_the_donors_size_is_rejected():
    allocator = small_allocator(AVMP_DYNAMIC_B128, 8, 8)
    assert not to_kv(allocator)
    assert allocator.rebalancer.rejected == 1


def test_a_recipient_at_its_end_leaves_the_donor_as_large_as_it_was():
    allocator = small_allocator(avmp_dynamic(1), 16_384, 8)  # all of 1 GiB
    assert not to_kv(allocator)
    assert (totals(allocator), allocator.rebalancer.rejected) == ((16_384, 8), 1)


def ruled(**settings) -> Variant:
    return dataclasses.replace(avmp_dynamic(1), **settings)


@pytest.mark.parametrize(("used", "moves"), [(94, False), (95, False), (96, True)])
def test_below_the_lower_threshold_the_failing_pool_counts_as_pressed(used, moves):
    allocator = small_allocator(ruled(obeys_low=True), 100, 100)
    allocate(allocator, 0, KV, used)
    assert to_kv(allocator) == moves
    assert allocator.rebalancer.withheld == (not moves)
    assert allocator.rebalancer.rejected == 0


@pytest.mark.parametrize(("used", "moves"), [(69, True), (70, False), (71, False)])
def test_above_the_upper_threshold_the_other_pool_may_give(used, moves):
    allocator = small_allocator(ruled(obeys_high=True), 100, 100)
    allocate(allocator, 0, SSM, used)
    assert to_kv(allocator) == moves


def test_the_interval_counts_operations_since_the_last_rebalance():
    allocator = small_allocator(ruled(obeys_interval=True, interval=3), 100, 100)
    assert to_kv(allocator)
    for _ in range(2):
        allocate(allocator, 0, KV, 1)
    assert not to_kv(allocator)
    allocate(allocator, 0, KV, 1)
    assert to_kv(allocator)


@pytest.mark.parametrize(
    "settings", [{"batch": 0}, {"low": 0.0}, {"low": 0.4}, {"high": 1.0}, {"interval": -1}, {"low": float("nan")}]
)
def test_settings_that_the_prototype_refuses_are_refused(settings):
    with pytest.raises(ValueError, match="expected batch >= 1"):
        ruled(**settings)
