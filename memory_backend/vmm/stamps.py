"""Stamps in bytes: words inside a block that depend only on its tag and on their offset in the block.

A word is `tag ^ salt(offset)`, so that a block keeps its stamp wherever it is copied, and two chunks swapped inside
one block do not read back.

Every chunk that a block touches holds a part of one of its words, however the block lies against the chunk grid.
With L = block_bytes >= 16 and C = chunk_bytes, words start at 0, C, 2C, ... up to L - 16, and at L - 8. The bytes
between two neighbouring words are fewer than C: C - 8 between words of the grid, and the last grid word starts above
L - 16 - C, which leaves fewer than C bytes up to L - 8. A chunk inside the block has C bytes, so it cannot lie
between two words; the first and the last chunk hold the block's first and last byte, which belong to words.
"""

from typing import NamedTuple

import numpy as np

from hbmgym.memory_backend.jit import kernel
from hbmgym.memory_backend.oplog import CHECK, KV, STAMP

WORD_BYTES = 8
LEAST_BLOCK_BYTES = 2 * WORD_BYTES
NO_FAULT = -1


class StampedRange(NamedTuple):
    """One pool's virtual range as the kernel sees it."""

    data: np.ndarray
    """uint8[reserved bytes]; only mapped blocks may be touched."""
    block_bytes: int
    offsets: np.ndarray
    """int64[words]: where the words of a stamp start inside a block."""
    salts: np.ndarray
    """int64[words]: what the tag is mixed with at each offset."""


def word_offsets(block_bytes: int, chunk_bytes: int) -> np.ndarray:
    """int64[words]: where a stamp's words start inside a block of at least `LEAST_BLOCK_BYTES`."""
    grid = np.arange(0, block_bytes - LEAST_BLOCK_BYTES + 1, chunk_bytes, dtype=np.int64)
    return np.append(grid, block_bytes - WORD_BYTES)


def salts(offsets: np.ndarray) -> np.ndarray:
    """A scrambled int64 for each offset (the finaliser of splitmix64, Steele et al. 2014)."""
    x = (offsets.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))).view(np.int64)


@kernel
def write_word(data, at, word):
    """Store `word` at byte `at`, which need not be aligned."""
    for i in range(WORD_BYTES):
        data[at + i] = (word >> (8 * i)) & 255


@kernel
def holds_word(data, at, word):
    """Does byte `at` start with `word`?"""
    different = 0
    for i in range(WORD_BYTES):
        different |= data[at + i] ^ ((word >> (8 * i)) & 255)
    return different == 0


@kernel
def first_wrong_word(stamped, block, tag):
    """Index of the first word of `block` that is not of stamp `tag`, or NO_FAULT."""
    start = block * stamped.block_bytes
    for i in range(len(stamped.offsets)):
        if not holds_word(stamped.data, start + stamped.offsets[i], tag ^ stamped.salts[i]):
            return i
    return NO_FAULT


@kernel
def run_stamps(ops, start, kv, ssm):
    """Execute STAMPs and CHECKs from `start` on: (index of the entry it stopped at, CHECKs read back, wrong word).

    It stops at the end, at an entry of another kind, or at a CHECK that fails: only then is the wrong word's index
    not NO_FAULT.
    """
    checked = 0
    for i in range(start, len(ops)):
        op = ops[i]
        stamped = kv if op.pool == KV else ssm
        if op.kind == STAMP:
            for word in range(len(stamped.offsets)):
                at = op.source * stamped.block_bytes + stamped.offsets[word]
                write_word(stamped.data, at, op.tag ^ stamped.salts[word])
        elif op.kind == CHECK:
            wrong = first_wrong_word(stamped, op.source, op.tag)
            if wrong != NO_FAULT:
                return i, checked, wrong
            checked += 1
        else:
            return i, checked, NO_FAULT
    return len(ops), checked, NO_FAULT
