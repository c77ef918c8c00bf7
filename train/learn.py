"""One PPO run: environments, model, callbacks; may be interrupted and continued."""

import dataclasses
import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger, make_output_format
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from hbmgym.controllers.helm.policy import Header
from hbmgym.controllers.observation import OBSERVATION_GROUPS, OBSERVATION_NAMES
from hbmgym.envs.hbm_partition import HbmPartitionEnv
from hbmgym.files import write_atomically
from hbmgym.train.actor import export_policy
from hbmgym.train.callbacks import Checkpoints, RolloutBar, SeenRange, Validation, WindowCurves
from hbmgym.train.collect import RolloutPPO
from hbmgym.train.domains import Domain
from hbmgym.train.options import ACTORS, TrainOptions
from hbmgym.train.pool import Pool
from hbmgym.train.runs import CannotGoOn, last_checkpoint

CRITIC = (128, 128)
"""Hidden layers of what judges in training; it is not exported."""
LOG_STD_INIT = -1.4
"""Noise of a quarter of the largest action, which is a fortieth of kv_share per window."""
GAE_LAMBDA = 0.95


def learn(options: TrainOptions, folder: Path, training: Sequence[Domain], validation: Sequence[Domain]) -> float:
    """Train up to options.total_timesteps and write policy.npz; returns its cost on validation over the best fixed
    splits', the least of all evaluations.

    Continues from the run's last checkpoint if it has one. Ctrl-C, SIGTERM and SIGHUP leave a checkpoint behind.
    """
    torch.set_num_threads(1)
    header = _header(options, training)
    judge = Validation(validation, folder, options.eval_freq, header)
    env = make_envs(options, training)
    checkpoint = last_checkpoint(folder)
    model = make_model(options, env) if checkpoint is None else _continue(checkpoint, env)
    model.threads = options.jobs
    model.set_logger(_make_logger(folder, model.num_timesteps))
    saver = Checkpoints(folder, options.save_freq)
    for callback in (judge, saver):  # they have work before learning begins, and after it has ended
        callback.init_callback(model)
    callbacks: list[BaseCallback] = [saver, SeenRange(), WindowCurves(), judge]  # in this order at a rollout's ends
    if options.progress:
        callbacks.append(RolloutBar())
    left = options.total_timesteps - model.num_timesteps
    try:
        if left > 0:
            model.learn(left, callbacks)
            saver.save()
            model.logger.dump(model.num_timesteps)
        elif not (folder / "policy.npz").is_file():  # it was stopped in the last evaluation
            judge.judge()
            model.logger.dump(model.num_timesteps)
    except KeyboardInterrupt as stop:
        saver.save()
        stop.args = (f"{str(stop) or 'interrupted'} after {saver.windows} windows",)
        raise
    finally:
        env.close()
        model.logger.close()
    _keep_policy(model, folder, header)
    return judge.best_cost


def make_envs(options: TrainOptions, training: Sequence[Domain]) -> DummyVecEnv:
    """The training environments, which share a pool of episodes; domains take turns."""
    pool = Pool(options.episodes, options.seed)
    domains = itertools.islice(itertools.cycle(training), options.n_envs)
    return DummyVecEnv([partial(make_env, options, domain, pool) for domain in domains])


def make_env(options: TrainOptions, domain: Domain, pool: Pool) -> HbmPartitionEnv:
    """One training environment."""
    return HbmPartitionEnv(
        workload=[pool.keep(workload) for workload in domain.workloads],
        episode_seeds=pool.seeds,
        reference_costs=pool.costs(domain.platform),
        serving=dataclasses.asdict(domain.config),
        backend=options.backend,
        part="train",
        absolute=options.absolute,
        randomise_initial_share=True,
        references={name: (found.kv_share, found.cost) for name, found in domain.references.items()},
    )


def make_model(options: TrainOptions, env: VecEnv) -> RolloutPPO:
    """PPO before its first step; inputs of the groups in `options.blind` are not seen."""
    model = RolloutPPO(
        "MlpPolicy",
        env,
        learning_rate=lambda left: options.learning_rate * left,
        n_steps=options.n_steps,
        batch_size=options.batch_size,
        n_epochs=options.n_epochs,
        gamma=options.gamma,
        gae_lambda=GAE_LAMBDA,
        policy_kwargs={
            "net_arch": {"pi": list(ACTORS[options.actor]), "vf": list(CRITIC)},
            "log_std_init": LOG_STD_INIT,
            "optimizer_kwargs": {"eps": 1e-5, "fused": True},  # SB3's own, an eighth of an update faster
        },
        seed=options.seed,
        device="cpu",
    )
    hidden = {name for group in options.blind for name, _ in OBSERVATION_GROUPS[group]}
    model.seen_inputs = np.array([name not in hidden for name in OBSERVATION_NAMES], np.float32)
    return model


def _continue(checkpoint: Path, env: VecEnv) -> RolloutPPO:
    try:
        return RolloutPPO.load(checkpoint, env=env, device="cpu")
    except ValueError as error:  # another version had other inputs
        raise CannotGoOn(f"{checkpoint} does not fit: {error}") from None


def _make_logger(folder: Path, steps: int) -> Logger:
    """A run that goes on keeps the progress it has: each stretch writes a file of its own."""
    suffix = f"_{steps}" if steps else ""
    return Logger(str(folder), [make_output_format(kind, str(folder), suffix) for kind in ("csv", "tensorboard")])


def _header(options: TrainOptions, training: Sequence[Domain]) -> Header:
    windows_s = [domain.config.window_s for domain in training]
    return Header(
        action_kind="absolute" if options.absolute else "incremental",
        windows_s=(min(windows_s), max(windows_s)),
        training=_facts(options, training),
    )


def _facts(options: TrainOptions, training: Sequence[Domain]) -> dict[str, object]:
    """What a policy's file tells about its training."""
    return {
        "recipe": options.recipe,
        "seed": options.seed,
        "platforms": list(dict.fromkeys(domain.platform for domain in training)),
        "workloads": sorted({workload.name for domain in training for workload in domain.workloads}),
    }


def _keep_policy(model: PPO, folder: Path, header: Header) -> None:
    """policy.npz is the best one on validation; last_policy.npz what training ended with."""
    export_policy(model, header).save(folder / "last_policy.npz")
    best = folder / "best" / "policy.npz"
    kept = best if best.is_file() else folder / "last_policy.npz"
    write_atomically(folder / "policy.npz", kept.read_bytes())
