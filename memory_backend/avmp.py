"""Avmp: KV pages and recurrent slots in one budget of memory whose split can be changed while blocks are in use.

A holder names a block by a handle of 64 bits; where the block lies may change, the handle does not. A block is *live*
while it is pinned, *cached* once its last holder unpins it (it is evicted when room is needed, least recently given up
first, and its handle goes stale), and free after `free`. The same kernels serve `Core`, the simulated engine.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from hbmgym.memory_backend import handles as kernels
from hbmgym.memory_backend.geometry import HybridModel, find_model
from hbmgym.memory_backend.handles import CLOSED, DONE, REFUSED
from hbmgym.memory_backend.memory_table import MemoryTable
from hbmgym.memory_backend.oplog import BYTES, EVERYTHING, KV, NOTHING, POOL_NAMES, SSM
from hbmgym.memory_backend.pools import NONE, Pool, free_blocks
from hbmgym.memory_backend.prefix_cache import NEVER, check_memory, make_memory
from hbmgym.memory_backend.split import CHUNK_BYTES, Layout
from hbmgym.memory_backend.vmm import VmmError, open_vmm

Handles = NDArray[np.uint64]
_HANDLE = np.dtype(np.uint64)
_POOL_OF = {name: pool for pool, name in enumerate(POOL_NAMES)}
_GENERATION_STEP = 0x9E3779B1
"""Odd, so that the first 2^31 allocators of a process begin with different generations: foreign handles are refused."""
_opened = count()


class OutOfBlocks(MemoryError):
    """A pool has too few free and cached blocks; none were taken."""


class BadHandle(ValueError):
    """A handle that names no block of this allocator, or not one that may be treated so; nothing was changed."""


@dataclass(frozen=True)
class MigrateOnFailure:
    """When a failed allocation may take chunks from the other pool: the AVMP paper's thresholds and throttle.

    Source: "Asymmetric Virtual Memory Paging" (arXiv 2605.22416), section 3.2. Cached blocks count as free.
    """

    low: float = 0.05
    """The failing pool must have less than this share of its blocks free."""
    high: float = 0.30
    """The other pool must have more than this share of its blocks free."""
    interval_ops: int = 1000
    """Successful operations that must lie between two such migrations."""
    chunks: int = 16
    """Chunks to move: more if the allocation needs more, fewer if the other pool has fewer free."""

    def __post_init__(self) -> None:
        if not 0.0 < self.low < self.high < 1.0:
            raise ValueError(f"low {self.low} and high {self.high}: expected 0 < low < high < 1")
        if self.interval_ops < 0 or self.chunks < 1:
            raise ValueError(f"interval_ops {self.interval_ops} must be >= 0 and chunks {self.chunks} >= 1")


@dataclass
class Moves:
    """What became of requests to move chunks."""

    accepted: int = 0
    """Runs of chunks that moved."""
    rejected: int = 0
    """Migrations on failure that thresholds, throttle, bounds or a request under way forbade."""
    rolled_back: int = 0
    """Runs that the backend could not make and that were undone."""
    deferred: int = 0
    """Requests of which a part had to wait for live blocks or for a batch."""


@dataclass(frozen=True)
class PoolStats:
    """One pool, in blocks."""

    block_bytes: int
    chunks: int
    """Mapped."""
    capacity: int
    """Blocks that the mapped chunks hold."""
    live: int
    cached: int
    free: int
    """Blocks that can be had without eviction; fewer than capacity - live - cached while the pool shrinks."""
    evictions: int


@dataclass(frozen=True)
class Stats:
    """The allocator at one moment."""

    budget_bytes: int
    chunk_bytes: int
    kv: PoolStats
    ssm: PoolStats
    kv_share: float
    """KV chunks / all chunks, as mapped."""
    kv_share_requested: float
    operations: int
    """Calls of allocate and free that succeeded, and migrations on failure."""
    moves: Moves
    moved_chunks: int
    relocated_bytes: int
    backend: str
    """One line: which backend, and why."""


class Avmp:
    """An allocator over two pools, `kv` (pages) and `ssm` (slots), inside one budget; a context manager.

    `budget_bytes` is rounded down to whole chunks. `model` is a slug of models.json or a HybridModel. `kv_share` is the
    split at start, rounded to the nearest realisable one. `backend` is accounting (no bytes), host, cuda or auto.
    `migrate` says when a failed allocation moves chunks by itself; None: never. With `check`, every block is stamped
    and every stamp read back; the bytes then belong to the stamps.

    Raises ValueError for a budget below one slot and one page, VmmRefused where the backend cannot be had. One thread
    at a time may use it.
    """

    def __init__(
        self,
        budget_bytes: int,
        model: str | HybridModel,
        *,
        kv_share: float = 0.5,
        backend: str = "auto",
        page_tokens: int = 64,
        kv_dtype: str = "bf16",
        state_dtype: str = "fp32",
        chunk_bytes: int = CHUNK_BYTES,
        migrate: MigrateOnFailure | None = MigrateOnFailure(),
        check: bool = False,
    ):
        shape = find_model(model) if isinstance(model, str) else model
        if chunk_bytes < 1 or page_tokens < 1:
            raise ValueError(f"chunk_bytes {chunk_bytes} and page_tokens {page_tokens} must be at least 1")
        layout = Layout(
            budget_bytes=budget_bytes // chunk_bytes * chunk_bytes,
            chunk_bytes=chunk_bytes,
            page_bytes=shape.page_bytes(kv_dtype, page_tokens),
            slot_bytes=shape.slot_bytes(state_dtype),
            min_slots=1,
            min_pages=1,
        )
        self._open(layout, kv_share, backend, migrate, check)

    @classmethod
    def of_layout(
        cls,
        layout: Layout,
        *,
        kv_share: float = 0.5,
        backend: str = "auto",
        migrate: MigrateOnFailure | None = MigrateOnFailure(),
        check: bool = False,
    ) -> Self:
        """An allocator for blocks of any two sizes."""
        self = cls.__new__(cls)
        self._open(layout, kv_share, backend, migrate, check)
        return self

    def _open(
        self, layout: Layout, kv_share: float, backend: str, migrate: MigrateOnFailure | None, check: bool
    ) -> None:
        self.layout = layout
        self._migrate = migrate
        self._operations = self._last_migration = 0
        self._batches = 0
        self._moves = Moves()
        self._refusal = ""
        slots = layout.slots(_share(kv_share))
        self._vmm = open_vmm(backend, layout, layout.kv_chunks(slots))
        level = EVERYTHING if check else NOTHING if self._vmm.name == "accounting" else BYTES
        blocks = layout.budget_bytes // layout.page_bytes + layout.budget_bytes // layout.slot_bytes
        # What one call may write at most: every block evicted, taken and relocated, every chunk moved.
        log_capacity = 8 * blocks + layout.chunks + 64
        self._memory = make_memory(layout, slots, 1, log_capacity, level, run_limit=layout.chunks)
        first = next(_opened) * _GENERATION_STEP & 0x7FFFFFFF
        for pool in self._pools:
            pool.entries["generation"] = first
        self._arrays = MemoryTable(self._memory)
        self._table = self._arrays.address

    @property
    def _pools(self) -> tuple[Pool, Pool]:
        return self._memory.kv, self._memory.ssm

    def allocate(self, kind: str, count: int = 1) -> Handles:
        """uint64[count]: handles of live blocks, the lowest free ones; cached ones are evicted for want of free ones.

        New slots are zero, pages hold what lay there. Raises OutOfBlocks, having taken none.
        """
        if type(count) is not int or count < 0:
            raise ValueError(f"count is {count!r}, expected an integer >= 0")
        pool = _pool_of(kind)
        handles = np.empty(count, _HANDLE)
        left = kernels.allocate_blocks(self._table, pool, handles)
        if left:
            self._finish_allocation(pool, handles, left)
        self._operations += 1
        return handles

    def _finish_allocation(self, pool: int, handles: Handles, left: int) -> None:
        if left == CLOSED:
            self._refuse()
        if left == REFUSED:
            if not len(handles):
                return
            if self._make_room(pool, len(handles)):
                left = kernels.allocate_blocks(self._table, pool, handles)
            if left == REFUSED:
                raise OutOfBlocks(self._shortage(pool, len(handles)))
        try:
            self._do(left)
        except VmmError:
            if self._table:
                kernels.free_blocks_of(self._table, handles)
                self._memory.log.head.count = 0
            raise

    def free(self, handles: Sequence[int] | Handles) -> None:
        """Give blocks back, live under one pin or cached, in any mixture of kinds.

        Raises BadHandle for a stale or foreign handle, one that comes twice, or a block that others hold; then none
        is freed.
        """
        named = _as_handles(handles)
        left = kernels.free_blocks_of(self._table, named)
        if left:
            self._finish(named, left, "free")
        self._operations += 1

    def pin(self, handles: Sequence[int] | Handles) -> None:
        """One more holder of each block; what was cached is live again. Raises BadHandle if one was evicted."""
        named = _as_handles(handles)
        self._finish(named, kernels.pin_blocks(self._table, named), "pin")

    def unpin(self, handles: Sequence[int] | Handles) -> None:
        """One holder less; a block that nobody holds is cached until it is pinned, freed or evicted."""
        named = _as_handles(handles)
        self._finish(named, kernels.unpin_blocks(self._table, named), "unpin")

    def _finish(self, handles: Handles, left: int, verb: str) -> None:
        if left == CLOSED:
            self._refuse()
        if left == REFUSED:
            raise BadHandle(self._fault(handles, verb))
        self._do(left)

    def resolve(self, handles: Sequence[int] | Handles) -> NDArray[np.int64]:
        """int64[n]: the physical block of each handle, as a block table wants it; valid until blocks are relocated.

        Block b of a pool starts `b * block_bytes` behind `base(kind)`. Raises BadHandle.
        """
        self._require_open()
        named = _as_handles(handles)
        blocks = np.empty(len(named), np.int64)
        if kernels.blocks_of(self._table, named, blocks) != NONE:
            raise BadHandle(self._fault(named, "resolve"))
        return blocks

    def base(self, kind: str) -> int:
        """Address of block 0 of a pool; it never changes. Raises VmmError for a backend without bytes."""
        self._require_open()
        return self._vmm.base(_pool_of(kind))

    def view(self, handle: int) -> Any:
        """The bytes of a block: uint8[block_bytes], a numpy array on host, for `torch.from_dlpack` on host and cuda.

        Valid until blocks are relocated or chunks moved: ask again after `request_split`, or after any call while a
        split is under way. Raises BadHandle, and VmmError for a backend without bytes.
        """
        (block,) = self.resolve([int(handle)])
        pool = int(handle) >> 63
        size = int(self._pools[pool].meta.block_bytes)
        return self._vmm.view(pool, int(block) * size, size)

    def request_split(self, kv_share: float) -> float:
        """Ask for the realisable split nearest to `kv_share`; replaces a pending request; returns the share as mapped.

        The pool that shrinks evicts what is cached and relocates what is live. Where live blocks do not fit any more,
        or a batch is open, chunks follow when blocks are freed and the batch has ended. Raises VmmError when the
        backend could not move chunks: the split is then as before, and nothing is pending.
        """
        self._require_open()
        self._ask_for(self.layout.slots(_share(kv_share)))
        return self.kv_share

    @property
    def kv_share(self) -> float:
        """KV chunks / all chunks, as mapped."""
        return float(self._memory.kv.meta.chunks) / self.layout.chunks

    @contextmanager
    def batch(self, stream: int | None = None) -> Iterator[None]:
        """While work that names blocks is being built and launched: no block is relocated and no chunk moved.

        At the end all that was launched on `stream` (a CUDA stream's handle, None: the default stream) is noted, and
        later moves, copies and zeroes wait for it.
        """
        self._require_open()
        self._batches += 1
        try:
            yield
        finally:
            self._batches -= 1
            if self._table:
                self._vmm.end_batch(stream)
                self._do(kernels.TO_DO)

    def stats(self) -> Stats:
        """Counts and shares at this moment."""
        self._require_open()
        split, layout = self._memory.split, self.layout
        return Stats(
            budget_bytes=layout.budget_bytes,
            chunk_bytes=layout.chunk_bytes,
            kv=_pool_stats(self._memory.kv),
            ssm=_pool_stats(self._memory.ssm),
            kv_share=self.kv_share,
            kv_share_requested=float(self._memory.kv.meta.target_chunks) / layout.chunks,
            operations=self._operations,
            moves=Moves(**vars(self._moves)),
            moved_chunks=int(split.moved_chunks),
            relocated_bytes=int(split.relocated_bytes),
            backend=self._vmm.why,
        )

    def check(self) -> None:
        """Raise AssertionError or VmmError unless page tables, bitmaps, counts, chunks and mappings agree."""
        self._require_open()
        check_memory(self._memory)
        if self._memory.log.head.level == NOTHING:
            return
        self._vmm.check()
        for pool in (KV, SSM):
            mapped = self._memory.chunk_at[pool, : self._pools[pool].meta.chunks]
            assert np.array_equal(mapped, self._vmm.chunk_at(pool)), f"{POOL_NAMES[pool]}: the backend has other chunks"

    def close(self) -> None:
        """Give all memory back; a second call does nothing, every other method refuses from now on."""
        self._stop("it is closed")
        self._vmm.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _stop(self, refusal: str) -> None:
        self._refusal = self._refusal or refusal
        self._table = 0
        self._arrays.close()

    def _require_open(self) -> None:
        if not self._table:
            self._refuse()

    def _refuse(self) -> None:
        raise VmmError(f"this allocator refuses every operation: {self._refusal}; open a new one")

    def _do(self, left: int) -> None:
        """Execute what the op log holds, then move the chunks that can move now."""
        if left == DONE:
            return
        self._execute()
        if self._memory.split.tick_s < NEVER and not self._batches:
            self._move_chunks()

    def _execute(self) -> None:
        log = self._memory.log
        entries, log.head.count = int(log.head.count), 0
        if entries:
            self._vmm.execute(log.ops[:entries])

    def _move_chunks(self) -> None:
        """Make a run of all chunks that can move, or none of it."""
        log = self._memory.log
        kernels.make_run(self._table)
        entries = int(log.head.count)
        try:
            self._execute()
        except VmmError as error:
            log.head.count = entries
            kernels.take_back_run(self._table)
            log.head.count = 0
            self._moves.rolled_back += 1
            self._stop_if_lost(error)
            raise
        self._moves.accepted += 1

    def _stop_if_lost(self, error: VmmError) -> None:
        """After a failed run: refuse everything if the backend does so too."""
        try:
            self._vmm.check()
        except VmmError:
            self._stop(str(error))

    def _ask_for(self, slots: int) -> None:
        ssm_chunks = self.layout.chunks - self.layout.kv_chunks(slots)
        self._do(kernels.ask_for_split(self._table, slots, ssm_chunks))
        if self._is_shrinking:
            self._moves.deferred += 1

    @property
    def _is_shrinking(self) -> bool:
        return bool(self._memory.kv.meta.chunks != self._memory.kv.meta.target_chunks)

    def _make_room(self, pool: int, blocks: int) -> bool:
        """After a failed allocation: chunks from the other pool, if MigrateOnFailure allows; did any move?"""
        if self._migrate is None:
            return False
        slots = self._slots_for(pool, blocks)
        if slots is None:
            self._moves.rejected += 1
            return False
        before = int(self._memory.split.moved_chunks)
        self._last_migration = self._operations = self._operations + 1
        self._ask_for(slots)
        return int(self._memory.split.moved_chunks) > before

    def _slots_for(self, pool: int, blocks: int) -> int | None:
        """The slot count that gives `pool` room for `blocks` more, or None where a migration is not allowed."""
        rule, layout = self._migrate, self.layout
        assert rule is not None
        meta, other = self._pools[pool].meta, self._pools[1 - pool].meta
        throttled = self._last_migration and self._operations - self._last_migration < rule.interval_ops
        starved = meta.limit - meta.live < rule.low * meta.capacity
        ample = other.limit - other.live > rule.high * other.capacity
        if throttled or self._is_shrinking or not (starved and ample):
            return None
        short_bytes = (blocks - (meta.limit - meta.live)) * meta.block_bytes
        spare = other.chunks - -(-other.live * other.block_bytes // other.chunk_bytes)
        chunks = min(max(rule.chunks, -(-short_bytes // meta.chunk_bytes)), int(spare))
        if pool == SSM:
            wanted = int(meta.chunks + chunks) * layout.chunk_bytes // layout.slot_bytes
        else:
            wanted = int(other.chunks - chunks) * layout.chunk_bytes // layout.slot_bytes
        slots = min(max(wanted, layout.min_slots), layout.max_slots)
        grows = layout.kv_chunks(slots) != meta.chunks if pool == KV else layout.kv_chunks(slots) != other.chunks
        return slots if grows else None

    def _shortage(self, pool: int, blocks: int) -> str:
        meta = self._pools[pool].meta
        available = max(int(meta.limit - meta.live), 0)
        return (
            f"{POOL_NAMES[pool]}: {blocks} blocks asked for, {available} free or cached of {int(meta.capacity)}: free "
            "some, or give the pool more with request_split"
        )

    def _fault(self, handles: Handles, verb: str) -> str:
        """One line about the first handle that cannot be treated so."""
        seen: set[int] = set()
        for handle in handles.tolist():
            entry = kernels.entry_of(self._table, np.uint64(handle))
            name = f"cannot {verb} handle {handle:#x}"
            if entry == NONE:
                return f"{name}: it names no {POOL_NAMES[handle >> 63]} block in use (freed, evicted or foreign)"
            pins = int(self._pools[handle >> 63].entries[entry].pins)
            if verb == "free" and handle in seen:
                return f"{name}: it is named twice in one call"
            if verb == "free" and pins > 1:
                return f"{name}: the block is pinned {pins} times, unpin it first"
            if verb == "unpin" and pins == 0:
                return f"{name}: nobody holds it"
            seen.add(handle)
        return f"cannot {verb} these handles: one is named more often than its block is pinned"


def _pool_of(kind: str) -> int:
    try:
        return _POOL_OF[kind]
    except (KeyError, TypeError):
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(POOL_NAMES)}") from None


def _share(kv_share: float) -> float:
    if not 0.0 <= kv_share <= 1.0:
        raise ValueError(f"kv_share is {kv_share}, expected a number from 0 to 1")
    return kv_share


def _as_handles(handles: Sequence[int] | Handles) -> Handles:
    """uint64[n], contiguous: what the kernels take."""
    if type(handles) is np.ndarray and handles.dtype is _HANDLE and handles.ndim == 1 and handles.flags.c_contiguous:
        return handles
    try:
        return np.array([int(handle) for handle in handles], dtype=_HANDLE)
    except (TypeError, ValueError, OverflowError) as error:
        raise BadHandle(f"{handles!r} are not handles: expected integers from allocate()") from error


def _pool_stats(pool: Pool) -> PoolStats:
    meta = pool.meta
    return PoolStats(
        block_bytes=int(meta.block_bytes),
        chunks=int(meta.chunks),
        capacity=int(meta.capacity),
        live=int(meta.live),
        cached=int(meta.cached),
        free=int(free_blocks(pool)),
        evictions=int(meta.evictions),
    )
