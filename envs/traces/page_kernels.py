"""Kernels of `pages`: who shares a stretch with whom, and writing and numbering the stretches.

Rows are in order of arrival. A block has `split` parts and a page `group` of them, equally large.
"""

import numpy as np

from hbmgym.memory_backend.jit import kernel, subkernel


@kernel
def write_owners(successor: np.ndarray, owner: np.ndarray) -> None:
    """Fill `owner`: the row at the end of each chain of successors, whose stretch the whole chain shares."""
    for row in range(len(successor) - 1, -1, -1):
        owner[row] = owner[successor[row]] if successor[row] >= 0 else row


@subkernel
def _write_pages(pages, row, id_base, h_jump, h_lcp, r_off, r_start, r_len, split, group):
    """Fill `pages` with the trace's page ids of a row, walking up the rows that its prefix was taken from."""
    depth = (len(pages) * group + split - 1) // split
    while row >= 0 and depth > 0:
        block = h_lcp[row]
        for run in range(r_off[row], r_off[row + 1]):
            for step in range(min(r_len[run], depth - block)):
                number = id_base + r_start[run] + step
                first_part = (block + step) * split
                for page in range(first_part // group, min((first_part + split) // group, len(pages))):
                    pages[page] = number * split + (page + 1) * group - 1 - first_part
            block += r_len[run]
            if block >= depth:
                break
        depth = min(depth, h_lcp[row])
        row = h_jump[row]


@kernel
def lay_out(
    source, id_base, owner, prompt_ids, known_ids, ref_off, refs, dense, begin, numbered,
    h_jump, h_lcp, r_off, r_start, r_len, split, group,
):  # fmt: skip
    """Write every owner's stretch, number the ids in order of first appearance; returns the number of ids.

    After the `prompt_ids` pages that the trace has ids for, each of an owner's pages has an id that no other has.
    Scratch: `dense` (per raw id) and `begin` (per row) hold -1, `numbered` (per row) 0.
    """
    used = 0
    ids = 0
    for row in range(len(owner)):
        top = owner[row]
        if begin[top] < 0:
            begin[top] = used
            stretch = refs[used : used + prompt_ids[top]]
            _write_pages(stretch, source[top], id_base[top], h_jump, h_lcp, r_off, r_start, r_len, split, group)
            used += known_ids[top]
        ref_off[row] = begin[top]
        for page in range(begin[top] + numbered[top], begin[top] + known_ids[row]):
            if page >= begin[top] + prompt_ids[top]:
                refs[page] = ids
                ids += 1
                continue
            raw = refs[page]
            if dense[raw] < 0:
                dense[raw] = ids
                ids += 1
            refs[page] = dense[raw]
        numbered[top] = max(numbered[top], known_ids[row])
    return ids
