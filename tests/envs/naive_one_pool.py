"""Once more: whether a page or a snapshot makes way where both lie in one queue, as in vLLM."""

import math
from collections.abc import Hashable
from typing import Any


def page_was_used_first(page: tuple[Any, Hashable | None], snapshot: tuple[Any, Hashable | None]) -> bool:
    """Each is a pool and the name that goes next there, None when nothing is cached; of two that were used at the same
    time the page goes."""
    times = [math.inf if name is None else _used_s(pool, name) for pool, name in (page, snapshot)]
    return times[0] <= times[1]


def _used_s(pool: Any, name: Hashable) -> float:
    """What nobody can match was never used."""
    return pool.used[name][1] if name[0] == "id" else -math.inf
