"""All of hbmgym once: every module, the environments, a trace there and back, a table, tuning, two PPO updates.

`python tests/smoke.py` needs hbmgym with its extras `tune` and `zst`, and nothing else of the checkout.
"""

import importlib
import json
import pkgutil
import subprocess
import sys
import tempfile
from pathlib import Path

import gymnasium
import numpy as np

import hbmgym
from hbmgym.envs.registration import ENVIRONMENTS
from hbmgym.envs.traces.load import load_trace

NEEDS_SGLANG = "hbmgym.eval.sglang_cache.theirs"
SERVING = ("--trace", "own.npz", "--model", "qwen3.5-4b", "--hbm-gib", "1")


def main() -> None:
    """Raises where anything fails."""
    import_all()
    step_environments()
    with tempfile.TemporaryDirectory() as folder:
        convert(Path(folder))
        run(folder, "hbmgym.eval.compare", *SERVING, "--seeds", "1", "--out", "table")
        tuning = ("--controller", "threshold", "--trials", "3", "--seeds", "1", "--out", "tuned.json")
        run(folder, "hbmgym.eval.tune", *SERVING, *tuning)
        run(folder, "hbmgym.train.ppo", *SERVING, "--smoke", "--out", "run")
        run(folder, "tensorboard.main", "--version")
    print(f"all of {Path(hbmgym.__file__).parent} works")


def import_all() -> None:
    """Every module of the package."""
    for module in pkgutil.walk_packages(hbmgym.__path__, "hbmgym."):
        if module.name != NEEDS_SGLANG:
            importlib.import_module(module.name)


def step_environments() -> None:
    """One window in each environment, made as users make them."""
    for name in ENVIRONMENTS:
        env = gymnasium.make(name, serving={"hbm_gib": 2.0})
        env.reset(seed=0)
        observation, reward, *_ = env.step(env.action_space.sample())
        assert env.observation_space.contains(observation) and float(reward) <= 1.0
        env.close()


def convert(folder: Path) -> None:
    """Write a Mooncake file and its compact form `own.npz`, which must hold the same rows."""
    rng = np.random.default_rng(0)
    with (folder / "own.jsonl").open("w") as file:
        for time_s in range(0, 1800, 2):
            ids = (100 * rng.integers(99) + np.arange(rng.integers(1, 20))).tolist()
            row = {"timestamp": 1000 * time_s, "input_length": 512 * len(ids), "output_length": 60, "hash_ids": ids}
            file.write(json.dumps(row) + "\n")
    run(str(folder), "hbmgym.envs.traces", "convert", "own.jsonl", "own.npz")
    before, after = load_trace(folder / "own.jsonl"), load_trace(folder / "own.npz")
    assert before.input_tokens.size == 900
    for column in ("arrival_s", "input_tokens", "h_ref", "r_start"):
        np.testing.assert_array_equal(getattr(before, column), getattr(after, column))


def run(folder: str, *command: str) -> None:
    """`python -m` this command, in `folder`."""
    subprocess.run([sys.executable, "-m", *command], cwd=folder, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
