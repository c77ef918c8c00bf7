"""Which static split is the best one: the cheapest of those that serve what the machine can hold.

A split that turns long prompts away at once is spared what they would make others wait, and could win by refusing.
"""

import numpy as np

UNSERVED = 0.01
"""Part of a class's tokens that a split may leave unserved beyond the split that leaves least. Whatever no split can
serve, too large for the machine or too much of it, is held against none."""
WORST_CLASS = "worst_class_unserved"
JUDGED = ("cost", WORST_CLASS)
"""What of a cell decides which split is the best one."""


def serves(unserved: np.ndarray) -> np.ndarray:
    """bool (splits,): which of the splits serve what the machine can hold; `unserved`, shape (splits,), is the part of
    the tokens that each leaves unserved, in the class where that is most (`worst_class_unserved` of its cells, mean
    over episodes)."""
    return np.asarray(unserved <= np.min(unserved) + UNSERVED)


def best_static(costs: np.ndarray, unserved: np.ndarray) -> int:
    """Place of the cheapest of the splits that serve what the machine can hold; both of shape (splits,)."""
    return int(np.where(serves(unserved), costs, np.inf).argmin())


def best_on_others(costs: np.ndarray, unserved: np.ndarray) -> list[int]:
    """For every episode the place of the split that is best on all others, of equal ones the nearest to the middle of
    the splits; both of shape (splits, episodes >= 2), the splits ascending."""
    from_middle = np.argsort(np.abs(np.arange(len(costs)) - (len(costs) - 1) / 2), kind="stable")
    found = []
    for others in ~np.eye(costs.shape[1], dtype=bool):
        # Means of equal costs differ in their last digits.
        means = (np.round(values[from_middle][:, others].mean(axis=1), 9) for values in (costs, unserved))
        found.append(int(from_middle[best_static(*means)]))
    return found


def best_costs(costs: np.ndarray, unserved: np.ndarray) -> np.ndarray:
    """float64 (episodes,): what each episode's own best split costs, of those that serve what the machine can hold over
    all episodes of a workload; both of shape (splits, episodes)."""
    return np.asarray(costs[serves(unserved.mean(axis=1))].min(axis=0))
