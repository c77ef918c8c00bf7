"""HelmController: a frozen base policy, an online residual adapter, burst-aware recovery and a cap, as one decision.

    action = project(base(observation))        where the base is at home
    action = project(rate_limit(base(observation) + gate * residual + burst))        where it is strange
    or, where nothing is reused, a cap on concurrency

In the manner of HELM (arXiv 2605.04450), whose parts are named in its abstract and whose formulas are not public; see
docs/helm.md. One kernel goes from the Telemetry record to the share to ask for.
"""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np

from hbmgym.controllers.actions import RULE_FIELDS, move, prepare
from hbmgym.controllers.base import HOLD, TELEMETRY, Decision, Setup
from hbmgym.controllers.helm.arrays import read_arrays, write_arrays
from hbmgym.controllers.helm.burst import BURST, BURST_FIELDS, STATES, burst_action, most_change, watch_arrivals
from hbmgym.controllers.helm.cap import CAP_FIELDS, ask_for_cap, nothing_reused
from hbmgym.controllers.helm.mlp import forward
from hbmgym.controllers.helm.parameters import HelmParameters
from hbmgym.controllers.helm.policy import Header, Policy
from hbmgym.controllers.helm.residual import RESIDUAL_FIELDS, adapt, correction, price_gap, rest
from hbmgym.controllers.observation import OBSERVATION_SIZE, observe_record
from hbmgym.memory_backend.jit import kernel, subkernel

VERSION = 1
"""Of the layout of a saved state."""

_PARAMETERS = tuple(field.name for field in dataclasses.fields(HelmParameters))
# kv_share per second that may change in recovery; base's action of the last decision; inputs that lay outside the range
# of training in it, what part of the windows was strange, averaged, and in how many decisions too many lay outside; how
# it began (_NEW, _RUNNING, _RESTORED).
_OWN = ("refill_per_s", "base", "outside", "strange", "unfamiliar", "started")
_NAMES = (*_PARAMETERS, *RULE_FIELDS, *RESIDUAL_FIELDS, *BURST_FIELDS, *CAP_FIELDS, *_OWN)
_NEW, _RUNNING, _RESTORED = 0.0, 1.0, 2.0
_STATE = np.dtype((np.record, [(name, "f8") for name in _NAMES]))
# Those that say under what a state was learned.
_GIVEN = (*_PARAMETERS, "low", "high", "hold", "step", "absolute", "refill_per_s")
_TELEMETRY = np.dtype((np.record, TELEMETRY))
_NONE_YET = ("told", "first_cost", "cost_before", "forced_cost", "cap")


class StateError(ValueError):
    """A saved state cannot be used; one line that names it and what is wrong."""


@subkernel
def _clip_to_range(observation, low, high, s):
    outside = 0.0
    for i in range(len(observation)):
        if observation[i] < low[i]:
            observation[i] = low[i]
            outside += 1.0
        elif observation[i] > high[i]:
            observation[i] = high[i]
            outside += 1.0
    s.outside = outside


@subkernel
def _is_strange(t, s):
    """Has the base not been trained for what goes on here? Then the layers that adapt online have a say."""
    if t.window_s > 0.0:
        now = 1.0 if s.outside >= s.strange_inputs else 0.0
        s.strange += -math.expm1(-t.window_s / s.strange_average_s) * (now - s.strange)
    return s.strange >= s.least_strange


@subkernel
def _base_action(observation, weights, sizes, scratch, s):
    """The base's action, or one that keeps the wanted share where it has never seen such a state."""
    if s.outside > s.most_outside * len(observation):
        s.unfamiliar += 1.0
        return 2.0 * (s.wanted - s.low) / (s.high - s.low) - 1.0 if s.absolute > 0.0 and s.high > s.low else 0.0
    return min(max(forward(weights, sizes, observation, scratch), -1.0), 1.0)


@kernel
def _decide(record, state, observation, low, high, weights, sizes, scratch):
    """The kv_share to ask for after one Telemetry record, or nan; `state` is learned on the way."""
    t, s = record.view(_TELEMETRY)[0], state.view(_STATE)[0]
    if s.started == _NEW or (s.started == _RESTORED and abs(t.kv_share_requested - s.asked) >= s.hold):
        # Setup does not tell the split at start, and an engine may restart at another one than it was left at.
        s.wanted = s.asked = t.kv_share_requested
    s.started = _RUNNING
    observe_record(record, observation)
    _clip_to_range(observation, low, high, s)
    s.base = action = _base_action(observation, weights, sizes, scratch, s)
    strange = _is_strange(t, s)
    capped = s.caps > 0.0 and nothing_reused(t, s)
    if s.bursts > 0.0:
        watch_arrivals(t, s)
    if capped:
        return ask_for_cap(t, s)
    if s.most_residual == 0.0 and s.bursts == 0.0:
        return move(s, action, math.inf)
    gap = price_gap(t, s)
    if not strange:
        rest(s)
        return move(s, action, math.inf)
    if s.bursts > 0.0:
        action += burst_action(gap, s)
    if s.most_residual > 0.0:
        if s.mode != BURST or s.freeze_in_burst == 0.0:
            adapt(t, s)
        action += correction(s)
    return move(s, action, most_change(t, s))


class HelmController:
    """The base's action; where the base is strange, corrected by what the pools are short of and in bursts; or a cap on
    concurrency where nothing is reused. One kernel call per decision.

    Without a policy the base keeps a static share of .5, around which the adapter moves: an ablation.
    """

    fixed_share: float | None = None

    def __init__(
        self, policy: Policy | None = None, parameters: HelmParameters | None = None, name: str = "helm"
    ) -> None:
        self.name = name
        self.policy = policy
        self.parameters = parameters or HelmParameters()
        self._observation = np.zeros(OBSERVATION_SIZE, np.float32)

    def reset(self, setup: Setup) -> None:
        """Forget everything, also what was learned: `restore` brings that back. ValueError in one line for windows that
        the policy was not trained on."""
        self.check_window(setup.window_s)
        self._base = base = self.policy or _static(0.5, setup)
        self._state = np.zeros(len(_NAMES))
        s = self._state.view(_STATE)[0]
        for name, value in dataclasses.asdict(self.parameters).items():
            s[name] = value
        if self.policy is None:
            s["least_strange"] = 0.0  # nobody has trained it for anything
        header = base.header
        prepare(s, header.action_kind, header.max_step_per_s, setup.window_s, setup.layout, setup.kv_share_bounds)
        s["refill_per_s"] = _refill_per_s(self.parameters.refill_part, setup)
        s["gate"], s["draws"], s["direction"] = self.parameters.gate_start, self.parameters.seed, 1.0
        for name in _NONE_YET:
            s[name] = math.nan
        self._network = (self._observation, base.low, base.high, base.packed, base.sizes, base.scratch)

    def check_window(self, window_s: float) -> None:
        """ValueError in one line for windows that the policy was not trained on."""
        if self.policy is not None:
            self.policy.header.check_window(window_s, self.name)

    def act(self, telemetry: np.record) -> Decision:
        share = _decide(np.frombuffer(telemetry, np.float64), self._state, *self._network)
        return Decision(share) if share == share else HOLD

    def value(self, name: str) -> float:
        """A number of the present state, for people and curves: residual, gate, trim, kv_price, cusum, base, ..."""
        return float(self._state.view(_STATE)[0][name])

    @property
    def burst_state(self) -> str:
        """One of STATES: normal, burst, recover."""
        return STATES[int(self.value("mode"))]

    @property
    def outside(self) -> int:
        """Inputs of the last decision that lay outside the range seen in training."""
        return int(self.value("outside"))

    def tell_burst(self, burst: bool | None) -> None:
        """Somebody else says whether there is a burst now; None leaves it to the CUSUM again."""
        self._state.view(_STATE)[0]["told"] = math.nan if burst is None else float(burst)

    def save(self, path: str | Path) -> None:
        """Write what was learned, whole or not at all: plain arrays."""
        header = {"version": VERSION, "names": list(_NAMES), "base": self._base.digest()}
        text = np.frombuffer(json.dumps(header, sort_keys=True).encode(), np.uint8)
        write_arrays(path, {"helm_state": self._state, "header": text})

    def restore(self, path: str | Path) -> None:
        """Go on where `save` left off, after `reset`; StateError for the state of another base, setup or version."""
        path = Path(path)
        arrays = read_arrays(path, StateError, "give what HelmController.save wrote")
        try:
            header, state = json.loads(arrays["header"].tobytes().decode()), arrays["helm_state"]
            names, base = header["names"], header["base"]
        except (KeyError, TypeError, ValueError):
            raise StateError(f"{path}: is not a state that HelmController.save wrote") from None
        if header.get("version") != VERSION or names != list(_NAMES):
            raise StateError(f"{path}: was written by another version of hbmgym; start without it")
        if base != self._base.digest():
            raise StateError(f"{path}: was learned on another base policy; start without it")
        if state.shape != self._state.shape or state.dtype != np.float64:
            raise StateError(f"{path}: holds {state.dtype} of shape {state.shape}, expected {self._state.shape}")
        theirs, own = state.view(_STATE)[0], self._state.view(_STATE)[0]
        if odd := [name for name in _GIVEN if theirs[name] != own[name]]:
            raise StateError(f"{path}: {odd[0]} is {theirs[odd[0]]:g} there and {own[odd[0]]:g} here; start without it")
        self._state[:] = state
        if own["started"] == _RUNNING:
            own["started"] = _RESTORED


def _refill_per_s(part: float, setup: Setup) -> float:
    """kv_share per second that `part` of the worker's rate can move."""
    return part / (setup.chunk_move_s * setup.layout.chunks) if setup.chunk_move_s > 0.0 else math.inf


def _static(share: float, setup: Setup) -> Policy:
    """A policy that always asks for `share`."""
    low, high = setup.kv_share_bounds
    action = 2.0 * (share - low) / (high - low) - 1.0 if high > low else 0.0
    layer = (np.zeros((1, OBSERVATION_SIZE)), np.array([action]))
    return Policy.from_layers([layer], Header(action_kind="absolute"))
