"""The flags of train/ppo.py."""

from dataclasses import dataclass

from hbmgym.cli import option
from hbmgym.controllers.observation import OBSERVATION_GROUPS
from hbmgym.envs.traces.seeds import SEED_RANGES
from hbmgym.eval.options import ServingOptions
from hbmgym.memory_backend.vmm import BACKENDS
from hbmgym.train.recipes import RECIPES

SMOKE = {"total_timesteps": 1440, "n_envs": 2, "n_steps": 360, "eval_episodes": 1, "table_episodes": 2}
"""Two updates that hold whole episodes, so that even a smoke run has a return curve."""
ACTORS = {"network": (64, 64), "linear": ()}
"""Hidden layers of what decides: a network, or one weight for each input."""


@dataclass(frozen=True)
class TrainOptions(ServingOptions):
    """What is learned, for how long, and where it goes."""

    recipe: str = option("", f"train on many platforms and scenarios: {', '.join(RECIPES)}", choices=("", *RECIPES))
    absolute: bool = option(False, "an action is kv_share itself, as in HbmPartitionAbsolute-v0")
    actor: str = option("network", "what decides: a network, or linear: one weight for each input", choices=ACTORS)
    blind: tuple[str, ...] = option((), f"inputs that are not seen, repeatable: {', '.join(OBSERVATION_GROUPS)}")
    total_timesteps: int = option(250_000, "windows of all environments together, also 2e5")
    n_envs: int = option(16, "environments")
    episodes: int = option(64, "training episodes of each workload, drawn again and again")
    n_steps: int = option(180, "windows per environment between two updates")
    batch_size: int = option(720, "windows per gradient step")
    n_epochs: int = option(8, "passes over the windows of an update")
    learning_rate: float = option(4e-4, "of Adam, falling linearly to 0")
    gamma: float = option(0.99, "discount per window")
    seed: int = option(0, "of networks, actions and episodes")
    seeds: int = option(1, "train so many policies, from --seed on, and keep the best on validation")
    backend: str = option("accounting", "what executes the moves", choices=BACKENDS)
    eval_freq: int = option(25_000, "windows between two evaluations on validation seeds")
    save_freq: int = option(50_000, "windows between two checkpoints")
    eval_episodes: int = option(4, "validation episodes that choose the policy, none of them in the table")
    table_episodes: int = option(8, "validation episodes of the table at the end")
    jobs: int = option(2, "threads of the training; processes of the table at the end, and of --seeds")
    out: str = option("", "run folder; by default the next free one under runs/")
    resume: str = option(
        "", "run folder to continue; its own options apply; checkpoints are pickles: only what you trust", metavar="RUN"
    )
    final: bool = option(
        True, "compare at the end, and replay one episode with real remapping; a recipe: eval/regret.py"
    )
    progress: bool = option(True, "show progress bars")
    smoke: bool = option(False, "two small updates, to see that everything works")

    def __post_init__(self) -> None:
        for name in ("total_timesteps", "n_envs", "n_steps", "batch_size", "n_epochs", "seeds", "eval_freq"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected an integer >= 1")
        for name in ("episodes", "save_freq", "eval_episodes", "table_episodes", "jobs"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected an integer >= 1")
        if unknown := sorted(set(self.blind) - set(OBSERVATION_GROUPS)):
            raise ValueError(f"--blind is {unknown[0]!r}, expected one of: {', '.join(OBSERVATION_GROUPS)}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"--seed is {self.seed}, expected an integer from 0 to {2**31 - 1}")
        if self.batch_size < 2 or self.n_envs * self.n_steps < 2:
            raise ValueError(
                f"--batch-size is {self.batch_size} and --n-envs x --n-steps is {self.n_envs * self.n_steps}, expected "
                "at least 2 windows each"
            )
        if self.eval_episodes + self.table_episodes > len(SEED_RANGES["validation"]):
            raise ValueError(
                f"--eval-episodes {self.eval_episodes} and --table-episodes {self.table_episodes} share "
                f"{len(SEED_RANGES['validation'])} validation seeds: take fewer"
            )
        if not 0.0 < self.gamma < 1.0:
            raise ValueError(f"--gamma is {self.gamma}, expected a number between 0 and 1")
        if not 0.0 < self.learning_rate < 1.0:
            raise ValueError(f"--learning-rate is {self.learning_rate}, expected a number between 0 and 1")
