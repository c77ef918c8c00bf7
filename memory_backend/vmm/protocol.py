"""The seam between the op log and memory: what every driver does, and the two ways it says no."""

from types import TracebackType
from typing import Any, Protocol, Self

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
        MOVEs succeed or fail together; entries behind a CHECK that fails may have been executed.
        """

    def end_batch(self, stream: int | None = None) -> None:
        """Work launched so far on `stream` may name any block; later entries that change or unmap bytes wait for it.

        `stream` is a CUDA stream's handle, None the default stream; the other drivers have nothing to wait for.
        """

    def base(self, pool: int) -> int:
        """Address of position 0 of `pool`, the same from the constructor to `close`; VmmError without bytes."""

    def view(self, pool: int, start: int, length: int) -> Any:
        """Bytes [start, start + length) of `pool`: uint8, exports DLPack; reads what lies there when it is read.

        Valid until a chunk under it moves or the driver closes. Raises VmmError for bytes that are not mapped and
        for a driver without bytes.
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
