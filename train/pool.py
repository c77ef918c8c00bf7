"""Pool: the episodes that a training draws from, each made once, and what their references cost, each run once."""

from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock

import numpy as np

from hbmgym.envs.hbm_partition import ReferenceCosts
from hbmgym.envs.traces.episode import Episode
from hbmgym.envs.traces.seeds import SEED_RANGES, Part
from hbmgym.envs.workload import Workload

MOST_BYTES = 512 * 2**20
"""Of all episodes that are kept; one of the default workload has 1.4 MB. A recipe's do not fit, and are made again."""


class Pool:
    """`size` training seeds, drawn by `seed`; every workload has an episode for each of them.

    Costs are kept for all of them, 3 kB each. Environments of a training share one pool, also from threads: two of them
    may make the same episode at the same time, which gives the same episode.
    """

    def __init__(self, size: int, seed: int, most_bytes: int = MOST_BYTES) -> None:
        part = SEED_RANGES["train"]
        drawn = np.random.default_rng(seed).choice(len(part), min(size, len(part)), replace=False)
        self.seeds = [part[int(place)] for place in drawn]
        self._costs: dict[str, ReferenceCosts] = {}
        self._episodes: OrderedDict[tuple[int, Part, int], Episode] = OrderedDict()
        self._bytes, self._most_bytes = 0, most_bytes
        self._lock = Lock()

    def costs(self, platform: str) -> ReferenceCosts:
        """What references cost on a platform, whatever moves cost there: fixed splits move nothing."""
        with self._lock:
            return self._costs.setdefault(platform, {})

    def keep(self, workload: Workload) -> Workload:
        """The same workload, whose episodes are kept here."""
        return _Kept(workload, self)

    def episode(self, workload: Workload, part: Part, seed: int) -> Episode:
        """The workload's; of all episodes those that were used last are kept."""
        key = id(workload), part, seed
        with self._lock:
            if key in self._episodes:
                self._episodes.move_to_end(key)
                return self._episodes[key]
        episode = workload.episode(part, seed)
        with self._lock:
            if key not in self._episodes:
                self._bytes += _bytes_of(episode)
                self._episodes[key] = episode
            while self._bytes > self._most_bytes:
                self._bytes -= _bytes_of(self._episodes.popitem(last=False)[1])
        return episode


def _bytes_of(episode: Episode) -> int:
    return int(episode.rows.nbytes + episode.refs.nbytes + episode.followers.nbytes)


@dataclass(frozen=True)
class _Kept:
    """A Workload; holds the one it stands for, so that its id is not given to another one."""

    workload: Workload
    pool: Pool

    @property
    def name(self) -> str:
        return self.workload.name

    def episode(self, part: Part, seed: int) -> Episode:
        return self.pool.episode(self.workload, part, seed)
