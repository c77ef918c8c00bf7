"""How much is measured: of memory, of repetitions, of simulated time."""

from dataclasses import dataclass

from hbmgym.envs.serving.config import GIB
from hbmgym.eval.replay import EXCERPT_S
from hbmgym.memory_backend.split import CHUNK_BYTES

RUNS = (1, 16, 128)
"""Chunks of one run, as the figures of a migration are given."""
LEAST_GIB = 1.0
"""Two runs of 128 chunks side by side, and as much again for what is mapped between them."""

Facts = dict[str, object]
"""What one part found, ready for JSON."""


@dataclass(frozen=True)
class Plan:
    """Sizes of one check. `gib`: memory that it may take at a time."""

    gib: float
    quick: bool = False

    def __post_init__(self) -> None:
        if not LEAST_GIB <= self.gib < float("inf"):
            raise ValueError(f"--gib is {self.gib:g}, expected a number >= {LEAST_GIB:g}")

    @property
    def chunks(self) -> int:
        """Chunks that are created, mapped and given back one by one."""
        return 32 if self.quick else min(512, int(self.gib * GIB) // CHUNK_BYTES)

    @property
    def repeats(self) -> int:
        """Times that anything larger is measured."""
        return 3 if self.quick else 20

    @property
    def excerpt_s(self) -> float:
        """Simulated seconds of the replayed episode."""
        return EXCERPT_S / 8 if self.quick else EXCERPT_S
