"""Every published aggregate comes out exactly, and so do the paper's totals."""

import pytest

from hbmgym.eval.avmp_paper.aggregate import aggregates, differences, mib_per_cell, select, total
from hbmgym.eval.avmp_paper.published import FIGURES, published
from hbmgym.eval.avmp_paper.sizes import GIB
from hbmgym.eval.avmp_paper.sweeps import SWEEPS, Sweep, cells_of, run_cells
from hbmgym.eval.avmp_paper.variants import HEADLINE, avmp_dynamic, fixed_dual

from .paper import sharegpt_lengths


def rows_of(sweep: Sweep, pools=(GIB, 4 * GIB), prompt_pool=None):
    return aggregates(run_cells(cells_of(sweep, pools), prompt_pool))


def oom_total(rows, variant: str) -> float:
    return round(total(select(rows, variant), "oom_count_mean"), 1)


@pytest.mark.parametrize(
    ("sweep", "cells", "rows", "figures"),
    [("table1", 180, 60, 312), ("batch", 432, 144, 648), ("threshold", 252, 84, 348), ("sharegpt", 60, 20, 104)],
)
def test_every_published_figure_comes_out_exactly(sweep, cells, rows, figures):
    theirs = published(sweep)
    ours = rows_of(SWEEPS[sweep], prompt_pool=sharegpt_lengths() if sweep == "sharegpt" else None)
    own = [cell for cell in cells_of(SWEEPS[sweep]) if cell.variant not in SWEEPS[sweep].references]
    assert (len(own), len(theirs)) == (cells, rows)
    assert differences(ours, theirs) == (figures, [])


def test_a_figure_that_is_off_in_its_last_digit_is_named():
    key = next(iter(published("table1")))
    theirs = {key: {"oom_count_mean": 0.6666666666666667}}
    compared, lines = differences(published("table1"), theirs)
    assert compared == 1
    assert lines == [
        "padded_unified uniform_short jamba_1_5_mini 1073741824: "
        "oom_count_mean is 0.6666666666666666, published 0.6666666666666667"
    ]


def test_the_published_figures_hold_what_a_sweep_published_and_no_more():
    assert set(published("static-grid")) == set()
    assert {tuple(row) for row in published("table1").values()} == {FIGURES[:4], FIGURES}


def test_the_batch_sweep_has_the_papers_totals():
    rows = rows_of(SWEEPS["batch"])
    dynamic = [f"avmp_dynamic_b{2**power}" for power in range(9)]
    assert [oom_total(rows, name) for name in dynamic] == [552, 554.3, 552, 551, 549, 524.7, 521.3, 510, 509.3]
    assert total(select(rows, "avmp_dynamic_b128"), "rebalance_count_median") == 84
    migrated = [round(mib_per_cell(select(rows, f"avmp_dynamic_b{batch}")), 2) for batch in (128, 256)]
    assert migrated == [298.67, 336.0]


def test_with_8_gib_the_totals_of_the_older_sweeps_come_out():
    variants = (*HEADLINE[:4], avmp_dynamic(1))
    rows = rows_of(Sweep("older", variants), (GIB, 4 * GIB, 8 * GIB))
    assert [oom_total(rows, variant.name) for variant in variants] == [1826.3, 784.7, 1507.3, 784.7, 786.3]


@pytest.mark.parametrize(("ratio", "ooms"), [(0.1, 495.3), (0.03125, 512.7), (0.25, 536.7)])
def test_a_plain_static_split_has_so_many_ooms(ratio, ooms):
    variant = fixed_dual(ratio)
    rows = rows_of(Sweep("static", (variant,)))
    assert oom_total(rows, variant.name) == ooms
