"""The driver on host memory: one sealed memfd holds all chunks, two reserved ranges show them, mremap moves them."""

import mmap
import os
import weakref
from contextlib import ExitStack

import numpy as np

from hbmgym.memory_backend.oplog import COPY, KV, POOL_NAMES, SSM
from hbmgym.memory_backend.split import Layout
from hbmgym.memory_backend.vmm import linux
from hbmgym.memory_backend.vmm.driver import LogDriver, require_stampable, wrong_stamp
from hbmgym.memory_backend.vmm.ownership import Ownership, Run
from hbmgym.memory_backend.vmm.protocol import VmmError, VmmRefused
from hbmgym.memory_backend.vmm.stamps import (
    NO_FAULT,
    WORD_BYTES,
    StampedRange,
    run_stamps,
    salts,
    word_offsets,
)

_SPARE_MAPPINGS = 300
"""Mappings left to the rest of the process: at the kernel's limit even the interpreter fails to allocate."""


class HostVmm(LogDriver):
    """Chunk i is bytes [i, i + 1) * chunk_bytes of the memfd; position i of a pool is the same part of its range.

    Block b of a pool is bytes [b, b + 1) * block_bytes of its range. With `huge_pages` the chunks lie on huge pages,
    whatever the system's setting: random reads take a fifth less time and copies a tenth, to open takes three times as
    long, moves are as fast either way (measured on one machine). Raises VmmRefused when the layout cannot be held here.

    One thread at a time: nothing here is locked, and whoever touches a view while a chunk under it moves may be
    killed. A forked child has none of the memory: there every method refuses, and touching a view kills the child.
    """

    name = "host"

    def __init__(self, layout: Layout, kv_chunks: int, huge_pages: bool = False):
        super().__init__(layout, kv_chunks)
        _require_layout_fits(layout)
        self._huge_pages = huge_pages
        if huge_pages:
            self.why += ", on huge pages"
        self._stamped: tuple[StampedRange, ...] = ()
        # The system calls of a move are attributes, so that their failure can be tried.
        self.remap = linux.remap
        self.reserve = linux.reserve
        with ExitStack() as resources:
            try:
                self._acquire(layout.budget_bytes, resources)
            except OSError as error:
                raise VmmRefused(
                    f"host memory: {error.strerror} while mapping {layout.budget_bytes} bytes: give a smaller budget "
                    "or take the accounting backend"
                ) from error
            # Also runs when the driver is dropped without close().
            self._release = weakref.finalize(self, resources.pop_all().close)
        self._process = os.getpid()
        _open_drivers.add(self)

    def check(self) -> None:
        """Raise VmmError unless every chunk is owned once and the kernel maps exactly the owned chunks, in place."""
        super().check()
        expected = {
            self._bases[pool] + position * self._chunk_bytes: chunk * self._chunk_bytes
            for pool in (KV, SSM)
            for position, chunk in enumerate(self._ownership.chunk_at(pool).tolist())
        }
        found = {
            address: mapping.offset + address - mapping.start
            for mapping in linux.file_mappings(self._descriptor)
            for address in range(mapping.start, mapping.stop, self._chunk_bytes)
        }
        if found != expected:
            address, _ = min(found.items() ^ expected.items())
            raise VmmError(
                f"address {address:#x}: expected byte {expected.get(address)} of the chunks, "
                f"mapped is {found.get(address)}"
            )

    def close(self) -> None:
        """Unmap everything and close the memfd; a second call does nothing."""
        super().close()
        self._stamped = ()
        self._release()

    def leave_to_parent(self) -> None:
        """In a forked child: forget memory that only the parent has mapped; here its addresses may be anyone's."""
        if self._release.detach():
            self._refusal = f"opened in process {self._process}, this is process {os.getpid()}: open one per process"
            self._stamped = ()
            os.close(self._descriptor)

    def _acquire(self, budget_bytes: int, resources: ExitStack) -> None:
        self._descriptor = linux.sealed_memory("hbmgym-chunks", budget_bytes)
        resources.callback(os.close, self._descriptor)
        self._bases = tuple(self._reserve_pool(budget_bytes, resources) for _ in POOL_NAMES)
        self._require_remap()
        for pool in (KV, SSM):
            chunks = self._ownership.chunk_at(pool)
            if chunks.size:
                length, offset = chunks.size * self._chunk_bytes, int(chunks[0]) * self._chunk_bytes
                linux.map_file(self._bases[pool], length, self._descriptor, offset)
                linux.keep_from_children(self._bases[pool], length)
                if self._huge_pages:
                    self._collapse(self._bases[pool], length)
        self._stamped = tuple(self._stamped_range(pool, budget_bytes) for pool in (KV, SSM))

    def _reserve_pool(self, budget_bytes: int, resources: ExitStack) -> int:
        # Ranges that start on a multiple of the chunk let mremap move whole page tables: several times faster.
        length = budget_bytes + self._chunk_bytes
        address = linux.reserve_anywhere(length)
        resources.callback(linux.unmap, address, length)
        return -(-address // self._chunk_bytes) * self._chunk_bytes

    def _collapse(self, address: int, length: int) -> None:
        grain = linux.huge_page_bytes()
        if self._chunk_bytes % grain:
            raise VmmRefused(
                f"host memory: chunk_bytes {self._chunk_bytes} is not a multiple of the {grain} bytes of a huge page: "
                "give a multiple, or take backend host"
            )
        try:
            linux.collapse(address, length)
        except OSError as error:
            raise VmmRefused(
                f"host memory: no huge pages for {length} bytes ({error.strerror}; Linux 6.1 or later is needed): "
                "take backend host"
            ) from error

    def _require_remap(self) -> None:
        """Try one move on an empty driver, so that an old kernel is refused before any data are held."""
        source, target = self._bases
        linux.map_file(source, self._chunk_bytes, self._descriptor, 0)
        try:
            self.remap(source, self._chunk_bytes, target)
        except OSError as error:
            raise VmmRefused(f"host memory: mremap says {error.strerror}; Linux 5.13 or later is needed") from error
        for base in self._bases:
            self.reserve(base, self._chunk_bytes)

    def _stamped_range(self, pool: int, budget_bytes: int) -> StampedRange:
        block_bytes = self._block_bytes[pool]
        offsets = word_offsets(block_bytes, self._chunk_bytes)
        return StampedRange(linux.bytes_at(self._bases[pool], budget_bytes), block_bytes, offsets, salts(offsets))

    def _run_blocks(self, ops: np.ndarray) -> None:
        position = 0
        while position < len(ops):
            position, checked, wrong = run_stamps(ops, position, *self._stamped)
            self.stamps_checked += checked
            if wrong != NO_FAULT:
                raise self._wrong_stamp(ops[position], wrong)
            if position < len(ops):
                self._copy_or_zero(ops[position])
                position += 1

    def _copy_or_zero(self, op: np.record) -> None:
        if op.kind == COPY:
            self._block(op.pool, op.target)[:] = self._block(op.pool, op.source)
        else:
            self._block(op.pool, op.source)[:] = 0

    def _block(self, pool: int, block: int) -> np.ndarray:
        size = self._block_bytes[pool]
        return self._stamped[pool].data[block * size : (block + 1) * size]

    def _wrong_stamp(self, op: np.record, word: int) -> VmmError:
        offset = int(self._stamped[op.pool].offsets[word])
        held = self._block(op.pool, op.source)[offset : offset + WORD_BYTES].tobytes()
        return wrong_stamp(op, offset, int.from_bytes(held, "little", signed=True))

    def _move(self, runs: list[Run], after: Ownership) -> None:
        # Chunks that follow each other in the memfd and in a pool are one mapping to the kernel, and move as one.
        stretches = [stretch for run in runs for stretch in run.stretches()]
        made: list[Run] = []
        try:
            for stretch in stretches:
                self.remap(*self._places(stretch))
                made.append(stretch)
            self._reserve_vacated(after, after.most)
        except OSError as error:
            self._undo(made, after.most, error)
            count, wanted = (sum(len(run.chunks) for run in some) for some in (made, stretches))
            raise VmmError(f"{count} of {wanted} moves made, then {error.strerror}; all of them were undone") from error

    def _undo(self, made: list[Run], most: list[int], cause: OSError) -> None:
        """Take back `made` runs, newest first; if that fails too, no chunk's contents can be trusted again."""
        try:
            for run in reversed(made):
                self.remap(*self._places(run.reverse))
            self._reserve_vacated(self._ownership, most)
        except OSError as error:
            raise self._lose_track(str(cause.strerror), str(error.strerror)) from error

    def _places(self, run: Run) -> tuple[int, int, int]:
        """(source address, bytes, target address)."""
        source = self._bases[run.pool] + run.source * self._chunk_bytes
        target = self._bases[run.target_pool] + run.target * self._chunk_bytes
        return source, len(run.chunks) * self._chunk_bytes, target

    def _base(self, pool: int) -> int:
        return self._bases[pool]

    def _view(self, pool: int, start: int, length: int) -> np.ndarray:
        return linux.bytes_at(self._bases[pool] + start, length, owner=self)

    def _reserve_vacated(self, ownership: Ownership, most: list[int]) -> None:
        """Of all positions that were mapped during a run of moves, reserve those above the pools' tops again."""
        for base, count, highest in zip(self._bases, (ownership.count(KV), ownership.count(SSM)), most, strict=True):
            if count < highest:
                self.reserve(base + count * self._chunk_bytes, (highest - count) * self._chunk_bytes)


_open_drivers: weakref.WeakSet[HostVmm] = weakref.WeakSet()


def _leave_all_to_parent() -> None:
    for driver in _open_drivers:
        driver.leave_to_parent()


os.register_at_fork(after_in_child=_leave_all_to_parent)


def _require_layout_fits(layout: Layout) -> None:
    """Raise VmmRefused for a layout that this computer cannot hold or that stamps cannot cover."""
    if layout.chunk_bytes % mmap.PAGESIZE:
        raise VmmRefused(
            f"host memory: chunk_bytes {layout.chunk_bytes} is not a multiple of the {mmap.PAGESIZE} bytes of a page: "
            f"give {-(-layout.chunk_bytes // mmap.PAGESIZE) * mmap.PAGESIZE}"
        )
    require_stampable("host", layout)
    free_bytes, source = linux.free_memory()
    if layout.budget_bytes > free_bytes // 2:
        raise VmmRefused(
            f"host memory: budget of {layout.budget_bytes} bytes is above half of the free memory "
            f"({free_bytes // 2} bytes, from {source}): give a smaller budget or take the accounting backend"
        )
    limit, present = linux.mapping_limit()
    # Each chunk may become a mapping of its own, and during a run of moves leave another one behind.
    needed = present + 2 * layout.chunks + _SPARE_MAPPINGS
    if needed > limit:
        raise VmmRefused(
            f"host memory: {layout.chunks} chunks may need {needed} mappings, above vm.max_map_count {limit}: "
            "give larger chunks or a smaller budget"
        )
