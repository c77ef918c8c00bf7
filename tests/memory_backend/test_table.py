"""Kernels take what lies behind a table's address for what they were compiled for, so a Table checks it."""

from typing import NamedTuple

import numpy as np
import pytest

from hbmgym.memory_backend.table import Table, equal_records

ITEM = np.dtype([("count", "i4"), ("seconds", "f8")], align=True)


class Two(NamedTuple):
    items: np.ndarray
    head: np.record


def two(items: np.ndarray, head_dtype: np.dtype = ITEM) -> Two:
    return Two(items, equal_records(head_dtype, 1)[0])


def frozen(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


EXAMPLE = two(np.zeros((2, 3)))


def test_arrays_of_any_length_are_taken():
    table = Table(two(np.ones((5, 7))), EXAMPLE)
    words = np.frombuffer((np.ctypeslib.ctypes.c_int64 * 4).from_address(table.address), np.int64)
    assert words[1:3].tolist() == [5, 7]
    assert words[0] == table.value.items.ctypes.data and words[3] == table.value.head.__array_interface__["data"][0]


@pytest.mark.parametrize(
    "other",
    [
        two(np.zeros((2, 3), np.float32)),
        two(np.zeros(6)),
        two(np.zeros((3, 2)).T),
        two(frozen(np.zeros((2, 3)))),
        two(np.zeros((2, 3)), np.dtype([("count", "i8"), ("seconds", "f8")], align=True)),
        (np.zeros((2, 3)),),
    ],
)
def test_arrays_that_a_kernel_would_take_for_others_are_refused(other):
    with pytest.raises(AssertionError, match="kernels would take these arrays for others"):
        Table(other, EXAMPLE)


def test_equal_records_are_zero_but_for_the_values_given_and_at_least_one():
    records = equal_records(ITEM, 3, count=-1)
    assert records.count.tolist() == [-1, -1, -1] and not records.seconds.any()
    assert len(equal_records(ITEM, 0)) == 1
