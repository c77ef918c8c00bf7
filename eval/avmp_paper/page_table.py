"""A page table: which pages of a pool are free, as a stack."""

from typing import NamedTuple

import numpy as np

from hbmgym.memory_backend.jit import kernel

PAGE_TABLE = np.dtype(
    [
        ("total", "i8"),  # pages that the pool may use now
        ("free", "i8"),  # of these, on the stack
        ("most", "i8"),  # pages that the store behind the pool could hold
        ("page_bytes", "i8"),
    ],
    align=True,
)


class PageTable(NamedTuple):
    """`stack[:head.free]` are the free pages, the next one to be handed out last."""

    head: np.record
    stack: np.ndarray
    """int32, room for head.most pages."""


def make_page_table(total: int, most: int, page_bytes: int) -> PageTable:
    """`total` pages, all free; the first ones handed out are 0, 1, 2, ..."""
    head = np.zeros(1, PAGE_TABLE).view(np.recarray)[0]
    head.total = head.free = total
    head.most, head.page_bytes = most, page_bytes
    stack = np.zeros(max(most, 1), np.int32)
    stack[:total] = np.arange(total)[::-1]
    return PageTable(head, stack)


@kernel
def take(table: PageTable, count: int, one_at_a_time: bool) -> bool:
    """Pop `count` pages, or none. `taken(table, count, i)` names them until the next push.

    AVMP pops them one by one. When they do not suffice, it pushes back what it got in the order in which it got it,
    and so reverses the whole stack.
    """
    if count > table.head.free:
        if one_at_a_time:
            _reverse(table)
        return False
    table.head.free -= count
    return True


@kernel
def taken(table: PageTable, count: int, i: int) -> int:
    """The i-th of the `count` pages that were just popped: they still lie above the top of the stack."""
    return table.stack[table.head.free + count - 1 - i]


@kernel
def give_back(table: PageTable, page: int) -> None:
    """Push one page."""
    table.stack[table.head.free] = page
    table.head.free += 1


@kernel
def resize(table: PageTable, total: int) -> bool:
    """Change the number of pages; refused when there is no such size, or a page above it is in use."""
    head = table.head
    if total < 0 or total > head.most:
        return False
    if total < head.total:
        return _shrink(table, total)
    # In ascending order, so that the highest of the new pages is handed out first.
    for page in range(head.total, total):
        give_back(table, page)
    head.total = total
    return True


@kernel
def _shrink(table: PageTable, total: int) -> bool:
    head = table.head
    kept = 0
    for place in range(head.free):
        if table.stack[place] < total:
            kept += 1
    if head.free - kept < head.total - total:
        return False
    kept = 0
    for place in range(head.free):
        page = table.stack[place]
        if page < total:
            table.stack[kept] = page
            kept += 1
    head.free = kept
    head.total = total
    return True


@kernel
def _reverse(table: PageTable) -> None:
    last = table.head.free - 1
    for place in range(table.head.free // 2):
        page = table.stack[place]
        table.stack[place] = table.stack[last - place]
        table.stack[last - place] = page
