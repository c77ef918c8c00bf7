"""How much of its prompts a trace would find in a cache that never forgets."""

import numpy as np

from hbmgym.envs.traces.trace import Trace
from hbmgym.memory_backend.jit import kernel

MAX_IDS = 2**30
"""Ids that are looked at, one byte each; a trace of more is not measured."""


def found_tokens(trace: Trace) -> np.ndarray | None:
    """int64 (n,): leading prompt tokens that rows before had; None for a trace without ids, or with too many."""
    if not trace.block_size or trace.id_span > MAX_IDS:
        return None
    blocks = np.empty(len(trace), np.int64)
    seen = np.zeros(trace.id_span, np.bool_)
    _count_found(trace.h_lcp, trace.r_off, trace.r_start, trace.r_len, seen, blocks)
    return np.minimum(blocks * trace.block_size, trace.input_tokens)


@kernel
def _count_found(h_lcp, r_off, r_start, r_len, seen, blocks):
    """Fill `blocks`: leading blocks of each row that are in earlier ones; `seen` (per id) is False on entry."""
    for row in range(len(h_lcp)):
        found = h_lcp[row]
        leading = True
        for run in range(r_off[row], r_off[row + 1]):
            for block in range(r_start[run], r_start[run] + r_len[run]):
                leading = leading and seen[block]
                found += leading
                seen[block] = True
        blocks[row] = found
