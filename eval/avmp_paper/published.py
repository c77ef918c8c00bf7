"""The figures that were published: one row per sweep, variant, workload, model and pool size, over three seeds.

`published_aggregates.csv` holds the aggregates of the sweeps behind the paper's tables, from the repository
codepawl/cachepawl at commit 1b677d8 (MIT licence, copyright its authors); per-seed files were never published there.
"""

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("published_aggregates.csv")
SWEEPS = {"table1": "v2-throughput", "batch": "v2-batchsize", "threshold": "v2-threshold", "sharegpt": "v15-sharegpt"}
"""Our names for the sweeps, and theirs."""
FIGURES = (
    "oom_count_mean",
    "oom_count_std",
    "completion_ratio_median",
    "effective_batch_size_p50",
    "rebalance_count_median",
    "bytes_migrated_median",
    "bytes_wasted_median",
)


@dataclass(frozen=True, order=True)
class RowKey:
    """What an aggregate is over: all seeds of this."""

    variant: str
    workload: str
    model: str
    pool_bytes: int


Aggregate = dict[str, float]
"""By the names in FIGURES; what a sweep did not publish is left out."""


@cache
def published(sweep: str) -> dict[RowKey, Aggregate]:
    """The published aggregates of one of our sweeps, in their order; empty where nothing was published."""
    with SOURCE.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["sweep"] == SWEEPS.get(sweep)]
    return {
        RowKey(row["variant"], row["workload"], row["model"], int(row["pool_bytes"])): {
            name: float(row[name]) for name in FIGURES if row[name]
        }
        for row in rows
    }
