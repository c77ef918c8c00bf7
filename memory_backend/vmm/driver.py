"""What all drivers share: entries are checked before they touch memory, and the log is cut into moves and the rest."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import pairwise
from time import perf_counter
from types import TracebackType
from typing import Any, Self

import numpy as np

from hbmgym.memory_backend.oplog import CHECK, COPY, MOVE, OP_NAMES, POOL_NAMES, STAMP
from hbmgym.memory_backend.split import Layout
from hbmgym.memory_backend.vmm.ownership import Ownership, Run, make_runs
from hbmgym.memory_backend.vmm.protocol import VmmError, VmmRefused
from hbmgym.memory_backend.vmm.stamps import LEAST_BLOCK_BYTES, salts

_INTERRUPTED = "a run of moves was interrupted"


class LogDriver(ABC):
    """Executes an op log over one table of owners; a subclass says what moves and block entries do to memory."""

    name: str

    def __init__(self, layout: Layout, kv_chunks: int):
        self.why = f"{self.name}: asked for by name"
        self.stamps_checked = 0
        self.chunks_moved = 0
        self.measured_move_s = 0.0
        self._chunks = layout.chunks
        self._chunk_bytes = layout.chunk_bytes
        self._block_bytes = (layout.page_bytes, layout.slot_bytes)
        self._ownership = Ownership.initial(layout.chunks, kv_chunks)
        self._refusal = ""

    @abstractmethod
    def _move(self, runs: list[Run], after: Ownership) -> None:
        """Make legal runs that lead to `after`, all of them, or none and raise VmmError (see `_lose_track`)."""

    @abstractmethod
    def _run_blocks(self, ops: np.ndarray) -> None:
        """Execute legal entries other than MOVE; raise VmmError at a CHECK that does not read back."""

    @abstractmethod
    def _base(self, pool: int) -> int:
        """Address of position 0 of `pool`, or VmmError."""

    @abstractmethod
    def _view(self, pool: int, start: int, length: int) -> Any:
        """Mapped bytes of `pool`, or VmmError."""

    def execute(self, ops: np.ndarray) -> None:
        """Execute `ops` in order (see `Vmm.execute`)."""
        self._require_usable()
        ops = ops.view(np.ndarray)  # the fields of record arrays are slow to reach
        kinds = ops["kind"]
        _require(ops, (kinds >= 0) & (kinds < len(OP_NAMES)), lambda op: f"unknown kind {op.kind}")
        for pools in (ops["pool"], ops["target_pool"]):
            _require(ops, (pools >= 0) & (pools < len(POOL_NAMES)), lambda op: f"unknown pool in {op}")
        for part in _parts(ops):
            if part["kind"][0] == MOVE:
                self._make_moves(part)
            else:
                self._require_legal_blocks(part)
                self._run_blocks(part.view(np.recarray))

    def chunk_at(self, pool: int) -> np.ndarray:
        """Physical chunk at each position of `pool`: int64[chunks of the pool]."""
        self._require_usable()
        return self._ownership.chunk_at(pool)

    def end_batch(self, stream: int | None = None) -> None:
        """Note work that may name blocks (see `Vmm.end_batch`)."""
        self._require_usable()

    def base(self, pool: int) -> int:
        """Address of position 0 of `pool`."""
        self._require_usable()
        return self._base(pool)

    def view(self, pool: int, start: int, length: int) -> Any:
        """Bytes [start, start + length) of `pool` (see `Vmm.view`)."""
        self._require_usable()
        mapped = self._ownership.count(pool) * self._chunk_bytes
        if not 0 <= start <= start + length <= mapped:
            raise VmmError(f"bytes {start} to {start + length} of {POOL_NAMES[pool]} are not mapped: it has {mapped}")
        return self._view(pool, start, length)

    def check(self) -> None:
        """Raise VmmError unless every chunk is owned exactly once."""
        self._require_usable()
        self._ownership.check(self._chunks)

    def close(self) -> None:
        """Refuse everything from now on."""
        self._refusal = "it is closed"

    def __reduce__(self) -> Any:
        raise TypeError(f"{self.name} memory cannot be copied or sent to another process: open it there")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _require_usable(self) -> None:
        if self._refusal:
            raise VmmError(f"{self.name} memory refuses every operation: {self._refusal}")

    def _capacity(self, pool: int) -> int:
        return self._ownership.count(pool) * self._chunk_bytes // self._block_bytes[pool]

    def _make_moves(self, ops: np.ndarray) -> None:
        runs = make_runs(ops)
        after = self._ownership.after(runs)
        started = perf_counter()
        self._refusal = _INTERRUPTED
        try:
            self._move(runs, after)
        except VmmError:
            if self._refusal == _INTERRUPTED:
                self._refusal = ""
            raise
        self.measured_move_s += perf_counter() - started
        self._ownership = after
        self.chunks_moved += len(ops)
        self._refusal = ""

    def _lose_track(self, cause: str, error: str) -> VmmError:
        """What a move raises whose roll-back failed too; no chunk's contents can be trusted from now on."""
        self._refusal = f"a move failed ({cause}) and so did its roll-back ({error})"
        return VmmError(f"{self.name} memory: {self._refusal}; chunks are in an unknown state")

    def _require_legal_blocks(self, ops: np.ndarray) -> None:
        source, target, kind = ops["source"], ops["target"], ops["kind"]
        capacity = np.array([self._capacity(pool) for pool in range(len(POOL_NAMES))])[ops["pool"]]
        no_copy, no_stamp = kind != COPY, (kind != STAMP) & (kind != CHECK)
        _require(ops, (source >= 0) & (source < capacity), lambda op: f"{_block(op, op.source)} is not mapped")
        _require(
            ops, no_copy | (target >= 0) & (target < capacity), lambda op: f"{_block(op, op.target)} is not mapped"
        )
        _require(ops, no_copy | (ops["target_pool"] == ops["pool"]), lambda op: "a block stays in its pool")
        _require(ops, no_stamp | (ops["tag"] > 0), lambda op: f"{op.tag} is not a stamp: stamps start at 1")


def require_stampable(name: str, layout: Layout) -> None:
    """Raise VmmRefused if a block of `layout` is too small for a stamp; `name` is the driver's."""
    smallest = min(layout.page_bytes, layout.slot_bytes)
    if smallest < LEAST_BLOCK_BYTES:
        raise VmmRefused(
            f"{name} memory: blocks of {smallest} bytes cannot be stamped, give {LEAST_BLOCK_BYTES} or more"
        )


def wrong_stamp(op: np.record, offset: int, word: int) -> VmmError:
    """What to raise about a CHECK that found `word` (64 bits) at byte `offset` of its block."""
    found = (word ^ int(salts(np.array([offset]))[0])) % 2**64
    held = found if word else "zeros"
    return VmmError(f"{_block(op, op.source)}, byte {offset}: expected stamp {op.tag}, found {held}")


def _block(op: np.record, block: int) -> str:
    return f"{POOL_NAMES[op.pool]} block {block}"


def _parts(ops: np.ndarray) -> Iterator[np.ndarray]:
    """Consecutive entries that are all MOVEs or all something else."""
    is_move = ops["kind"] == MOVE
    turns = np.flatnonzero(is_move[1:] != is_move[:-1]) + 1
    edges = [0, *turns.tolist(), len(ops)]
    return (ops[start:stop] for start, stop in pairwise(edges) if stop > start)


def _require(ops: np.ndarray, legal: np.ndarray, problem: Callable[[np.record], str]) -> None:
    """Raise VmmError about the first entry that is not `legal`."""
    if not legal.all():
        op = ops.view(np.recarray)[int(np.argmin(legal))]
        name = OP_NAMES[op.kind] if 0 <= op.kind < len(OP_NAMES) else "op"
        raise VmmError(f"{name}: {problem(op)}")
