"""Policy: a small network that looks at an observation and answers an action, kept in one `.npz` of plain arrays."""

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hbmgym.controllers.actions import ACTION_KINDS, DEFAULT_MAX_STEP
from hbmgym.controllers.helm.mlp import forward
from hbmgym.controllers.observation import OBSERVATION_NAMES
from hbmgym.files import write_atomically

VERSION = 1
"""Of the file's layout; an older or newer file is refused."""

Layers = Sequence[tuple[np.ndarray, np.ndarray]]


class PolicyError(ValueError):
    """A policy cannot be used; one line that names it, what is wrong and the remedy."""


@dataclass(frozen=True)
class Header:
    """What the numbers of a policy mean."""

    observation: tuple[str, ...] = OBSERVATION_NAMES
    """Names of the inputs, in order."""
    action_kind: str = "incremental"
    """One of ACTION_KINDS."""
    max_step: float = DEFAULT_MAX_STEP
    """Change of the wanted kv_share at action 1; unused by the absolute kind."""
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
        header = cls(**{**values, "observation": tuple(values.get("observation", ()))})
        if header.action_kind not in ACTION_KINDS:
            raise ValueError(f"action_kind is {header.action_kind!r}, expected one of: {', '.join(ACTION_KINDS)}")
        if not 0.0 < header.max_step <= 1.0:
            raise ValueError(f"max_step is {header.max_step}, expected a share above 0 and at most 1")
        return header


class Policy:
    """A tanh network; its action is the clipped mean, without noise.

    Not for two threads at once: the hidden layers are written to one buffer.
    """

    def __init__(self, layers: Layers, header: Header) -> None:
        self.layers = [(np.array(matrix, np.float32), np.array(bias, np.float32)) for matrix, bias in layers]
        self.header = header
        _check(self.layers, header)
        sizes = [self.layers[0][0].shape[1], *(len(bias) for _, bias in self.layers)]
        self._sizes = np.array(sizes, np.int64)
        self._packed = np.concatenate([part for matrix, bias in self.layers for part in (matrix.T.ravel(), bias)])
        self._scratch = np.zeros((2, max(sizes)), np.float32)

    @classmethod
    def from_layers(cls, layers: Layers, header: Header | None = None) -> "Policy":
        """From (matrix, bias) per layer, matrices as (outputs, inputs) like torch's; the last layer has one output."""
        return cls(layers, header or Header())

    def mean(self, observation: np.ndarray) -> float:
        """The network's answer to a C-contiguous float32[inputs]."""
        return forward(self._packed, self._sizes, observation, self._scratch)

    def action(self, observation: np.ndarray) -> float:
        """The action in [-1, 1] for a C-contiguous float32[inputs]."""
        return min(max(self.mean(observation), -1.0), 1.0)

    def save(self, path: str | Path) -> None:
        """Write the file whole or not at all."""
        arrays: dict[str, Any] = {"header": np.frombuffer(self.header.to_json().encode(), np.uint8)}
        for i, (matrix, bias) in enumerate(self.layers):
            arrays[f"matrix_{i}"], arrays[f"bias_{i}"] = matrix, bias
        _write_whole(Path(path), arrays)

    @classmethod
    def load(cls, path: str | Path) -> "Policy":
        """Read what `save` wrote; never unpickles. PolicyError says what is wrong with the file."""
        path = Path(path)
        arrays = _read_arrays(path)
        try:
            header = Header.from_json(arrays["header"].tobytes().decode())
            layers = [(arrays[f"matrix_{i}"], arrays[f"bias_{i}"]) for i in range((len(arrays) - 1) // 2)]
            return cls(layers, header)
        except KeyError as error:
            what = f"has no array {error}"
        except (ValueError, TypeError) as error:
            what = str(error)
        raise PolicyError(f"{path}: {what}; export the policy again with this version of hbmgym")


def _check(layers: Layers, header: Header) -> None:
    """Raise PolicyError unless these layers can answer the observations of this version."""
    if header.observation != OBSERVATION_NAMES:
        odd = sorted(set(header.observation) ^ set(OBSERVATION_NAMES))
        raise PolicyError(f"policy was trained on other observations ({', '.join(odd[:4]) or 'another order'})")
    inputs = len(header.observation)
    for i, (matrix, bias) in enumerate(layers):
        if bias.ndim != 1 or matrix.shape != (len(bias), inputs):
            raise PolicyError(
                f"policy has matrix_{i} of shape {matrix.shape} and bias_{i} of {bias.shape}, "
                f"expected (n, {inputs}) and (n,)"
            )
        if not (np.isfinite(matrix).all() and np.isfinite(bias).all()):
            raise PolicyError(f"policy has weights in layer {i} that are not finite")
        inputs = len(bias)
    if not layers or inputs != 1:
        raise PolicyError(f"policy has {inputs if layers else 'no'} outputs, expected 1")


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except OSError as error:
        if not path.is_file():
            raise PolicyError(f"{path}: no such file; give a policy.npz or the folder of a training run") from error
        raise PolicyError(f"{path}: cannot be read ({error.strerror or error}); check the file") from error
    except Exception as error:  # zipfile and numpy together raise ten kinds for damaged files
        raise PolicyError(f"{path}: is damaged or no archive of plain arrays; copy or export it again") from error


def _write_whole(path: Path, arrays: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    np.savez(content, **arrays)
    write_atomically(path, content.getvalue())
