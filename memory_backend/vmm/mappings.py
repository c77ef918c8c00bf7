"""What is mapped where on a GPU, so that every map is undone by exactly one unmap."""

from contextlib import ExitStack

from hbmgym.memory_backend.vmm import cuda_calls as cuda


class Mappings:
    """The handle at each address where a chunk is mapped; all methods need the context to be current.

    Changes since the last `commit` can be undone.
    """

    def __init__(self, chunk_bytes: int, device: int):
        self._chunk_bytes, self._device = chunk_bytes, device
        self._handles: dict[int, int] = {}
        self._changes: list[tuple[int, int]] = []

    def map_run(self, address: int, handles: list[int]) -> None:
        """Map handles one after the other from `address` on and let the device touch them."""
        for place, handle in enumerate(handles):
            self._map(address + place * self._chunk_bytes, handle)
        if handles:
            cuda.allow_access(address, len(handles) * self._chunk_bytes, self._device)

    def unmap_run(self, address: int, count: int) -> None:
        """Unmap `count` chunks from `address` on."""
        for place in range(count):
            self._unmap(address + place * self._chunk_bytes)

    def commit(self) -> None:
        """What has been changed stays."""
        self._changes.clear()

    def undo(self) -> None:
        """Take back all changes since the last `commit`, newest first; raises CudaFailure where that fails."""
        while self._changes:
            address, handle = self._changes[-1]
            if address in self._handles:
                self._unmap(address)
            else:
                self.map_run(address, [handle])
            del self._changes[-2:]

    def close(self) -> None:
        """Unmap everything; what one failing call leaves does not keep the others from being made."""
        with ExitStack() as unmaps:
            while self._handles:
                address, _ = self._handles.popitem()
                unmaps.callback(cuda.unmap, address, self._chunk_bytes)

    def _map(self, address: int, handle: int) -> None:
        cuda.map_handle(address, self._chunk_bytes, handle)
        self._handles[address] = handle
        self._changes.append((address, handle))

    def _unmap(self, address: int) -> None:
        cuda.unmap(address, self._chunk_bytes)
        self._changes.append((address, self._handles.pop(address)))
