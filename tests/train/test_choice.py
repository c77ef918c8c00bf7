"""Of several policies the one is kept that costs least on more episodes than an evaluation in training has."""

import numpy as np
import pytest

from hbmgym.controllers.helm.policy import Header, Policy
from hbmgym.controllers.helm.ppo import PpoController
from hbmgym.controllers.observation import OBSERVATION_SIZE
from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.serving.core import Core
from hbmgym.eval.rollout import evaluate
from hbmgym.train import choice, ppo
from hbmgym.train.domains import Traffic, find_references
from hbmgym.train.options import TrainOptions

from ..eval.traffic import HBM_GIB, MIX, MODEL

CONFIG = ServingConfig(model=MODEL, hbm_gib=HBM_GIB)


def holding(action: float) -> Policy:
    """Always at one share, from the smallest (-1) to the largest (1)."""
    return Policy.from_layers([(np.zeros((1, OBSERVATION_SIZE)), np.array([action]))], Header(action_kind="absolute"))


@pytest.fixture
def run(tmp_path):
    """A run of two seeds."""
    shares = {"seed-0/policy": -1.0, "seed-0/last_policy": 1.0, "seed-1/policy": -0.95, "seed-1/last_policy": -0.2}
    for name, action in shares.items():
        holding(action).save(tmp_path / f"{name}.npz")
    return tmp_path


def test_the_best_of_all_seeds_is_kept(run, monkeypatch):
    monkeypatch.setattr(choice, "SEEDS", choice.SEEDS[-2:])
    options = TrainOptions(model=MODEL, hbm_gib=HBM_GIB, seeds=2, jobs=1, progress=False)
    file = run / "references.json"
    judging = find_references([Traffic(CONFIG, (MIX,))], "validation", choice.SEEDS, file, 1, False)
    scores = ppo._choose(options, run, [run / "seed-0", run / "seed-1"], judging)
    core, episodes = Core(CONFIG), [MIX.episode("validation", seed) for seed in choice.SEEDS]
    reference = judging[0].references[MIX.name].cost
    for name, score in scores.items():
        rollouts = evaluate(PpoController(Policy.load(run / name)), core, episodes)
        assert score == pytest.approx(np.mean([rollout.cell["cost"] for rollout in rollouts]) / reference)
    assert len(scores) == 4 and len(set(scores.values())) > 1
    best = min(scores, key=scores.__getitem__)
    assert (run / "policy.npz").read_bytes() == (run / best).read_bytes()


def test_the_episodes_that_choose_are_not_those_of_a_table():
    assert len(choice.SEEDS) == choice.EPISODES and choice.SEEDS[0] > 10_000 + TrainOptions().table_episodes
