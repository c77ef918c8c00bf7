"""A policy and an engine in one kernel: many windows without Python, and without other environments' data between them.

It gives what stepping gives, observe, act, raise to the floor, ask, serve, because it calls the same functions.
"""

import math
from typing import NamedTuple

import numpy as np

from hbmgym.controllers.actions import RULE, ShareAction, move
from hbmgym.controllers.floor import ShareFloor, raise_share
from hbmgym.controllers.helm.mlp import forward
from hbmgym.controllers.observation import OBSERVATION_SIZE, observe_record
from hbmgym.controllers.telemetry import TELEMETRY
from hbmgym.envs.serving.core import Core, serve_window
from hbmgym.envs.serving.engine import ask_for_share
from hbmgym.memory_backend.jit import kernel

_FIELDS = list(TELEMETRY.names or ())
_KV_NEEDED, _REQUESTED = _FIELDS.index("kv_needed"), _FIELDS.index("kv_share_requested")


class Network(NamedTuple):
    """A policy's mean action, as `mlp.forward` takes it; see `Policy`."""

    packed: np.ndarray
    sizes: np.ndarray


class Windows(NamedTuple):
    """Windows in a row, a line each."""

    observations: np.ndarray
    """float32 (n, OBSERVATION_SIZE): by which each action was chosen."""
    actions: np.ndarray
    """float32 (n,): not clipped."""
    telemetry: np.ndarray
    """TELEMETRY (n,): at the end of each window."""


@kernel
def _act(values, rule, floor, packed, sizes, scratch, noise, observation):
    """The action after one Telemetry record, and the share to ask for, or nan."""
    observe_record(values, observation)
    action = np.float32(forward(packed, sizes, observation, scratch) + noise)
    share = move(rule.view(RULE)[0], np.float64(action), math.inf)
    return action, raise_share(floor, share, values[_KV_NEEDED], values[_REQUESTED])


@kernel
def _act_and_serve(
    table, clock, window, telemetry, values, rule, floor, packed, sizes, scratch, noise, observations, actions, records
):
    for k in range(len(noise)):
        action, share = _act(values, rule, floor, packed, sizes, scratch, noise[k], observations[k])
        actions[k] = action
        if share == share:
            ask_for_share(table, share)
        serve_window(table, clock, window, telemetry, values)
        for i in range(len(values)):
            records[k, i] = values[i]


def act_and_serve(core: Core, action: ShareAction, floor: ShareFloor, network: Network, noise: np.ndarray) -> Windows:
    """A window for each number of `noise`, float32 (n,), which is added to the network's action."""
    observations, actions = np.zeros((len(noise), OBSERVATION_SIZE), np.float32), np.zeros(len(noise), np.float32)
    records = np.zeros((len(noise), len(_FIELDS)))
    scratch = np.zeros((2, int(network.sizes.max())), np.float32)
    acting = action.values, floor.values, *network, scratch
    if core.keeps_log:  # which the backend has to execute between two windows
        values = np.frombuffer(core.telemetry, np.float64)
        for k in range(len(noise)):
            actions[k], share = _act(values, *acting, noise[k], observations[k])
            if share == share:
                core.request_split(share)
            core.run_window()
            records[k] = values
    else:
        _act_and_serve(*core.kernel_arguments, *acting, noise, observations, actions, records)
    return Windows(observations, actions, records.view(TELEMETRY)[:, 0])
