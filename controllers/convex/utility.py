"""What bytes are worth to a pool: a concave curve of seconds saved per second over the bytes it has.

The curve is known at a few points: the steps of Telemetry's gains and costs around the present size. `concave_slopes`
takes the least concave curve above them, which Talus (Beckmann and Sanchez, HPCA 2015) proves can be had by mixing two
sizes. To the worth of what is cached comes that of admitting at once, by Erlang's loss formula.
"""

import numpy as np

from hbmgym.controllers.base import MARGINAL_STEPS
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
def erlang_b(servers, load):
    """The part of arrivals that find all of `servers` taken: B_k = a B_{k-1} / (k + a B_{k-1}), B_0 = 1, for an offered
    load of a. Between whole numbers it is interpolated, which keeps it convex."""
    if load <= 0.0:
        return 0.0
    blocked = 1.0
    whole = int(servers)
    for k in range(1, whole + 1):
        blocked = load * blocked / (k + load * blocked)
    following = load * blocked / (whole + 1 + load * blocked)
    return blocked + (servers - whole) * (following - blocked)


@subkernel
def remember(cells, share, gains, costs, weight):
    """Let the slopes around `share` of the budget move by `weight` towards those of gains and costs, (steps,) each.

    `cells` has shape (CELLS,): seconds saved per second and budget, where a pool has the share in the middle of a cell.
    A pool that has moved still knows what it saw where it was.
    """
    steps = len(gains)
    for cell in range(CELLS):
        offset = (cell + 0.5) / CELLS - share
        side = gains if offset >= 0.0 else costs
        for step in range(steps):
            if abs(offset) <= MARGINAL_STEPS[step]:
                before = MARGINAL_STEPS[step - 1] if step > 0 else 0.0
                worth = side[step] - (side[step - 1] if step > 0 else 0.0)
                cells[cell] += weight * (worth / (MARGINAL_STEPS[step] - before) - cells[cell])
                break


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
