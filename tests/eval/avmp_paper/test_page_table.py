"""The stack of free pages, with its quirks."""

import pytest

from hbmgym.eval.avmp_paper.page_table import give_back, make_page_table, resize, take, taken


def pop(table, count: int) -> list[int]:
    assert take(table, count, False)
    return [taken(table, count, i) for i in range(count)]


def left(table) -> list[int]:
    return table.stack[: table.head.free][::-1].tolist()


def test_pages_are_handed_out_in_ascending_order_at_first():
    table = make_page_table(5, 5, 64)
    assert pop(table, 2) + pop(table, 3) == [0, 1, 2, 3, 4]


def test_the_page_that_came_back_last_goes_first():
    table = make_page_table(5, 5, 64)
    pop(table, 3)
    give_back(table, 2)
    give_back(table, 0)
    assert pop(table, 3) == [0, 2, 3]


def test_what_does_not_suffice_takes_nothing():
    table = make_page_table(5, 5, 64)
    pop(table, 2)
    assert not take(table, 4, False)
    assert left(table) == [2, 3, 4]


def test_one_at_a_time_a_failure_reverses_the_stack():
    table = make_page_table(5, 5, 64)
    pop(table, 1)
    assert not take(table, 5, True)
    assert left(table) == [4, 3, 2, 1]
    assert not take(table, 5, True)
    assert left(table) == [1, 2, 3, 4]


def test_a_shrink_keeps_the_order_of_what_stays():
    table = make_page_table(6, 6, 64)
    pop(table, 4)
    for page in (3, 1):
        give_back(table, page)
    assert left(table) == [1, 3, 4, 5]
    assert resize(table, 4)
    assert (left(table), table.head.total) == ([1, 3], 4)


@pytest.mark.parametrize("total", [0, 4, 5])
def test_a_page_in_use_above_the_new_size_forbids_it(total):
    table = make_page_table(6, 6, 64)
    pop(table, 6)
    for page in range(5):
        give_back(table, page)
    before = left(table)
    assert not resize(table, total)
    assert (left(table), table.head.total) == (before, 6)


def test_of_new_pages_the_highest_goes_first():
    table = make_page_table(2, 5, 64)
    assert resize(table, 5)
    assert pop(table, 5) == [4, 3, 2, 0, 1]


@pytest.mark.parametrize("total", [-1, 6])
def test_a_store_has_no_pages_below_zero_or_beyond_its_end(total):
    table = make_page_table(2, 5, 64)
    assert not resize(table, total)
    assert (left(table), table.head.total) == ([0, 1], 2)
