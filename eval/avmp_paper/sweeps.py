"""Which cells a sweep has, and running them."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from tqdm import tqdm

from hbmgym.envs.traces.avmp_workloads import PAPER_WORKLOADS, SHAREGPT, PaperRequests, paper_requests
from hbmgym.eval.avmp_paper.harness import Outcome, simulate
from hbmgym.eval.avmp_paper.sizes import GIB, MODELS
from hbmgym.eval.avmp_paper.variants import (
    AVMP_DYNAMIC_B128,
    AVMP_STATIC_MR05,
    BATCHES,
    FIXED_DUAL_MR05,
    HEADLINE,
    PADDED_UNIFIED,
    THRESHOLDS,
    Variant,
    avmp_dynamic,
    fixed_dual,
)

REPLICATES = 3
POOLS = (GIB, 4 * GIB)
SYNTHETIC = tuple(name for name in PAPER_WORKLOADS if name != SHAREGPT)
BASELINES = (PADDED_UNIFIED, FIXED_DUAL_MR05, AVMP_STATIC_MR05)
GRID_RATIOS = (
    *(0.01, 0.02, 0.03125, 0.05, 0.075, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45),
    *(0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95),
)


@dataclass(frozen=True)
class Sweep:
    """Variants on every workload, model, pool size and seed."""

    name: str
    variants: tuple[Variant, ...]
    workloads: tuple[str, ...] = SYNTHETIC
    references: tuple[Variant, ...] = ()
    """Not of the sweep, but its table shows them."""


@dataclass(frozen=True)
class Cell:
    """One run of the simulator."""

    sweep: str
    variant: Variant
    workload: str
    model: str
    pool_bytes: int
    replicate: int

    @property
    def seed(self) -> int:
        """As the paper counts."""
        return PAPER_WORKLOADS[self.workload].base_seed + self.replicate


@dataclass(frozen=True)
class Result:
    """A cell and what it counted."""

    cell: Cell
    outcome: Outcome


SWEEPS = {
    sweep.name: sweep
    for sweep in (
        Sweep("table1", HEADLINE),
        Sweep("batch", (*BASELINES, *(avmp_dynamic(batch) for batch in BATCHES))),
        Sweep("threshold", (*BASELINES, *THRESHOLDS), references=(AVMP_DYNAMIC_B128,)),
        Sweep("sharegpt", HEADLINE, (SHAREGPT,)),
        Sweep("static-grid", tuple(fixed_dual(ratio) for ratio in GRID_RATIOS), references=HEADLINE),
    )
}


def cells_of(sweep: Sweep, pools: Sequence[int] = POOLS) -> list[Cell]:
    """In the order in which they are written; those of the references come last."""
    return [
        Cell(sweep.name, variant, workload, model, pool_bytes, replicate)
        for variant in (*sweep.variants, *sweep.references)
        for workload in sweep.workloads
        for model in MODELS
        for pool_bytes in pools
        for replicate in range(REPLICATES)
    ]


def run_cells(
    cells: Sequence[Cell],
    prompt_pool: np.ndarray | None = None,
    *,
    recompute: bool = False,
    label: str = "",
    progress: bool = False,
) -> list[Result]:
    """In the order of the cells.

    In one process: a cell takes less than 10 ms, so that all 180 of a sweep are done before a second one has started.
    """
    traces = cache(lambda workload, replicate: paper_requests(workload, replicate, prompt_pool))
    watched = tqdm(cells, desc=label, disable=not progress, leave=False)
    return [Result(cell, _run(cell, traces(cell.workload, cell.replicate), recompute)) for cell in watched]


def _run(cell: Cell, requests: PaperRequests, recompute: bool) -> Outcome:
    return simulate(cell.variant, MODELS[cell.model], cell.pool_bytes, requests, recompute=recompute)


def under(cells: Iterable[Cell], **settings: Any) -> list[Cell]:
    """The same cells with other settings of the variant."""
    return [replace(cell, variant=replace(cell.variant, **settings)) for cell in cells]


WRITTEN = (
    *("oom_count", "completed", "submitted", "rebalance_count", "rebalance_rejected", "bytes_migrated"),
    *("bytes_wasted", "effective_batch_size_p50"),
)


def as_row(result: Result) -> dict[str, Any]:
    """A line of cells.json."""
    cell, counted = result.cell, asdict(result.outcome)
    row: dict[str, Any] = {
        "sweep": cell.sweep,
        "variant": cell.variant.name,
        "workload": cell.workload,
        "model": cell.model,
        "pool_bytes": cell.pool_bytes,
        "seed": cell.seed,
    }
    if cell.sweep == "static-grid":
        row["mamba_ratio"] = cell.variant.mamba_ratio
    return row | {name: counted[name] for name in WRITTEN}
