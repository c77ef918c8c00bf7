"""Which physical chunk lies at which position: every chunk belongs to one pool, positions run from 0 without a hole."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from hbmgym.memory_backend.oplog import KV, POOL_NAMES, SSM
from hbmgym.memory_backend.vmm.protocol import VmmError


class Move(NamedTuple):
    """One MOVE entry of the op log; the fields are in the order of `MOVE_FIELDS`."""

    pool: int
    source: int
    target_pool: int
    target: int
    chunk: int

    def __str__(self) -> str:
        source, target = POOL_NAMES[self.pool], POOL_NAMES[self.target_pool]
        return f"MOVE of chunk {self.chunk} from {source} position {self.source} to {target} position {self.target}"


MOVE_FIELDS = ["pool", "source", "target_pool", "target", "tag"]


class Ownership:
    """Each pool is a stack of physical chunks: a move takes the top of one and puts it on top of the other."""

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

    def after(self, moves: Iterable[Move]) -> "Ownership":
        """The ownership once `moves` are made, or VmmError at the first illegal one; this object stays as it is."""
        result = Ownership(*self._stacks)
        for move in moves:
            result._make(move)
        return result

    def _make(self, move: Move) -> None:
        if move.target_pool == move.pool:
            raise VmmError(f"{move}: both pools are the same")
        source, target = self._stacks[move.pool], self._stacks[move.target_pool]
        if move.source != len(source) - 1:
            raise VmmError(f"{move}: not the top of {POOL_NAMES[move.pool]}, which has {len(source)} chunks")
        if move.chunk != source[-1]:
            raise VmmError(f"{move}: chunk {source[-1]} lies there")
        if move.target != len(target):
            problem = "is occupied" if 0 <= move.target < len(target) else "would leave a hole"
            raise VmmError(f"{move}: the target position {problem}, the free one is {len(target)}")
        target.append(source.pop())
        self.least[move.pool] = min(self.least[move.pool], len(source))
        self.most[move.target_pool] = max(self.most[move.target_pool], len(target))

    def check(self, chunks: int) -> None:
        """Raise VmmError unless the chunks 0..chunks-1 are owned exactly once."""
        owners = np.bincount(np.concatenate([self.chunk_at(KV), self.chunk_at(SSM)]), minlength=chunks)
        if len(owners) > chunks:
            raise VmmError(f"chunk {len(owners) - 1} is owned, but the budget has {chunks} chunks")
        wrong = np.flatnonzero(owners != 1)
        if wrong.size:
            raise VmmError(f"chunk {wrong[0]} is owned {owners[wrong[0]]} times")
