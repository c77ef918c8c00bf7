"""The seam between a serving engine and whoever divides its memory: Telemetry in, Decision out.

A controller sees what a real engine could export at that moment, never the trace.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hbmgym.controllers.telemetry import TELEMETRY as TELEMETRY
from hbmgym.memory_backend.split import Layout

# As HiMA's, both pools together: what a byte is worth, in prefill seconds per second and byte; by how much that falls
# per byte that moves; seconds of work that a request in the queue waits for. Copied into the kernel as they are.
PRICES = np.dtype([("shadow_price", "f8"), ("curvature", "f8"), ("deferral_weight", "f8")])


@dataclass(frozen=True)
class Setup:
    """What a controller may know before traffic starts; never the trace."""

    layout: Layout
    """Budget, chunk and block sizes, and the splits that can be realised."""
    kv_token_bytes: int
    """KV bytes of one token, all attention layers."""
    slots_per_request: int
    window_s: float
    """Simulated seconds between two decisions."""
    kv_share_bounds: tuple[float, float]
    """Shares outside are clipped."""
    chunk_move_s: float
    """Modelled seconds to move one chunk."""
    tpot_slo_s: float


@dataclass(frozen=True)
class Decision:
    """None keeps what was last asked for."""

    kv_share: float | None = None
    prices: np.record | None = None


class Controller(Protocol):
    """Chooses the split once per window."""

    name: str
    fixed_share: float | None
    """The share it starts at and never changes, or None when it may move. The harness starts the episode there and,
    unless shortages move the split, rejects at arrival what does not fit."""

    def reset(self, setup: Setup) -> None:
        """Forget the past; called before every episode."""
        ...

    def act(self, telemetry: np.record) -> Decision:
        """`telemetry` is one TELEMETRY record, valid until the next call."""
        ...


HOLD = Decision()
