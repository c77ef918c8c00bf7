"""The paper's tables in Markdown, published and reproduced values side by side."""

from collections.abc import Iterable, Mapping, Sequence

from hbmgym.eval.avmp_paper.aggregate import aggregates, mib_per_cell, select, total, total_deviation
from hbmgym.eval.avmp_paper.bootstrap import BASELINE, Comparison, Interval, Row, table2
from hbmgym.eval.avmp_paper.published import Aggregate, RowKey, published
from hbmgym.eval.avmp_paper.sweeps import Result, Sweep
from hbmgym.eval.avmp_paper.variants import AVMP_DYNAMIC_B128, Variant

Rows = Mapping[RowKey, Aggregate]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; all columns but the first are set flush right."""
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables(sweep: Sweep, results: Sequence[Result]) -> dict[str, str]:
    """What the paper shows of a sweep: title and table."""
    ours, theirs = aggregates(results), published(sweep.name)
    if sweep.name == "table1":
        return {"Table 1: OOM count": oom_table(sweep, ours, theirs), "Table 2: differences": difference_table(results)}
    if sweep.name == "sharegpt":
        return {"ShareGPT: OOM count, laid out as Table 1": oom_table(sweep, ours, theirs)}
    if sweep.name == "batch":
        return {"Table 5: migration batch size": batch_table(sweep, ours, theirs)}
    if sweep.name == "threshold":
        return {"Table 6: thresholds": threshold_table(sweep, ours, theirs)}
    return {"Static splits (not in the paper)": grid_table(sweep, ours)}


def oom_table(sweep: Sweep, ours: Rows, theirs: Rows) -> str:
    """Sums over models and pool sizes of mean OOM counts; the total with its standard deviation over seeds."""
    header = ["Variant"]
    for column in (*sweep.workloads, "Total"):
        header += [f"{column}, paper", "ours"]
    return markdown(header, (_oom_cells(variant, sweep, ours, theirs) for variant in sweep.variants))


def _oom_cells(variant: Variant, sweep: Sweep, ours: Rows, theirs: Rows) -> list[str]:
    cells = [variant.name]
    for workload in sweep.workloads:
        cells += [_ooms(rows, variant, workload) for rows in (theirs, ours)]
    for rows in (theirs, ours):
        cells.append(f"{_ooms(rows, variant)} ± {total_deviation(select(rows, variant.name)):.1f}")
    return cells


def _ooms(rows: Rows, variant: Variant, workload: str | None = None) -> str:
    return f"{total(select(rows, variant.name, workload), 'oom_count_mean'):.1f}"


def batch_table(sweep: Sweep, ours: Rows, theirs: Rows) -> str:
    """OOM counts by batch size; the last columns say what the migrations came to, over the 12 rows."""
    header = ["batch_size"]
    for column in (*sweep.workloads, "Total"):
        header += [f"{column}, paper", "ours"]
    header += ["rebalances, paper", "ours", "rejected, ours", "MiB per cell, paper", "ours"]
    return markdown(header, (_batch_cells(v, sweep, ours, theirs) for v in sweep.variants if v.dynamic))


def _batch_cells(variant: Variant, sweep: Sweep, ours: Rows, theirs: Rows) -> list[str]:
    cells = [str(variant.batch)]
    for workload in (*sweep.workloads, None):
        cells += [_ooms(rows, variant, workload) for rows in (theirs, ours)]
    cells += [_count(rows, variant, "rebalance_count_median") for rows in (theirs, ours)]
    cells.append(_count(ours, variant, "rebalance_rejected_median"))
    return cells + [f"{mib_per_cell(select(rows, variant.name)):.1f}" for rows in (theirs, ours)]


def _count(rows: Rows, variant: Variant, figure: str) -> str:
    return f"{total(select(rows, variant.name), figure):.0f}"


def threshold_table(sweep: Sweep, ours: Rows, theirs: Rows) -> str:
    """The prototype's threshold sweep, and the default beside it, which the paper takes from the batch sweep."""
    reference = {key: row for key, row in published("batch").items() if key.variant == AVMP_DYNAMIC_B128.name}
    theirs = {**theirs, **reference}
    header = ["Variant", "threshold_low", "threshold_high", "total_oom, paper", "ours"]
    header += ["rebalance_count, paper", "ours", "rejected, ours"]
    rows = []
    for variant in (*sweep.references, *(v for v in sweep.variants if v.dynamic)):
        cells = [variant.name, f"{variant.low:.2f}", f"{variant.high:.2f}"]
        cells += [_ooms(rows_, variant) for rows_ in (theirs, ours)]
        cells += [_count(rows_, variant, "rebalance_count_median") for rows_ in (theirs, ours)]
        rows.append([*cells, _count(ours, variant, "rebalance_rejected_median")])
    return markdown(header, rows)


def grid_table(sweep: Sweep, ours: Rows) -> str:
    """OOM counts of two plain pools, and what the paper compares, for reference."""
    header = ["Variant", "mamba_ratio", *sweep.workloads, "Total"]
    rows = []
    for variant in (*sweep.variants, *sweep.references):
        ratio = "" if variant.unified else f"{variant.mamba_ratio:g}"
        counts = [_ooms(ours, variant, workload) for workload in (*sweep.workloads, None)]
        rows.append([variant.name, ratio, *counts])
    return markdown(header, rows)


def difference_table(results: Sequence[Result]) -> str:
    """The count rows of Table 2; the last interval is not the paper's."""
    return markdown(DIFFERENCE_HEADER, map(difference_cells, table2(results)))


DIFFERENCE_HEADER = (
    *("Comparison", "Workload", "pairs", "Mean difference per cell", "95 %, paper", "95 %, ours", "significant"),
    *("traces", "95 %, traces resampled", "significant"),
)


def difference_cells(row: Row, baseline: str = BASELINE) -> list[str]:
    """One row of Table 2."""
    comparison = row.comparison
    return [
        f"{comparison.variant} - {baseline}, {comparison.figure}",
        comparison.workload or "all",
        str(row.pairs),
        f"{row.mean:+.2f}",
        _published(comparison),
        _text(row.by_pair, 100.0 / row.baseline if comparison.relative else None),
        _yes(row.by_pair),
        str(row.traces),
        _text(row.by_trace),
        _yes(row.by_trace),
    ]


def _published(comparison: Comparison) -> str:
    if comparison.published is None:
        return "not public"
    low, high = comparison.published
    return f"[{low:+.1f} %, {high:+.1f} %]" if comparison.relative else f"[{low:+.2f}, {high:+.2f}]"


def _text(interval: Interval, percent: float | None = None) -> str:
    text = f"[{interval.low:+.2f}, {interval.high:+.2f}]"
    return text if percent is None else f"{text} = [{interval.low * percent:+.1f} %, {interval.high * percent:+.1f} %]"


def _yes(interval: Interval) -> str:
    return "yes" if interval.excludes_zero else "no"
