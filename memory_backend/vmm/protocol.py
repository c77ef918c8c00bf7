"""The seam between the op log and memory: what every driver does, and the two ways it says no."""

from types import TracebackType
from typing import Protocol, Self

import numpy as np


class VmmError(RuntimeError):
    """Memory is not as the op log says, or an operation would make it so; one line says where."""


class VmmRefused(VmmError):
    """This driver cannot serve this layout on this computer; the message names the limit."""


class Vmm(Protocol):
    """Executes op logs on the chunks of one budget; after `execute` or its roll-back, memory is as the log says."""

    name: str
    """`accounting`, `host`, ..."""
    why: str
    """One line: which driver this is and why it was chosen."""
    stamps_checked: int
    """CHECK entries that read back."""
    chunks_moved: int
    measured_move_s: float
    """Wall time spent in moves; for summaries only, never an input of the simulation."""

    def execute(self, ops: np.ndarray) -> None:
        """Execute `ops` (dtype `oplog.OP`, shape [n]) in order.

        Raises VmmError at the first entry that fails. Entries before it have been executed, except that consecutive
        MOVEs succeed or fail together.
        """

    def chunk_at(self, pool: int) -> np.ndarray:
        """Physical chunk at each position of `pool`: int64[chunks of the pool]."""

    def check(self) -> None:
        """Raise VmmError unless every chunk is owned exactly once and every pool is contiguous from position 0."""

    def close(self) -> None:
        """Give everything back; a second call does nothing, every other method refuses from now on."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
