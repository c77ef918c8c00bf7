"""HelmController and its ablations by name, and the policy that comes with the package."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hbmgym.controllers.helm.controller import HelmController
from hbmgym.controllers.helm.parameters import HelmParameters
from hbmgym.controllers.helm.policy import Policy

SHIPPED = Path(__file__).with_name("policy.npz")
STATIC_RESIDUAL = "helm-static-residual"

# What differs from the defaults.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "helm": {},
    "helm-base": {"most_residual": 0.0, "bursts": False, "caps": False},
    "helm-residual": {"bursts": False, "caps": False, "least_strange": 0.0},
    "helm-burst": {"most_residual": 0.0, "caps": False, "least_strange": 0.0},
    "helm-cap": {"most_residual": 0.0, "bursts": False},
    "helm-always": {"least_strange": 0.0},
    "helm-freeze": {"freeze_in_burst": True, "least_strange": 0.0},
}


def make_variant(name: str, policy: Policy) -> HelmController:
    """One of VARIANTS on a base policy."""
    return HelmController(policy, HelmParameters(**VARIANTS[name]), name)


def static_residual() -> HelmController:
    """The adapter around a static share of .5, without base and bursts."""
    return HelmController(None, HelmParameters(bursts=False, caps=False), STATIC_RESIDUAL)


def shipped_policy() -> Policy:
    """The one that comes with the package; docs/helm.md tells how it was trained."""
    return Policy.load(SHIPPED)
