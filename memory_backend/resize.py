"""The four steps from the requested to the effective split.

To shrink a pool to C blocks: (1) stop handing out above C, (2) evict until live + cached <= C, (3) relocate what lies
above into the lowest free blocks, (4) if live alone exceeds C, go on when a request finishes.
Chunks leave the top of the shrinking pool for the top of the other in runs, each after its modelled time; a run keeps
its order, so that what was adjacent stays adjacent and moves as one.

Nothing is preempted for a resize: (1) binds whoever is admitted. Where requests that run may grow into all that is
mapped (`pages_grow`), free KV chunks stay with them until live <= C; otherwise a pool gives what it can.
"""

from hbmgym.memory_backend.invariants import InvariantError
from hbmgym.memory_backend.jit import kernel, subkernel
from hbmgym.memory_backend.oplog import COPY, KV, MOVE, record_op
from hbmgym.memory_backend.pools import NONE, change_block, relocate
from hbmgym.memory_backend.prefix_cache import NEVER, evict_page, evict_snapshot

RUN_CHUNKS = 256  # chunks per run: 19 ms at 75 us each, about one decode iteration


@subkernel
def _set_target(pool, target_chunks):
    meta = pool.meta
    meta.target_chunks = target_chunks
    meta.limit = min(meta.capacity, target_chunks * meta.chunk_bytes // meta.block_bytes)


@kernel
def request_split(memory, slots, ssm_chunks, now_s, chunk_move_s):
    """Ask for the split with `slots` slots on `ssm_chunks` chunks; replaces a pending request."""
    memory.split.requested_slots = slots
    _set_target(memory.ssm, ssm_chunks)
    _set_target(memory.kv, memory.split.chunks - ssm_chunks)
    shrinks_kv = memory.kv.meta.chunks > memory.kv.meta.target_chunks
    if memory.kv.meta.chunks == memory.kv.meta.target_chunks or shrinks_kv != (memory.split.run_from_kv != 0):
        memory.split.tick_s = NEVER  # a run on its way goes on if its direction is still right
    go_on_shrinking(memory, now_s, chunk_move_s)


@subkernel
def _movable_chunks(pool, wait_for_live):
    """Chunks at the top of a shrinking pool that its blocks in use, packed low, do not need."""
    meta = pool.meta
    if wait_for_live and meta.live > meta.limit:
        return 0
    in_use = -(-(meta.live + meta.cached) * meta.block_bytes // meta.chunk_bytes)
    return max(meta.chunks - max(meta.target_chunks, in_use), 0)


@subkernel
def _next_run(memory):
    """(from the KV pool?, chunks) of the next run; 0 chunks when nothing can move now."""
    from_kv = memory.kv.meta.chunks > memory.kv.meta.target_chunks
    if from_kv:
        movable = _movable_chunks(memory.kv, memory.split.pages_grow != 0)
    else:
        movable = _movable_chunks(memory.ssm, False)
    return from_kv, min(movable, memory.split.run_limit)


@subkernel
def go_on_shrinking(memory, now_s, chunk_move_s):
    """Evict down to the limits and schedule what can move; to be called after a request or whenever memory is freed."""
    _evict_to_limits(memory)
    _schedule_run(memory, now_s, chunk_move_s)


@subkernel
def _evict_to_limits(memory):
    while memory.ssm.meta.live + memory.ssm.meta.cached > memory.ssm.meta.limit and memory.ssm.meta.cached > 0:
        evict_snapshot(memory)
    while memory.kv.meta.live + memory.kv.meta.cached > memory.kv.meta.limit and memory.kv.meta.cached > 0:
        evict_page(memory)


@subkernel
def _schedule_run(memory, now_s, chunk_move_s):
    """If chunks can move and none are on their way, say when the next run arrives."""
    if memory.split.tick_s < NEVER or memory.kv.meta.chunks == memory.kv.meta.target_chunks:
        return
    from_kv, chunks = _next_run(memory)
    if chunks > 0:
        memory.split.run_chunks = chunks
        memory.split.run_from_kv = from_kv
        memory.split.tick_s = max(now_s, memory.split.worker_free_s) + chunks * chunk_move_s


@subkernel
def _clear_top(pool, log, capacity):
    """Relocate what lies at or above `capacity`; returns the bytes copied."""
    copied = 0
    for block in range(capacity, pool.meta.capacity):
        entry = pool.entry_at[block]
        if entry != NONE:
            if pool.entries[entry].block != block:
                raise InvariantError("entry_at does not invert the page table")
            relocate(pool, log, entry)
            copied += pool.meta.block_bytes
    return copied


@subkernel
def _set_chunks(pool, chunks):
    meta = pool.meta
    meta.chunks = chunks
    meta.capacity = chunks * meta.chunk_bytes // meta.block_bytes
    meta.limit = min(meta.capacity, meta.target_chunks * meta.chunk_bytes // meta.block_bytes)


@subkernel
def _move_top_chunks(memory, donor, recipient, count):
    for i in range(count):
        source = donor.meta.chunks - count + i
        target = recipient.meta.chunks + i
        chunk = memory.chunk_at[donor.meta.pool, source]
        memory.chunk_at[donor.meta.pool, source] = NONE
        memory.chunk_at[recipient.meta.pool, target] = chunk
        record_op(memory.log, MOVE, donor.meta.pool, source, recipient.meta.pool, target, chunk)


@subkernel
def _move_chunks(memory, from_kv, count):
    """Move the top chunks of one pool onto the top of the other; returns the bytes copied to clear their way."""
    donor = memory.kv if from_kv else memory.ssm
    recipient = memory.ssm if from_kv else memory.kv
    left = donor.meta.chunks - count
    copied = _clear_top(donor, memory.log, left * donor.meta.chunk_bytes // donor.meta.block_bytes)
    _move_top_chunks(memory, donor, recipient, count)
    _set_chunks(donor, left)
    _set_chunks(recipient, recipient.meta.chunks + count)
    memory.split.moved_chunks += count
    memory.split.relocated_bytes += copied
    return copied


@subkernel
def run_arrives(memory, chunk_move_s, copy_s_per_byte):
    """Move the run that is due and schedule the next; returns (chunks moved, bytes copied to clear their way)."""
    split = memory.split
    due_s = split.tick_s
    split.tick_s = NEVER
    from_kv, movable = _next_run(memory)
    count = min(movable, split.run_chunks)
    copied = _move_chunks(memory, from_kv, count)
    split.worker_free_s = due_s + copied * copy_s_per_byte
    _schedule_run(memory, due_s, chunk_move_s)
    return count, copied


@subkernel
def ssm_chunks_of(memory, slots):
    """SSM chunks of the split with `slots` slots."""
    return -(-slots * memory.ssm.meta.block_bytes // memory.ssm.meta.chunk_bytes)


@subkernel
def most_slots_beside(memory, pages):
    """Slots of the split that leaves room for `pages` pages and has most slots; below 0 where the budget cannot hold
    so many pages."""
    kv, ssm = memory.kv.meta, memory.ssm.meta
    chunks = memory.split.chunks - -(-pages * kv.block_bytes // kv.chunk_bytes)
    return min(chunks * ssm.chunk_bytes // ssm.block_bytes, memory.split.max_slots)


@subkernel
def change_split_now(memory, slots):
    """Take the split with `slots` slots at once; returns (chunks moved, bytes copied to clear their way).

    What is live must fit, and no request may be under way.
    """
    kv, ssm = memory.kv, memory.ssm
    if kv.meta.chunks != kv.meta.target_chunks:
        raise InvariantError("a requested split is under way")
    ssm_chunks = ssm_chunks_of(memory, slots)
    memory.split.requested_slots = slots
    _set_target(ssm, ssm_chunks)
    _set_target(kv, memory.split.chunks - ssm_chunks)
    _evict_to_limits(memory)
    if kv.meta.live > kv.meta.limit or ssm.meta.live > ssm.meta.limit:
        raise InvariantError("live blocks are in the way")
    count = abs(kv.meta.chunks - kv.meta.target_chunks)
    return count, _move_chunks(memory, kv.meta.chunks > kv.meta.target_chunks, count)


@subkernel
def undo_run(memory):
    """Take back the run that the op log holds, newest entry first; what was evicted for it stays evicted."""
    log, split = memory.log, memory.split
    for i in range(log.head.count - 1, -1, -1):
        op = log.ops[i]
        pool = memory.kv if op.pool == KV else memory.ssm
        if op.kind == COPY:
            change_block(pool, pool.entry_at[op.target], op.source)
            split.relocated_bytes -= pool.meta.block_bytes
        elif op.kind == MOVE:
            recipient = memory.ssm if op.pool == KV else memory.kv
            memory.chunk_at[op.target_pool, op.target] = NONE
            memory.chunk_at[op.pool, op.source] = op.tag
            _set_chunks(pool, pool.meta.chunks + 1)
            _set_chunks(recipient, recipient.meta.chunks - 1)
            split.moved_chunks -= 1


@subkernel
def withdraw_request(memory):
    """Be content with the chunks as they are mapped."""
    memory.split.tick_s = NEVER
    _set_target(memory.kv, memory.kv.meta.chunks)
    _set_target(memory.ssm, memory.ssm.meta.chunks)
    memory.split.requested_slots = memory.ssm.meta.capacity
