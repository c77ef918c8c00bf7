"""The driver without bytes: it keeps the owners of chunks and the stamp each block would hold."""

from typing import Any

import numpy as np

from hbmgym.memory_backend.jit import kernel
from hbmgym.memory_backend.oplog import CHECK, COPY, KV, POOL_NAMES, SSM, STAMP
from hbmgym.memory_backend.split import Layout
from hbmgym.memory_backend.vmm.driver import LogDriver
from hbmgym.memory_backend.vmm.ownership import Ownership, Run
from hbmgym.memory_backend.vmm.protocol import VmmError

NO_STAMP = 0


class AccountingVmm(LogDriver):
    """Follows the log in a table block -> stamp; a block loses its stamp with the first of its chunks that leaves."""

    name = "accounting"

    def __init__(self, layout: Layout, kv_chunks: int):
        super().__init__(layout, kv_chunks)
        self._stamps = tuple(
            np.full(layout.budget_bytes // block_bytes, NO_STAMP, dtype=np.int64) for block_bytes in self._block_bytes
        )

    def _move(self, runs: list[Run], after: Ownership) -> None:
        for pool, stamps in enumerate(self._stamps):
            stamps[after.least[pool] * self._chunk_bytes // self._block_bytes[pool] :] = NO_STAMP

    def _run_blocks(self, ops: np.ndarray) -> None:
        stop, checked = follow_stamps(ops, self._stamps[KV], self._stamps[SSM])
        self.stamps_checked += checked
        if stop < len(ops):
            op = ops[stop]
            found = int(self._stamps[op.pool][op.source])
            held = "none" if found == NO_STAMP else str(found)
            raise VmmError(f"{POOL_NAMES[op.pool]} block {op.source}: expected stamp {op.tag}, found {held}")

    def _base(self, pool: int) -> int:
        raise self._no_bytes()

    def _view(self, pool: int, start: int, length: int) -> Any:
        raise self._no_bytes()

    def _no_bytes(self) -> VmmError:
        return VmmError(f"accounting has no bytes to look at: open it with backend host or cuda (now it is {self.why})")


@kernel
def follow_stamps(ops, kv_stamps, ssm_stamps):
    """Apply entries to the stamp tables: (index of the first CHECK that fails or len(ops), CHECKs that read back)."""
    checked = 0
    for i in range(len(ops)):
        op = ops[i]
        stamps = kv_stamps if op.pool == KV else ssm_stamps
        if op.kind == STAMP:
            stamps[op.source] = op.tag
        elif op.kind == CHECK:
            if stamps[op.source] != op.tag:
                return i, checked
            checked += 1
        elif op.kind == COPY:
            stamps[op.target] = stamps[op.source]
        else:
            stamps[op.source] = NO_STAMP
    return len(ops), checked
