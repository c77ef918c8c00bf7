"""One PPO run: environments, model, callbacks; may be interrupted and continued."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, ProgressBarCallback
from stable_baselines3.common.logger import Logger, make_output_format
from stable_baselines3.common.vec_env import VecMonitor

from hbmgym.controllers.static import StaticController
from hbmgym.envs.hbm_partition import HbmPartitionEnv
from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.serving.core import Core
from hbmgym.envs.traces.episode import Episode
from hbmgym.envs.traces.seeds import SEED_RANGES
from hbmgym.envs.vec import CoreVecEnv
from hbmgym.envs.workload import Workload
from hbmgym.eval.comparison import static_shares
from hbmgym.eval.rollout import evaluate
from hbmgym.files import write_atomically
from hbmgym.train.callbacks import Checkpoints, Validation, WindowCurves, export_policy
from hbmgym.train.options import TrainOptions
from hbmgym.train.runs import last_checkpoint

HIDDEN = (64, 64)
LOG_STD_INIT = -1.0
GAE_LAMBDA = 0.95
COARSE_STEP = 0.1
"""Grid of the statics that the curve eval/gap_to_best_static refers to."""


class Interrupted(Exception):
    """The user stopped the run; it can be continued."""


def learn(options: TrainOptions, folder: Path, config: ServingConfig, workloads: Sequence[Workload]) -> float:
    """Train up to options.total_timesteps and write policy.npz; returns the best mean cost on validation.

    Continues from the run's last checkpoint if it has one. Raises Interrupted after Ctrl-C, with a checkpoint saved.
    """
    torch.set_num_threads(1)
    env = VecMonitor(CoreVecEnv([make_env(options, workloads) for _ in range(options.n_envs)]))
    checkpoint = last_checkpoint(folder)
    model = make_model(options, env) if checkpoint is None else _continue(checkpoint, options, env)
    model.set_logger(_make_logger(folder, model.num_timesteps))
    validation = _validation(options, folder, config, workloads)
    saver = Checkpoints(folder, options.save_freq)
    callbacks: list[BaseCallback] = [WindowCurves(), validation, saver]
    if options.progress:
        callbacks.append(ProgressBarCallback())
    left = options.total_timesteps - model.num_timesteps
    try:
        if left > 0:
            model.learn(left, callbacks, reset_num_timesteps=checkpoint is None)
            saver.save()
            model.logger.dump(model.num_timesteps)
    except KeyboardInterrupt:
        saver.save()
        raise Interrupted(f"interrupted after {model.num_timesteps} windows") from None
    finally:
        env.close()
        model.logger.close()
    _keep_policy(model, folder, options)
    return validation.best_cost


def make_env(options: TrainOptions, workloads: Sequence[Workload]) -> HbmPartitionEnv:
    """One training environment."""
    serving = dataclasses.asdict(options.serving_config())
    return HbmPartitionEnv(
        workload=workloads, serving=serving, backend=options.backend, part="train", randomise_initial_share=True
    )


def make_model(options: TrainOptions, env: VecMonitor) -> PPO:
    """PPO before its first step."""
    return PPO(
        "MlpPolicy",
        env,
        learning_rate=lambda left: options.learning_rate * left,
        n_steps=options.n_steps,
        batch_size=options.batch_size,
        n_epochs=options.n_epochs,
        gamma=options.gamma,
        gae_lambda=GAE_LAMBDA,
        policy_kwargs={"net_arch": list(HIDDEN), "log_std_init": LOG_STD_INIT},
        seed=options.seed,
        device="cpu",
    )


def _continue(checkpoint: Path, options: TrainOptions, env: VecMonitor) -> PPO:
    model = PPO.load(checkpoint, env=env, device="cpu")
    # Loading seeds episodes and noise as at the start, and the first episodes would be replayed.
    model.set_random_seed(options.seed + model.num_timesteps)
    return model


def _make_logger(folder: Path, steps: int) -> Logger:
    """A run that goes on keeps the progress it has: each stretch writes a file of its own."""
    suffix = f"_{steps}" if steps else ""
    return Logger(str(folder), [make_output_format(kind, str(folder), suffix) for kind in ("csv", "tensorboard")])


def _validation(
    options: TrainOptions, folder: Path, config: ServingConfig, workloads: Sequence[Workload]
) -> Validation:
    """Judged on the last validation seeds; the table at the end uses the first ones."""
    seeds = SEED_RANGES["validation"][-options.eval_episodes :]
    episodes = [workload.episode("validation", seed) for workload in workloads for seed in seeds]
    core = Core(config)
    return Validation(core, episodes, _best_static_cost(core, episodes), folder, options.eval_freq)


def _best_static_cost(core: Core, episodes: Sequence[Episode]) -> float:
    costs = []
    for share in static_shares(core.layout, COARSE_STEP):
        rollouts = evaluate(StaticController(share), core, episodes)
        costs.append(float(np.mean([rollout.cell["cost"] for rollout in rollouts])))
    return min(costs)


def _keep_policy(model: PPO, folder: Path, options: TrainOptions) -> None:
    """policy.npz is the best one on validation; last_policy.npz what training ended with."""
    export_policy(model, {"steps": model.num_timesteps, "seed": options.seed}).save(folder / "last_policy.npz")
    best = folder / "best" / "policy.npz"
    kept = best if best.is_file() else folder / "last_policy.npz"
    write_atomically(folder / "policy.npz", kept.read_bytes())
