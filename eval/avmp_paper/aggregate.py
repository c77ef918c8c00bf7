"""From cells to what the paper prints: aggregates over seeds, and totals over models and pool sizes."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from math import sqrt

import numpy as np

from hbmgym.eval.avmp_paper.published import Aggregate, RowKey
from hbmgym.eval.avmp_paper.sweeps import Result

MIB = 2**20


def aggregates(results: Iterable[Result]) -> dict[RowKey, Aggregate]:
    """Over the seeds: mean and population standard deviation of the OOM count, the median of everything else."""
    groups: dict[RowKey, list[Result]] = defaultdict(list)
    for result in results:
        cell = result.cell
        groups[RowKey(cell.variant.name, cell.workload, cell.model, cell.pool_bytes)].append(result)
    return {key: _aggregate(group) for key, group in groups.items()}


def _aggregate(group: Sequence[Result]) -> Aggregate:
    outcomes = [result.outcome for result in group]
    ooms = np.array([outcome.oom_count for outcome in outcomes], float)
    medians: dict[str, list[float]] = {
        "completion_ratio_median": [outcome.completed / outcome.submitted for outcome in outcomes],
        "effective_batch_size_p50": [outcome.effective_batch_size_p50 for outcome in outcomes],
        "rebalance_count_median": [outcome.rebalance_count for outcome in outcomes],
        "rebalance_rejected_median": [outcome.rebalance_rejected for outcome in outcomes],
        "bytes_migrated_median": [outcome.bytes_migrated for outcome in outcomes],
        "bytes_wasted_median": [outcome.bytes_wasted for outcome in outcomes],
    }
    return {
        "oom_count_mean": float(ooms.mean()),
        "oom_count_std": float(ooms.std()),
        **{name: float(np.median(values)) for name, values in medians.items()},
    }


def select(rows: Mapping[RowKey, Aggregate], variant: str, workload: str | None = None) -> list[Aggregate]:
    """The rows of a variant, on one workload or on all."""
    return [row for key, row in rows.items() if key.variant == variant and workload in (None, key.workload)]


def total(rows: Iterable[Aggregate], figure: str) -> float:
    """Sum over rows; the paper sums also medians in this way."""
    return sum(row[figure] for row in rows)


def total_deviation(rows: Iterable[Aggregate]) -> float:
    """Of a total OOM count: the root of the sum of squares."""
    return sqrt(sum(row["oom_count_std"] ** 2 for row in rows))


def mib_per_cell(rows: Sequence[Aggregate]) -> float:
    """Migrated, the mean over rows of medians."""
    return total(rows, "bytes_migrated_median") / len(rows) / MIB


def differences(ours: Mapping[RowKey, Aggregate], theirs: Mapping[RowKey, Aggregate]) -> tuple[int, list[str]]:
    """How many published figures were compared, and a line for each that is not ours to the last digit."""
    compared, lines = 0, []
    for key, row in theirs.items():
        for name, value in row.items():
            compared += 1
            if ours[key][name] != value:
                where = f"{key.variant} {key.workload} {key.model} {key.pool_bytes}"
                lines.append(f"{where}: {name} is {ours[key][name]!r}, published {value!r}")
    return compared, lines
