import numpy as np
import pytest

from hbmgym.controllers.bandit import BanditController, BanditParameters
from hbmgym.controllers.base import HOLD

from .records import LAYOUT, SETUP, served


def started(**parameters: float) -> BanditController:
    controller = BanditController(BanditParameters(**parameters))
    controller.reset(SETUP)
    return controller


def live(controller: BanditController, best_of_demand, demands, share: float = 0.5) -> list[float]:
    """Shares over windows in which requests miss by how far the share is from the best one for the demand."""
    shares = []
    for demand in demands:
        missed = min(100.0, 150.0 * abs(share - best_of_demand(demand)))
        record = served(share, kv_demand_10s=demand, met=100.0 - missed, missed=missed, busy_fraction=0.7)
        asked = controller.act(record).kv_share
        share = share if asked is None else LAYOUT.share(LAYOUT.slots(asked))
        shares.append(share)
    return shares


@pytest.mark.parametrize("best", [0.25, 0.75])
def test_it_finds_the_best_share(best):
    shares = live(started(), lambda _: best, [0.5] * 300)
    assert all(abs(share - best) < 0.1 for share in shares[-50:])


def test_it_learns_against_what_it_believed_at_first():
    """More demand for KV, but a smaller best share: the prior says the opposite."""
    demands = np.repeat([0.2, 0.8] * 12, 40)
    shares = live(started(), lambda demand: 0.7 if demand < 0.5 else 0.3, demands)
    last = np.array(shares[-80:])
    assert last[:40].mean() > 0.55 and last[40:].mean() < 0.45


def test_before_it_has_learnt_it_leans_towards_the_demand():
    for demand, sign in ((0.9, 1.0), (0.1, -1.0)):
        record = served(0.5, kv_demand_10s=demand, met=0, missed=5)
        share = started().act(record).kv_share
        assert sign * (share - 0.5) > 0.0


def test_while_nothing_is_missed_it_explores_nothing():
    controller = started(exploration=10.0)
    assert all(controller.act(served(0.3, kv_demand_10s=0.9, met=20)) is HOLD for _ in range(50))


def test_epochs_double_up_to_the_longest():
    controller = started(least_gain=0.0, exploration=0.5, longest_epoch=4, arms=3)
    rng, asked = np.random.default_rng(0), []
    for window in range(40):  # costs without any pattern, so that it goes on trying
        share = float(rng.uniform(0.1, 0.9))
        missed = float(rng.integers(1, 99))
        if controller.act(served(share, met=100 - missed, missed=missed, kv_demand_10s=0.5)) is not HOLD:
            asked.append(window)
    # The first epoch ends with the first window, as its context is new; the next ones last 1, 2, 4, 4, ... windows.
    ends = {0, 1, 3} | set(range(7, 40, 4))
    assert set(asked) <= ends and len(asked) > 3


def test_a_new_context_ends_an_epoch():
    controller = started(longest_epoch=32, exploration=0.0)
    bad = {"met": 10, "missed": 10}
    for _ in range(9):
        controller.act(served(0.5, kv_demand_10s=0.5, **bad))
    assert controller.act(served(0.5, kv_demand_10s=0.55, **bad)) is HOLD
    assert controller.act(served(0.5, kv_demand_10s=0.95, **bad)).kv_share > 0.5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("arms", 1), ("longest_epoch", 0), ("exploration", -1), ("ridge", 0), ("largest_cost", 0), ("memory", 0)),
        *(("memory", 1.1), ("least_gain", -0.1), ("context_change", float("nan"))),
    ],
)
def test_impossible_parameters_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"bandit: .*{field}.*{value}"):
        BanditParameters(**{field: value})
