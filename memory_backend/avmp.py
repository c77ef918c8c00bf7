"""Avmp: KV pages and slots of records in one budget of memory whose split can be changed while blocks are in use.

A holder names a block by a handle of 64 bits; where the block lies may change, the handle does not. A block is *live*
while it is pinned, *cached* once its last holder unpins it (it is evicted when room is needed, least recently given up
first, and its handle goes stale), and free after `free`. The same kernels serve `Core`, the simulated engine.
"""

import operator
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from hbmgym.memory_backend import handles as kernels
from hbmgym.memory_backend.avmp_stats import Moves, PoolStats, Stats
from hbmgym.memory_backend.geometry import HybridModel, find_model
from hbmgym.memory_backend.handles import CLOSED, DONE, REFUSED, TO_DO
from hbmgym.memory_backend.migration import PAPERS_RULE, MigrateOnFailure
from hbmgym.memory_backend.oplog import BYTES, EVERYTHING, NOTHING, POOL_NAMES
from hbmgym.memory_backend.pools import NONE, Pool, free_blocks
from hbmgym.memory_backend.prefix_cache import (
    EXAMPLE_MEMORY,
    NEVER,
    check_chunks,
    check_memory,
    check_stamps,
    make_memory,
)
from hbmgym.memory_backend.split import CHUNK_BYTES, Layout
from hbmgym.memory_backend.table import Table
from hbmgym.memory_backend.vmm import VmmError, open_vmm

Handles = NDArray[np.uint64]
_HANDLE = np.dtype(np.uint64)
_POOL_OF = {name: pool for pool, name in enumerate(POOL_NAMES)}
_GENERATION_STEP = 0x9E3779B1
"""Odd: the allocators of a process begin with generations far apart, so that foreign handles are refused."""
_opened = count()
_UNDER_WAY = "a call was interrupted, or is under way"


class OutOfBlocks(MemoryError):
    """A pool has too few free and cached blocks; none were taken."""


class BadHandle(ValueError):
    """A handle that names no block of this allocator, or not one that may be treated so; nothing was changed."""


class Avmp:
    """An allocator over two pools, `kv` (pages) and `ssm` (slots), inside one budget; a context manager.

    `budget_bytes` is rounded down to whole chunks. `model` is a slug of models.json or a HybridModel. `kv_share` is the
    split at start, rounded to the nearest realisable one. `backend` is accounting (no bytes), host, host-huge, cuda or
    auto. `migrate` says when a failed allocation moves chunks by itself: PAPERS_RULE has the AVMP paper's thresholds,
    None means never. With `check`, every block is
    stamped and every stamp read back; the bytes then belong to the stamps.

    Raises ValueError for a budget below one slot and one page, VmmRefused where the backend cannot be had. One thread
    at a time may use it. Interrupted in the middle of a change, or changed from within one (by a finaliser, say), it
    refuses every operation rather than guess.
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
        migrate: MigrateOnFailure | None = PAPERS_RULE,
        check: bool = False,
    ):
        shape = model if isinstance(model, HybridModel) else find_model(str(model))
        sizes = {"budget_bytes": budget_bytes, "chunk_bytes": chunk_bytes, "page_tokens": page_tokens}
        budget_bytes, chunk_bytes, page_tokens = (_integer(name, value, least=1) for name, value in sizes.items())
        try:
            layout = Layout(
                budget_bytes=budget_bytes // chunk_bytes * chunk_bytes,
                chunk_bytes=chunk_bytes,
                page_bytes=shape.page_bytes(kv_dtype, page_tokens),
                slot_bytes=shape.slot_bytes(state_dtype),
                min_slots=1,
                min_pages=1,
            )
        except ValueError as error:
            raise ValueError(f"budget_bytes {budget_bytes}, in chunks of {chunk_bytes}: {error}") from None
        self._open(layout, kv_share, backend, migrate, check)

    @classmethod
    def of_layout(
        cls,
        layout: Layout,
        *,
        kv_share: float = 0.5,
        backend: str = "auto",
        migrate: MigrateOnFailure | None = PAPERS_RULE,
        check: bool = False,
    ) -> Self:
        """An allocator for blocks of any two sizes."""
        self = cls.__new__(cls)
        self._open(layout, kv_share, backend, migrate, check)
        return self

    def _open(
        self, layout: Layout, kv_share: float, backend: str, migrate: MigrateOnFailure | None, check: bool
    ) -> None:
        if not isinstance(migrate, MigrateOnFailure | None):
            raise ValueError(f"migrate is {migrate!r}, expected a MigrateOnFailure or None")
        self.layout = layout
        self._migrate = migrate
        self._operations = 0
        self._last_migration: int | None = None
        self._open_batches = 0
        self._moves = Moves()
        slots = layout.slots(_share(kv_share))
        self._vmm = open_vmm(backend, layout, layout.kv_chunks(slots))
        level = EVERYTHING if check else NOTHING if self._vmm.name == "accounting" else BYTES
        blocks = layout.budget_bytes // layout.page_bytes + layout.budget_bytes // layout.slot_bytes
        # What one call writes at most: of every block an eviction, its new content and a relocation; every chunk moved.
        log_capacity = 4 * blocks + layout.chunks + 64
        self._memory = make_memory(layout, slots, 1, log_capacity, level, run_limit=layout.chunks, pages_grow=False)
        for pool in self._pools:
            pool.entries["generation"] = next(_opened) * _GENERATION_STEP & 0x7FFFFFFF
        self._arrays = Table(self._memory, EXAMPLE_MEMORY)
        self._table = self._arrays.address  # 0: every operation is refused
        self._refusal = ""
        _allocators.add(self)

    @property
    def _pools(self) -> tuple[Pool, Pool]:
        return self._memory.kv, self._memory.ssm

    def allocate(self, kind: str, count: int = 1) -> Handles:
        """uint64[count]: handles of live blocks, the lowest free ones; cached ones are evicted for want of free ones.

        New slots are zero, pages hold what lay there. Raises OutOfBlocks, having taken none.
        """
        if type(count) is not int or count < 0:
            count = _integer("count", count, least=0)
        pool = _pool_of(kind)
        try:
            handles = np.empty(count, _HANDLE)
        except (MemoryError, ValueError):
            raise OutOfBlocks(self._shortage(pool, count)) from None
        outcome = kernels.allocate_blocks(self._table, pool, handles)
        if outcome != DONE:
            self._finish_allocation(pool, handles, outcome)
        self._operations += 1
        return handles

    def _finish_allocation(self, pool: int, handles: Handles, outcome: int) -> None:
        if outcome == CLOSED:
            self._refuse()
        if outcome == REFUSED and len(handles):
            self._migrate_to(pool, len(handles))
            outcome = kernels.allocate_blocks(self._table, pool, handles)
            if outcome == REFUSED:
                raise OutOfBlocks(self._shortage(pool, len(handles)))
        if outcome == TO_DO:
            try:
                self._execute_and_move()
            except VmmError:
                if self._table:
                    kernels.free_blocks_of(self._table, handles)
                    self._memory.log.head.count = 0
                raise

    def free(self, handles: int | Sequence[int] | Handles) -> None:
        """Give blocks back, live under one pin or cached, in any mixture of kinds.

        Raises BadHandle for a stale or foreign handle, one that comes twice, or a block that others hold; then none
        is freed. Raises VmmError when the blocks are free, but chunks that waited for them could not be moved.
        """
        named = _as_handles(handles)
        outcome = kernels.free_blocks_of(self._table, named)
        if outcome != DONE:
            self._finish(named, outcome, "free")
        self._operations += 1

    def pin(self, handles: int | Sequence[int] | Handles) -> None:
        """One more holder of each block; what was cached is live again. Raises BadHandle if one was evicted."""
        named = _as_handles(handles)
        self._finish(named, kernels.pin_blocks(self._table, named), "pin")

    def unpin(self, handles: int | Sequence[int] | Handles) -> None:
        """One holder less; a block that nobody holds is cached until it is pinned, freed or evicted.

        Raises BadHandle, and VmmError as `free` does.
        """
        named = _as_handles(handles)
        self._finish(named, kernels.unpin_blocks(self._table, named), "unpin")

    def _finish(self, handles: Handles, outcome: int, verb: str) -> None:
        if outcome == CLOSED:
            self._refuse()
        if outcome == REFUSED:
            raise BadHandle(self._fault(handles, verb))
        if outcome == TO_DO:
            self._execute_and_move()

    def resolve(self, handles: int | Sequence[int] | Handles) -> NDArray[np.int64]:
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

    def view(self, handle: int | Handles) -> Any:
        """The bytes of a block: uint8[block_bytes], a numpy array on host, for `torch.from_dlpack` on host and cuda.

        Valid until blocks are relocated, chunks moved, or the allocator is closed, after which touching it may kill
        the process: ask again after `request_split`, or after any call while a split is under way. Raises BadHandle,
        and VmmError for a backend without bytes.
        """
        named, *others = _as_handles(handle).tolist()
        if others:
            raise BadHandle(f"{len(others) + 1} handles given, expected one: view them one by one")
        (block,) = self.resolve(named)
        pool = named >> 63
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
        self._require_open()
        return float(self._memory.kv.meta.chunks) / self.layout.chunks

    @contextmanager
    def batch(self, stream: int | None = None) -> Iterator[None]:
        """While work that names blocks is being built and launched: no block is relocated and no chunk moved.

        At the end all that was launched on `stream` (a CUDA stream's handle, None: the default stream) is noted, and
        later moves, copies and zeroes wait for it. Free a block only after the batches that write to it: the next
        holder is not kept waiting for a batch that is still open. Raises VmmError as `free` does; if the end cannot
        be noted, the allocator refuses every operation.
        """
        stream = None if stream is None else _integer("stream (a CUDA stream's handle)", stream, least=0)
        self._require_open()
        self._open_batches += 1
        try:
            yield
        finally:
            self._open_batches -= 1
            self._end_batch(stream)

    def _end_batch(self, stream: int | None) -> None:
        if not self._table:
            return
        try:
            self._vmm.end_batch(stream)
        except BaseException as error:
            self._stop(f"the end of a batch could not be noted ({error})")
            raise
        self._execute_and_move()

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
            moves=replace(self._moves),
            moved_chunks=int(split.moved_chunks),
            relocated_bytes=int(split.relocated_bytes),
            backend=self._vmm.why,
        )

    def check(self) -> None:
        """Raise AssertionError or VmmError unless page tables, bitmaps, counts, chunks, mappings and stamps agree."""
        self._require_open()
        check_memory(self._memory)
        if self._memory.log.head.level == NOTHING:
            return
        check_stamps(self._memory)
        with self._changing():
            self._execute()
        self._vmm.check()
        check_chunks(self._memory, self._vmm)

    def close(self) -> None:
        """Give all memory back; a second call does nothing, every other method refuses from now on."""
        self._stop("it is closed")
        self._vmm.close()

    def __repr__(self) -> str:
        if not self._table:
            return f"<Avmp: {self._refusal}>"
        kv, ssm = (f"{int(pool.meta.live)} of {int(pool.meta.capacity)}" for pool in self._pools)
        budget = self.layout.budget_bytes
        return (
            f"<Avmp on {self._vmm.name}, {budget} bytes, kv_share {self.kv_share:.3f}, live: {kv} pages, {ssm} slots>"
        )

    def __reduce__(self) -> Any:
        raise TypeError("an Avmp cannot be copied or sent to another process: open one there")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def leave_to_parent(self) -> None:
        """In a forked child: refuse everything, the memory is the parent's."""
        self._stop("it was opened in the parent process")

    def _stop(self, refusal: str) -> None:
        self._table, self._refusal = 0, refusal

    def _require_open(self) -> None:
        if not self._table:
            self._refuse()

    def _refuse(self) -> None:
        raise VmmError(f"this allocator refuses every operation: {self._refusal}; open a new one")

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """While memory is changed nobody else may come in; only an end with the backend's word on it opens again."""
        table, self._table, self._refusal = self._table, 0, _UNDER_WAY
        try:
            yield
        except VmmError as error:
            self._memory.log.head.count = 0
            self._stop_if_lost(error)
            self._reopen(table)
            raise
        self._reopen(table)

    def _reopen(self, table: int) -> None:
        if self._refusal == _UNDER_WAY:
            self._table, self._refusal = table, ""

    def _stop_if_lost(self, error: VmmError) -> None:
        """After a failed change: go on only if the backend still knows where everything is."""
        try:
            self._vmm.check()
        except VmmError:
            self._stop(str(error))

    def _execute_and_move(self) -> None:
        """Execute what the op log holds, then move the chunks that can move now."""
        with self._changing():
            self._execute()
            if self._memory.split.tick_s < NEVER and not self._open_batches:
                self._move_chunks()

    def _execute(self) -> None:
        log = self._memory.log
        entries, log.head.count = int(log.head.count), 0
        if entries:
            self._vmm.execute(log.ops[:entries])

    def _move_chunks(self) -> None:
        """Make a run of all chunks that can move, or none of it."""
        log = self._memory.log
        kernels.make_run(self._arrays.address)
        entries = int(log.head.count)
        try:
            self._execute()
        except VmmError:
            log.head.count = entries
            kernels.withdraw(self._arrays.address)
            self._moves.rolled_back += 1
            raise
        self._moves.accepted += 1

    def _ask_for(self, slots: int) -> None:
        ssm_chunks = self.layout.chunks - self.layout.kv_chunks(slots)
        if kernels.ask_for_split(self._table, slots, ssm_chunks) == TO_DO:
            try:
                self._execute_and_move()
            except VmmError:
                kernels.withdraw(self._arrays.address)
                raise
        if self._is_shrinking:
            self._moves.deferred += 1

    @property
    def _is_shrinking(self) -> bool:
        return bool(self._memory.kv.meta.chunks != self._memory.kv.meta.target_chunks)

    def _migrate_to(self, pool: int, blocks: int) -> None:
        """After a failed allocation: move chunks from the other pool, if MigrateOnFailure allows."""
        if self._migrate is None:
            return
        rule, last = self._migrate, self._last_migration
        is_throttled = last is not None and self._operations - last < rule.interval_ops
        slots = kernels.slots_after_failure(self._table, pool, blocks, rule.low, rule.high, rule.chunks)
        if slots == NONE or is_throttled or self._is_shrinking or self._open_batches:
            self._moves.rejected += 1
            return
        try:
            self._ask_for(slots)
        except VmmError:
            self._require_open()
            return  # rolled back: the allocation fails as it would have done
        self._operations += 1
        self._last_migration = self._operations

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


_allocators: weakref.WeakSet[Avmp] = weakref.WeakSet()


def _leave_all_to_parent() -> None:
    for allocator in _allocators:
        allocator.leave_to_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_all_to_parent)


def _pool_of(kind: str) -> int:
    try:
        return _POOL_OF[kind]
    except (KeyError, TypeError):
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(POOL_NAMES)}") from None


def _integer(name: str, value: Any, least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise ValueError(f"{name} is {value!r}, expected an integer >= {least}")
    return number


def _share(kv_share: Any) -> float:
    if not isinstance(kv_share, float | int | np.number) or not 0.0 <= kv_share <= 1.0:
        raise ValueError(f"kv_share is {kv_share!r}, expected a number from 0 to 1")
    return float(kv_share)


def _as_handles(handles: Any) -> Handles:
    """uint64[n], contiguous, of one handle or several: what the kernels take."""
    if type(handles) is np.ndarray and handles.dtype is _HANDLE and handles.ndim == 1 and handles.flags.c_contiguous:
        return handles
    try:
        # Through integers: numpy would take floats, which handles cannot survive.
        several = np.ravel(handles) if isinstance(handles, np.ndarray | np.generic | int) else handles
        return np.array([operator.index(handle) for handle in several], dtype=_HANDLE)
    except (TypeError, OverflowError):
        raise BadHandle(f"{handles!r}: expected one or several handles, integers from allocate()") from None


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
