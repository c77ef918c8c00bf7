import itertools
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest

from hbmgym.controllers.actions import ACTION_KINDS
from hbmgym.controllers.helm.policy import Header, Policy, PolicyError
from hbmgym.controllers.observation import OBSERVATION_SIZE


def make_layers(*widths: int, seed: int = 0, scale: float = 1.0) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    sizes = (OBSERVATION_SIZE, *widths, 1)
    return [
        (scale * rng.normal(size=(n, m)) / np.sqrt(m), scale * 0.1 * rng.normal(size=n))
        for m, n in itertools.pairwise(sizes)
    ]


def make_observations(count: int) -> np.ndarray:
    return np.random.default_rng(7).uniform(-1, 1, (count, OBSERVATION_SIZE)).astype(np.float32)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "policy.npz"
    Policy.from_layers(make_layers(8, 8)).save(path)
    return path


def rewrite(path, **changes) -> None:
    with np.load(path) as archive:
        arrays = dict(archive) | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


def header_bytes(**changes) -> np.ndarray:
    return np.frombuffer(json.dumps(json.loads(Header().to_json()) | changes).encode(), np.uint8)


@pytest.mark.parametrize("widths", [(), (16,), (64, 64), (5, 7, 3)])
@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_the_kernel_equals_torch(widths, scale):
    import torch

    layers = make_layers(*widths, scale=scale)
    observations = make_observations(50)
    hidden = torch.from_numpy(observations)
    for i, (matrix, bias) in enumerate(layers):
        hidden = torch.nn.functional.linear(hidden, torch.tensor(matrix).float(), torch.tensor(bias).float())
        hidden = torch.tanh(hidden) if i < len(widths) else hidden
    policy = Policy.from_layers(layers)
    means = [policy.mean(observation) for observation in observations]
    np.testing.assert_allclose(means, hidden[:, 0].numpy(), rtol=1e-5, atol=1e-5)


def test_actions_are_clipped_means():
    policy = Policy.from_layers(make_layers(8, scale=4.0))
    for observation in make_observations(50):
        assert policy.action(observation) == np.clip(policy.mean(observation), -1.0, 1.0)


def test_a_saved_policy_reads_back_the_same(tmp_path):
    header = Header(
        action_kind=ACTION_KINDS[1], max_step_per_s=0.05, windows_s=(1.0, 15.0), training={"seed": 3, "steps": 1e6}
    )
    policy = Policy.from_layers(make_layers(8, 8), header)
    policy.save(tmp_path / "run" / "policy.npz")
    read = Policy.load(tmp_path / "run" / "policy.npz")
    assert read.header == header
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["policy.npz"]
    for observation in make_observations(20):
        assert read.action(observation) == policy.action(observation)


@pytest.mark.parametrize("windows_s", [(5.0, 5.0), (1.0, 15.0)])
def test_windows_that_it_was_not_trained_on_are_refused(windows_s):
    header = Header(windows_s=windows_s)
    for window_s in windows_s:
        header.check_window(window_s, "helm")
    for window_s in (0.99 * windows_s[0], 30.0):
        with pytest.raises(
            ValueError, match=rf"helm was trained on windows of .* s, window_s is {window_s:g}: "
        ) as error:
            header.check_window(window_s, "helm")
        assert "\n" not in str(error.value)


def test_ranges_of_training_come_with_the_policy(saved):
    low, high = np.full(OBSERVATION_SIZE, -0.5), np.linspace(0.0, 1.0, OBSERVATION_SIZE)
    plain = Policy.load(saved)
    assert (plain.low == -1.0).all() and (plain.high == 1.0).all()
    Policy.from_layers(plain.layers, ranges=(low, high)).save(saved)
    read = Policy.load(saved)
    assert (read.low == low.astype(np.float32)).all() and (read.high == high.astype(np.float32)).all()
    assert read.digest() != plain.digest()


def test_weights_that_were_changed_after_they_were_frozen_are_refused(saved):
    for name in ("matrix_0", "bias_1", "high"):
        with np.load(saved) as archive:
            changed = archive[name].copy()
        before = changed.flat[0]
        changed.flat[0] = np.nextafter(before, np.float32(2.0))
        rewrite(saved, **{name: changed})
        assert "its arrays are not those that were frozen" in refused(saved)
        changed.flat[0] = before
        rewrite(saved, **{name: changed})
        Policy.load(saved)


def test_a_failed_write_leaves_the_old_file(saved, monkeypatch):
    old = saved.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(OSError, match="disk full"):
        Policy.from_layers(make_layers(4)).save(saved)
    assert saved.read_bytes() == old
    assert list(saved.parent.iterdir()) == [saved]


def refused(path) -> str:
    with pytest.raises(PolicyError) as error:
        Policy.load(path)
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message


def test_a_missing_file_is_named(tmp_path):
    assert "no such file" in refused(tmp_path / "policy.npz")


def test_truncated_files_are_refused(saved):
    whole = saved.read_bytes()
    for size in range(0, len(whole), 97):
        saved.write_bytes(whole[:size])
        assert "damaged" in refused(saved)


def test_flipped_bits_are_refused_or_without_effect(saved):
    whole, action = saved.read_bytes(), Policy.load(saved).action(make_observations(1)[0])
    for place in range(0, len(whole), 31):
        saved.write_bytes(whole[:place] + bytes([whole[place] ^ 0x15]) + whole[place + 1 :])
        try:
            assert Policy.load(saved).action(make_observations(1)[0]) == action
        except PolicyError as error:
            assert "\n" not in str(error)


def test_pickles_are_never_opened(saved):
    saved.write_bytes(pickle.dumps(print))
    assert "plain arrays" in refused(saved)
    np.savez(saved, header=np.array([print], dtype=object))
    assert "plain arrays" in refused(saved)


def test_a_bare_array_is_refused(saved):
    with saved.open("wb") as file:
        np.save(file, np.zeros(3))
    assert "plain arrays" in refused(saved)


def test_another_version_is_refused(saved):
    rewrite(saved, header=header_bytes(version=99))
    assert "version is 99, expected 3" in refused(saved)


def test_other_observations_are_refused(saved):
    rewrite(saved, header=header_bytes(observation=["kv_share", "moon_phase"]))
    assert "other observations" in refused(saved)


@pytest.mark.parametrize(
    "changes",
    [
        {"action_kind": "relative"},
        {"max_step_per_s": 7},
        {"max_step_per_s": "large"},
        {"windows_s": [15.0, 1.0]},
        {"windows_s": [0.0, 5.0]},
        {"windows_s": []},
        {"windows_s": [5.0]},
        {"windows_s": 5.0},
        {"windows_s": ["a", "b"]},
        {"colour": 1},
        {"observation": 3},
    ],
)
def test_bad_headers_are_refused(saved, changes):
    rewrite(saved, header=header_bytes(**changes))
    refused(saved)


@pytest.mark.parametrize("text", [b"", b"[1]", b"{", b"\xff"])
def test_headers_that_are_no_json_object_are_refused(saved, text):
    rewrite(saved, header=np.frombuffer(text, np.uint8))
    refused(saved)


@pytest.mark.parametrize(
    "changes",
    [
        {"matrix_1": np.zeros((8, 9))},
        {"bias_1": np.zeros(7)},
        {"matrix_2": np.zeros((2, 8)), "bias_2": np.zeros(2)},
        {"matrix_0": np.full((8, OBSERVATION_SIZE), np.nan)},
        {"matrix_0": np.array(["a", "b"])},
        {"bias_0": np.array(0.0)},
        {"header": None},
        {"matrix_0": None, "spare": np.zeros(1)},
        {"low": None},
        {"high": np.ones(3)},
        {"low": np.full(OBSERVATION_SIZE, 2.0)},
        {"high": np.full(OBSERVATION_SIZE, np.nan)},
    ],
)
def test_wrong_arrays_are_refused(saved, changes):
    rewrite(saved, **changes)
    refused(saved)


def test_evaluation_does_not_import_torch(saved):
    code = f"""
import sys
import numpy as np
from hbmgym.controllers.observation import OBSERVATION_SIZE
from hbmgym.controllers.registry import make_controller
controller = make_controller("ppo:{saved}")
controller.policy.action(np.zeros(OBSERVATION_SIZE, np.float32))
make_controller("helm:{saved}")
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
