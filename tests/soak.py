"""A million random operations on the allocator over host memory, compared with a plain-Python model all the while.

`make soak`, or `python tests/soak.py --operations N --seed S`. Small chunks, so that relocations, moves and evictions
are frequent; blocks and counts are compared after every operation, the bytes of every block every few hundred.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for the model, which is no part of the package

from hbmgym.cli import option, parse_options, user_errors
from hbmgym.memory_backend.avmp import Avmp
from hbmgym.memory_backend.split import Layout
from hbmgym.memory_backend.vmm import VmmError
from tests.memory_backend.allocator_model import Comparison, random_step

LAYOUT = Layout(48 * 4096, 4096, 3_000, 10_000, min_slots=1, min_pages=1)
START = 0.5


@dataclass(frozen=True)
class SoakOptions:
    """How long, and from which seed."""

    operations: int = option(1_000_000, "random operations")
    seed: int = option(0, "seed of the operations")
    backend: str = option("host", "what holds the blocks", choices=("accounting", "host", "host-huge"))


def soak(options: SoakOptions) -> None:
    """Raises AssertionError or VmmError at the first disagreement."""
    rng = np.random.default_rng(options.seed)
    with Avmp.of_layout(LAYOUT, kv_share=START, backend=options.backend, migrate=None) as real:
        both = Comparison(real, START, holds_bytes=not real.stats().backend.startswith("accounting"))
        print(real.stats().backend)
        for step in tqdm(range(options.operations), unit="op", mininterval=1.0, disable=None):
            random_step(both, rng)
            both.compare(bytes_too=step % 500 == 0)
        both.compare()
        stats = real.stats()
    moves = stats.moves
    print(
        f"{options.operations:,} operations agreed with the model: {moves.accepted:,} runs of chunks, "
        f"{stats.moved_chunks:,} chunks moved, {moves.deferred:,} requests waited, "
        f"{stats.relocated_bytes // 1000:,} kB relocated, {stats.kv.evictions + stats.ssm.evictions:,} evictions"
    )


def main() -> None:
    """The command line."""
    options = parse_options(SoakOptions, __doc__ or "")
    with user_errors(VmmError):
        if options.operations < 1:
            raise ValueError(f"--operations is {options.operations}, expected an integer >= 1")
        Avmp.of_layout(LAYOUT, backend=options.backend).close()
    soak(options)


if __name__ == "__main__":
    main()
