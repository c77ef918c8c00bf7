"""Which physical chunk lies at which position: every chunk belongs to one pool, positions run from 0 without a hole."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from hbmgym.memory_backend.oplog import KV, MOVE, OP, POOL_NAMES, SSM
from hbmgym.memory_backend.vmm.protocol import Vmm, VmmError


class Run(NamedTuple):
    """MOVE entries whose positions follow each other: chunks that leave the top of a pool and keep their order."""

    pool: int
    source: int
    """Position of the first chunk."""
    target_pool: int
    target: int
    """The first chunk's new position."""
    chunks: tuple[int, ...]

    def __str__(self) -> str:
        what = f"chunk {self.chunks[0]}" if len(self.chunks) == 1 else f"chunks {self.chunks[0]} to {self.chunks[-1]}"
        source, target = POOL_NAMES[self.pool], POOL_NAMES[self.target_pool]
        return f"MOVE of {what} from {source} position {self.source} to {target} position {self.target}"

    @property
    def reverse(self) -> "Run":
        """The run that undoes this one."""
        return Run(self.target_pool, self.target, self.pool, self.source, self.chunks)

    def stretches(self) -> Iterator["Run"]:
        """The run cut wherever the number of the next chunk is not the next number."""
        start = 0
        for stop in range(1, len(self.chunks) + 1):
            if stop == len(self.chunks) or self.chunks[stop] != self.chunks[stop - 1] + 1:
                yield self._replace(
                    source=self.source + start, target=self.target + start, chunks=self.chunks[start:stop]
                )
                start = stop


def top_moves(vmm: Vmm, pool: int, count: int) -> np.ndarray:
    """The op log (dtype `oplog.OP`, shape [count]) that takes the top `count` chunks of `pool` to the other pool."""
    chunks, free = vmm.chunk_at(pool), len(vmm.chunk_at(1 - pool))
    ops = np.zeros(count, OP)
    ops["kind"], ops["pool"], ops["target_pool"] = MOVE, pool, 1 - pool
    ops["source"] = np.arange(len(chunks) - count, len(chunks))
    ops["target"] = np.arange(free, free + count)
    ops["tag"] = chunks[len(chunks) - count :]
    return ops


def make_runs(ops: np.ndarray) -> list[Run]:
    """The fewest runs that make up MOVE entries (dtype `oplog.OP`, shape [n], n >= 1), in their order."""
    pool, source, target_pool, target = (ops[name] for name in ("pool", "source", "target_pool", "target"))
    same_pools = (pool[1:] == pool[:-1]) & (target_pool[1:] == target_pool[:-1])
    follows = same_pools & (source[1:] == source[:-1] + 1) & (target[1:] == target[:-1] + 1)
    edges = [0, *(np.flatnonzero(~follows) + 1).tolist(), len(ops)]
    return [
        Run(int(pool[i]), int(source[i]), int(target_pool[i]), int(target[i]), tuple(ops["tag"][i:stop].tolist()))
        for i, stop in pairwise(edges)
    ]


class Ownership:
    """Each pool is a stack of physical chunks: a run takes the top of one and puts it on top of the other."""

    def __init__(self, kv: Sequence[int], ssm: Sequence[int]):
        self._stacks = (list(kv), list(ssm))
        self.least = [len(kv), len(ssm)]
        """Fewest chunks each pool has had since this object was made."""
        self.most = [len(kv), len(ssm)]
        """Most chunks each pool has had since this object was made."""

    @classmethod
    def initial(cls, chunks: int, kv_chunks: int) -> "Ownership":
        """KV holds chunks 0..kv_chunks-1, SSM the rest, in order."""
        if not 0 <= kv_chunks <= chunks:
            raise VmmError(f"kv_chunks is {kv_chunks}, expected 0 to {chunks}, the chunks of the budget")
        return cls(range(kv_chunks), range(kv_chunks, chunks))

    def count(self, pool: int) -> int:
        """Chunks of `pool`; its positions are 0..count-1."""
        return len(self._stacks[pool])

    def chunk_at(self, pool: int) -> np.ndarray:
        """int64[count(pool)]: the physical chunk at each position."""
        return np.array(self._stacks[pool], dtype=np.int64)

    def after(self, runs: Iterable[Run]) -> "Ownership":
        """The ownership once `runs` are made, or VmmError at the first illegal one; this object stays as it is."""
        result = Ownership(*self._stacks)
        for run in runs:
            result._make(run)
        return result

    def _make(self, run: Run) -> None:
        if run.target_pool == run.pool:
            raise VmmError(f"{run}: both pools are the same")
        source, target = self._stacks[run.pool], self._stacks[run.target_pool]
        left = len(source) - len(run.chunks)
        if run.source != left:
            raise VmmError(f"{run}: not the top of {POOL_NAMES[run.pool]}, which has {len(source)} chunks")
        for found, chunk in zip(source[left:], run.chunks, strict=True):
            if found != chunk:
                raise VmmError(f"{run}: instead of chunk {chunk}, chunk {found} lies there")
        if run.target != len(target):
            problem = "is occupied" if 0 <= run.target < len(target) else "would leave a hole"
            raise VmmError(f"{run}: the target position {problem}, the free one is {len(target)}")
        del source[left:]
        target.extend(run.chunks)
        self.least[run.pool] = min(self.least[run.pool], len(source))
        self.most[run.target_pool] = max(self.most[run.target_pool], len(target))

    def check(self, chunks: int) -> None:
        """Raise VmmError unless the chunks 0..chunks-1 are owned exactly once."""
        owners = np.bincount(np.concatenate([self.chunk_at(KV), self.chunk_at(SSM)]), minlength=chunks)
        if len(owners) > chunks:
            raise VmmError(f"chunk {len(owners) - 1} is owned, but the budget has {chunks} chunks")
        wrong = np.flatnonzero(owners != 1)
        if wrong.size:
            raise VmmError(f"chunk {wrong[0]} is owned {owners[wrong[0]]} times")
