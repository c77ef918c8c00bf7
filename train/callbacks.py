"""What is recorded while PPO learns: curves for TensorBoard, the best policy on validation, checkpoints."""

import io
import os
from pathlib import Path

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy

from hbmgym.controllers.helm.policy import Header, Policy
from hbmgym.controllers.helm.ppo import PpoController
from hbmgym.envs.serving.config import GIB
from hbmgym.envs.serving.core import Core
from hbmgym.envs.traces.episode import Episode
from hbmgym.eval.rollout import Rollout, evaluate
from hbmgym.files import write_atomically

_MEANS = {
    "mem/kv_share_requested": "kv_share_requested",
    "mem/kv_share_effective": "kv_share_effective",
    "mem/kv_pressure": "kv_pressure",
    "mem/ssm_pressure": "ssm_pressure",
    "mem/preemptions": "preemptions",
    "mem/hit_rate": "hit_rate",
}


def export_policy(model: PPO, training: dict[str, object]) -> Policy:
    """The actor of a model as plain arrays."""
    actor = model.policy
    assert isinstance(actor, ActorCriticPolicy)
    layers = [*actor.mlp_extractor.policy_net, actor.action_net]
    linear = [layer for layer in layers if isinstance(layer, torch.nn.Linear)]
    arrays = [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in linear]
    return Policy.from_layers(arrays, Header(training=training))


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


class Validation(BaseCallback):
    """Runs the policy, without noise, on validation episodes and keeps the best one as best/policy.npz."""

    def __init__(self, core: Core, episodes: list[Episode], best_static_cost: float, folder: Path, every: int) -> None:
        super().__init__()
        self._core, self._episodes = core, episodes
        self._best_static_cost = best_static_cost
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
        policy = export_policy(self.model, {"steps": self.num_timesteps})
        rollouts = evaluate(PpoController(policy), self._core, self._episodes)
        cost = self._record(rollouts)
        self._keep_evaluation([rollout.cell["cost"] for rollout in rollouts])
        if cost < self.best_cost:
            self.best_cost = cost
            policy = export_policy(self.model, {"steps": self.num_timesteps, "validation_cost": cost})
            policy.save(self._folder / "best" / "policy.npz")

    def _keep_evaluation(self, costs: list[float]) -> None:
        """Append to evaluations.npz: steps, int64 (evaluations,), and cost, float64 (evaluations, episodes)."""
        path = self._folder / "evaluations.npz"
        steps, rows = np.array([self.num_timesteps]), np.array([costs])
        if path.is_file():
            with np.load(path) as earlier:
                steps, rows = np.append(earlier["steps"], steps), np.concatenate([earlier["cost"], rows])
        content = io.BytesIO()
        np.savez(content, steps=steps, cost=rows)
        write_atomically(path, content.getvalue())

    def _record(self, rollouts: list[Rollout]) -> float:
        """Write the curves; returns the mean cost."""

        def mean(key: str) -> float:
            return float(np.mean([rollout.cell[key] for rollout in rollouts]))

        cost = mean("cost")
        self.logger.record("eval/cost", cost)
        self.logger.record("eval/gap_to_best_static", cost / self._best_static_cost - 1.0)
        self.logger.record("slo/ttft_p99", mean("ttft_p99_s"))
        self.logger.record("slo/tpot_p99", mean("tpot_p99_s"))
        self.logger.record("eval/violation", mean("slo_violation_rate"))
        for key in ("cost", "ttft_p99_s", "slo_violation_rate", "hit_rate", "kv_share_min", "kv_share_max"):
            for name in {rollout.cell["trace"] for rollout in rollouts}:
                values = [rollout.cell[key] for rollout in rollouts if rollout.cell["trace"] == name]
                self.logger.record(f"eval/{name}/{key}", float(np.mean(values)))
        slowest_us = max(rollout.timing["decision_us_p99"] for rollout in rollouts)
        self.logger.record("control/decision_us_p99", slowest_us)
        return cost


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
        temporary = self._folder / "checkpoints" / ".model.zip"
        self.model.save(temporary)
        os.replace(temporary, self._folder / "checkpoints" / f"model_{self.num_timesteps}.zip")
