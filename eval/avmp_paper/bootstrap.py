"""The paper's Table 2: intervals of differences between variants, paired by cell; and the same with traces resampled.

The 36 pairs of a comparison over all workloads stand on 9 distinct traces: models and pool sizes see the same ones, and
everything else is deterministic. Resampling pairs treats them as 36 observations.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hbmgym.eval.avmp_paper.sweeps import SYNTHETIC, Result

RESAMPLES = 10_000
SEED = 20260520
BASELINE = "fixed_dual_mr05"


@dataclass(frozen=True)
class Comparison:
    """variant - BASELINE of one figure, on one workload or on all of them."""

    variant: str
    figure: str
    workload: str | None
    published: tuple[float, float] | None = None
    """The interval where it is public, rounded as there."""
    relative: bool = False
    """The published interval is one of percent of the baseline's mean."""


@dataclass(frozen=True)
class Interval:
    """95 %, percentiles of the resampled means."""

    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """What the paper calls significant."""
        return self.low > 0.0 or self.high < 0.0


@dataclass(frozen=True)
class Row:
    """A comparison with both intervals."""

    comparison: Comparison
    pairs: int
    traces: int
    mean: float
    baseline: float
    """The baseline's mean."""
    by_pair: Interval
    by_trace: Interval


_SKIPPED = 3
"""Before the other rows the paper's generator draws for three rows on goodput, which no count can reproduce."""
OOM_ROWS = (
    Comparison("avmp_dynamic_b128", "oom_count", "uniform_short", (0.0, 1.25)),
    Comparison("avmp_dynamic_b128", "oom_count", "mixed_long", (-10.33, -1.33)),
    Comparison("avmp_dynamic_b128", "oom_count", "agentic_burst", (-9.25, -1.33)),
    Comparison("avmp_dynamic_b128", "oom_count", None, (-12.7, -3.0), relative=True),
)
OTHER_ROWS = (
    Comparison("avmp_static_mr05", "oom_count", None),
    Comparison("fixed_dual_mr09", "oom_count", None),
    Comparison("padded_unified", "oom_count", None),
    *(Comparison("avmp_dynamic_b128", "effective_batch_size_p50", workload) for workload in SYNTHETIC),
)


def table2(results: Sequence[Result]) -> list[Row]:
    """The count rows of Table 2, with one generator for all of them in the paper's order."""
    rng = np.random.default_rng(SEED)
    rows = [compare(results, row, rng) for row in OOM_ROWS]
    pairs = rows[0].pairs
    for _ in range(_SKIPPED):
        rng.integers(0, pairs, size=(RESAMPLES, pairs))
    return [*rows, *(compare(results, row, rng) for row in OTHER_ROWS)]


def compare(
    results: Sequence[Result], comparison: Comparison, rng: np.random.Generator, baseline: str = BASELINE
) -> Row:
    """`rng` resamples the pairs, a generator of its own the traces."""
    differences, traces, reference = _differences(results, comparison, baseline)
    by_trace = np.array([differences[traces == trace].mean() for trace in range(traces.max() + 1)])
    return Row(
        comparison,
        len(differences),
        len(by_trace),
        float(differences.mean()),
        reference,
        _interval(differences, rng),
        # Every trace has equally many pairs, so the mean over traces is the mean over pairs.
        _interval(by_trace, np.random.default_rng(SEED)),
    )


def _interval(values: np.ndarray, rng: np.random.Generator) -> Interval:
    means = values[rng.integers(0, len(values), size=(RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(low), float(high))


def _differences(
    results: Sequence[Result], comparison: Comparison, baseline: str
) -> tuple[np.ndarray, np.ndarray, float]:
    """Of each pair, sorted by workload, model, pool size and seed; the trace behind it; and the baseline's mean."""

    def values(variant: str) -> dict[tuple[str, str, int, int], float]:
        return {
            (cell.workload, cell.model, cell.pool_bytes, cell.seed): getattr(result.outcome, comparison.figure)
            for result in results
            if (cell := result.cell).variant.name == variant and comparison.workload in (None, cell.workload)
        }

    ours, reference = values(comparison.variant), values(baseline)
    assert ours.keys() == reference.keys() and ours, (comparison, baseline)
    keys = sorted(ours)
    traces = {trace: number for number, trace in enumerate(sorted({(key[0], key[3]) for key in keys}))}
    differences = np.array([ours[key] - reference[key] for key in keys], float)
    mean = float(np.mean(list(reference.values())))
    return differences, np.array([traces[key[0], key[3]] for key in keys]), mean
