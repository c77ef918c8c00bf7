"""Waves against the plain definition of a conflict."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hbmgym.memory_backend.oplog import CHECK, COPY, KV, SSM
from hbmgym.memory_backend.vmm.waves import assign_waves
from tests.memory_backend.vmm.logs import check, copy, log, stamp, zero

BLOCKS = 4
Entry = tuple[int, ...]


def cut(*entries: Entry) -> tuple[list[int], int]:
    """(each entry's wave, number of waves); the scratch arrays are left as they were."""
    turns = [np.zeros((BLOCKS, 2), np.int32) for _ in (KV, SSM)]
    wave = np.full(len(entries), -1, np.int32)
    waves = assign_waves(log(*entries).view(np.recarray), *turns, wave)
    assert not any(some.any() for some in turns)
    return wave.tolist(), waves


def reads(entry: Entry) -> set[tuple[int, int]]:
    kind, pool, source = entry[:3]
    return {(pool, source)} if kind in (CHECK, COPY) else set()


def writes(entry: Entry) -> set[tuple[int, int]]:
    kind, pool, source, _, target, _ = entry
    return set() if kind == CHECK else {(pool, target if kind == COPY else source)}


def conflict(one: Entry, other: Entry) -> bool:
    return bool(writes(one) & (reads(other) | writes(other)) or reads(one) & writes(other))


pools, blocks = st.sampled_from((KV, SSM)), st.integers(0, BLOCKS - 1)
entries = st.one_of(
    st.builds(stamp, pools, blocks, st.integers(1, 9)),
    st.builds(check, pools, blocks, st.integers(1, 9)),
    st.builds(zero, pools, blocks),
    st.builds(copy, pools, blocks, blocks),
)


@settings(deadline=None)  # the first call compiles
@given(st.lists(entries, max_size=30))
def test_a_wave_is_the_first_above_all_earlier_conflicts(some: list[Entry]) -> None:
    wave, waves = cut(*some)
    for i, entry in enumerate(some):
        earlier = [wave[j] for j in range(i) if conflict(some[j], entry)]
        assert wave[i] == max(earlier, default=-1) + 1
    assert waves == max(wave, default=-1) + 1


def test_reads_of_one_block_share_a_wave() -> None:
    assert cut(check(KV, 1, 5), copy(KV, 1, 0), check(KV, 1, 5), copy(KV, 1, 2)) == ([0, 0, 0, 0], 1)


def test_blocks_of_different_pools_do_not_meet() -> None:
    assert cut(stamp(KV, 1, 5), stamp(SSM, 1, 6), check(SSM, 1, 6)) == ([0, 0, 1], 2)


def test_all_kinds_that_write_exclude_each_other() -> None:
    assert cut(stamp(KV, 0, 1), zero(KV, 0), stamp(KV, 0, 2), copy(KV, 1, 0)) == ([0, 1, 2, 3], 4)
