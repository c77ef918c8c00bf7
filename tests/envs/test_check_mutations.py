"""`--check` finds one lost, swapped or stale block: a real episode on a driver that is damaged exactly once."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest

from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.serving.core import Core
from hbmgym.memory_backend.oplog import CHECK, COPY, KV, MOVE, OP, OP_NAMES, SSM, STAMP, ZERO
from hbmgym.memory_backend.pools import NONE
from hbmgym.memory_backend.vmm import VmmError, VmmRefused
from tests.envs.episodes import SMALL_PAGE, Ask, make_episode, with_own_pages

# Blocks of a quarter of the model, so that 38 chunks run short and a slot lies on four or five of them.
CONFIG = ServingConfig(
    model="qwen3.5-4b", tensor_parallel=4, state_dtype="bf16", hbm_gib=0.075, page_tokens=SMALL_PAGE,
    prefill_budget=128, decode_snapshot_tokens=32, slots_per_request=1, window_s=0.1, ttft_slo_floor_s=0.1,
    chunk_move_s=1e-3,
)  # fmt: skip
EPISODE = make_episode(
    with_own_pages(
        [
            Ask(
                0.003 * i,
                340 + 40 * (i % 3),
                300 + 30 * (i % 4),
                ["document"] * 20 + [i % 5],
                [i - 4] if i > 4 and i % 4 == 3 else [],
            )
            for i in range(24)
        ],
        SMALL_PAGE,
    ),
    SMALL_PAGE,
)
SHARES = (0.2, 0.6, 0.1, 0.3)
BACKENDS = ("accounting", "host")


def start(backend: str) -> Core:
    core = Core(CONFIG, backend=backend, check=True)
    try:
        core.reset(EPISODE, SHARES[0])
    except VmmRefused as refusal:
        pytest.skip(str(refusal))
    return core


def windows(core: Core) -> Iterator[int]:
    """The number of each window, before it runs; the requested split changes with every one."""
    window = 0
    while not core.done:
        yield window
        core.run_window()
        window += 1
        core.request_split(SHARES[window % len(SHARES)])


def op_log(core: Core) -> np.ndarray:
    """Lets `core` finish: all that its backend executed."""
    parts, execute = [], core.vmm.execute

    def record(ops: np.ndarray) -> None:
        parts.append(ops.copy())
        execute(ops)

    core.vmm.execute = record
    for _ in windows(core):
        pass
    return np.concatenate(parts)


@cache
def undamaged() -> np.ndarray:
    return op_log(start("accounting"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_undamaged_episode_passes_and_does_all_that_can_go_wrong(backend: str) -> None:
    core = start(backend)
    assert np.array_equal(op_log(core), undamaged())
    assert set(undamaged()["kind"]) == set(range(len(OP_NAMES)))
    evictions, relocated = core.memory.kv.meta.evictions, core.memory.split.relocated_bytes
    assert evictions > 100 and relocated > 0 and core.moved_chunks > 50 and core.counters.preemptions > 0
    core.close()


# --- the op log


def dropped(ops: np.ndarray, at: int) -> np.ndarray:
    return np.delete(ops, at)


def to_neighbour(column: str) -> Callable[[np.ndarray, int], np.ndarray]:
    def redirected(ops: np.ndarray, at: int) -> np.ndarray:
        ops[column][at] += 1 if ops[column][at] == 0 else -1
        return ops

    return redirected


def reversed_copy(ops: np.ndarray, at: int) -> np.ndarray:
    ops["source"][at], ops["target"][at] = ops["target"][at], ops["source"][at]
    return ops


def stamped_before(ops: np.ndarray, at: int) -> np.ndarray:
    ops["tag"][at] = max(ops["tag"][at] - 1, 1) if ops["tag"][at] > 1 else 2
    return ops


def without_its_run(ops: np.ndarray, at: int) -> np.ndarray:
    others = np.flatnonzero(ops["kind"] != MOVE)
    first = max((i + 1 for i in others if i < at), default=0)
    return np.delete(ops, slice(first, min((i for i in others if i > at), default=len(ops))))


def is_read(at: int) -> bool:
    """Is what this entry of the undamaged log writes read before it is overwritten? A slot is stamped when it is taken,
    and then zeroed or copied over: nothing is lost with that first stamp."""
    log = undamaged()
    op, later = log[at], log[at + 1 :]
    block = op["target" if op["kind"] == COPY else "source"]
    here = (later["pool"] == op["pool"]) & (later["kind"] != MOVE)
    reads = here & np.isin(later["kind"], (CHECK, COPY)) & (later["source"] == block)
    writes = here & np.isin(later["kind"], (ZERO, STAMP)) & (later["source"] == block)
    writes |= here & (later["kind"] == COPY) & (later["target"] == block)
    return op["kind"] == MOVE or bool(np.argmax(reads | writes) == np.argmax(reads))


@cache
def numbers(kind: int) -> list[int]:
    """Which entries of a kind, counted over the episode, are worth damaging: five, first and last among them."""
    found = [n for n, at in enumerate(np.flatnonzero(undamaged()["kind"] == kind)) if is_read(int(at))]
    return [found[round(i)] for i in np.linspace(0, len(found) - 1, 5)]


LOG_DAMAGES = {
    "a stamp is lost": (STAMP, dropped),
    "a stamp goes to a neighbour": (STAMP, to_neighbour("source")),
    "a stamp is an older one": (STAMP, stamped_before),
    "a copy is lost": (COPY, dropped),
    "a copy goes to a neighbour": (COPY, to_neighbour("target")),
    "a copy comes from a neighbour": (COPY, to_neighbour("source")),
    "a copy goes backwards": (COPY, reversed_copy),
    "a run of moves is lost": (MOVE, without_its_run),
}


@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize("damage", LOG_DAMAGES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_entry_executed_wrongly_is_found_in_its_window(backend: str, damage: str, place: int) -> None:
    core = start(backend)
    kind, change = LOG_DAMAGES[damage]
    number = numbers(kind)[place]
    execute, seen, done = core.vmm.execute, 0, False

    def damaged(ops: np.ndarray) -> None:
        nonlocal seen, done
        at = np.flatnonzero(ops["kind"] == kind)
        if seen <= number < seen + len(at):
            ops, done = change(ops.copy(), at[number - seen]), True
        seen += len(at)
        execute(ops)

    core.vmm.execute = damaged
    with pytest.raises((VmmError, AssertionError)):
        for _ in windows(core):
            assert_not_missed(done, damage)
    assert done, "found before it happened"
    core.close()


def assert_not_missed(done: bool, damage: str) -> None:
    if done:
        pytest.fail(f"a whole window did not find that {damage}")


# --- memory, the backend's tables and the page tables


def used_blocks(core: Core, pool: int) -> list[int]:
    """The lowest and the highest block in use."""
    table = core.memory[pool].entry_at
    blocks = np.flatnonzero(table != NONE)
    return [int(blocks[0]), int(blocks[-1])]


def zero_block(core: Core, pool: int) -> None:
    core.vmm.execute(np.array([(ZERO, pool, used_blocks(core, pool)[1], pool, 0, 0)], OP))


def make_block_stale(core: Core, pool: int) -> None:
    block = used_blocks(core, pool)[0]
    tag = core.memory[pool].entries.tag[core.memory[pool].entry_at[block]] - 1
    core.vmm.execute(np.array([(STAMP, pool, block, pool, 0, max(tag, 1))], OP))


def swap_blocks(core: Core, pool: int) -> None:
    low, high = used_blocks(core, pool)
    if core.vmm.name == "accounting":
        swap(core.vmm._stamps[pool], low, high)
    else:
        size = (core.layout.page_bytes, core.layout.slot_bytes)[pool]
        swap(core.vmm.view(pool, 0, (high + 1) * size).reshape(-1, size), low, high)


def swap(rows: np.ndarray, one: int, other: int) -> None:
    rows[[one, other]] = rows[[other, one]]


def flip_stamp_byte(word: int, byte: int) -> Callable[[Core, int], None]:
    def flip(core: Core, pool: int) -> None:
        size = (core.layout.page_bytes, core.layout.slot_bytes)[pool]
        offsets = core.vmm._stamped[pool].offsets
        at = used_blocks(core, pool)[0] * size + int(offsets[word % len(offsets)]) + byte
        core.vmm.view(pool, at, 1)[0] ^= 0x10

    return flip


def swap_bytes_of_chunks(core: Core, pool: int) -> None:
    size, chunks = core.layout.chunk_bytes, len(core.vmm.chunk_at(pool))
    block_bytes = (core.layout.page_bytes, core.layout.slot_bytes)[pool]
    first = min(used_blocks(core, pool)[0] * block_bytes // size, chunks - 2)
    swap(core.vmm.view(pool, 0, chunks * size).reshape(chunks, size), first, first + 1)


def swap_mappings(core: Core, pool: int) -> None:
    from hbmgym.memory_backend.vmm import linux

    vmm, size = core.vmm, core.layout.chunk_bytes
    first, last = vmm.base(pool), vmm.base(pool) + (len(vmm.chunk_at(pool)) - 1) * size
    aside = linux.reserve_anywhere(size)
    for source, target in ((first, aside), (last, first), (aside, last)):
        linux.remap(source, size, target)
    linux.unmap(aside, size)


def swap_owners(core: Core, pool: int) -> None:
    stack = core.vmm._ownership._stacks[pool]
    stack[0], stack[-1] = stack[-1], stack[0]


def lose_chunk(core: Core, pool: int) -> None:
    del core.vmm._ownership._stacks[pool][0]


def own_twice(core: Core, pool: int) -> None:
    stacks = core.vmm._ownership._stacks
    stacks[pool][0] = stacks[1 - pool][0]


def swap_page_table_entries(core: Core, pool: int) -> None:
    entries, table = core.memory[pool].entries, core.memory[pool].entry_at
    one, other = (table[block] for block in used_blocks(core, pool))
    swap(entries.block, one, other)


def swap_page_table_and_its_inverse(core: Core, pool: int) -> None:
    swap_page_table_entries(core, pool)
    swap(core.memory[pool].entry_at, *used_blocks(core, pool))


def expect_another_stamp(core: Core, pool: int) -> None:
    entries, table = core.memory[pool].entries, core.memory[pool].entry_at
    entries.tag[table[used_blocks(core, pool)[0]]] += 1


ANYWHERE = {
    "a block is zeroed": zero_block,
    "a block holds what it held before": make_block_stale,
    "two blocks changed places": swap_blocks,
    "two owners changed places": swap_owners,
    "a chunk has no owner": lose_chunk,
    "a chunk has two owners": own_twice,
    "two entries of the page table changed places": swap_page_table_entries,
    "two entries changed places and so did their inverse": swap_page_table_and_its_inverse,
    "a page table entry has another stamp": expect_another_stamp,
}
WITH_BYTES = {
    "the first byte of a stamp flipped": flip_stamp_byte(0, 0),
    "a byte amid a stamp flipped": flip_stamp_byte(1, 3),
    "the last byte of a stamp flipped": flip_stamp_byte(-1, 7),
    "two chunks exchanged their bytes": swap_bytes_of_chunks,
    "two mappings changed places": swap_mappings,
}
DAMAGES: dict[str, Callable[[Any, int], None]] = ANYWHERE | WITH_BYTES
CASES = [(backend, damage) for backend in BACKENDS for damage in (DAMAGES if backend == "host" else ANYWHERE)]


@pytest.mark.parametrize("before", [2, 9])
@pytest.mark.parametrize("pool", [KV, SSM])
@pytest.mark.parametrize(("backend", "damage"), CASES)
def test_damage_between_two_windows_is_found_in_the_next(backend: str, damage: str, pool: int, before: int) -> None:
    core, done = start(backend), False
    with pytest.raises((VmmError, AssertionError)):
        for window in windows(core):
            assert_not_missed(done, damage)
            if window == before:
                DAMAGES[damage](core, pool)
                done = True
    assert done, "found before it happened"
    core.close()
