"""The allocator's rules once more, in plain Python, and random steps that compare it with the real one."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hbmgym.memory_backend.avmp import Avmp, OutOfBlocks
from hbmgym.memory_backend.split import Layout

KINDS = ("kv", "ssm")


@dataclass
class PoolModel:
    """Blocks of one kind by name."""

    block_bytes: int
    chunk_bytes: int
    chunks: int
    target: int
    at: dict[int, int] = field(default_factory=dict)
    pins: dict[int, int] = field(default_factory=dict)
    cached: dict[int, None] = field(default_factory=dict)
    """In the order of eviction."""

    def holds(self, chunks: int) -> int:
        return chunks * self.chunk_bytes // self.block_bytes

    @property
    def limit(self) -> int:
        return self.holds(min(self.chunks, self.target))

    def lowest_free(self) -> int:
        used = set(self.at.values())
        return next(block for block in range(len(used) + 1) if block not in used)

    def forget(self, name: int) -> None:
        del self.at[name], self.pins[name]
        self.cached.pop(name, None)

    def evict_to(self, in_use: int) -> None:
        while len(self.at) > in_use and self.cached:
            self.forget(next(iter(self.cached)))


class AllocatorModel:
    """Allocates, frees, pins and moves as Avmp must; names are any integers that the caller chooses."""

    def __init__(self, layout: Layout, kv_share: float):
        self.layout = layout
        kv = layout.kv_chunks(layout.slots(kv_share))
        ssm = layout.chunks - kv
        self.kv = PoolModel(layout.page_bytes, layout.chunk_bytes, kv, kv)
        self.ssm = PoolModel(layout.slot_bytes, layout.chunk_bytes, ssm, ssm)
        self.moved_chunks = self.relocated_bytes = 0

    def pool(self, kind: str) -> PoolModel:
        return self.kv if kind == "kv" else self.ssm

    def room(self, kind: str) -> int:
        """Blocks that can be had, with eviction."""
        pool = self.pool(kind)
        return max(pool.limit - (len(pool.at) - len(pool.cached)), 0)

    def allocate(self, kind: str, names: list[int]) -> None:
        pool = self.pool(kind)
        for name in names:
            pool.evict_to(pool.limit - 1)
            pool.at[name], pool.pins[name] = pool.lowest_free(), 1

    def free(self, names: list[int]) -> None:
        for name in names:
            (self.kv if name in self.kv.at else self.ssm).forget(name)
        self._go_on()

    def pin(self, names: list[int]) -> None:
        for name in names:
            pool = self.kv if name in self.kv.at else self.ssm
            pool.pins[name] += 1
            pool.cached.pop(name, None)

    def unpin(self, names: list[int]) -> None:
        for name in names:
            pool = self.kv if name in self.kv.at else self.ssm
            pool.pins[name] -= 1
            if pool.pins[name] == 0:
                pool.cached[name] = None
        self._go_on()

    def request_split(self, kv_share: float) -> None:
        self.kv.target = self.layout.kv_chunks(self.layout.slots(kv_share))
        self.ssm.target = self.layout.chunks - self.kv.target
        self._go_on()

    def _go_on(self) -> None:
        if self.kv.chunks == self.kv.target:
            return
        donor, recipient = (self.kv, self.ssm) if self.kv.chunks > self.kv.target else (self.ssm, self.kv)
        for pool in (self.kv, self.ssm):
            pool.evict_to(pool.limit)
        needed = -(-len(donor.at) * donor.block_bytes // donor.chunk_bytes)
        count = donor.chunks - max(donor.target, needed)
        if count <= 0:
            return
        kept = donor.holds(donor.chunks - count)
        for name in sorted(donor.at, key=donor.at.__getitem__):
            if donor.at[name] >= kept:
                donor.at[name] = donor.lowest_free()
                self.relocated_bytes += donor.block_bytes
        donor.chunks -= count
        recipient.chunks += count
        self.moved_chunks += count


class Comparison:
    """An allocator and its model, taken through the same steps; with bytes, every block holds a content of its own."""

    def __init__(self, real: Avmp, kv_share: float, *, holds_bytes: bool):
        self.real, self.holds_bytes = real, holds_bytes
        self.model = AllocatorModel(real.layout, kv_share)
        self.content: dict[int, int] = {}
        self._next_content = 1

    def known(self, kind: str) -> list[int]:
        return sorted(self.model.pool(kind).at)

    def allocate(self, kind: str, count: int) -> list[int]:
        if count > self.model.room(kind):
            try:
                self.real.allocate(kind, count)
            except OutOfBlocks:
                return []
            raise AssertionError(f"{count} {kind} blocks out of {self.model.room(kind)}")
        handles = [int(handle) for handle in self.real.allocate(kind, count)]
        self.model.allocate(kind, handles)
        for handle in handles:
            self._fill(handle, must_be_zero=kind == "ssm")
        return handles

    def free(self, handles: list[int]) -> None:
        self.real.free(handles)
        self.model.free(handles)

    def pin(self, handles: list[int]) -> None:
        self.real.pin(handles)
        self.model.pin(handles)

    def unpin(self, handles: list[int]) -> None:
        self.real.unpin(handles)
        self.model.unpin(handles)

    def request_split(self, kv_share: float) -> None:
        self.real.request_split(kv_share)
        self.model.request_split(kv_share)

    def _fill(self, handle: int, *, must_be_zero: bool) -> None:
        if not self.holds_bytes:
            return
        view = self.real.view(handle)
        assert not must_be_zero or not view.any(), "a new slot is not zero"
        self.content[handle] = self._next_content
        view[:] = _pattern(self._next_content, len(view))
        self._next_content += 1

    def compare(self, *, bytes_too: bool = True) -> None:
        """Assert that blocks, counts and, at choice, contents and the backend's mappings are the same."""
        stats = self.real.stats()
        for kind, found in (("kv", stats.kv), ("ssm", stats.ssm)):
            pool = self.model.pool(kind)
            handles = np.array(self.known(kind), np.uint64)
            assert self.real.resolve(handles).tolist() == [pool.at[int(handle)] for handle in handles]
            expected = (
                pool.chunks,
                len(pool.at) - len(pool.cached),
                len(pool.cached),
                max(pool.limit - len(pool.at), 0),
            )
            assert (found.chunks, found.live, found.cached, found.free) == expected, kind
            if self.holds_bytes and bytes_too:
                for handle in self.known(kind):
                    self.compare_bytes(handle)
        assert (stats.moved_chunks, stats.relocated_bytes) == (self.model.moved_chunks, self.model.relocated_bytes)
        if bytes_too:
            self.real.check()

    def compare_bytes(self, handle: int) -> None:
        view = self.real.view(handle)
        assert np.array_equal(view, _pattern(self.content[handle], len(view))), f"{handle:#x} lost its bytes"


def _pattern(content: int, length: int) -> Any:
    return ((np.arange(length) // 7 + content * 31) % 251).astype(np.uint8)


def random_step(comparison: Comparison, rng: np.random.Generator) -> None:
    """One random operation on both."""
    kind = KINDS[rng.integers(2)]
    known = comparison.known(kind)
    pins = comparison.model.pool(kind).pins
    some = [known[i] for i in rng.permutation(len(known))[: rng.integers(1, 6)]]
    match rng.integers(8):
        case 0 | 1 | 2:
            comparison.allocate(kind, int(rng.integers(1, 7)))
        case 3:
            comparison.free([name for name in some if pins[name] <= 1])
        case 4:
            comparison.pin(some)
        case 5 | 6:
            comparison.unpin([name for name in some if pins[name] > 0])
        case _:
            comparison.request_split(float(rng.random()))
