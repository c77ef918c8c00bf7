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
from hbmgym.memory_backend.split import Layout

# Reading a field by its name costs Python eight times as much.
_read = struct.Struct("d").unpack_from
_KV_NEEDED = TELEMETRY.fields["kv_needed"][1]  # type: ignore[index]


class ShareFloor:
    """Raises shares to where the KV pool holds `kv_needed` pages, and takes that back later; `reset` first."""

    def reset(self, layout: Layout, bounds: tuple[float, float], share: float) -> None:
        """Start at the requested `share`; `bounds` are the shares that may be asked for."""
        self._layout, self._most = layout, bounds[1]
        self._wanted = share
        self._share_per_page = layout.page_bytes / layout.budget_bytes
        # A split that holds some pages has less room beside them than a slot and the ends of two chunks.
        self._slack = (layout.slot_bytes + 2 * layout.chunk_bytes) / layout.budget_bytes
        self._raised = False

    def raised(self, asked: float | None, telemetry: np.record) -> float | None:
        """The share to ask for where a controller asks for `asked`; None keeps what was last asked for."""
        if asked is not None:
            self._wanted = asked
        (pages,) = _read(telemetry, _KV_NEEDED)
        is_plenty = pages * self._share_per_page + self._slack < self._wanted  # which is so most of the time
        if not is_plenty and (least := self._share_that_holds(pages)) > self._wanted:
            self._raised = True
            return None if least == telemetry["kv_share_requested"] else least
        if self._raised:
            self._raised = False
            return self._wanted
        return asked

    def _share_that_holds(self, pages: float) -> float:
        layout = self._layout
        if not pages > 0.0:  # NaN as well
            return 0.0
        if pages >= layout.pages(layout.min_slots):
            return self._most
        return min(layout.share(max(layout.slots_beside(math.ceil(pages)), layout.min_slots)), self._most)


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
