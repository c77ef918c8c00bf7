"""What bytes are worth to a pool: a concave curve of seconds saved per second over the bytes it has.

The curve is known at a few points: the steps of Telemetry's gains and costs around the present size. `concave_slopes`
takes the least concave curve above them, which Talus (Beckmann and Sanchez, HPCA 2015) proves can be had by mixing two
sizes. To the worth of what is cached comes that of admitting at once, by Erlang's loss formula.
"""

import numpy as np

from hbmgym.controllers.telemetry import MARGINAL_STEPS
from hbmgym.memory_backend.jit import kernel, subkernel

OFFSETS = np.array([*(-step for step in reversed(MARGINAL_STEPS)), 0.0, *MARGINAL_STEPS])
"""Points of a curve, as parts of the budget from the pool's present size; ascending."""
POINTS = len(OFFSETS)
CELLS = 100


@kernel
def concave_slopes(points, values, slopes):
    """Write the slopes of the concave majorant of values[i] at points[i] (ascending), one per interval."""
    count = len(points) - 1
    begin = 0
    while begin < count:
        steepest, end = begin + 1, begin + 1
        best = (values[end] - values[begin]) / (points[end] - points[begin])
        for i in range(begin + 2, count + 1):
            slope = (values[i] - values[begin]) / (points[i] - points[begin])
            if slope >= best:
                best, steepest = slope, i
        for i in range(begin, steepest):
            slopes[i] = best
        begin = steepest


@kernel
def erlang_b(load, servers, blocked, more):
    """The part of arrivals that find all of `more` servers taken, when `blocked` of them do with `servers`, at most as
    many: B_k = a B_{k-1} / (k + a B_{k-1}), B_0 = 1, for an offered load of a."""
    for k in range(servers + 1, more + 1):
        blocked = load * blocked / (k + load * blocked)
    return blocked


@subkernel
def remember(cells, share, record, gains, costs, weight):
    """Let the worth of bytes around `share` of the budget move by `weight` towards what a Telemetry record says, in
    which the pool's gains and costs begin at `gains` and `costs`.

    `cells` has shape (CELLS,): seconds saved per second and budget, where a pool has the share in the middle of a cell.
    A pool that has moved still knows what it saw where it was.
    """
    for cell in range(CELLS):
        offset = (cell + 0.5) / CELLS - share
        side = gains if offset >= 0.0 else costs
        inner, worth_inside = 0.0, 0.0
        for step in range(len(MARGINAL_STEPS)):
            outer, worth = MARGINAL_STEPS[step], record[side + step]
            if inner <= abs(offset) < outer:
                cells[cell] += weight * ((worth - worth_inside) / (outer - inner) - cells[cell])
            inner, worth_inside = outer, worth


@subkernel
def recall(cells, share, values):
    """Write what the pool would save per second at the points around `share`, (POINTS,), less what it saves there."""
    middle = POINTS // 2
    values[middle] = 0.0
    for side in (-1, 1):
        for step in range(1, middle + 1):
            inner, outer = middle + side * (step - 1), middle + side * step
            values[outer] = values[inner] + _integral(cells, share + OFFSETS[inner], share + OFFSETS[outer])


@subkernel
def _integral(cells, begin, end):
    if end < begin:
        return -_integral_up(cells, end, begin)
    return _integral_up(cells, begin, end)


@subkernel
def _integral_up(cells, begin, end):
    begin, end = min(max(begin, 0.0), 1.0), min(max(end, 0.0), 1.0)
    total = 0.0
    for cell in range(int(begin * CELLS), min(int(end * CELLS) + 1, CELLS)):
        total += cells[cell] * max(min(end, (cell + 1) / CELLS) - max(begin, cell / CELLS), 0.0)
    return total
