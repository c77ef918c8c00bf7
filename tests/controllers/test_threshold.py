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


def decision(controller: ThresholdController, **fields: float):
    controller.reset(SETUP)
    return controller.act(served(SHARE, **fields))


# Pools that are full of cached blocks, of which new ones will have evicted 30 of 50 slots within claim_s, or all.
FULL = {"kv_free": 0, "kv_cached": PAGES, "ssm_free": 0, "ssm_cached": SLOTS}
SLOTS_CLAIMED = FULL | {"ssm_evictions_per_s": SLOTS / 30.0}


def test_claimed_blocks_are_no_headroom():
    lost = SLOTS_CLAIMED | {"ssm_loss_tokens_per_s": 1.0}
    assert decision(ThresholdController(), **lost) is HOLD
    share = decision(ThresholdController.avmp(128), **lost).kv_share
    assert (SHARE - share) * LAYOUT.budget_bytes == pytest.approx(128 * LAYOUT.page_bytes)


def test_the_paper_s_batches_differ():
    lost = SLOTS_CLAIMED | {"blocked_ssm_fraction": 0.1}
    one = decision(ThresholdController.avmp(1), **lost).kv_share
    assert (SHARE - one) * LAYOUT.budget_bytes == pytest.approx(LAYOUT.slot_bytes)
    assert decision(ThresholdController.avmp(128), **lost).kv_share < one


@pytest.mark.parametrize(
    "fields",
    [
        SLOTS_CLAIMED,
        FULL | {"ssm_loss_tokens_per_s": 1.0},
        SLOTS_CLAIMED | {"ssm_loss_tokens_per_s": 1.0, "kv_evictions_per_s": 0.71 * PAGES / 30.0},
    ],
    ids=["nobody_wanted_them", "hardly_any_eviction", "the_other_s_are_claimed_too"],
)
def test_claimed_holds_otherwise(fields):
    assert decision(ThresholdController.avmp(128), **fields) is HOLD


def test_the_code_moves_whatever_the_thresholds_say():
    crowded = {"ssm_free": 0.5 * SLOTS, "kv_free": 0.1 * PAGES, "blocked_kv_fraction": 0.2}
    assert decision(ThresholdController.avmp(16), **crowded) is HOLD
    share = decision(ThresholdController.avmp(16, "code"), **crowded).kv_share
    assert (share - SHARE) * LAYOUT.budget_bytes == pytest.approx(16 * LAYOUT.page_bytes)


def test_the_code_needs_a_failure_and_helps_the_pool_that_failed_longer():
    code = ThresholdController.avmp(16, "code")
    assert decision(code, **KV_SHORT) is HOLD
    assert decision(code, blocked_kv_fraction=0.1, blocked_ssm_fraction=0.3).kv_share < SHARE
    assert decision(code, blocked_kv_fraction=0.3, blocked_ssm_fraction=0.1).kv_share > SHARE


def test_a_giver_without_a_slot_to_spare_gives_nothing():
    assert decision(ThresholdController.avmp(16, "code"), ssm_free=0.9, blocked_kv_fraction=0.2) is HOLD


def test_names_say_batch_and_reading():
    assert ThresholdController().name == "threshold"
    assert ThresholdController.avmp(1).name == "threshold-b1"
    assert ThresholdController.avmp(128, "code").name == "threshold-code-b128"


@pytest.mark.parametrize("parameters", [{"reading": "letter"}, {"claim_s": -1.0}, {"claim_s": float("inf")}])
def test_impossible_readings_are_refused(parameters):
    with pytest.raises(ValueError, match="expected"):
        ThresholdParameters(**parameters)


@pytest.mark.parametrize(("low", "high", "batch"), [(0.3, 0.05, 1), (0.0, 0.3, 1), (0.05, 0.3, 0)])
def test_impossible_parameters_are_refused(low, high, batch):
    with pytest.raises(ValueError, match="expected"):
        ThresholdParameters(low, high, batch)
