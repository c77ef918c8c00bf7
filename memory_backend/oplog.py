"""The op log: what the core decided about physical memory, in order, for a Vmm to execute.

| kind  | pool        | source         | target_pool | target        | tag   |
|-------|-------------|----------------|-------------|---------------|-------|
| ZERO  | pool        | block          |             |               |       |
| STAMP | pool        | block          |             |               | stamp |
| COPY  | pool        | from block     | same pool   | to block      |       |
| MOVE  | from pool   | from position  | to pool     | to position   | chunk |
| CHECK | pool        | block          |             |               | stamp |

Blocks are physical block numbers of a pool, positions are chunk-sized places of a pool's virtual range.
A log says at its `level` what it keeps: nothing, what changes bytes (ZERO, COPY, MOVE), or stamps and checks as well.
"""

from typing import NamedTuple

import numpy as np

from hbmgym.memory_backend.jit import kernel

KV, SSM = 0, 1
POOL_NAMES = ("kv", "ssm")
ZERO, STAMP, COPY, MOVE, CHECK = range(5)
OP_NAMES = ("ZERO", "STAMP", "COPY", "MOVE", "CHECK")

OP = np.dtype(
    [("kind", "i4"), ("pool", "i4"), ("source", "i8"), ("target_pool", "i4"), ("target", "i8"), ("tag", "i8")],
    align=True,
)
NOTHING, BYTES, EVERYTHING = range(3)

HEAD = np.dtype([("count", "i8"), ("level", "i8"), ("next_tag", "i8")], align=True)


class OpLog(NamedTuple):
    """`ops[:head.count]` wait to be executed; `head.next_tag` makes every stamp unique."""

    head: np.record
    ops: np.recarray


def make_op_log(capacity: int, level: int) -> OpLog:
    """An empty log; whatever its level drops, it hands out stamps."""
    head = np.zeros(1, HEAD).view(np.recarray)[0]
    head.level, head.next_tag = level, 1
    return OpLog(head, np.zeros(1 if level == NOTHING else capacity, OP).view(np.recarray))


@kernel
def record_op(log, kind, pool, source, target_pool, target, tag):
    """Append one entry, if the log keeps entries of its kind."""
    if log.head.level < EVERYTHING and (log.head.level == NOTHING or kind in (STAMP, CHECK)):
        return
    op = log.ops[log.head.count]
    op.kind = kind
    op.pool = pool
    op.source = source
    op.target_pool = target_pool
    op.target = target
    op.tag = tag
    log.head.count += 1
