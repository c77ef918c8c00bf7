"""Controllers by name, as the command line and tables write them."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hbmgym.controllers.balance import BalanceController
from hbmgym.controllers.bandit import BanditController
from hbmgym.controllers.base import Controller
from hbmgym.controllers.convex.controller import ConvexController
from hbmgym.controllers.demand import DemandController
from hbmgym.controllers.floor import floored
from hbmgym.controllers.gradient import GradientController
from hbmgym.controllers.helm.controller import HelmController
from hbmgym.controllers.helm.policy import Policy, PolicyError
from hbmgym.controllers.helm.ppo import PpoController
from hbmgym.controllers.helm.variants import (
    STATIC_RESIDUAL,
    VARIANTS,
    make_variant,
    shipped_policy,
    static_residual,
)
from hbmgym.controllers.moving_average import MovingAverageController
from hbmgym.controllers.random_walk import RandomController
from hbmgym.controllers.static import StaticController
from hbmgym.controllers.tail_blame import TailBlameController
from hbmgym.controllers.threshold import ThresholdController
from hbmgym.controllers.tuning import RANGES, check_tunable, tuned_parameters

_PLAIN: dict[str, Callable[[], Controller]] = {
    "random": RandomController,
    "threshold": ThresholdController,
    "threshold-b1": lambda: ThresholdController.avmp(1),
    "threshold-b128": lambda: ThresholdController.avmp(128),
    "threshold-code-b1": lambda: ThresholdController.avmp(1, "code"),
    "threshold-code-b128": lambda: ThresholdController.avmp(128, "code"),
    "demand": DemandController,
    "sglang-balance": BalanceController,
    "moving-average": MovingAverageController,
    "tail-blame": TailBlameController,
    "tail-blame-fast": TailBlameController.fast,
    "gradient": GradientController,
    "bandit": BanditController,
    "convex": ConvexController,
    STATIC_RESIDUAL: static_residual,
}
_NUMBERED: dict[str, Callable[[float], Controller]] = {
    "static": StaticController,
    "sglang": StaticController.from_sglang_ratio,
}
_LEARNED: dict[str, Callable[[Policy], Controller]] = {
    "ppo": PpoController,
    **{name: functools.partial(make_variant, name) for name in VARIANTS},
}

MOVING_CONTROLLERS = tuple(_PLAIN)
"""Those that need neither a number nor a file."""
KNOWN_CONTROLLERS = (
    "static-<kv share>",
    "sglang-<mamba_full_memory_ratio>",
    *MOVING_CONTROLLERS,
    *(f"{name}:tuned" for name in RANGES),
    *VARIANTS,
    *(f"{name}:<run folder or policy.npz>" for name in _LEARNED),
)


def make_controller(spec: str, window_s: float | None = None) -> Controller:
    """The controller that `spec` names, see KNOWN_CONTROLLERS, over a ShareFloor where it may move; ValueError in one
    line when there is none, or when it is to decide every `window_s` and was not trained for that."""
    controller = _make(spec)
    if window_s is not None and isinstance(controller, HelmController):
        controller.check_window(window_s)
    return floored(controller)


def _make(spec: str) -> Controller:
    if spec in _PLAIN:
        return _PLAIN[spec]()
    kind, _, path = spec.partition(":")
    if kind in _PLAIN and path == "tuned":
        controller = with_parameters(kind, tuned_parameters(kind))
        controller.name = spec
        return controller
    if spec in VARIANTS:
        return _LEARNED[spec](shipped_policy())
    if kind in _LEARNED and path:
        return _LEARNED[kind](Policy.load(_policy_file(Path(os.path.expanduser(path)))))
    kind, _, text = spec.partition("-")
    if kind in _NUMBERED and text:
        try:
            number = float(text)
        except ValueError:
            raise ValueError(f"controller {spec!r}: {text!r} is not a number") from None
        return _NUMBERED[kind](number)
    raise ValueError(f"controller {spec!r} is unknown, expected one of: {', '.join(KNOWN_CONTROLLERS)}")


def untuned_parameters(name: str) -> dict[str, Any]:
    """Those of a controller's parameters that may be tuned, as they are; ValueError when there are none."""
    check_tunable(name)
    controller: Any = _PLAIN[name]()
    return {key: getattr(controller.parameters, key) for key in RANGES[name]}


def with_parameters(name: str, values: Mapping[str, Any]) -> Controller:
    """The controller of RANGES called `name`, with some of its parameters replaced."""
    untuned: Any = _PLAIN[name]()
    controller: Controller = type(untuned)(dataclasses.replace(untuned.parameters, **values))
    controller.name = name
    return controller


def is_static(name: str) -> bool:
    """Does a controller of this name keep the split it starts at?"""
    kind, _, number = name.partition("-")
    return kind in _NUMBERED and name.partition(":")[0] not in _PLAIN and bool(number)


def _policy_file(path: Path) -> Path:
    """`path` itself, or the policy of the run folder that it is."""
    if not path.is_dir():
        return path
    for file in (path / "policy.npz", path / "best" / "policy.npz"):
        if file.is_file():
            return file
    raise PolicyError(f"{path}: holds neither policy.npz nor best/policy.npz; let the training run end or give a file")
