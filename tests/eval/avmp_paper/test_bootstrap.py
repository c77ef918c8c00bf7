"""Table 2's intervals, and the ones that resample traces."""

import pytest

from hbmgym.eval.avmp_paper.bootstrap import table2
from hbmgym.eval.avmp_paper.sweeps import SWEEPS, cells_of, run_cells


@pytest.fixture(scope="module")
def rows():
    return table2(run_cells(cells_of(SWEEPS["table1"])))


def test_every_public_interval_comes_out(rows):
    public = [row for row in rows if row.comparison.published]
    assert len(public) == 4
    for row in public:
        unit, digits = (100.0 / row.baseline, 1) if row.comparison.relative else (1.0, 2)
        ours = tuple(round(bound * unit, digits) for bound in (row.by_pair.low, row.by_pair.high))
        assert ours == row.comparison.published


def test_36_pairs_stand_on_9_traces(rows):
    assert {(row.comparison.workload is None, row.pairs, row.traces) for row in rows} == {(True, 36, 9), (False, 12, 3)}


def test_the_reduction_is_the_papers(rows):
    row = rows[3]
    assert (row.mean * row.pairs / 3, row.baseline * row.pairs / 3) == (pytest.approx(-42), pytest.approx(552))
    assert row.by_pair.excludes_zero and row.by_trace.excludes_zero


def test_static_avmp_and_batch_sizes_never_differ(rows):
    null = [row for row in rows if row.comparison.variant == "avmp_static_mr05" or row.comparison.figure != "oom_count"]
    assert len(null) == 4
    for row in null:
        assert row.by_pair == row.by_trace
        assert (row.mean, row.by_pair.low, row.by_pair.high) == (0.0, 0.0, 0.0)
