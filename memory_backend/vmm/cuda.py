"""The driver on a GPU: an allocation per chunk, two reserved ranges that show them; to move is to alias, then unmap."""

import os
import warnings
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import numpy as np

from hbmgym.memory_backend.oplog import CHECK, KV, POOL_NAMES, SSM
from hbmgym.memory_backend.split import Layout
from hbmgym.memory_backend.vmm import cuda_calls as cuda
from hbmgym.memory_backend.vmm.cuda_calls import CudaFailure
from hbmgym.memory_backend.vmm.device_blocks import BATCH_ENTRIES, DeviceBlocks, Fault
from hbmgym.memory_backend.vmm.dlpack import CUDA, ByteView
from hbmgym.memory_backend.vmm.driver import LogDriver, require_stampable, wrong_stamp
from hbmgym.memory_backend.vmm.fence import Fence
from hbmgym.memory_backend.vmm.mappings import Mappings
from hbmgym.memory_backend.vmm.ownership import Ownership, Run
from hbmgym.memory_backend.vmm.protocol import VmmError, VmmRefused
from hbmgym.memory_backend.vmm.stamps import word_offsets

_ORDINAL = 0  # CUDA_VISIBLE_DEVICES says which GPU that is
_FENCE_TIMEOUT_S = 30.0
_OTHERWISE = "take backend host or accounting"


class _Holdings(NamedTuple):
    """What a driver has of the GPU."""

    process: int
    context: int
    fence: Fence
    contents: ExitStack
    """Releases what was made in the context."""
    retained: ExitStack
    """Releases the context."""

    def wait(self) -> None:
        """Wait until the GPU is done with the memory, or raise VmmError."""
        with cuda.current(self.context):
            self.fence.wait()

    def release(self) -> None:
        """Give everything back; what one failing call leaves does not keep the others from being made."""
        with self.retained, cuda.current(self.context), self.contents:
            pass

    def drop(self) -> None:
        """Give everything back when nobody is there to hear of a failure; in a fork, nothing may be touched."""
        if os.getpid() != self.process:
            return
        try:
            self.wait()
            self.release()
        except VmmError as error:
            warnings.warn(f"cuda memory was dropped and not given back: {error}", ResourceWarning, stacklevel=1)


class CudaVmm(LogDriver):
    """Chunk i is one physical allocation, made once and reused; position i of a pool is a part of its range.

    Block b of a pool is bytes [b, b + 1) * block_bytes of its range. A move maps its chunks at their new positions,
    waits on the host for whatever may still name the old ones, then unmaps those. Raises VmmRefused when there is no
    such GPU or the layout cannot be held on it.

    Any thread may call, one at a time; the device's primary context is current in it only while a method runs.
    """

    name = "cuda"

    def __init__(self, layout: Layout, kv_chunks: int):
        super().__init__(layout, kv_chunks)
        require_stampable(self.name, layout)
        self._process = os.getpid()
        with ExitStack() as retained:
            try:
                self._retain_device(retained)
                with cuda.current(self._context), ExitStack() as contents:
                    self._require_room(layout)
                    self._acquire(layout, contents)
                    everything = contents.pop_all()
            except CudaFailure as failure:
                raise VmmRefused(f"cuda memory: {failure}: {_OTHERWISE}") from failure
            self._holdings = _Holdings(self._process, self._context, self._fence, everything, retained.pop_all())
        self._finalizer = weakref.finalize(self, self._holdings.drop)
        self.why += f", on {self.device_name}"

    @property
    def fence_timeout_s(self) -> float:
        """How long a move, a block entry or `close` waits for the GPU before it refuses; 30 s unless set."""
        return self._fence.timeout_s

    @fence_timeout_s.setter
    def fence_timeout_s(self, seconds: float) -> None:
        self._fence.timeout_s = seconds

    def execute(self, ops: np.ndarray) -> None:
        """Execute `ops` in order (see `Vmm.execute`)."""
        with self._entered():
            super().execute(ops)

    def end_batch(self, stream: int | None = None) -> None:
        """Record an event on `stream` (see `Vmm.end_batch`)."""
        with self._entered():
            self._fence.record(stream)

    def check(self) -> None:
        """Raise VmmError unless every chunk is owned once and the GPU maps exactly the owned chunks, in place."""
        with self._entered():
            super().check()
            for pool in (KV, SSM):
                self._check_mappings(pool)

    def close(self) -> None:
        """Unmap and release everything; a second call does nothing.

        Raises VmmError, and can be called again, when work that may name a block does not end in time.
        """
        if self._finalizer.alive and os.getpid() == self._process:
            self._holdings.wait()
            self._finalizer.detach()
            super().close()
            self._holdings.release()
        super().close()

    @contextmanager
    def _entered(self) -> Iterator[None]:
        self._require_usable()
        with cuda.current(self._context):
            yield

    def _require_usable(self) -> None:
        if os.getpid() != self._process:
            self._refusal = (
                f"opened in process {self._process}, this is process {os.getpid()}: open one per process, "
                "and start processes with spawn, because CUDA does not survive a fork"
            )
        super()._require_usable()

    def _retain_device(self, resources: ExitStack) -> None:
        try:
            cuda.initialise()
            self._device = cuda.device(_ORDINAL)
        except CudaFailure as failure:
            raise VmmRefused(f"cuda memory: no NVIDIA driver or no GPU ({failure}): {_OTHERWISE}") from failure
        self.device_name = cuda.device_name(self._device)
        if not cuda.supports_virtual_memory(self._device):
            raise VmmRefused(f"cuda memory: {self.device_name} has no virtual memory management: {_OTHERWISE}")
        self._context = cuda.retain_context(self._device)
        resources.callback(cuda.release_context, self._device)

    def _require_room(self, layout: Layout) -> None:
        grain = cuda.granularity(self._device)
        if layout.chunk_bytes % grain:
            raise VmmRefused(
                f"cuda memory: chunk_bytes {layout.chunk_bytes} is not a multiple of {grain}, the granularity of "
                f"{self.device_name}: give a multiple, or {_OTHERWISE}"
            )
        free_bytes = cuda.free_memory()
        if layout.budget_bytes > free_bytes:
            raise VmmRefused(
                f"cuda memory: budget of {layout.budget_bytes} bytes is above the free memory of {self.device_name} "
                f"({free_bytes} bytes): give a smaller budget, or {_OTHERWISE}"
            )

    def _acquire(self, layout: Layout, resources: ExitStack) -> None:
        self._bases = tuple(self._reserve_pool(layout.budget_bytes, resources) for _ in POOL_NAMES)
        self._handles = []
        for _ in range(self._chunks):
            self._handles.append(cuda.create(self._chunk_bytes, self._device))
            resources.callback(cuda.release, self._handles[-1])
        self._mappings = Mappings(self._chunk_bytes, self._device)
        resources.callback(self._mappings.close)
        for pool in (KV, SSM):
            self._mappings.map_run(self._bases[pool], self._owned_handles(pool))
        self._mappings.commit()
        stream = cuda.make_stream()
        resources.callback(cuda.destroy_stream, stream)
        self._fence = Fence(stream, _FENCE_TIMEOUT_S)
        resources.callback(self._fence.close)
        self._blocks = DeviceBlocks(layout, self._bases, self._fence, resources)

    def _reserve_pool(self, budget_bytes: int, resources: ExitStack) -> int:
        address = cuda.reserve(budget_bytes)
        resources.callback(cuda.free_range, address, budget_bytes)
        return address

    def _owned_handles(self, pool: int) -> list[int]:
        return [self._handles[chunk] for chunk in self._ownership.chunk_at(pool).tolist()]

    def _address(self, pool: int, position: int) -> int:
        return self._bases[pool] + position * self._chunk_bytes

    def _check_mappings(self, pool: int) -> None:
        owned = self._owned_handles(pool)
        for position in range(self._chunks):
            expected = owned[position] if position < len(owned) else None
            found = cuda.handle_at(self._address(pool, position))
            if found != expected:
                raise VmmError(
                    f"{POOL_NAMES[pool]} position {position}: expected {self._chunk_of(expected)}, "
                    f"mapped is {self._chunk_of(found)}"
                )

    def _chunk_of(self, handle: int | None) -> str:
        if handle is None:
            return "nothing"
        return f"chunk {self._handles.index(handle)}" if handle in self._handles else "foreign memory"

    def _run_blocks(self, ops: np.ndarray) -> None:
        self._fence.wait()
        for start in range(0, len(ops), BATCH_ENTRIES):
            batch = ops[start : start + BATCH_ENTRIES]
            try:
                fault = self._blocks.run(batch)
            except VmmError:
                self._await_the_rest()
                raise
            stop = len(batch) if fault is None else fault.entry
            self.stamps_checked += int(np.count_nonzero(batch["kind"][:stop] == CHECK))
            if fault is not None:
                raise self._wrong_stamp(batch[fault.entry], fault)

    def _await_the_rest(self) -> None:
        """After a failed batch: what was launched may still be executed, and until then no block is anybody's."""
        try:
            self._fence.wait()
        except VmmError as error:
            self._refusal = f"block entries were not seen to end ({error})"
            raise

    def _wrong_stamp(self, op: np.record, fault: Fault) -> VmmError:
        offsets = word_offsets(self._block_bytes[op.pool], self._chunk_bytes)
        return wrong_stamp(op, int(offsets[fault.word]), fault.found)

    def _move(self, runs: list[Run], after: Ownership) -> None:
        try:
            for run in runs:
                self._make_run(run)
        except VmmError as error:
            self._undo(error)
            moves = sum(len(run.chunks) for run in runs)
            raise VmmError(f"{moves} moves failed: {error}; all of them were undone") from error
        self._mappings.commit()

    def _make_run(self, run: Run) -> None:
        handles = [self._handles[chunk] for chunk in run.chunks]
        self._mappings.map_run(self._address(run.target_pool, run.target), handles)
        self._fence.wait()
        self._mappings.unmap_run(self._address(run.pool, run.source), len(handles))

    def _undo(self, cause: VmmError) -> None:
        try:
            self._mappings.undo()
        except CudaFailure as error:
            raise self._lose_track(str(cause), str(error)) from error

    def _base(self, pool: int) -> int:
        return self._bases[pool]

    def _view(self, pool: int, start: int, length: int) -> ByteView:
        return ByteView(self._bases[pool] + start, length, (CUDA, self._device), self)
