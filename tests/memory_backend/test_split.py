"""Layout: every split is whole chunks, none wastes capacity, and a share names the nearest one."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hbmgym.memory_backend.split import Layout

CHUNK = 1000
repeatable = settings(derandomize=True, deadline=None)
SIZES = st.integers(CHUNK // 10, 10 * CHUNK)


@st.composite
def layouts(draw):
    chunks, page, slot = draw(st.integers(1, 400)), draw(SIZES), draw(SIZES)
    min_slots, min_pages = draw(st.integers(1, 5)), draw(st.integers(1, 20))
    assume(-(-min_slots * slot // CHUNK) + -(-min_pages * page // CHUNK) <= chunks)
    return Layout(chunks * CHUNK, CHUNK, page, slot, min_slots, min_pages)


def all_slots(layout):
    return range(layout.min_slots, layout.max_slots + 1)


@repeatable
@given(layouts())
def test_the_share_of_a_split_names_that_split(layout):
    for slots in all_slots(layout):
        assert layout.share(layout.slots(layout.share(slots))) == layout.share(slots)


@repeatable
@given(layouts(), st.floats(-0.5, 1.5))
def test_a_share_maps_to_the_nearest_realisable_split(layout, share):
    found = abs(layout.share(layout.slots(share)) - share)
    assert found == min(abs(layout.share(slots) - share) for slots in all_slots(layout))


@repeatable
@given(layouts(), st.floats(0, 1))
def test_a_larger_share_never_means_fewer_pages(layout, share):
    assert layout.pages(layout.slots(share)) <= layout.pages(layout.slots(min(share + 0.1, 1.0)))


@repeatable
@given(layouts())
def test_no_split_loses_a_chunk_or_a_slot(layout):
    for slots in all_slots(layout):
        ssm_bytes = (layout.chunks - layout.kv_chunks(slots)) * CHUNK
        assert slots * layout.slot_bytes <= ssm_bytes < slots * layout.slot_bytes + CHUNK
        assert layout.pages(slots) == (layout.budget_bytes - ssm_bytes) // layout.page_bytes


@repeatable
@given(layouts())
def test_every_split_keeps_the_least_slots_and_pages(layout):
    for slots in all_slots(layout):
        assert slots >= layout.min_slots and layout.pages(slots) >= layout.min_pages
    one_more = -(-(layout.max_slots + 1) * layout.slot_bytes // CHUNK)
    assert (layout.chunks - one_more) * CHUNK // layout.page_bytes < layout.min_pages, "another slot would have fitted"


@repeatable
@given(layouts())
def test_share_bounds_are_the_extreme_splits(layout):
    shares = [layout.share(slots) for slots in all_slots(layout)]
    assert layout.share_bounds == (min(shares), max(shares))


def test_a_tie_goes_to_the_fewer_slots():
    layout = Layout(10 * CHUNK, CHUNK, CHUNK, 2 * CHUNK, min_slots=1, min_pages=1)
    assert [layout.share(slots) for slots in (2, 3)] == [0.6, 0.4]
    assert layout.slots(0.5) == 2


def test_slots_smaller_than_a_chunk_still_find_the_nearest_share():
    layout = Layout(10 * CHUNK, CHUNK, CHUNK, CHUNK // 10, min_slots=1, min_pages=1)
    assert layout.share(layout.slots(0.86)) == 0.9


def test_a_budget_of_broken_chunks_is_refused():
    with pytest.raises(ValueError, match="not a multiple of chunk_bytes"):
        Layout(10 * CHUNK + 1, CHUNK, CHUNK, CHUNK, 1, 1)


def test_a_budget_too_small_for_one_request_is_refused_with_the_size_it_needs():
    with pytest.raises(ValueError, match="give at least 6000 bytes"):
        Layout(5 * CHUNK, CHUNK, CHUNK // 2, 2 * CHUNK, min_slots=2, min_pages=3)
    Layout(6 * CHUNK, CHUNK, CHUNK // 2, 2 * CHUNK, min_slots=2, min_pages=3)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_sizes_of_nothing_are_refused(sizes):
    with pytest.raises(ValueError, match="must be at least 1"):
        Layout(100, *sizes, 1, 1)
