"""Domains: what a policy is trained and judged on, and what the best of a few fixed splits costs there."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hbmgym.controllers.static import static_name
from hbmgym.envs.platforms import Platform
from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.serving.core import make_layout, setup_hash
from hbmgym.envs.traces.episode import Episode
from hbmgym.envs.traces.seeds import Part
from hbmgym.envs.traces.trace import TraceError
from hbmgym.envs.workload import ScenarioWorkload, Workload
from hbmgym.eval.cells import Bench, Runner, Task, write_json
from hbmgym.eval.comparison import static_shares
from hbmgym.eval.rollout import cell_hash
from hbmgym.eval.statics import JUDGED, best_static

COARSE_STEP = 0.08
"""Between the fixed splits that are tried."""
_RARE = 4.0


@dataclass(frozen=True)
class VariedLoad:
    """A scenario of which every seed has its own load, `least` to `most` times the scenario's."""

    scenario: ScenarioWorkload
    least: float
    most: float

    @property
    def name(self) -> str:
        """The scenario's."""
        return self.scenario.name

    def episode(self, part: Part, seed: int) -> Episode:
        """The scenario's at the load of the seed, or at several times the largest where nothing arrives at that."""
        factor = np.random.default_rng(seed).uniform(self.least, self.most)
        try:
            return self._at(factor, part, seed)
        except TraceError:  # rare traffic, of which nothing happens to arrive
            return self._at(_RARE * self.most, part, seed)

    def _at(self, factor: float, part: Part, seed: int) -> Episode:
        return replace(self.scenario, load=self.scenario.load * factor).episode(part, seed)


class Reference(NamedTuple):
    """The best fixed split of a workload (`eval.statics`); means over some episodes."""

    kv_share: float
    cost: float
    """Per request."""
    unserved: float
    """Part of the tokens that every one of the splits leaves unserved."""


@dataclass(frozen=True)
class Traffic:
    """A platform and what arrives there."""

    config: ServingConfig
    workloads: tuple[Workload, ...]

    @property
    def platform(self) -> str:
        """As model@gpu@GiB, and the engine unless it is the default one."""
        config = self.config
        return Platform(config.model, config.gpu, config.hbm_gib, config.engine.name).name


@dataclass(frozen=True)
class Domain(Traffic):
    """Traffic, with a reference for each workload by name, over `seeds` of `part`."""

    part: Part
    seeds: tuple[int, ...]
    references: Mapping[str, Reference]

    def only(self, names: Sequence[str]) -> "Domain":
        """With those workloads alone."""
        kept = tuple(workload for workload in self.workloads if workload.name in names)
        return Domain(self.config, kept, self.part, self.seeds, {name: self.references[name] for name in names})


def find_references(
    traffic: Sequence[Traffic], part: Part, seeds: Sequence[int], file: Path, jobs: int, progress: bool
) -> list[Domain]:
    """Run the fixed splits, unless `file` knows what they cost; what is found is kept there, domain by domain."""
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    domains = []
    for own in traffic:
        keys = {workload.name: _key(own.config, workload, part, seeds) for workload in own.workloads}
        unknown = tuple(workload for workload in own.workloads if keys[workload.name] not in known)
        if unknown:
            found = _run_splits(Traffic(own.config, unknown), part, seeds, jobs, progress)
            known |= {keys[name]: reference for name, reference in found.items()}
            write_json(file, known)
        references = {name: Reference(*known[key]) for name, key in keys.items()}
        domains.append(Domain(own.config, own.workloads, part, tuple(seeds), references))
    return domains


def _key(config: ServingConfig, workload: Workload, part: Part, seeds: Sequence[int]) -> str:
    """Of all that the fixed splits are given: rates and loads may have changed since a run was interrupted."""
    setup, digest = setup_hash(config), hashlib.sha256()
    for seed in seeds:
        digest.update(cell_hash(setup, workload.episode(part, seed)).encode())
    return f"{workload.name} {part} {digest.hexdigest()[:16]}"


def _run_splits(own: Traffic, part: Part, seeds: Sequence[int], jobs: int, progress: bool) -> dict[str, Reference]:
    shares = static_shares(make_layout(own.config), COARSE_STEP)
    tasks = [
        Task(static_name(share), place, seed)
        for place in range(len(own.workloads))
        for share in shares
        for seed in seeds
    ]
    with Runner(Bench(own.config, own.workloads, part), min(jobs, len(tasks)), progress) as runner:
        cells = [rollout.cell for rollout in runner.run(tasks, f"fixed splits of {own.config.model}")]
    shape = (len(own.workloads), len(shares), len(seeds))
    costs, unserved = (np.array([cell[key] for cell in cells]).reshape(shape).mean(axis=2) for key in JUDGED)
    return {
        workload.name: Reference(shares[best], float(costs[place, best]), float(unserved[place].min()))
        for place, workload in enumerate(own.workloads)
        for best in [best_static(costs[place], unserved[place])]
    }
