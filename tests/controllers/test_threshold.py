import pytest

from hbmgym.controllers.base import HOLD
from hbmgym.controllers.threshold import ThresholdController, ThresholdParameters

from .records import LAYOUT, SETUP, served

SLOTS = 50
SHARE, PAGES = LAYOUT.share(SLOTS), LAYOUT.pages(SLOTS)
BATCH = 16
KV_SHORT = {"kv_free": 0.02 * PAGES}
SSM_SHORT = {"ssm_free": 0.02 * SLOTS}


def moved_bytes(batch: int = BATCH, **fields: float) -> float:
    """Bytes that KV is to gain."""
    controller = ThresholdController(ThresholdParameters(migration_batch_pages=batch))
    controller.reset(SETUP)
    decision = controller.act(served(SHARE, **fields))
    return 0.0 if decision is HOLD else (decision.kv_share - SHARE) * LAYOUT.budget_bytes


def test_the_paper_s_defaults():
    defaults = ThresholdParameters()
    assert (defaults.threshold_low, defaults.threshold_high, defaults.migration_batch_pages) == (0.05, 0.30, 128)


def test_a_short_pool_gets_a_batch_from_the_other():
    assert moved_bytes(**KV_SHORT) == pytest.approx(BATCH * LAYOUT.page_bytes)
    assert moved_bytes(**SSM_SHORT) == pytest.approx(-BATCH * LAYOUT.page_bytes)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"kv_free": 0.06 * PAGES},
        {"kv_free": 0.0, "kv_cached": 0.06 * PAGES},
        KV_SHORT | SSM_SHORT,
        KV_SHORT | {"ssm_free": 0.30 * SLOTS},
        KV_SHORT | {"moving_chunks": 1},
    ],
    ids=["idle", "above_low", "evictable_counts", "both_short", "donor_not_above_high", "still_moving"],
)
def test_otherwise_it_holds(fields):
    assert moved_bytes(**fields) == 0.0


def test_evictable_blocks_can_be_given():
    assert moved_bytes(**KV_SHORT, ssm_free=0, ssm_cached=SLOTS) == pytest.approx(BATCH * LAYOUT.page_bytes)


def test_what_waiting_requests_lack_moves_at_once():
    needed = 3 * SETUP.slots_per_request * LAYOUT.slot_bytes
    assert moved_bytes(ssm_free=0, waiting=3) == pytest.approx(-needed)
    tokens = 3 * 2000 * SETUP.kv_token_bytes
    assert moved_bytes(kv_free=0, waiting=3, tokens_per_request_100s=2000) == pytest.approx(tokens)


def test_the_giver_keeps_its_headroom():
    spare = (0.5 - 0.30) * SLOTS * LAYOUT.slot_bytes
    assert moved_bytes(batch=10_000, **KV_SHORT, ssm_free=0.5 * SLOTS) == pytest.approx(spare)


def test_less_than_a_slot_is_not_worth_a_move():
    assert moved_bytes(**KV_SHORT, ssm_free=0.3 * SLOTS + 0.9) == 0.0


def test_at_least_a_slot_moves():
    assert moved_bytes(batch=1, **SSM_SHORT) == pytest.approx(-LAYOUT.slot_bytes)


@pytest.mark.parametrize(("low", "high", "batch"), [(0.3, 0.05, 1), (0.0, 0.3, 1), (0.05, 0.3, 0)])
def test_impossible_parameters_are_refused(low, high, batch):
    with pytest.raises(ValueError, match="expected"):
        ThresholdParameters(low, high, batch)
