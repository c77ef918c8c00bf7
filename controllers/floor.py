"""The least kv_share that an engine can do with: a floor under what every controller asks for.

A request that fits the machine but not the present split waits until the split changes (Telemetry's `aside`). An engine
with a fixed split turns it away; one whose split moves can serve it, so whoever moves the split has to. And under a
split that is too small for what already runs, a request could neither grow nor finish.
"""

import math
import struct
from typing import Any

import numpy as np

from hbmgym.controllers.base import TELEMETRY, Controller, Decision, Setup
from hbmgym.memory_backend.jit import kernel, subkernel
from hbmgym.memory_backend.split import Layout

# Reading a field by its name costs Python eight times as much.
_read = struct.Struct("d").unpack_from
_KV_NEEDED, _REQUESTED = (TELEMETRY.fields[name][1] for name in ("kv_needed", "kv_share_requested"))  # type: ignore[index]

_FLOOR = np.dtype(
    (
        np.record,
        [
            ("wanted", "f8"),  # the share that was asked for last
            ("raised", "i8"),  # 1: more than that was asked for
            ("most", "f8"),  # the largest share that may be asked for
            ("most_pages", "i8"),  # of the largest split
            ("share_per_page", "f8"),
            ("slack", "f8"),  # beside some pages a split has less room left: a slot and two ends of chunks
            ("chunks", "i8"),
            ("chunk_bytes", "i8"),
            ("page_bytes", "i8"),
            ("slot_bytes", "i8"),
            ("min_slots", "i8"),
        ],
    )
)


@subkernel
def _share_that_holds(floor, pages):
    if not pages > 0.0:  # NaN as well
        return 0.0
    if pages >= floor.most_pages:
        return floor.most
    beside = floor.chunks - -(-math.ceil(pages) * floor.page_bytes // floor.chunk_bytes)
    slots = max(beside * floor.chunk_bytes // floor.slot_bytes, floor.min_slots)
    return min((floor.chunks - -(-slots * floor.slot_bytes // floor.chunk_bytes)) / floor.chunks, floor.most)


@subkernel
def raise_share(values, asked, pages, requested):
    """The share to ask for, or nan for none, where a controller asks for `asked` (nan: for none), `pages` are needed
    and `requested` was asked for last; `values` are those of a ShareFloor."""
    floor = values.view(_FLOOR)[0]
    if asked == asked:
        floor.wanted = asked
    if not pages * floor.share_per_page + floor.slack < floor.wanted:  # which is so most of the time
        least = _share_that_holds(floor, pages)
        if least > floor.wanted:
            floor.raised = 1
            return math.nan if least == requested else least
    if floor.raised != 0:
        floor.raised = 0
        return floor.wanted
    return asked


@kernel
def _raise_share(values, asked, pages, requested):
    return raise_share(values, asked, pages, requested)


class ShareFloor:
    """Raises shares to where the KV pool holds `kv_needed` pages, and takes that back later; `reset` first."""

    def __init__(self) -> None:
        self.values = np.zeros(len(_FLOOR.names or ()), np.int64)
        """What `raise_share` takes."""

    def reset(self, layout: Layout, bounds: tuple[float, float], share: float) -> None:
        """Start at the requested `share`; `bounds` are the shares that may be asked for."""
        floor = self.values.view(_FLOOR)[0]
        floor.wanted, floor.raised, floor.most = share, 0, bounds[1]
        floor.most_pages = layout.pages(layout.min_slots)
        floor.share_per_page = layout.page_bytes / layout.budget_bytes
        floor.slack = (layout.slot_bytes + 2 * layout.chunk_bytes) / layout.budget_bytes
        for name in ("chunks", "chunk_bytes", "page_bytes", "slot_bytes", "min_slots"):
            floor[name] = getattr(layout, name)

    def raised(self, asked: float | None, telemetry: np.record) -> float | None:
        """The share to ask for where a controller asks for `asked`; None keeps what was last asked for."""
        (pages,), (requested,) = _read(telemetry, _KV_NEEDED), _read(telemetry, _REQUESTED)
        share = _raise_share(self.values, math.nan if asked is None else float(asked), pages, requested)
        return share if share == share else None


class Floored:
    """A controller over a ShareFloor. Whatever else it has, parameters or what it learned, can be read as before."""

    fixed_share: float | None = None

    def __init__(self, controller: Controller) -> None:
        self.controller = controller
        self.name = controller.name
        self._floor = ShareFloor()

    def reset(self, setup: Setup) -> None:
        self._setup, self._started = setup, False
        self.controller.reset(setup)

    def act(self, telemetry: np.record) -> Decision:
        if not self._started:
            # Setup does not tell the split at start.
            setup, start = self._setup, float(telemetry["kv_share_requested"])
            self._floor.reset(setup.layout, setup.kv_share_bounds, start)
            self._started = True
        decision = self.controller.act(telemetry)
        share = self._floor.raised(decision.kv_share, telemetry)
        return decision if share == decision.kv_share else Decision(share, decision.prices)

    def __getattr__(self, name: str) -> Any:
        if name == "controller":  # not there yet, as while a copy is made
            raise AttributeError(name)
        return getattr(self.controller, name)


def floored(controller: Controller) -> Controller:
    """The controller over a ShareFloor; itself if it has one already, or keeps one split for ever."""
    if isinstance(controller, Floored) or controller.fixed_share is not None:
        return controller
    return Floored(controller)
