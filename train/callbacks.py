"""What is recorded while PPO learns: curves for TensorBoard, the best policy on validation, checkpoints."""

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy

from hbmgym.controllers.helm.policy import Header, Policy
from hbmgym.controllers.helm.ppo import PpoController
from hbmgym.controllers.observation import OBSERVATION_SIZE
from hbmgym.envs.serving.config import GIB
from hbmgym.envs.serving.core import Core
from hbmgym.envs.traces.episode import Episode
from hbmgym.eval.rollout import Rollout, evaluate
from hbmgym.files import write_atomically
from hbmgym.train.domains import Domain
from hbmgym.train.runs import CannotGoOn

_MEANS = {
    "mem/kv_share_requested": "kv_share_requested",
    "mem/kv_share_effective": "kv_share_effective",
    "mem/kv_pressure": "kv_pressure",
    "mem/ssm_pressure": "ssm_pressure",
    "mem/preemptions": "preemptions",
    "mem/hit_rate": "hit_rate",
}


SEEN = "seen_range"
AVERAGED = "averaged_actor"
"""Attributes of a model, saved with it."""
AVERAGED_UPDATES = 10


def export_policy(model: PPO, header: Header, **facts: object) -> Policy:
    """The actor of a model as plain arrays, averaged over updates where that was kept; `facts` join those of the
    header, and the steps so far."""
    training = {**header.training, "steps": model.num_timesteps, **facts}
    header = dataclasses.replace(header, training=training)
    layers = getattr(model, AVERAGED, None) or actor_layers(model)
    low, high = getattr(model, SEEN, (-np.ones(OBSERVATION_SIZE), np.ones(OBSERVATION_SIZE)))
    # What was always 0 has taught nothing: its weights are as they were drawn.
    unused = (low == 0.0) & (high == 0.0)
    (matrix, bias), *rest = layers
    layers = [(np.where(unused, 0.0, matrix), bias), *rest]
    return Policy.from_layers(layers, header, (np.where(unused, -1.0, low), np.where(unused, 1.0, high)))


def actor_linears(model: PPO) -> list[torch.nn.Linear]:
    """The layers of the actor that have weights, from the inputs to the action."""
    actor = model.policy
    assert isinstance(actor, ActorCriticPolicy)
    layers = [*actor.mlp_extractor.policy_net, actor.action_net]
    return [layer for layer in layers if isinstance(layer, torch.nn.Linear)]


def actor_layers(model: PPO) -> list[tuple[np.ndarray, np.ndarray]]:
    """(matrix, bias) per layer of the actor as it is now; copies."""
    linears = actor_linears(model)
    return [(layer.weight.detach().numpy().copy(), layer.bias.detach().numpy().copy()) for layer in linears]


class AveragedActor(BaseCallback):
    """Keeps, with the model, its actor's weights averaged over some AVERAGED_UPDATES updates.

    The average is what is judged and exported: single updates stray (Polyak and Juditsky, 1992).
    """

    def _on_training_start(self) -> None:
        self._updates = AVERAGED_UPDATES if hasattr(self.model, AVERAGED) else 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        now = actor_layers(self.model)  # type: ignore[arg-type]
        self._updates += 1
        part = max(1.0 / self._updates, 1.0 / AVERAGED_UPDATES)
        before = getattr(self.model, AVERAGED, now)
        layers = zip(before, now, strict=True)
        averaged = [tuple(old + part * (new - old) for old, new in zip(*pair, strict=True)) for pair in layers]
        setattr(self.model, AVERAGED, averaged)


class SeenRange(BaseCallback):
    """Remembers, with the model, the least and the largest value of every input: what a policy has been trained on."""

    def _on_training_start(self) -> None:
        if not hasattr(self.model, SEEN):
            if self.num_timesteps:
                raise CannotGoOn("its checkpoint is of an older version, without the inputs it has seen")
            self._widen(self.model._last_obs)  # type: ignore[arg-type]

    def _on_step(self) -> bool:
        self._widen(self.locals["new_obs"])
        return True

    def _widen(self, observations: np.ndarray) -> None:
        low, high = getattr(self.model, SEEN, (observations[0], observations[0]))
        seen = np.minimum(low, observations.min(axis=0)), np.maximum(high, observations.max(axis=0))
        setattr(self.model, SEEN, seen)


class WindowCurves(BaseCallback):
    """Means over the windows of an update: rewards, memory, SLOs, how far actions go."""

    def __init__(self) -> None:
        super().__init__()
        self._infos: list[dict[str, float]] = []
        self._actions: list[np.ndarray] = []

    def _on_step(self) -> bool:
        self._infos += [info for info in self.locals["infos"] if not info["warmup"]]
        self._actions.append(self.locals["clipped_actions"])
        return True

    def _on_rollout_end(self) -> None:
        infos, self._infos = self._infos, []
        actions, self._actions = self._actions, []
        self.logger.record("control/action_std", float(np.std(np.concatenate(actions))))
        if not infos:
            return
        for tag, key in _MEANS.items():
            self.logger.record(tag, float(np.mean([info[key] for info in infos])))
        self.logger.record("mem/migrated_gib", float(np.mean([info["migrated_bytes"] for info in infos])) / GIB)
        met, missed = (sum(info[key] for info in infos) for key in ("met", "missed"))
        self.logger.record("slo/goodput", met / max(met + missed, 1))
        self.logger.record("slo/violation", missed / max(met + missed, 1))


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
        self._next = 0
        self.best_cost = _kept_cost(folder / "best" / "policy.npz")

    def _on_training_start(self) -> None:
        self._next = self.num_timesteps + self._every

    def _on_step(self) -> bool:
        if self.num_timesteps >= self._next:
            self._next += self._every
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
        """Append to evaluations.npz: steps, int64 (evaluations,), and cost, float64 (evaluations, episodes)."""
        path = self._folder / "evaluations.npz"
        steps, rows = np.array([self.model.num_timesteps]), np.array([costs])
        if path.is_file():
            with np.load(path) as earlier:
                steps, rows = np.append(earlier["steps"], steps), np.concatenate([earlier["cost"], rows])
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
    """Saves the model every `every` windows, whole or not at all."""

    def __init__(self, folder: Path, every: int) -> None:
        super().__init__()
        self._folder, self._every = folder, every
        self._next = 0

    def _on_training_start(self) -> None:
        self._next = self.num_timesteps + self._every

    def _on_step(self) -> bool:
        if self.num_timesteps >= self._next:
            self._next += self._every
            self.save()
        return True

    def save(self) -> None:
        """Save now."""
        content = io.BytesIO()
        self.model.save(content)
        name = f"model_{self.model.num_timesteps}.zip"
        write_atomically(self._folder / "checkpoints" / name, content.getvalue())
