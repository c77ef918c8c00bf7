"""What the paper's counts leave out, in figures."""

import pytest

from hbmgym.envs.traces.avmp_workloads import paper_requests
from hbmgym.eval.avmp_paper.harness import simulate
from hbmgym.eval.avmp_paper.sizes import GIB
from hbmgym.eval.avmp_paper.sweeps import SWEEPS, cells_of, run_cells
from hbmgym.eval.avmp_paper.variants import AVMP_DYNAMIC_B128, AVMP_STATIC_MR05, PADDED_UNIFIED

from .paper import JAMBA, MAMBA2

both = pytest.mark.parametrize("model", [JAMBA, MAMBA2], ids=lambda model: model.name)


def test_every_oom_is_a_kv_allocation_at_arrival_and_every_rebalance_goes_to_kv():
    outcomes = [result.outcome for result in run_cells(cells_of(SWEEPS["table1"]))]
    assert sum(outcome.kv_ooms_at_arrival for outcome in outcomes) == sum(outcome.oom_count for outcome in outcomes) > 0
    assert {outcome.ssm_ooms_at_arrival + outcome.ooms_at_growth for outcome in outcomes} == {0}
    assert all(outcome.rebalances_to_kv == outcome.rebalance_count for outcome in outcomes)


@pytest.mark.parametrize(("model", "lost"), [(JAMBA, 465), (MAMBA2, 498)], ids=lambda value: str(value))
def test_most_completed_requests_had_lost_something(model, lost):
    outcome = simulate(AVMP_STATIC_MR05, model, GIB, paper_requests("uniform_short", 0))
    assert (outcome.completed, outcome.completed - outcome.intact) == (507, lost)


@pytest.mark.parametrize(("model", "accepted", "rejected"), [(JAMBA, 9, 101), (MAMBA2, 1, 106)])
def test_most_rebalances_are_rejected(model, accepted, rejected):
    outcome = simulate(AVMP_DYNAMIC_B128, model, GIB, paper_requests("mixed_long", 0))
    assert (outcome.rebalance_count, outcome.rebalance_rejected) == (accepted, rejected)


@both
def test_padded_unified_frees_pages_of_others_all_the_time(model):
    assert simulate(PADDED_UNIFIED, model, GIB, paper_requests("uniform_short", 0)).foreign_frees > 1000
