"""What is recorded while PPO learns: curves for TensorBoard, the best policy on validation, checkpoints."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, ProgressBarCallback

from hbmgym.controllers.helm.policy import Header, Policy
from hbmgym.controllers.helm.ppo import PpoController
from hbmgym.controllers.observation import OBSERVATION_SIZE
from hbmgym.envs.hbm_partition import memory_facts
from hbmgym.envs.serving.config import GIB
from hbmgym.envs.serving.core import Core
from hbmgym.envs.traces.episode import Episode
from hbmgym.eval.rollout import Rollout, evaluate
from hbmgym.files import write_atomically
from hbmgym.memory_backend.split import CHUNK_BYTES
from hbmgym.train.actor import SEEN, export_policy
from hbmgym.train.domains import Domain
from hbmgym.train.runs import CannotGoOn


class SeenRange(BaseCallback):
    """Remembers, with the model, the least and the largest value of every input: what a policy has been trained on."""

    def _on_training_start(self) -> None:
        if not hasattr(self.model, SEEN):
            if self.num_timesteps:
                raise CannotGoOn("its checkpoint is of an older version, without the inputs it has seen")
            self._widen(self.model._last_obs)  # type: ignore[arg-type]

    def _on_step(self) -> bool:
        self._widen(self.locals["rollout_buffer"].observations.reshape(-1, OBSERVATION_SIZE))
        self._widen(self.model._last_obs)  # type: ignore[arg-type]
        return True

    def _widen(self, observations: np.ndarray) -> None:
        low, high = getattr(self.model, SEEN, (observations[0], observations[0]))
        seen = np.minimum(low, observations.min(axis=0)), np.maximum(high, observations.max(axis=0))
        setattr(self.model, SEEN, seen)


class WindowCurves(BaseCallback):
    """Means over the windows of an update: memory, SLOs, how far actions go."""

    def _on_step(self) -> bool:
        actions = np.clip(self.locals["rollout_buffer"].actions, -1.0, 1.0)
        self.logger.record("control/action_std", float(np.std(actions)))
        parts = [part for own in self.locals["parts"] for part in own]
        telemetry = np.concatenate([part.telemetry[~part.warmup] for part in parts])
        if not len(telemetry):
            return True
        facts = memory_facts(telemetry, CHUNK_BYTES)
        for name in ("kv_share_requested", "kv_share_effective", "preemptions"):
            self.logger.record(f"mem/{name}", float(telemetry[name].mean()))
        for name in ("kv_pressure", "ssm_pressure", "hit_rate"):
            self.logger.record(f"mem/{name}", float(facts[name].mean()))
        self.logger.record("mem/migrated_gib", float(facts["migrated_bytes"].mean()) / GIB)
        met, missed = (int(telemetry[name].sum()) for name in ("met", "missed"))
        self.logger.record("slo/goodput", met / max(met + missed, 1))
        self.logger.record("slo/violation", missed / max(met + missed, 1))
        return True


class RolloutBar(ProgressBarCallback):
    """SB3's progress bar, for steps that are rollouts."""

    def _on_step(self) -> bool:
        self.pbar.update(_rollout_windows(self.model))
        return True


def _rollout_windows(model: BaseAlgorithm) -> int:
    assert isinstance(model, PPO)
    return model.n_steps * model.n_envs


def _is_due(model: BaseAlgorithm, every: int) -> bool:
    """Has the last rollout passed a multiple of `every` windows? So that a run which goes on does not shift them."""
    return model.num_timesteps // every > (model.num_timesteps - _rollout_windows(model)) // every >= 0


class _Case(NamedTuple):
    """A workload that a policy is judged on."""

    name: str
    core: Core
    episodes: list[Episode]
    reference: float
    """Mean cost of the best fixed split."""


def _cases(domain: Domain, of_many: bool) -> list[_Case]:
    core = Core(domain.config)
    return [
        _Case(
            f"{workload.name}@{domain.platform}" if of_many else workload.name,
            core,
            [workload.episode(domain.part, seed) for seed in domain.seeds],
            domain.references[workload.name].cost,
        )
        for workload in domain.workloads
    ]


class Validation(BaseCallback):
    """Runs the policy, without noise, on validation episodes and keeps the best one as best/policy.npz.

    The best one has the least mean of cost / cost of the best fixed split over all workloads.
    """

    def __init__(self, domains: Sequence[Domain], folder: Path, every: int, header: Header) -> None:
        super().__init__()
        self._header = header
        self._cases = [case for domain in domains for case in _cases(domain, len(domains) > 1)]
        self._folder = folder
        self._every = every
        self.best_cost = _kept_cost(folder / "best" / "policy.npz")

    def _on_step(self) -> bool:
        # The last policy is judged when training has ended, with its last update.
        if _is_due(self.model, self._every) and self.model.num_timesteps < self.model._total_timesteps:
            self.judge()
        return True

    def _on_training_end(self) -> None:
        self.judge()

    def judge(self) -> None:
        """Evaluate now; the curves carry the current step."""
        assert isinstance(self.model, PPO)
        controller = PpoController(export_policy(self.model, self._header))
        rollouts = [evaluate(controller, case.core, case.episodes) for case in self._cases]
        costs = [[rollout.cell["cost"] for rollout in own] for own in rollouts]
        relative = [float(np.mean(own)) / case.reference for own, case in zip(costs, self._cases, strict=True)]
        self._record(rollouts, relative)
        self._keep_evaluation([cost for own in costs for cost in own])
        cost = float(np.mean(relative))
        if cost < self.best_cost:
            self.best_cost = cost
            policy = export_policy(self.model, self._header, validation_cost=cost)
            policy.save(self._folder / "best" / "policy.npz")

    def _keep_evaluation(self, costs: list[float]) -> None:
        """Append to evaluations.npz: steps, int64 (evaluations,), and cost, float64 (evaluations, episodes); those that
        a run had behind its checkpoint are made again."""
        path = self._folder / "evaluations.npz"
        steps, rows = np.array([self.model.num_timesteps]), np.array([costs])
        if path.is_file():
            with np.load(path) as earlier:
                before = earlier["steps"] < self.model.num_timesteps
                steps = np.append(earlier["steps"][before], steps)
                rows = np.concatenate([earlier["cost"][before], rows])
        content = io.BytesIO()
        np.savez(content, steps=steps, cost=rows)
        write_atomically(path, content.getvalue())

    def _record(self, rollouts: Sequence[Sequence[Rollout]], relative: Sequence[float]) -> None:
        """Write the curves."""
        everything = [rollout for own in rollouts for rollout in own]

        def mean(key: str, of: Sequence[Rollout] = everything) -> float:
            return float(np.mean([rollout.cell[key] for rollout in of]))

        self.logger.record("eval/cost", mean("cost"))
        self.logger.record("eval/gap_to_best_static", float(np.mean(relative)) - 1.0)
        self.logger.record("eval/worst_gap_to_best_static", max(relative) - 1.0)
        self.logger.record("slo/ttft_p99", mean("ttft_p99_s"))
        self.logger.record("slo/tpot_p99", mean("tpot_p99_s"))
        self.logger.record("eval/violation", mean("slo_violation_rate"))
        for case, own in zip(self._cases, rollouts, strict=True):
            for key in ("cost", "ttft_p99_s", "slo_violation_rate", "hit_rate", "kv_share_min", "kv_share_max"):
                self.logger.record(f"eval/{case.name}/{key}", mean(key, own))
        slowest_us = max(rollout.timing["decision_us_p99"] for rollout in everything)
        self.logger.record("control/decision_us_p99", slowest_us)


def _kept_cost(path: Path) -> float:
    """The cost of the best policy that a resumed run has already."""
    return float(Policy.load(path).header.training["validation_cost"]) if path.is_file() else float("inf")


class Checkpoints(BaseCallback):
    """Keeps the model as it was between its last two updates, and saves it every `every` windows, whole or not at all.

    A run that goes on from there does what it would have done: wherever it was stopped, no half of a rollout or of an
    update is saved.
    """

    def __init__(self, folder: Path, every: int) -> None:
        super().__init__()
        self._folder, self._every = folder, every

    def _init_callback(self) -> None:
        self.keep()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self.keep()
        if _is_due(self.model, self._every):
            self.save()

    def _on_training_end(self) -> None:
        self.keep()

    def keep(self) -> None:
        """Remember the model as it is now."""
        content = io.BytesIO()
        self.model.save(content)
        self.windows, self._kept = self.model.num_timesteps, content.getvalue()

    def save(self) -> None:
        """Save what was kept."""
        write_atomically(self._folder / "checkpoints" / f"model_{self.windows}.zip", self._kept)
