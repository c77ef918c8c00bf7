"""Where to put a few checkpoints along a prefix, given how deep later requests are likely to share it.

Exact, in O(positions x checkpoints). Source: Sparse Prefix Caching (arXiv 2605.05219): a request that shares d
positions resumes from the deepest checkpoint at or before d and recomputes the rest, so that checkpoints c1 < c2 < ...
save the sum of c_k times the weight of the depths from c_k to before c_k+1.
"""

from typing import NamedTuple

import numpy as np

from hbmgym.memory_backend.jit import kernel, subkernel


class Placement(NamedTuple):
    """The arrays that `place_checkpoints` works on, for at most n positions and k checkpoints."""

    before: np.ndarray
    """int64, shape (n + 2,): in, weight of each depth (place 0 unused); out, weight of all depths before it."""
    allowed: np.ndarray
    """int64, shape (n + 2,): 1 where a checkpoint may be."""
    saved: np.ndarray
    """int64, shape (k + 1, n + 2): most that checkpoints from this position on can save, the first of them here."""
    after: np.ndarray
    """int32, shape (k + 1, n + 2): position of the checkpoint that follows then, the end if none does."""
    lines: np.ndarray
    """int32, shape (n + 2,): positions whose lines are the upper envelope."""
    chosen: np.ndarray
    """int32, shape (k,): the checkpoints, shallowest first."""


def make_placement(positions: int, checkpoints: int) -> Placement:
    """Arrays for so many."""
    places = positions + 2
    return Placement(
        np.zeros(places, np.int64),
        np.zeros(places, np.int64),
        np.zeros((checkpoints + 1, places), np.int64),
        np.zeros((checkpoints + 1, places), np.int32),
        np.zeros(places, np.int32),
        np.zeros(checkpoints, np.int32),
    )


@kernel
def place_checkpoints(placement, positions):
    """Choose the allowed positions that save most, no more than there is room for in `chosen`; returns how many.

    One that saves nothing is not chosen. Of equals, fewer, then shallower ones.
    """
    _sum_weights(placement, positions)
    most = len(placement.chosen)
    best, first, rounds = np.int64(0), np.int64(0), 0
    for k in range(1, most + 1):
        _add_checkpoint(placement, positions, k)
        for c in range(positions, 0, -1):
            if placement.allowed[c] != 0 and placement.saved[k, c] >= best + (0 if k == rounds else 1):
                best, first, rounds = placement.saved[k, c], np.int64(c), k
    for k in range(rounds):
        placement.chosen[k] = first
        first = np.int64(placement.after[rounds - k, first])
    return rounds


@subkernel
def _sum_weights(placement, positions):
    total = np.int64(0)
    for depth in range(1, positions + 2):
        weight = placement.before[depth] if depth <= positions else 0
        placement.before[depth] = total
        total += weight


@subkernel
def _add_checkpoint(placement, positions, k):
    """Fill `saved[k]` from `saved[k - 1]`: of k checkpoints from a position on, the first is there.

    What the rest saves is the best of the lines before[next] x position + saved[k - 1, next]. Positions are tried
    downwards: slopes fall with every line that joins, and so does the place at which they are asked.
    """
    end = positions + 1
    placement.lines[0] = end
    first, count = 0, 1
    for c in range(positions, 0, -1):
        if placement.allowed[c] == 0:
            continue
        while count - first > 1 and _line(placement, k, end, placement.lines[first + 1], c) > _line(
            placement, k, end, placement.lines[first], c
        ):
            first += 1
        after = np.int64(placement.lines[first])
        placement.saved[k, c] = _line(placement, k, end, after, c) - placement.before[c] * c
        placement.after[k, c] = after
        if k == 1:
            continue
        while count - first > 1 and _is_hidden(placement, k, end, count - 1, c):
            count -= 1
        placement.lines[count] = c
        count += 1


@subkernel
def _intercept(placement, k, end, place):
    return np.int64(0) if place == end else placement.saved[k - 1, place]


@subkernel
def _line(placement, k, end, place, at):
    return placement.before[place] * at + _intercept(placement, k, end, place)


@subkernel
def _is_hidden(placement, k, end, last, flat):
    """Is the `last` line nowhere above both the one before it and the new one, which is flatter?"""
    steep, middle = placement.lines[last - 1], placement.lines[last]
    rise = _intercept(placement, k, end, middle) - _intercept(placement, k, end, steep)
    rise_of_flat = _intercept(placement, k, end, flat) - _intercept(placement, k, end, steep)
    fall = placement.before[steep] - placement.before[middle]
    fall_of_flat = placement.before[steep] - placement.before[flat]
    return rise * fall_of_flat <= rise_of_flat * fall
