"""Which entries of a log may be executed together: the log is cut into waves.

Two entries conflict when both touch one block and at least one of them writes it. An entry's wave is the first that
lies above the waves of all earlier entries it conflicts with, so executing wave after wave, each in any order, gives
what the log gives.
"""

from hbmgym.memory_backend.jit import kernel
from hbmgym.memory_backend.oplog import CHECK, COPY, KV

READ, WRITE = 0, 1


@kernel
def assign_waves(ops, kv_turns, ssm_turns, wave):
    """Fill `wave` (int32[len(ops)]) for block entries; returns the number of waves.

    `turns` (int32[blocks, 2], zeros, and zeros again on return): the first wave that may read and the first that may
    write each block.
    """
    waves = 0
    for i in range(len(ops)):
        op = ops[i]
        turns = kv_turns if op.pool == KV else ssm_turns
        wave[i] = turns[op.source, READ if op.kind == CHECK or op.kind == COPY else WRITE]
        if op.kind == COPY:
            wave[i] = max(wave[i], turns[op.target, WRITE])
        after = wave[i] + 1
        if op.kind == CHECK or op.kind == COPY:
            turns[op.source, WRITE] = max(turns[op.source, WRITE], after)
        if op.kind != CHECK:
            written = op.target if op.kind == COPY else op.source
            turns[written, READ] = turns[written, WRITE] = after
        waves = max(waves, after)
    for i in range(len(ops)):
        op = ops[i]
        turns = kv_turns if op.pool == KV else ssm_turns
        for side in (READ, WRITE):
            turns[op.source, side] = 0
            if op.kind == COPY:
                turns[op.target, side] = 0
    return waves
