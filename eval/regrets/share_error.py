"""The share error: how far a controller's split is from the nearest that would have done as well.

An episode is cut into segments of SEGMENT_S. J_w(r) is the mean cost of the measured requests that arrive in segment w
under the static split r, for every r of a grid of realisable splits. The share error of a segment is the distance of
the controller's mean effective kv_share in it to the nearest member of {r : J_w(r) <= (1 + EPSILON) min J_w}. All
between two members that are neighbours on the grid is a member as well, and where no split matters the error is 0. As
costs are only compared within a segment, their sums serve as well as their means. The mean over segments weighs each by
its requests.

The statics know nothing of carried-over state: each meets a segment with the cache that it has always held, while who
has moved there must fill it first. A split that is far from this set may hence be the right one for now, and following
the set from segment to segment may cost more than it saves. And with few requests in a segment J_w is noisy and the set
small by chance: their number is told with every error, and the error of the best static beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hbmgym.eval.rollout import Rollout

SEGMENT_S = 60.0
"""Twelve decisions, and a fifth of a usual phase (240 to 360 s), so that few segments lie on both sides of a shift;
shorter ones would have fewer requests, which in most cases are few already."""
EPSILON = 0.01
GRID_STEP = 0.05


@dataclass(frozen=True)
class ShareError:
    """Means over the segments of episodes, weighted by their requests."""

    error: float
    """Distance to the splits that cost at most EPSILON more than the best one."""
    mae: float
    """Distance to the very best one, of equally good ones the nearest to that of the segment before."""
    requests: float
    """Mean over the segments in which any arrive."""


def share_error(grid: Sequence[float], statics: Sequence[Sequence[Rollout]], rollouts: Sequence[Rollout]) -> ShareError:
    """Of one controller's episodes. `statics`: those of every share of the ascending `grid`, by episode."""
    errors, distances, arrivals = [], [], []
    for place, rollout in enumerate(rollouts):
        segments = [own[place].segments for own in statics]
        costs = np.array([own["cost"] for own in segments])
        shares = mean_shares(rollout.history, segments[0]["begin_s"], segments[0]["end_s"])
        errors.append(distance_to(shares, np.asarray(grid), nearly_best(costs)))
        distances.append(np.abs(shares - np.asarray(grid)[nearest_best(grid, costs)]))
        arrivals.append(segments[0]["arrivals"])
    weights = np.concatenate(arrivals)
    error, mae = (float(np.average(np.concatenate(values), weights=weights)) for values in (errors, distances))
    return ShareError(error, mae, float(weights[weights > 0].mean()))


def mean_shares(history: dict[str, list[float]], begin_s: Sequence[float], end_s: Sequence[float]) -> np.ndarray:
    """float64 (segments,): mean effective kv_share over time. A window has the share of its end, as moving takes less
    than a second; after the last window it stays what it was."""
    times_s = np.array([0.0, *history["time_s"], np.inf])
    shares = np.array(history["kv_share_effective"])
    held = np.clip(times_s, np.reshape(begin_s, (-1, 1)), np.reshape(end_s, (-1, 1)))
    return np.diff(held) @ np.append(shares, shares[-1]) / np.subtract(end_s, begin_s)


def nearly_best(costs: np.ndarray) -> np.ndarray:
    """bool, shaped as `costs` (shares, segments): who costs at most EPSILON more than the best share of a segment."""
    return costs <= (1.0 + EPSILON) * costs.min(axis=0)


def distance_to(shares: np.ndarray, grid: np.ndarray, members: np.ndarray) -> np.ndarray:
    """float64 (segments,): distance of each segment's share to its `members` (shares, segments) of the grid; 0 between
    two neighbours that are both members."""
    apart = np.abs(shares - grid[:, None])
    nearest = np.where(members, apart, np.inf).min(axis=0)
    between = (grid[:-1, None] <= shares) & (shares <= grid[1:, None])
    return np.where((members[:-1] & members[1:] & between).any(axis=0), 0.0, nearest)


def nearest_best(grid: Sequence[float], costs: np.ndarray) -> list[int]:
    """Place of the least cost of each segment, of equal ones the nearest to the place before; the first one has the
    best of the whole episode before it."""
    shares = np.asarray(grid)
    place = int(costs.sum(axis=1).argmin())
    places = []
    for own in costs.T:
        ties = np.flatnonzero(own == own.min())
        place = int(ties[np.abs(shares[ties] - shares[place]).argmin()])
        places.append(place)
    return places
