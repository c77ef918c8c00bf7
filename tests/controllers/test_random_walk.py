import itertools

import pytest

from hbmgym.controllers.random_walk import RandomController, RandomParameters

from .records import LAYOUT, SETUP, served


def walk(seed: int = 0, windows: int = 200) -> list[float | None]:
    controller = RandomController(RandomParameters(seed))
    controller.reset(SETUP)
    return [controller.act(served(0.5)).kv_share for _ in range(windows)]


def test_every_episode_walks_alike_and_another_seed_does_not():
    assert walk() == walk()
    assert walk(1) != walk()


def test_it_wanders_through_the_bounds_in_steps():
    asked = [share for share in walk() if share is not None]
    low, high = LAYOUT.share_bounds
    assert min(asked) < 0.2 and max(asked) > 0.8
    assert all(low <= share <= high for share in asked)
    steps = [abs(after - before) for before, after in itertools.pairwise(asked)]
    assert max(steps) <= 0.1 + LAYOUT.share_step + 1 / LAYOUT.chunks


@pytest.mark.parametrize("max_step_per_s", [0.0, -0.1, 1.1])
def test_impossible_parameters_are_refused(max_step_per_s):
    with pytest.raises(ValueError, match="random: max_step_per_s"):
        RandomParameters(max_step_per_s=max_step_per_s)
