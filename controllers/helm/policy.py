"""Policy: a small network that looks at an observation and answers an action, kept in one `.npz` of plain arrays."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hbmgym.controllers.actions import ACTION_KINDS, DEFAULT_MAX_STEP_PER_S, check_max_step_per_s
from hbmgym.controllers.helm.arrays import read_arrays, write_arrays
from hbmgym.controllers.helm.mlp import forward
from hbmgym.controllers.observation import OBSERVATION_NAMES

VERSION = 3
"""Of the file's layout; an older or newer file is refused."""

Layers = Sequence[tuple[np.ndarray, np.ndarray]]
Ranges = tuple[np.ndarray, np.ndarray]


class PolicyError(ValueError):
    """A policy cannot be used; one line that names it, what is wrong and the remedy."""


class OtherWindows(PolicyError):
    """A policy was not trained on windows as long as those in which it is to decide."""


@dataclass(frozen=True)
class Header:
    """What the numbers of a policy mean."""

    observation: tuple[str, ...] = OBSERVATION_NAMES
    """Names of the inputs, in order."""
    action_kind: str = "incremental"
    """One of ACTION_KINDS."""
    max_step_per_s: float = DEFAULT_MAX_STEP_PER_S
    """Change of the wanted kv_share per second at action 1; unused by the absolute kind."""
    windows_s: tuple[float, float] = (5.0, 5.0)
    """The shortest and the longest window that it was trained on, in seconds; with others it is refused."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Facts about the training run, for people; JSON values."""
    version: int = VERSION

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Header":
        """ValueError or TypeError when fields are missing, unknown or of another version."""
        values = json.loads(text)
        if not isinstance(values, dict):
            raise TypeError("the header is not a JSON object")
        if values.get("version") != VERSION:
            raise ValueError(f"version is {values.get('version')!r}, expected {VERSION}")
        listed = {name: tuple(values.get(name, ())) for name in ("observation", "windows_s")}
        header = cls(**{**values, **listed})
        if header.action_kind not in ACTION_KINDS:
            raise ValueError(f"action_kind is {header.action_kind!r}, expected one of: {', '.join(ACTION_KINDS)}")
        check_max_step_per_s(header.max_step_per_s)
        windows_s = header.windows_s
        if len(windows_s) != 2 or not 0.0 < windows_s[0] <= windows_s[1] < math.inf:
            raise ValueError(f"windows_s is {list(windows_s)}, expected [shortest, longest] in seconds, above 0")
        return header

    def check_window(self, window_s: float, owner: str) -> None:
        """OtherWindows, in one line, for windows that the policy, which `owner` runs, was not trained on."""
        least, most = self.windows_s
        if not least <= window_s <= most:
            windows = f"{least:g} s" if least == most else f"{least:g} to {most:g} s"
            raise OtherWindows(
                f"{owner} was trained on windows of {windows}, window_s is {window_s:g}: leave it out, take such "
                f"windows, or train a policy on these (python train/ppo.py --window-s {window_s:g})"
            )


class Policy:
    """A tanh network, or with one layer a linear rule; its action is the clipped mean, without noise.

    Not for two threads at once: the hidden layers are written to one buffer.
    """

    low: np.ndarray
    """float32[inputs]: the least value of each input that was seen in training; -1 where nobody has looked."""
    high: np.ndarray
    """Likewise the largest, or 1."""
    packed: np.ndarray
    """All weights as `mlp.forward` takes them, with `sizes` and `scratch`."""

    def __init__(self, layers: Layers, header: Header, ranges: Ranges | None = None) -> None:
        self.layers = [(np.array(matrix, np.float32), np.array(bias, np.float32)) for matrix, bias in layers]
        self.header = header
        ones = np.ones(len(header.observation), np.float32)
        self.low, self.high = (np.array(end, np.float32) for end in ranges or (-ones, ones))
        _check(self)
        sizes = [self.layers[0][0].shape[1], *(len(bias) for _, bias in self.layers)]
        self.sizes = np.array(sizes, np.int64)
        self.packed = np.concatenate([part for matrix, bias in self.layers for part in (matrix.T.ravel(), bias)])
        self.scratch = np.zeros((2, max(sizes)), np.float32)

    @classmethod
    def from_layers(cls, layers: Layers, header: Header | None = None, ranges: Ranges | None = None) -> "Policy":
        """From (matrix, bias) per layer, matrices as (outputs, inputs) like torch's; the last layer has one output.

        `ranges`: the least and the largest value of each input in training, two of float32[inputs].
        """
        return cls(layers, header or Header(), ranges)

    def mean(self, observation: np.ndarray) -> float:
        """The network's answer to a C-contiguous float32[inputs]."""
        return forward(self.packed, self.sizes, observation, self.scratch)

    def action(self, observation: np.ndarray) -> float:
        """The action in [-1, 1] for a C-contiguous float32[inputs]."""
        return min(max(self.mean(observation), -1.0), 1.0)

    def save(self, path: str | Path) -> None:
        """Write the file whole or not at all, with the digest of what is frozen in it."""
        arrays: dict[str, Any] = {"header": np.frombuffer(self.header.to_json().encode(), np.uint8)}
        for i, (matrix, bias) in enumerate(self.layers):
            arrays[f"matrix_{i}"], arrays[f"bias_{i}"] = matrix, bias
        digest = np.frombuffer(self.digest().encode(), np.uint8)
        write_arrays(path, arrays | {"low": self.low, "high": self.high, "digest": digest})

    def digest(self) -> str:
        """Tells this policy from others: of all that decides its actions."""
        h = self.header
        header = f"{h.observation} {h.action_kind} {h.max_step_per_s} {h.windows_s} {self.sizes.tolist()}"
        return hashlib.sha256(
            header.encode() + self.packed.tobytes() + self.low.tobytes() + self.high.tobytes()
        ).hexdigest()

    @classmethod
    def load(cls, path: str | Path) -> "Policy":
        """Read what `save` wrote; never unpickles. PolicyError says what is wrong with the file."""
        path = Path(path)
        arrays = read_arrays(path, PolicyError, "give a policy.npz or the folder of a training run")
        try:
            header = Header.from_json(arrays["header"].tobytes().decode())
            ranges, digest = (arrays.pop("low"), arrays.pop("high")), arrays.pop("digest").tobytes().decode()
            layers = [(arrays[f"matrix_{i}"], arrays[f"bias_{i}"]) for i in range((len(arrays) - 1) // 2)]
            policy = cls(layers, header, ranges)
            if policy.digest() == digest:
                return policy
            what = f"its arrays are not those that were frozen (digest {policy.digest()[:12]}, not {digest[:12]})"
        except KeyError as error:
            what = f"has no array {error}"
        except (ValueError, TypeError) as error:
            what = str(error)
        raise PolicyError(f"{path}: {what}; export the policy again with this version of hbmgym")


def _check(policy: Policy) -> None:
    """Raise PolicyError unless the policy can answer the observations of this version."""
    header = policy.header
    if header.observation != OBSERVATION_NAMES:
        odd = sorted(set(header.observation) ^ set(OBSERVATION_NAMES))
        raise PolicyError(f"policy was trained on other observations ({', '.join(odd[:4]) or 'another order'})")
    inputs = len(header.observation)
    for name, end in (("low", policy.low), ("high", policy.high)):
        if end.shape != (inputs,):
            raise PolicyError(f"policy has {name} of shape {end.shape}, expected ({inputs},)")
    if not (policy.low <= policy.high).all():
        raise PolicyError("policy has ranges whose low is above their high or not a number")
    for i, (matrix, bias) in enumerate(policy.layers):
        if bias.ndim != 1 or matrix.shape != (len(bias), inputs):
            raise PolicyError(
                f"policy has matrix_{i} of shape {matrix.shape} and bias_{i} of {bias.shape}, "
                f"expected (n, {inputs}) and (n,)"
            )
        if not (np.isfinite(matrix).all() and np.isfinite(bias).all()):
            raise PolicyError(f"policy has weights in layer {i} that are not finite")
        inputs = len(bias)
    if not policy.layers or inputs != 1:
        raise PolicyError(f"policy has {inputs if policy.layers else 'no'} outputs, expected 1")
