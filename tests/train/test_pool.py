"""Pool: which episodes a training draws, and that each is made and its reference run once."""

from dataclasses import dataclass, field

import numpy as np

from hbmgym.envs.traces.episode import Episode
from hbmgym.envs.traces.seeds import SEED_RANGES
from hbmgym.train.domains import Domain, Reference
from hbmgym.train.learn import make_envs
from hbmgym.train.options import TrainOptions
from hbmgym.train.pool import Pool

from ..envs.test_hbm_partition import TinyWorkload
from ..eval.traffic import CONFIG, HBM_GIB, MODEL


@dataclass
class Counted:
    """How often each episode was made."""

    name: str = "tiny"
    made: list[int] = field(default_factory=list)

    def episode(self, part, seed) -> Episode:
        self.made.append(seed)
        return TinyWorkload().episode(part, seed)


def test_the_seed_decides_which_seeds_are_drawn_from():
    pool = Pool(50, 0)
    assert len(set(pool.seeds)) == 50 and set(pool.seeds) <= set(SEED_RANGES["train"])
    assert pool.seeds == Pool(50, 0).seeds != Pool(50, 1).seeds
    assert sorted(Pool(10**6, 0).seeds) == list(SEED_RANGES["train"])


def test_an_episode_is_made_once():
    counted = Counted()
    pool = Pool(4, 0)
    kept = pool.keep(counted)
    first = [kept.episode("train", seed) for seed in (5, 6, 5)]
    assert counted.made == [5, 6] and first[0] is first[2] and kept.name == counted.name
    pool.keep(Counted()).episode("train", 5)
    assert counted.made == [5, 6], "another workload has episodes of its own"


def test_episodes_that_were_not_used_for_longest_are_made_again_when_memory_is_short():
    counted = Counted()
    episodes = [TinyWorkload().episode("train", seed) for seed in (1, 2, 3)]
    most_bytes = sum(e.rows.nbytes + e.refs.nbytes + e.followers.nbytes for e in episodes) - 1
    kept = Pool(4, 0, most_bytes).keep(counted)
    for seed in (1, 2, 1, 3, 1, 2):
        assert np.array_equal(kept.episode("train", seed).rows, TinyWorkload().episode("train", seed).rows)
    assert counted.made == [1, 2, 3, 2]


def test_environments_of_a_training_share_episodes_and_references():
    counted = Counted()
    options = TrainOptions(model=MODEL, hbm_gib=HBM_GIB, n_envs=3, episodes=4)
    envs = make_envs(options, [Domain(CONFIG, (counted,), "train", (), {"tiny": Reference(0.5, 1.0, 0.0)})])
    for _ in range(20):
        envs.reset()
    assert sorted(counted.made) == sorted(Pool(4, options.seed).seeds)
    known = [env.unwrapped._known_costs for env in envs.envs]
    assert len(known[0]) == 4 and all(costs is known[0] for costs in known)
