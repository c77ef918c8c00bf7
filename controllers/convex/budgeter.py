"""The Budgeter's convex program, solved exactly for concave utilities in straight pieces.

    maximise  sum_i U_i(m_i) - sum_i (c / 2) |m_i - now_i|   subject to  sum_i m_i = B,  lo_i <= m_i <= hi_i

Without the cost c of a moved byte this is water-filling: every pool has its bytes whose worth exceeds the level, the
dual of the budget. The cost only bends the utilities at `now_i`, by c / 2 up before and down after: they stay concave
and in pieces. A byte then moves if it is worth more than c more where it goes: the dead zone, which is also the payback
rule of HiMA's public forks, (R_dst - R_src) * horizon > cost.
"""

import math

from hbmgym.memory_backend.jit import kernel, subkernel


@kernel
def charge_moves(cost, now, starts, widths, slopes):
    """Bend utilities at `now` (pools,) by the cost of a moved byte. Pool i has pieces of widths[i, j] bytes and slopes
    slopes[i, j] from starts[i] on; `now` lies between two of them or outside."""
    for i in range(len(starts)):
        end = starts[i]
        for j in range(widths.shape[1]):
            end += widths[i, j]
            # The middle, so that rounding at the joints cannot matter.
            slopes[i, j] += 0.5 * cost if end - 0.5 * widths[i, j] < now[i] else -0.5 * cost


@subkernel
def _wanted(pool, level, ties, starts, widths, slopes):
    """Bytes of a pool whose worth exceeds the level, with `ties` also what equals it."""
    size = starts[pool]
    for j in range(widths.shape[1]):
        if slopes[pool, j] > level or (ties and slopes[pool, j] == level):
            size += widths[pool, j]
    return size


@kernel
def fill(budget, starts, widths, slopes, sizes):
    """Water-filling: write the bytes of every pool, float64 (pools,), and return the level.

    `starts` float64 (pools,): least bytes; `widths`, `slopes` float64 (pools, pieces): bytes and worth per byte of the
    pieces above, slopes not increasing along a pool. NaN when the least bytes exceed the budget; 0 when all pieces fit,
    and sizes are then the largest; the greatest slope when none fits. Few slopes occur, so the level is found by going
    down through them, exactly; smooth utilities would take bisection.
    """
    least, most = 0.0, 0.0
    for i in range(len(starts)):
        least += starts[i]
        most += _wanted(i, -math.inf, False, starts, widths, slopes)
    if least > budget * (1.0 + 1e-12):  # more than by rounding
        return math.nan
    level = _next_slope(math.inf, widths, slopes)
    while level > -math.inf and _total(level, starts, widths, slopes) < min(budget, most):
        level = _next_slope(level, widths, slopes)
    left = budget
    for i in range(len(starts)):
        sizes[i] = _wanted(i, level, False, starts, widths, slopes)
        left -= sizes[i]
    for i in range(len(starts)):  # what the level just pays for shares what is left
        more = min(_wanted(i, level, True, starts, widths, slopes) - sizes[i], max(left, 0.0))
        sizes[i] += more
        left -= more
    return level if most > budget and abs(level) < math.inf else 0.0


@subkernel
def _total(level, starts, widths, slopes):
    total = 0.0
    for i in range(len(starts)):
        total += _wanted(i, level, True, starts, widths, slopes)
    return total


@subkernel
def _next_slope(level, widths, slopes):
    """The greatest slope below `level`."""
    below = -math.inf
    for i in range(len(widths)):
        for j in range(widths.shape[1]):
            if widths[i, j] > 0.0 and slopes[i, j] < level:
                below = max(below, slopes[i, j])
    return below
