"""The ids of the environments. Importing this loads neither kernels nor torch: the entry points are strings."""

from collections.abc import Mapping
from typing import Any

from gymnasium.envs.registration import register, registry

_ENTRY_POINT = "hbmgym.envs.hbm_partition:HbmPartitionEnv"

# Arguments of each id. Whatever changes results gets a new version; the old one stays.
ENVIRONMENTS: Mapping[str, Mapping[str, Any]] = {
    "hbmgym/HbmPartition-v0": {},
    "hbmgym/HbmPartitionAbsolute-v0": {"absolute": True},
}


def register_environments() -> None:
    """Make the ids known to Gymnasium; idempotent."""
    for name, arguments in ENVIRONMENTS.items():
        if name not in registry:
            register(id=name, entry_point=_ENTRY_POINT, kwargs=dict(arguments))
