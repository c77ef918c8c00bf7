"""One episode with bytes really moved, beside the same episode on accounting: metrics equal, every stamp read back."""

from dataclasses import dataclass

import numpy as np

from hbmgym.controllers.base import HOLD, Controller, Decision, Setup
from hbmgym.envs.serving.config import GIB, ServingConfig
from hbmgym.envs.serving.core import Core
from hbmgym.envs.traces.episode import Episode
from hbmgym.eval.rollout import Rollout, run_episode

EXCERPT_S = 400.0
MIN_MOVED_CHUNKS = 100
"""With fewer, real remapping has hardly been tried."""


@dataclass(frozen=True)
class Replay:
    """What the episode with real remapping showed; `refused` says why there was none."""

    backend: str
    refused: str | None = None
    budget_bytes: int = 0
    chunks_moved: int = 0
    stamps_checked: int = 0
    metrics_equal: bool = False
    measured_move_us: float = 0.0
    """Microseconds per chunk."""
    driven_by: str = ""

    @property
    def lines(self) -> list[str]:
        """What people read of it."""
        if self.refused is not None:
            return [f"real remapping: not shown, {self.backend} memory was refused: {self.refused}"]
        return [
            f"real remapping on {self.backend} memory, {self.budget_bytes / GIB:.2f} GiB, driven by {self.driven_by}: "
            f"{self.chunks_moved} chunks moved ({self.measured_move_us:.1f} us each), "
            f"{self.stamps_checked} stamps read back and right, metrics "
            + ("equal to the accounting episode" if self.metrics_equal else "DIFFER FROM THE ACCOUNTING EPISODE")
        ]

    @property
    def good(self) -> bool:
        """All that can be shown here was shown."""
        return self.refused is not None or (self.metrics_equal and self.chunks_moved >= MIN_MOVED_CHUNKS)


def excerpt(episode: Episode, length_s: float = EXCERPT_S) -> Episode:
    """The first `length_s` seconds, a quarter of them warm-up; with real states copied, a whole one is slow."""
    return episode.until(length_s, length_s / 4)


def replay(controller: Controller, config: ServingConfig, episode: Episode, backend: str) -> Replay:
    """Run `episode` on `backend` with every check, and on accounting; once more with a swing if hardly a chunk moved.

    Raises VmmRefused when `backend` cannot be had here, VmmError when memory is not as the log says.
    """
    found = _replay(controller, config, episode, backend)
    if found.chunks_moved < MIN_MOVED_CHUNKS:
        found = _replay(Restless(controller), config, episode, backend)
    return found


class Restless:
    """A controller and a slow swing around it, so that chunks move even where the controller sees no reason to."""

    def __init__(self, controller: Controller, swing: float = 0.1, every: int = 12) -> None:
        self.name = f"{controller.name} and a swing of {swing:g}"
        self.fixed_share: float | None = None
        self._controller, self._swing, self._every = controller, swing, every

    def reset(self, setup: Setup) -> None:
        """As the controller does."""
        self._controller.reset(setup)
        self._windows = 0
        self._share: float | None = None

    def act(self, telemetry: np.record) -> Decision:
        """The controller's share, alternately raised and lowered."""
        decision = self._controller.act(telemetry)
        self._share = decision.kv_share if decision.kv_share is not None else self._share
        self._windows += 1
        if self._windows % self._every:
            return HOLD
        center = self._share if self._share is not None else float(telemetry.kv_share_requested)
        sign = 1.0 if self._windows // self._every % 2 else -1.0
        return Decision(center + sign * self._swing)


def _replay(controller: Controller, config: ServingConfig, episode: Episode, backend: str) -> Replay:
    plain = _run(controller, Core(config), episode)
    real = _run(controller, Core(config, backend=backend, check=True), episode)
    return Replay(
        backend=real.timing["backend"],
        budget_bytes=real.cell["budget_bytes"],
        chunks_moved=real.timing["chunks_moved"],
        stamps_checked=real.timing["stamps_checked"],
        metrics_equal=plain.cell == real.cell and plain.history == real.history,
        measured_move_us=1e6 * real.timing["move_s"] / max(real.timing["chunks_moved"], 1),
        driven_by=controller.name,
    )


def _run(controller: Controller, core: Core, episode: Episode) -> Rollout:
    try:
        return run_episode(controller, core, episode)
    finally:
        core.close()
