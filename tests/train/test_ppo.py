"""`python train/ppo.py`: a run folder with curves, a policy that is what torch learned, and runs that go on."""

import csv
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from stable_baselines3 import PPO
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hbmgym.controllers.helm.policy import Header, Policy
from hbmgym.controllers.observation import OBSERVATION_GROUPS, OBSERVATION_NAMES, OBSERVATION_SIZE
from hbmgym.controllers.registry import make_controller
from hbmgym.envs.hbm_partition import HbmPartitionEnv
from hbmgym.train.actor import AVERAGED, AVERAGED_UPDATES, SEEN, actor_layers, average, export_policy
from hbmgym.train.callbacks import Validation
from hbmgym.train.collect import RolloutPPO
from hbmgym.train.domains import Domain
from hbmgym.train.learn import make_envs, make_model
from hbmgym.train.options import TrainOptions
from hbmgym.train.ppo import main
from hbmgym.train.runs import held

from ..eval.traffic import CHAT, HBM_GIB, MODEL, write_trace

SCRIPT = Path(__file__).resolve().parents[2] / "train" / "ppo.py"


@pytest.fixture
def flags(tmp_path) -> list[str]:
    return ["--model", MODEL, "--hbm-gib", str(HBM_GIB), "--trace", str(write_trace(tmp_path / "own.jsonl"))]


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as archive:
        return dict(archive)


def return_curve(folder: Path) -> list[float]:
    rows = [
        row for path in sorted(folder.glob("progress*.csv")) for row in csv.DictReader(path.read_text().splitlines())
    ]
    return [float(row["rollout/ep_rew_mean"]) for row in rows if row.get("rollout/ep_rew_mean")]


def tags(folder: Path) -> set[str]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return set(events.Tags()["scalars"])


def flip_the_middle(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]


@pytest.mark.slow
def test_a_smoke_run_writes_everything_that_is_promised(flags, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, str(SCRIPT), "--smoke", "--out", str(run), *flags]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    for line in (f"run folder: {run}", f"tensorboard --logdir {run}", "real remapping"):
        assert line in ended.stdout
    config = json.loads((run / "config.json").read_text())
    assert config["command"][1:] == command[1:]
    assert config["options"]["total_timesteps"] == 1440
    assert return_curve(run)
    for prefix in ("slo/", "mem/", "control/", "rollout/", "train/", "eval/own/"):
        assert any(tag.startswith(prefix) for tag in tags(run)), prefix
    assert list((run / "checkpoints").glob("model_*.zip"))
    assert (run / "policy.npz").read_bytes() == (run / "best" / "policy.npz").read_bytes()
    assert {cell["controller"] for cell in json.loads((run / "cells.json").read_text())} >= {"ppo", "threshold"}
    summary = json.loads((run / "summary.json").read_text())
    assert summary["replay"]["metrics_equal"] or summary["replay"]["refused"]
    assert "ppo against sglang-0.9" in "\n".join(summary["tables"]["own"])
    assert {"slo/ttft_p99", "slo/violation", "eval/cost"} <= tags(next((run / "references").glob("own-sglang-0.9")))


def test_one_seed_gives_one_policy(flags, tmp_path):
    for name in ("one", "two"):
        main(["--smoke", "--no-final", "--out", str(tmp_path / name), *flags])
    for policy in ("policy.npz", "last_policy.npz"):
        one, two = arrays(tmp_path / "one" / policy), arrays(tmp_path / "two" / policy)
        assert one.keys() == two.keys()
        assert all(np.array_equal(one[key], two[key]) for key in one)
    assert return_curve(tmp_path / "one") == return_curve(tmp_path / "two")


def test_a_linear_actor_is_one_weight_for_each_input(flags, tmp_path):
    main(["--smoke", "--no-final", "--actor", "linear", "--out", str(tmp_path / "run"), *flags])
    policy = Policy.load(tmp_path / "run" / "policy.npz")
    ((weights, bias),) = policy.layers
    assert (weights.shape, bias.shape) == ((1, OBSERVATION_SIZE), (1,))
    assert np.abs(weights).max() > 0.0
    seen = np.random.default_rng(0).uniform(-1.0, 1.0, OBSERVATION_SIZE).astype(np.float32)
    assert policy.mean(seen) == pytest.approx(float(weights[0] @ seen + bias[0]), abs=1e-5)


def test_a_policy_knows_the_windows_that_it_was_trained_on(flags, tmp_path):
    main(["--smoke", "--no-final", "--window-s", "10", "--out", str(tmp_path / "run"), *flags])
    assert Policy.load(tmp_path / "run" / "policy.npz").header.windows_s == (10.0, 10.0)
    make_controller(f"ppo:{tmp_path / 'run'}", 10.0)
    with pytest.raises(ValueError, match="ppo was trained on windows of 10 s, window_s is 5: "):
        make_controller(f"ppo:{tmp_path / 'run'}", 5.0)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_goes_on_where_it_was(number, code, flags, tmp_path):
    run, total = tmp_path / "run", 8000
    small = ["--n-envs", "2", "--n-steps", "360", "--eval-episodes", "1", "--eval-freq", "720", "--no-final"]
    command = [sys.executable, str(SCRIPT), "--out", str(run), "--total-timesteps", str(total), *small, *flags]
    heard = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a job in the background would pass on its deafness
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, heard)
    while not (run / "evaluations.npz").is_file() or len(arrays(run / "evaluations.npz")["steps"]) < 2:
        assert process.poll() is None  # in the first rollout there is nothing yet to go on from
        time.sleep(0.05)
    process.send_signal(number)
    printed = process.communicate(timeout=120)[1]
    assert process.returncode == code
    assert printed.splitlines()[-1].endswith(f"go on with: python train/ppo.py --resume {run}")
    assert "Traceback" not in printed
    assert len(list((run / "checkpoints").iterdir())) == 1
    assert not (run / "policy.npz").exists()
    kept = Policy.load(run / "best" / "policy.npz").header.training["validation_cost"]

    main(["--resume", str(run)])
    steps = Policy.load(run / "last_policy.npz").header.training["steps"]
    assert total <= steps < total + 720
    assert len(list(run.glob("progress*.csv"))) == 2
    assert Policy.load(run / "policy.npz").header.training["validation_cost"] <= kept


@pytest.mark.parametrize(("stopped", "windows"), [((HbmPartitionEnv, "reset"), 0), ((Validation, "judge"), 1440)])
def test_a_run_that_is_stopped_before_or_after_learning_goes_on(stopped, windows, flags, tmp_path, monkeypatch, capsys):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(*stopped, interrupt)
        main(["--smoke", "--no-final", "--out", str(run), *flags])
    assert stop.value.code == 130
    assert f"interrupted after {windows} windows; go on with" in capsys.readouterr().err
    main(["--resume", str(run)])
    assert (run / "policy.npz").read_bytes() == (run / "best" / "policy.npz").read_bytes()


@pytest.mark.parametrize("stopped", [(RolloutPPO, "train"), (HbmPartitionEnv, "run_policy"), (Validation, "judge")])
def test_a_run_that_is_resumed_goes_on_as_if_it_had_never_been_stopped(stopped, flags, tmp_path, monkeypatch):
    """Wherever it is stopped in the third of four rollouts: parts of episodes, random numbers, average, evaluations."""
    small = ["--n-envs", "2", "--n-steps", "130", "--total-timesteps", "1040", "--eval-freq", "500", "--jobs", "1"]
    command = [*small, "--batch-size", "65", "--eval-episodes", "1", "--no-final", *flags]
    main([*command, "--out", str(tmp_path / "whole")])
    owner, name = stopped
    method, starts = getattr(owner, name), {"run_policy": 5, "train": 3, "judge": 2}
    calls = 0

    def interrupt(*arguments, **named):
        nonlocal calls
        calls += 1
        if calls == starts[name]:
            raise KeyboardInterrupt
        return method(*arguments, **named)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(owner, name, interrupt)
        main([*command, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run" / "policy.npz").exists()
    main(["--resume", str(tmp_path / "run")])
    for file in ("policy.npz", "last_policy.npz", "evaluations.npz"):
        whole, resumed = arrays(tmp_path / "whole" / file), arrays(tmp_path / "run" / file)
        assert whole.keys() == resumed.keys()
        assert all(np.array_equal(whole[key], resumed[key]) for key in whole), file
    assert arrays(tmp_path / "run" / "evaluations.npz")["steps"].tolist() == [520, 1040]


def test_a_finished_run_that_is_resumed_keeps_its_policy(flags, tmp_path, capsys):
    run = tmp_path / "run"
    main(["--smoke", "--no-final", "--out", str(run), *flags])
    before = (run / "policy.npz").read_bytes()
    main(["--resume", str(run)])
    assert (run / "policy.npz").read_bytes() == before
    (run / "best" / "policy.npz").write_bytes(before[:100])
    with pytest.raises(SystemExit) as stop:
        main(["--resume", str(run)])
    assert stop.value.code == 2
    assert "is damaged or no archive of plain arrays" in capsys.readouterr().err.splitlines()[-1]


def test_traffic_of_which_a_later_seed_makes_no_episode_ends_a_run_in_one_line(tmp_path, capsys):
    """Its validation part has one request: after the first seed's start, but before that of the last."""
    times_s = [*range(0, 3600, 10), 3650, 6000]
    rows = [{"timestamp": 1000 * time_s, "input_length": 700, "output_length": 60} for time_s in times_s]
    (tmp_path / "gap.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit) as stop:
        main(["--smoke", "--model", MODEL, "--trace", str(tmp_path / "gap.jsonl"), "--out", str(tmp_path / "run")])
    assert stop.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "gap: 0 of the episode's" in line and line.endswith("a run keeps its traffic: start a new one")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run that has ended, with two checkpoints; tests work on copies."""
    folder = tmp_path_factory.mktemp("finished")
    trace = write_trace(folder / "own.jsonl")
    serving = ["--model", MODEL, "--hbm-gib", str(HBM_GIB), "--trace", str(trace)]
    main(["--smoke", "--no-final", "--save-freq", "720", "--out", str(folder / "run"), *serving])
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def checkpoints(run: Path) -> list[Path]:
    """Oldest first."""
    return sorted((run / "checkpoints").iterdir(), key=lambda path: int(path.stem.split("_")[1]))


def refused(run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of a run that cannot be resumed."""
    with pytest.raises(SystemExit) as stop:
        main(["--resume", str(run)])
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("spoil", [lambda whole: whole[: len(whole) // 2], lambda whole: b"", flip_the_middle])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(spoil, run, capsys):
    before, last = checkpoints(run)
    last.write_bytes(spoil(last.read_bytes()))
    (run / "policy.npz").unlink()
    main(["--resume", str(run)])
    assert f"{last} is damaged; going on from {before.name}" in capsys.readouterr().err
    assert Policy.load(run / "last_policy.npz").header.training["steps"] == 1440
    before.write_bytes(b"")
    last.write_bytes(b"")
    line = refused(run, capsys)
    assert f"{last} is damaged, and there is no other" in line and "start a new run" in line


def test_a_checkpoint_that_has_forgotten_what_it_saw_is_refused(run, capsys):
    before, last = checkpoints(run)
    last.unlink()
    model = PPO.load(before)
    delattr(model, SEEN)
    model.save(before)
    assert f"{run} cannot be resumed: its checkpoint is of an older version" in refused(run, capsys)


def test_a_checkpoint_with_other_inputs_is_refused(run, capsys):
    for checkpoint in checkpoints(run):
        model = PPO.load(checkpoint)
        model.observation_space = Box(-1.0, 1.0, (OBSERVATION_SIZE + 1,), np.float32)
        model.save(checkpoint)
    assert f"{checkpoints(run)[-1]} does not fit: Observation spaces do not match" in refused(run, capsys)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_where_files_cannot_be_locked_a_line_says_so(number, tmp_path, monkeypatch, capsys):
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / "config.json").write_text("{}")
    with held(tmp_path):
        pass
    line = f"{tmp_path} cannot be locked ({os.strerror(number)}): start no other process on it\n"
    assert capsys.readouterr().err == line


def test_a_run_folder_that_cannot_be_made_whole_goes_again(flags, tmp_path, monkeypatch, capsys):
    def refuse(path: Path, _: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("hbmgym.train.runs.write_json", refuse)
    with pytest.raises(SystemExit):
        main(["--smoke", "--out", str(tmp_path / "runs" / "mine"), *flags])
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "runs").exists()


def test_a_disk_that_is_full_while_it_trains_is_one_line_that_says_how_to_go_on(flags, tmp_path, monkeypatch, capsys):
    def refuse(path: Path, _: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr("hbmgym.train.callbacks.write_atomically", refuse)
        main(["--smoke", "--no-final", "--out", str(run), *flags])
    assert stop.value.code == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "No space left on device" in line and line.endswith(f"go on with: python train/ppo.py --resume {run}")
    main(["--resume", str(run)])
    assert (run / "policy.npz").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_that_train_save_whatever_stops_the_first_process(number, flags, tmp_path):
    small = ["--n-envs", "2", "--n-steps", "360", "--eval-episodes", "1", "--eval-freq", "720", "--no-final"]
    several = ["--total-timesteps", "1000000", "--seeds", "2", "--jobs", "2", "--out", str(tmp_path / "run")]
    with subprocess.Popen([sys.executable, str(SCRIPT), *several, *small, *flags], stderr=subprocess.PIPE) as process:
        folders = [tmp_path / "run" / f"seed-{seed}" for seed in range(2)]
        while not all((folder / "best" / "policy.npz").is_file() for folder in folders):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        process.communicate(timeout=120)  # workers have its streams, so that this waits for them too
    assert process.returncode == (143 if number == signal.SIGTERM else -number)
    assert all(len(checkpoints(folder)) == 1 for folder in folders)


def test_one_process_at_a_time_has_a_run(run, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with held(run):
        assert f"{run} is in use by another process" in refused(run, capsys)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    main(["--resume", str(run)])


@pytest.fixture
def model() -> Iterator[PPO]:
    """Before its first step."""
    options = TrainOptions(model=MODEL, hbm_gib=HBM_GIB, n_envs=1, n_steps=64, batch_size=64, learning_rate=0.05)
    domain = Domain(options.serving_config(), (CHAT,), "train", (), {})
    env = make_envs(options, [domain])
    yield make_model(options, env)
    env.close()


def test_an_exported_policy_answers_as_torch_does(model):
    model.learn(256)
    setattr(model, AVERAGED, None)  # what torch answers with is the last update alone
    policy = export_policy(model, Header())
    observations = np.random.default_rng(0).uniform(-1, 1, (200, OBSERVATION_SIZE)).astype(np.float32)
    with torch.no_grad():
        expected = model.policy.get_distribution(torch.from_numpy(observations)).distribution.mean[:, 0].numpy()
    means = [policy.mean(observation) for observation in observations]
    assert np.std(means) > 0.01
    np.testing.assert_allclose(means, expected, atol=1e-5)
    actions = [policy.action(observation) for observation in observations]
    np.testing.assert_allclose(actions, model.predict(observations, deterministic=True)[0][:, 0], atol=1e-5)


def test_a_policy_that_was_blind_to_a_group_ignores_it(flags, tmp_path):
    main(
        ["--smoke", "--no-final", "--blind", "marginals", "--blind", "geometry", "--out", str(tmp_path / "run"), *flags]
    )
    policy = Policy.load(tmp_path / "run" / "policy.npz")
    hidden = {name for group in ("marginals", "geometry") for name, _ in OBSERVATION_GROUPS[group]}
    blind = np.array([name in hidden for name in OBSERVATION_NAMES])
    rng = np.random.default_rng(0)
    observation = rng.uniform(-1, 1, OBSERVATION_SIZE).astype(np.float32)
    other = np.where(blind, rng.uniform(-1, 1, OBSERVATION_SIZE), observation).astype(np.float32)
    assert policy.mean(observation) == policy.mean(other)
    assert policy.mean(observation) != policy.mean(np.where(blind, observation, 0.5 * observation).astype(np.float32))
    assert (policy.low[blind] == -1.0).all() and (policy.high[blind] == 1.0).all()


def test_an_unknown_group_of_inputs_is_refused(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--smoke", "--blind", "colours", *flags])
    assert stop.value.code == 2
    assert "--blind is 'colours', expected one of: shares, pools" in capsys.readouterr().err


def test_what_is_exported_is_averaged_over_some_ten_updates_and_forgets_those_before():
    """Weights that were 0 for long and then 1: after ten updates two thirds of the average are of the last ten."""
    averaged, biases = None, []
    for update in range(1, 4 * AVERAGED_UPDATES + 1):
        value = float(update > 3 * AVERAGED_UPDATES)
        averaged = average(averaged, [(np.full((1, 2), value), np.full(1, value))], update)
        biases.append(float(averaged[0][1][0]))
    assert not any(biases[: 3 * AVERAGED_UPDATES])
    assert biases[-1] == pytest.approx(1.0 - (1.0 - 1.0 / AVERAGED_UPDATES) ** AVERAGED_UPDATES)
    assert averaged[0][0].tolist() == [[biases[-1]] * 2]


def test_the_first_updates_enter_the_average_with_equal_weight():
    averaged = None
    for update in range(1, AVERAGED_UPDATES + 1):
        averaged = average(averaged, [(np.zeros((1, 1)), np.array([float(update)]))], update)
    assert averaged[0][1][0] == pytest.approx((AVERAGED_UPDATES + 1) / 2)


def test_the_last_update_enters_the_exported_average(model):
    after = []
    train = PPO.train

    def watched(self):
        train(self)
        after.append(actor_layers(self))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PPO, "train", watched)
        model.learn(3 * 64)
    assert len(after) == 3
    for place, (matrix, bias) in enumerate(export_policy(model, Header()).layers):
        expected = [np.mean([layers[place][part] for layers in after], axis=0) for part in range(2)]
        np.testing.assert_allclose(bias, expected[1], rtol=1e-5, atol=1e-7)
        if place:  # of the first layer, weights of inputs that were always 0 are left out
            np.testing.assert_allclose(matrix, expected[0], rtol=1e-5, atol=1e-7)
