"""How many requests run at once at a split, and what bounds them.

SGLang takes the least of what was asked for, what the KV pool holds and what the states allow, and says so in its log
only (issues 33004 and 38846). No engine minds time per token: beyond its SLO more requests run, and all are late.
"""

from dataclasses import dataclass

import numpy as np

from hbmgym.envs.serving.cost_model import iteration_s
from hbmgym.memory_backend.split import Layout

MOST = 4096
"""SGLang's own bound on running requests."""


@dataclass(frozen=True)
class Caps:
    """Requests that each bound lets run at once."""

    slots: int
    pages: int
    """For requests of the mean context, none of which is shared."""
    time_per_token: int
    """As many decode together within the TPOT SLO; at most MOST."""
    max_running_requests: int | None = None
    """What the engine is told; None: nothing."""

    @property
    def admitted(self) -> int:
        """What the engine lets run at once."""
        return min(self._bounds.values())

    @property
    def binding(self) -> str:
        """The field that says so."""
        return min(self._bounds, key=self._bounds.__getitem__)

    @property
    def holds(self) -> int:
        """How many of these decode within the TPOT SLO."""
        return min(self.admitted, self.time_per_token)

    @property
    def _bounds(self) -> dict[str, int]:
        bounds = {name: getattr(self, name) for name in ("slots", "pages", "max_running_requests")}
        return {name: value for name, value in bounds.items() if value is not None}


@dataclass(frozen=True)
class Demand:
    """What one request takes."""

    slots: int
    context_tokens: float
    """Prompt and output, mean over requests."""


def caps_at(
    layout: Layout, slots: int, page_tokens: int, demand: Demand, decoding: int, told: int | None = None
) -> Caps:
    """At the split with `slots` slots; `decoding`: what `most_decoding` says."""
    pages = int(layout.pages(slots) * page_tokens / demand.context_tokens)
    return Caps(slots // demand.slots, pages, decoding, told)


def most_decoding(cost: np.record, context_tokens: float, tpot_slo_s: float) -> int:
    """The most requests of so many tokens that decode together within the SLO; 0 if not even one does."""
    low, high = 0, MOST
    while low < high:
        middle = (low + high + 1) // 2
        if iteration_s(cost, middle, middle * context_tokens, 0, 0.0) <= tpot_slo_s:
            low = middle
        else:
            high = middle - 1
    return low


def slots_for(requests: int, slots_per_request: int) -> int:
    """States that let so many requests run at once in SGLang: one more than they hold, as a chunk's end takes a slot
    before it gives one back (issue 37066)."""
    return requests * slots_per_request + 1
