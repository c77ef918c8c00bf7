import pytest

from hbmgym.controllers.base import HOLD
from hbmgym.controllers.tail_blame import TailBlameController, TailBlameParameters

from .records import LAYOUT, SETUP, served

SHARE = LAYOUT.share(50)
TAX = 0.1


def decide(**fields: float):
    controller = TailBlameController(TailBlameParameters(tax_per_s=TAX / SETUP.window_s))
    controller.reset(SETUP)
    return controller.act(served(SHARE, **fields))


def test_robinhood_s_tax():
    assert TailBlameParameters().tax_per_s * 5.0 == 0.01
    assert TailBlameController().name == "tail-blame"
    assert TailBlameController.fast().name == "tail-blame-fast"


@pytest.mark.parametrize(("kv", "ssm"), [(0.4, 0.0), (0.0, 0.4), (0.3, 0.1)])
def test_each_pool_gives_its_tax_and_gets_its_part_of_the_blame(kv, ssm):
    share = decide(missed=1, blocked_kv_fraction=kv, blocked_ssm_fraction=ssm).kv_share
    given, kv_part = TAX * SHARE + TAX * (1 - SHARE), kv / (kv + ssm)
    assert share == pytest.approx(SHARE - TAX * SHARE + given * kv_part)


def test_recomputing_is_blame_by_its_share_of_the_work():
    work = {"busy_fraction": 0.8, "prompt_tokens_per_s_10s": 4000.0, "hit_rate_10s": 0.5}
    recomputed = decide(missed=1, kv_loss_tokens_per_s=500.0, **work)  # .8 * 500 / 2000
    assert recomputed == decide(missed=1, blocked_kv_fraction=0.2)
    mixed = decide(missed=1, kv_loss_tokens_per_s=500.0, blocked_ssm_fraction=0.2, **work)
    assert mixed == decide(missed=1, blocked_kv_fraction=0.2, blocked_ssm_fraction=0.2)


@pytest.mark.parametrize(
    "fields",
    [
        {"blocked_kv_fraction": 0.5},
        {"missed": 1},
        {"missed": 1, "blocked_kv_fraction": 0.005, "blocked_ssm_fraction": 0.004},
        {"missed": 1, "blocked_kv_fraction": 0.5, "moving_chunks": 1},
    ],
    ids=["nobody_is_slow", "nobody_is_to_blame", "hardly_any_blame", "still_moving"],
)
def test_otherwise_it_holds(fields):
    assert decide(**fields) is HOLD


def test_a_rejected_request_is_a_slow_one():
    assert decide(rejected=1, blocked_kv_fraction=0.5).kv_share > SHARE


def test_small_taxes_add_up_to_a_slot():
    controller = TailBlameController()
    controller.reset(SETUP)
    blocked = served(SHARE, missed=1, blocked_kv_fraction=1.0)
    shares = [controller.act(blocked).kv_share for _ in range(4)]
    assert shares[:2] == [None, None]
    assert shares[2] == pytest.approx(SHARE + 3 * 0.01 * (1 - SHARE))


@pytest.mark.parametrize(("tax_per_s", "least_blame"), [(0.0, 0.0), (1.1, 0.0), (0.01, 1.0), (0.01, -0.1)])
def test_impossible_parameters_are_refused(tax_per_s, least_blame):
    with pytest.raises(ValueError, match=r"tail-blame: .* expected"):
        TailBlameParameters(tax_per_s, least_blame)
