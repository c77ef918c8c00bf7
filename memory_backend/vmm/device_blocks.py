"""Block entries on a GPU: wave after wave on one stream, with one wait per batch."""

import ctypes
from contextlib import ExitStack
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from hbmgym.memory_backend.oplog import CHECK, COPY, KV, SSM, STAMP
from hbmgym.memory_backend.split import Layout
from hbmgym.memory_backend.vmm import cuda_calls as cuda
from hbmgym.memory_backend.vmm.build_device import PTX
from hbmgym.memory_backend.vmm.fence import Fence
from hbmgym.memory_backend.vmm.stamps import NO_FAULT
from hbmgym.memory_backend.vmm.waves import assign_waves

BATCH_ENTRIES = 4096
"""Entries between two waits; bounds the buffers."""
STAMP_ENTRY = np.dtype(
    [("address", "u8"), ("bytes", "i8"), ("tag", "i8"), ("is_check", "i8"), ("wrong_word", "i8"), ("found", "u8")]
)
"""A STAMP or CHECK as run_stamps in device.cu takes it; `wrong_word` and `found` are its answer."""
_THREADS = 128
_KERNEL_TYPES = (ctypes.c_uint64, ctypes.c_int32, ctypes.c_int64)


class Fault(NamedTuple):
    """A CHECK that did not read back."""

    entry: int
    """Its index in the batch."""
    word: int
    """Index of the first word that is not the stamp's."""
    found: int
    """What lies there: 64 bits, unsigned."""


class DeviceBlocks:
    """Executes COPY, ZERO, STAMP and CHECK on the blocks of two ranges; all methods need the context to be current."""

    def __init__(self, layout: Layout, bases: tuple[int, ...], fence: Fence, resources: ExitStack):
        self._bases = np.array(bases)
        self._block_bytes = np.array([layout.page_bytes, layout.slot_bytes])
        self._chunk_bytes = layout.chunk_bytes
        self._stream, self._fence = fence.stream, fence
        self._turns = tuple(np.zeros((layout.budget_bytes // size, 2), np.int32) for size in self._block_bytes)
        module = cuda.load_module(PTX.read_bytes() + b"\0")
        resources.callback(cuda.unload_module, module)
        self._run_stamps = cuda.function(module, "run_stamps")
        length = BATCH_ENTRIES * STAMP_ENTRY.itemsize
        self._device_entries = cuda.allocate(length)
        resources.callback(cuda.free, self._device_entries)
        self._host_entries = cuda.allocate_host(length)
        resources.callback(cuda.free_host, self._host_entries)
        staging = (ctypes.c_uint8 * length).from_address(self._host_entries)
        self._entries = np.ctypeslib.as_array(staging).view(STAMP_ENTRY)

    def run(self, ops: np.ndarray) -> Fault | None:
        """Execute a batch of at most BATCH_ENTRIES legal entries; the first CHECK in log order that fails, if any.

        Foreign work must have ended. Raises VmmError when a call fails or the entries do not end in time: any of them
        may have been executed, or may yet be.
        """
        wave = np.empty(len(ops), np.int32)
        edges = np.arange(1 + assign_waves(ops, self._turns[KV], self._turns[SSM], wave))
        order = np.argsort(wave, kind="stable")
        is_stamp = (ops["kind"] == STAMP) | (ops["kind"] == CHECK)
        stamps, others = order[is_stamp[order]], order[~is_stamp[order]]
        stamp_edges, other_edges = (np.searchsorted(wave[part], edges).tolist() for part in (stamps, others))
        transfers = self._transfers(ops[others])
        self._stage(ops[stamps])
        for this, following in pairwise(range(len(edges))):
            for transfer in transfers[other_edges[this] : other_edges[following]]:
                self._copy_or_zero(*transfer)
            self._launch(stamp_edges[this], stamp_edges[following])
        return self._first_fault(stamps)

    def _addresses(self, ops: np.ndarray, field: str) -> np.ndarray:
        return self._bases[ops["pool"]] + ops[field] * self._block_bytes[ops["pool"]]

    def _stage(self, ops: np.ndarray) -> None:
        """Send STAMPs and CHECKs to the device, in the order of their waves."""
        if not len(ops):
            return
        entries = self._entries[: len(ops)]
        entries["address"] = self._addresses(ops, "source")
        entries["bytes"] = self._block_bytes[ops["pool"]]
        entries["tag"] = ops["tag"]
        entries["is_check"] = ops["kind"] == CHECK
        entries["wrong_word"] = NO_FAULT
        cuda.copy_to_device(self._device_entries, self._host_entries, entries.nbytes, self._stream)

    def _transfers(self, ops: np.ndarray) -> list[tuple[int, ...]]:
        """(kind, source address, target address, bytes) of each COPY and ZERO."""
        columns = ops["kind"], self._addresses(ops, "source"), self._addresses(ops, "target")
        return list(zip(*(column.tolist() for column in (*columns, self._block_bytes[ops["pool"]])), strict=True))

    def _copy_or_zero(self, kind: int, source: int, target: int, size: int) -> None:
        if kind != COPY:
            cuda.clear(source, size, self._stream)
        elif source != target:
            cuda.copy(target, source, size, self._stream)

    def _launch(self, start: int, stop: int) -> None:
        if start < stop:
            entries = self._device_entries + start * STAMP_ENTRY.itemsize
            blocks = -(-(stop - start) // _THREADS)
            arguments = (entries, stop - start, self._chunk_bytes)
            cuda.launch(self._run_stamps, blocks, _THREADS, self._stream, arguments, _KERNEL_TYPES)

    def _first_fault(self, stamps: np.ndarray) -> Fault | None:
        entries = self._entries[: len(stamps)]
        if len(stamps):
            cuda.copy_to_host(self._host_entries, self._device_entries, entries.nbytes, self._stream)
        self._fence.wait()
        wrong = np.flatnonzero(entries["wrong_word"] != NO_FAULT)
        if not len(wrong):
            return None
        first = wrong[np.argmin(stamps[wrong])]
        return Fault(int(stamps[first]), int(entries["wrong_word"][first]), int(entries["found"][first]))
