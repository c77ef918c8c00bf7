"""The actor of a model as plain arrays: as it is, averaged over updates, and exported as a Policy."""

import dataclasses

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.policies import ActorCriticPolicy

from hbmgym.controllers.helm.policy import Header, Policy
from hbmgym.controllers.observation import OBSERVATION_SIZE

SEEN = "seen_range"
AVERAGED = "averaged_actor"
"""Attributes of a model, saved with it."""
AVERAGED_UPDATES = 10

Layers = list[tuple[np.ndarray, np.ndarray]]
"""(matrix, bias) per layer."""


def actor_linears(model: PPO) -> list[torch.nn.Linear]:
    """The layers of the actor that have weights, from the inputs to the action."""
    actor = model.policy
    assert isinstance(actor, ActorCriticPolicy)
    layers = [*actor.mlp_extractor.policy_net, actor.action_net]
    return [layer for layer in layers if isinstance(layer, torch.nn.Linear)]


def actor_layers(model: PPO) -> Layers:
    """The layers of the actor as it is now; copies."""
    linears = actor_linears(model)
    return [(layer.weight.detach().numpy().copy(), layer.bias.detach().numpy().copy()) for layer in linears]


def average(before: Layers | None, now: Layers, updates: int) -> Layers:
    """The average after `updates` updates: a plain mean of the first AVERAGED_UPDATES, then one that forgets.

    The average is what is judged and exported: single updates stray (Polyak and Juditsky, 1992).
    """
    if before is None:
        return now
    part = max(1.0 / updates, 1.0 / AVERAGED_UPDATES)
    layers = zip(before, now, strict=True)
    return [(old[0] + part * (new[0] - old[0]), old[1] + part * (new[1] - old[1])) for old, new in layers]


def export_policy(model: PPO, header: Header, **facts: object) -> Policy:
    """The actor of a model as plain arrays, averaged over updates where that was kept; `facts` join those of the
    header, and the steps so far."""
    training = {**header.training, "steps": model.num_timesteps, **facts}
    header = dataclasses.replace(header, training=training)
    layers = getattr(model, AVERAGED, None) or actor_layers(model)
    low, high = getattr(model, SEEN, (-np.ones(OBSERVATION_SIZE), np.ones(OBSERVATION_SIZE)))
    # What was always 0 has taught nothing: its weights are as they were drawn.
    unused = (low == 0.0) & (high == 0.0)
    (matrix, bias), *rest = layers
    layers = [(np.where(unused, 0.0, matrix), bias), *rest]
    return Policy.from_layers(layers, header, (np.where(unused, -1.0, low), np.where(unused, 1.0, high)))
