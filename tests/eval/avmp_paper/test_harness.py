"""Events and what they count, on requests that can be followed by hand."""

import dataclasses

import numpy as np
import pytest

from hbmgym.eval.avmp_paper.harness import ARRIVAL, DEPARTURE, GROWTH, make_events, simulate
from hbmgym.eval.avmp_paper.sizes import GIB
from hbmgym.eval.avmp_paper.variants import AVMP_STATIC_MR05, FIXED_DUAL_MR05, HEADLINE, fixed_dual

from .paper import JAMBA, MAMBA2, requests

MIB = 2**20


def events(*columns) -> list[tuple[int, int, int]]:
    return [tuple(map(int, event)) for event in zip(*make_events(requests(*columns)), strict=True)]


def test_a_request_grows_when_a_token_begins_a_page_and_departs_after_its_last():
    assert events((3, 15, 18)) == [(3, ARRIVAL, 0), (20, GROWTH, 0), (36, DEPARTURE, 0), (36, GROWTH, 0)]


def test_a_full_last_page_grows_with_the_first_token():
    assert events((0, 16, 1)) == [(0, ARRIVAL, 0), (17, DEPARTURE, 0), (17, GROWTH, 0)]


def test_within_a_tick_departures_come_first_and_arrivals_last():
    order = events((0, 8, 2), (10, 1, 1), (0, 15, 16))
    assert [event[1:] for event in order if event[0] == 10] == [(DEPARTURE, 0), (ARRIVAL, 1)]
    assert order[0][2] == 0 and order[1][2] == 2


@pytest.mark.parametrize("variant", HEADLINE, ids=lambda variant: variant.name)
def test_what_fits_is_never_refused(variant):
    outcome = simulate(variant, JAMBA, GIB, requests((0, 100, 50), (1, 2000, 20)))
    assert (outcome.oom_count, outcome.completed, outcome.submitted, outcome.intact) == (0, 2, 2, 2)
    assert outcome.evictions == outcome.foreign_frees == 0


def test_an_oom_is_a_call_per_layer_and_the_request_stays():
    # 2 MiB of KV are 32 pages; each of the four layers asks for 33.
    outcome = simulate(FIXED_DUAL_MR05, JAMBA, 4 * MIB, requests((0, 33 * 16, 40)))
    assert (outcome.oom_count, outcome.completed, outcome.kv_ooms_at_arrival) == (4, 0, 4)


def test_an_evicted_request_still_completes():
    # 8 blocks of state for 28 layers: the request takes its own away again and again.
    outcome = simulate(FIXED_DUAL_MR05, JAMBA, 4 * MIB, requests((0, 16, 1)))
    assert (outcome.oom_count, outcome.completed, outcome.intact) == (0, 1, 0)
    assert outcome.evictions > 0


def test_a_pool_without_a_single_block_fails_every_layer():
    outcome = simulate(fixed_dual(0.01), MAMBA2, 64 * MIB, requests((0, 16, 1)))
    assert (outcome.oom_count, outcome.ssm_ooms_at_arrival, outcome.completed) == (28, 28, 0)


def two_that_fit_one_by_one() -> tuple:
    """16 MiB of KV are 256 pages. Each request needs 160 at first, 164 later; the second evicts the first."""
    return FIXED_DUAL_MR05, JAMBA, 32 * MIB, requests((0, 40 * 16, 40), (10, 40 * 16, 40))


def test_the_paper_does_not_charge_what_an_eviction_takes():
    outcome = simulate(*two_that_fit_one_by_one())
    assert (outcome.completed, outcome.intact, outcome.recomputed_tokens) == (2, 1, 0)


def test_recomputing_restores_the_context_and_may_evict_in_turn():
    outcome = simulate(*two_that_fit_one_by_one(), recompute=True)
    # Both grow three times, in turn, and each time take back what the other one has just taken.
    assert (outcome.restores, outcome.recomputed_tokens) == (6, 2 * (641 + 657 + 673))
    assert (outcome.evictions, outcome.completed, outcome.intact) == (6, 2, 0)


def test_a_request_that_fits_beside_the_others_after_its_loss_finishes():
    # The second request departs before the first grows, so that the first can restore everything.
    load = requests((0, 40 * 16, 40), (10, 30 * 16, 1))
    outcome = simulate(FIXED_DUAL_MR05, JAMBA, 32 * MIB, load, recompute=True)
    assert (outcome.restores, outcome.recomputed_tokens, outcome.completed, outcome.intact) == (1, 641, 2, 1)


def test_one_that_leaves_without_its_memory_has_not_finished():
    # The first request has no growth left after the second has taken its pages.
    load = requests((0, 40 * 16, 10), (648, 40 * 16, 10))
    assert simulate(FIXED_DUAL_MR05, JAMBA, 32 * MIB, load).completed == 2
    assert simulate(FIXED_DUAL_MR05, JAMBA, 32 * MIB, load, recompute=True).completed == 1


def test_equal_arguments_give_equal_outcomes():
    load = requests(*((i, 500 + 37 * i % 400, 60) for i in range(60)))
    one, other = (simulate(AVMP_STATIC_MR05, JAMBA, 64 * MIB, load) for _ in range(2))
    assert dataclasses.asdict(one) == dataclasses.asdict(other)
    assert np.isfinite(one.effective_batch_size_p50)
