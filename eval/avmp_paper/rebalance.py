"""Rebalancing: the pool whose allocation failed takes capacity from the other one.

The prototype tests neither its thresholds nor its interval on this path, the only one it ever takes. What its paper
says about them can be asked for (`obeys_*`); such an attempt is then withheld, not rejected.
"""

import numpy as np

from hbmgym.eval.avmp_paper.page_table import PageTable, resize
from hbmgym.memory_backend.jit import kernel, subkernel

REBALANCER = np.dtype(
    [
        ("enabled", "i8"),
        ("batch", "i8"),  # units of the pool that gives
        ("low", "f8"),  # free fractions
        ("high", "f8"),
        ("interval", "i8"),  # operations
        ("obeys_low", "i8"),
        ("obeys_high", "i8"),
        ("obeys_interval", "i8"),
        ("operations", "i8"),  # successful allocations, frees and rebalances so far
        ("latest", "i8"),  # operations after the latest rebalance
        ("accepted", "i8"),
        ("rejected", "i8"),  # a page in use lay too high, or the pool is smaller than the batch
        ("withheld", "i8"),
        ("to_kv", "i8"),  # of the accepted ones
        ("bytes_migrated", "i8"),
        ("bytes_wasted", "i8"),  # taken from the donor, too few for another page of the recipient
    ],
    align=True,
)


@kernel
def rebalance(state: np.record, recipient: PageTable, donor: PageTable) -> bool:
    """Shrink the donor by one batch and let the recipient grow by as many whole units as those bytes hold.

    The batch counts the donor's units. A batch smaller than one unit of the recipient gives it nothing, and is
    accepted all the same.
    """
    if not _may(state, recipient, donor):
        state.withheld += 1
        return False
    donor_bytes = state.batch * donor.head.page_bytes
    gained = donor_bytes // recipient.head.page_bytes
    before = donor.head.total
    if not resize(donor, before - state.batch):
        state.rejected += 1
        return False
    if not resize(recipient, recipient.head.total + gained):
        resize(donor, before)
        state.rejected += 1
        return False
    state.accepted += 1
    state.operations += 1
    state.latest = state.operations
    state.bytes_migrated += donor_bytes
    state.bytes_wasted += donor_bytes - gained * recipient.head.page_bytes
    return True


@subkernel
def _may(state: np.record, recipient: PageTable, donor: PageTable) -> bool:
    if state.obeys_low and recipient.head.free >= state.low * recipient.head.total:
        return False
    if state.obeys_high and donor.head.free <= state.high * donor.head.total:
        return False
    early = state.accepted > 0 and state.operations - state.latest < state.interval
    return not (state.obeys_interval and early)
