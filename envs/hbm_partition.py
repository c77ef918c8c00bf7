"""The environment: one serving engine, and how its memory is divided."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.error import ResetNeeded

from hbmgym.controllers.actions import ShareAction
from hbmgym.controllers.base import TELEMETRY
from hbmgym.controllers.floor import ShareFloor
from hbmgym.controllers.observation import OBSERVATION_SIZE, OBSERVATION_TABLE, observe
from hbmgym.envs.fused import Network, act_and_serve
from hbmgym.envs.render import HistoryFigure, ansi_line
from hbmgym.envs.serving.config import Policies, ServingConfig, with_policies
from hbmgym.envs.serving.core import Core
from hbmgym.envs.serving.engines import ENGINE_PROFILES, find_engine
from hbmgym.envs.traces.episode import Episode, Loop
from hbmgym.envs.traces.seeds import SEED_RANGES, Part, check_seed
from hbmgym.envs.traces.trace import TraceError
from hbmgym.envs.workload import Workload, open_workloads
from hbmgym.memory_backend.vmm import BACKENDS

RENDER_MODES = ("ansi", "rgb_array")
_RESET_OPTIONS = ("episode_seed", "skip")
_FIELDS = TELEMETRY.names or ()


ReferenceCosts = MutableMapping[tuple[str, int, float], np.ndarray]
"""Costs of every window, float64 (windows,), by workload, seed of the episode and share."""
_NO_COSTS = np.zeros(0)
_DRAWS = 100
"""Seeds that are tried before traffic is too rare to go on."""


class Stretch(NamedTuple):
    """What `run_policy` did: windows of one episode in a row, a line each."""

    observations: np.ndarray
    """float32 (n, OBSERVATION_SIZE): by which each action was chosen."""
    actions: np.ndarray
    """float32 (n,): not clipped."""
    telemetry: np.ndarray
    """TELEMETRY (n,): at the end of each window."""
    rewards: np.ndarray
    """float64 (n,)"""
    warmup: np.ndarray
    """bool (n,): the window lies in the warm-up."""
    last: np.ndarray
    """float32 (OBSERVATION_SIZE,): the observation after all of them."""
    truncated: bool
    """The episode has ended."""


class HbmPartitionEnv(gym.Env[np.ndarray, np.ndarray]):
    """Divide one GPU's cache memory between the KV cache and records of fixed size while requests are served.

    ## Description
    A serving engine replays a trace of LLM requests on a hybrid model. Its cache budget is an amount of HBM held as
    chunks, each of which belongs to the pool of KV pages or to the pool of slots, which hold what a sequence keeps
    whatever its length: its recurrent state, the tail of its sliding windows, or both. Once per window of
    simulated time (5 s by default) the agent says which share belongs to KV; chunks then move as soon as nothing that
    runs needs them, and moving takes simulated time. kv_share = KV chunks / all chunks.

    ## Action space
    `Box(-1, 1, (1,), float32)`; values outside are clipped.

    | id                                | action a means                                                        |
    |-----------------------------------|-----------------------------------------------------------------------|
    | `hbmgym/HbmPartition-v0`          | the wanted kv_share changes by 0.02 a per second, 0.1 a in 5 s        |
    | `hbmgym/HbmPartitionAbsolute-v0`  | the wanted kv_share is a, mapped linearly from [-1, 1] onto the bounds |

    The bounds are the smallest and the largest share that can be realised. The wanted share is a real number, kept
    from window to window and clipped to the bounds; the engine is asked for the realisable split nearest to it once it
    is a slot and a chunk away from what was last asked for, and for a bound once it is as near as that to the bound
    (`controllers.actions.ShareAction`). Until then the request holds. Small actions of one sign therefore add up
    instead of being rounded away, and small noise moves nothing. No action gets less for KV than the largest request
    needs that runs, heads the queue or is set aside (`controllers.floor.ShareFloor`): what the machine can hold is
    served.

    ## Observation space
    `Box(-1, 1, (OBSERVATION_SIZE,), float32)`: `controllers.observation.observe` of the engine's telemetry at the end
    of the window (`controllers.telemetry.TELEMETRY_TABLE` has its units and averaging times). The normalisation is
    fixed and nothing looks ahead.

    OBSERVATION_ROWS

    ## Reward
    Per window, and 0 while the window lies in the warm-up:

        reward = (reference - cost) / (expected * reference mean)

    | term           | meaning                                                                                       |
    |----------------|-----------------------------------------------------------------------------------------------|
    | cost           | growth in this window of the sum over requests of min(max(TTFT / SLO, TPOT / SLO), 10), the   |
    |                | age of a request that waits for its first token counted while it passes; a rejected one is 10 |
    | expected       | the episode's mean measured arrivals per window                                               |
    | reference      | the cost that a fixed split has in the same window of the same episode (see `references`); by |
    |                | default `expected`: a cost of 1 per request                                                   |
    | reference mean | that split's mean cost per request over the workload; by default 1                            |

    So the mean reward is by how much, relative to the reference, the mean cost of a request is smaller, but for what is
    still to be served at the horizon; the mean cost is what controllers are compared by. What costs much whatever the
    split, a burst of long prompts, cancels out (an input-dependent baseline: Mao et al., ICLR 2019). Moving memory has
    no term of its own: it costs time. Nothing is added at truncation; bootstrap there.

    ## Starting state
    Empty caches at the configuration's `initial_kv_share`, or at a share drawn uniformly from the bounds with
    `randomise_initial_share`. The episode is the workload's for a seed drawn from the part's range or from
    `episode_seeds`, and drawn again where nothing arrives that is measured; `reset(options={"episode_seed": n})`
    chooses it, `{"skip": x}` serves that part of the episode, from 0 to below 1, at the initial split before the first
    step. Of several workloads each reset draws one. Equal reset seeds and actions give identical arrays.

    ## Episode end
    Truncated at the first window end at or after the episode's horizon, so that its length does not depend on actions.
    Never terminated: a serving system does not end.

    ## Information
    The same keys at every step and at reset; numbers of the last window unless marked "now".

    | key                                                 | meaning                                                 |
    |-----------------------------------------------------|---------------------------------------------------------|
    | `time_s`                                            | now: simulated clock                                    |
    | `warmup`                                            | the window lies in the warm-up; true at reset           |
    | `cost`                                              | as in the reward                                        |
    | `kv_share_requested`, `kv_share_effective`          | now                                                     |
    | `met`, `missed`, `arrivals`, `preemptions`, `rejected` | requests; missed once each: age > TTFT SLO, or later |
    | `waiting`, `running`                                | requests, now                                           |
    | `moved_chunks`, `migrated_bytes`                    | chunks that changed pools; their bytes and those copied |
    | `hit_rate`                                          | prompt tokens reused / admitted, averaged over ~10 s    |
    | `kv_pressure`, `ssm_pressure`                       | now: live blocks / capacity                             |

    ## Arguments
    | name                      | default        | meaning                                                           |
    |---------------------------|----------------|-------------------------------------------------------------------|
    | `scenario`                | None           | generated workload, or several; without a trace mix-shift         |
    | `trace`                   | None           | path of a recorded trace, or several paths                        |
    | `part`                    | `"train"`      | range of seeds, and part of a recorded trace                      |
    | `load`                    | 1.0            | multiplies the arrival rate                                       |
    | `loop`                    | `"open"`       | `"closed"`: a turn follows the end of the turn before             |
    | `spread`                  | True           | spread arrivals that a trace's format is known to round           |
    | `backend`                 | `"accounting"` | who executes the op log; never changes a result                   |
    | `check`                   | False          | verify every invariant after every window                         |
    | `render_mode`             | None           | `"ansi"` (one line) or `"rgb_array"` (figure of the episode)      |
    | `serving`                 | None           | fields of `ServingConfig` that differ from their defaults         |
    | `absolute`                | set by the id  | the second row of the action table                                |
    | `randomise_initial_share` | False          | see starting state; for training                                  |
    | `references`              | None           | (kv_share, mean cost) of a fixed split by name of workload        |
    | `episode_seeds`           | None           | the seeds that episodes are drawn from; default: all of the part  |
    | `reference_costs`         | None           | what references cost, to be shared where fixed splits cost the same |
    | `workload`                | None           | `Workload` object or several, in place of scenario and trace      |

    All but `workload` and `reference_costs` can be written as JSON. Wrong ones raise a one-line ValueError.

    ## Version history
    * v0: initial version; until hbmgym is released, its results change with the engine's rules
    """

    metadata: dict[str, Any] = {"render_modes": list(RENDER_MODES), "render_fps": 10}  # noqa: RUF012

    core: Core
    workload: Workload
    """Where the current episode comes from."""
    episode: Episode
    """The current one; there is none before the first reset."""

    def __init__(
        self,
        *,
        scenario: str | Sequence[str] | None = None,
        trace: str | Sequence[str] | None = None,
        part: Part = "train",
        load: float = 1.0,
        loop: Loop = "open",
        spread: bool = True,
        backend: str = "accounting",
        check: bool = False,
        render_mode: str | None = None,
        serving: Mapping[str, Any] | None = None,
        absolute: bool = False,
        randomise_initial_share: bool = False,
        references: Mapping[str, Sequence[float]] | None = None,
        episode_seeds: Sequence[int] | None = None,
        reference_costs: ReferenceCosts | None = None,
        workload: Workload | Sequence[Workload] | None = None,
    ) -> None:
        _check_choice("part", part, SEED_RANGES)
        _check_choice("backend", backend, BACKENDS)
        _check_choice("render_mode", render_mode, (None, *RENDER_MODES))
        config = serving_config(serving or {})
        self.core = Core(config, backend=backend, check=check)
        if workload is None:
            scenarios, traces = _listed(scenario), _listed(trace)
            self._workloads = open_workloads(
                config, scenarios=scenarios, traces=traces, load=load, loop=loop, spread=spread
            )
        else:
            self._workloads = list(workload) if isinstance(workload, Sequence) else [workload]
        self.workload = self._workloads[0]
        self.render_mode = render_mode
        self.action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.observation_space = gym.spaces.Box(-1.0, 1.0, (OBSERVATION_SIZE,), np.float32)
        self._part = part
        self._seeds = SEED_RANGES[part] if episode_seeds is None else list(episode_seeds)
        _check_seeds(part, self._seeds)
        self._known_costs: ReferenceCosts = {} if reference_costs is None else reference_costs
        self._references = dict(references or {})
        _check_references(self._references, [workload.name for workload in self._workloads])
        self._action = ShareAction("absolute" if absolute else "incremental")
        self._floor = ShareFloor()
        self._randomise_initial_share = randomise_initial_share
        self._figure: HistoryFigure | None = None
        self._windows = 0
        self._reference_costs = _NO_COSTS
        """float64, one for each window of the episode; none before the first."""

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode; one-line ValueError for an unknown option or a seed outside the part's range."""
        super().reset(seed=seed)
        self._windows, self._reference_costs = 0, _NO_COSTS  # an episode that cannot start leaves none to go on with
        self.workload = self._workloads[int(self.np_random.integers(len(self._workloads)))]
        self.episode = self._draw_episode(options or {})
        self._expected = self.episode.rate_per_s * self.core.config.window_s
        self._reference_costs = self._find_reference_costs()
        telemetry = self.core.reset(self.episode, self._initial_share())
        self._windows = self._skipped_windows(options or {})
        self.core.run_windows(self._windows)
        share, layout = float(telemetry.kv_share_requested), self.core.layout
        self._action.reset(share, layout, self.core.config.window_s)
        self._floor.reset(layout, layout.share_bounds, share)
        if self.render_mode == "rgb_array":
            self._figure = self._figure or HistoryFigure()
            self._figure.start(telemetry, self.episode.horizon_s)
        return observe(telemetry), self._info(dict(zip(_FIELDS, telemetry.item(), strict=True)))

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Ask for a split and serve for one window; ResetNeeded outside of an episode."""
        if self._windows >= len(self._reference_costs):
            raise ResetNeeded("the episode has ended, or none has begun: call reset() before step()")
        self._request_split(float(action[0]))
        telemetry = self.core.run_window()
        self._windows += 1
        info = self._info(dict(zip(_FIELDS, telemetry.item(), strict=True)))
        if self._figure is not None:
            self._figure.add(telemetry)
        reward = float(self._rewards(slice(self._windows - 1, self._windows), telemetry.cost)[0])
        return observe(telemetry), reward, False, self._windows == len(self._reference_costs), info

    def run_policy(self, network: Network, noise: np.ndarray) -> Stretch:
        """`step` as often as `noise`, float32 (n,), has numbers, or up to the episode's end, with the network's action
        plus the noise; ResetNeeded outside of an episode."""
        left = len(self._reference_costs) - self._windows
        if not left > 0:
            raise ResetNeeded("the episode has ended, or none has begun: call reset() before run_policy()")
        windows = act_and_serve(self.core, self._action, self._floor, network, noise[:left])
        if not np.isfinite(windows.actions).all():
            raise ValueError(f"action is {windows.actions[-1]}, expected a number from -1 to 1")
        if self._figure is not None:
            for record in windows.telemetry.view(np.recarray):
                self._figure.add(record)
        served = slice(self._windows, self._windows + len(windows.actions))
        self._windows = served.stop
        return Stretch(
            *windows,
            rewards=self._rewards(served, windows.telemetry["cost"]),
            warmup=self._lies_in_warmup(1 + np.arange(served.start, served.stop)),
            last=observe(self.core.telemetry),
            truncated=self._windows == len(self._reference_costs),
        )

    def render(self) -> str | np.ndarray | None:
        """The line or the figure of the current state, None without a render mode."""
        if self.render_mode == "ansi":
            return ansi_line(self.core.telemetry)
        return None if self._figure is None else self._figure.pixels()

    def close(self) -> None:
        """Give the backend's memory back; idempotent."""
        self.core.close()

    def _end_s(self, windows: Any) -> Any:
        # On the grid: the engine's clock stands at the first iteration edge behind it, which depends on actions.
        return windows * self.core.config.window_s

    def _lies_in_warmup(self, windows: Any) -> Any:
        """Whether the window does that ends after so many; of a number or an array."""
        return self._end_s(windows) <= self.episode.warmup_s

    def _draw_episode(self, options: Mapping[str, Any]) -> Episode:
        """The one that was asked for, or the first of those drawn in which something arrives."""
        for option in options:
            _check_choice("reset option", option, _RESET_OPTIONS)
        if "episode_seed" in options:
            check_seed(self._part, int(options["episode_seed"]))
            return self._measured_episode(int(options["episode_seed"]))
        for _ in range(_DRAWS):
            with suppress(TraceError):
                return self._measured_episode(self._drawn_seed())
        return self._measured_episode(self._drawn_seed())

    def _drawn_seed(self) -> int:
        return self._seeds[int(self.np_random.integers(len(self._seeds)))]

    def _measured_episode(self, seed: int) -> Episode:
        episode = self.workload.episode(self._part, seed)
        if not episode.rate_per_s > 0.0:
            raise TraceError(f"episode {episode.name} seed {episode.seed} has no measured arrivals")
        return episode

    def _skipped_windows(self, options: Mapping[str, Any]) -> int:
        part = float(options.get("skip", 0.0))
        if not 0.0 <= part < 1.0:
            raise ValueError(f"reset option skip is {part}, expected a part of the episode from 0 to below 1")
        return int(part * len(self._reference_costs))

    def _initial_share(self) -> float:
        if not self._randomise_initial_share:
            return self.core.config.initial_kv_share
        return float(self.np_random.uniform(*self.core.layout.share_bounds))

    def _request_split(self, action: float) -> None:
        if not math.isfinite(action):
            raise ValueError(f"action is {action}, expected a number from -1 to 1")
        share = self._floor.raised(self._action.next_share(action), self.core.telemetry)
        if share is not None:
            self.core.request_split(share)

    def _find_reference_costs(self) -> np.ndarray:
        """float64 (windows,): what the workload's reference, a fixed split, costs in every window of this episode."""
        share, mean = self._references.get(self.workload.name, (None, 1.0))
        self._reference_mean = self._expected * mean
        windows = 0
        while self._end_s(windows) < self.episode.horizon_s:
            windows += 1
        if share is None:
            return np.full(windows, self._expected)
        key = self.workload.name, self.episode.seed, share
        if key not in self._known_costs:
            self.core.reset(self.episode, share, (share, share))
            self._known_costs[key] = self.core.run_windows(windows)["cost"].copy()
        return self._known_costs[key]

    def _rewards(self, windows: slice, costs: Any) -> np.ndarray:
        """float64 (n,): of those windows of the episode, which cost so much."""
        saved = (self._reference_costs[windows] - costs) / self._reference_mean
        return np.where(self._lies_in_warmup(1 + np.arange(windows.start, windows.stop)), 0.0, saved)

    def _info(self, telemetry: dict[str, float]) -> dict[str, Any]:
        facts = memory_facts(telemetry, self.core.layout.chunk_bytes)
        return {
            "time_s": telemetry["time_s"],
            "warmup": bool(self._lies_in_warmup(self._windows)),
            "cost": telemetry["cost"],
            "kv_share_requested": telemetry["kv_share_requested"],
            "kv_share_effective": telemetry["kv_share_effective"],
            "met": int(telemetry["met"]),
            "missed": int(telemetry["missed"]),
            "arrivals": round(telemetry["arrivals_per_s"] * telemetry["window_s"]),
            "preemptions": int(telemetry["preemptions"]),
            "rejected": int(telemetry["rejected"]),
            "waiting": int(telemetry["waiting"]),
            "running": int(telemetry["running"]),
            "moved_chunks": int(telemetry["moved_chunks"]),
            "migrated_bytes": int(facts["migrated_bytes"]),
            "hit_rate": facts["hit_rate"],
            "kv_pressure": facts["kv_pressure"],
            "ssm_pressure": facts["ssm_pressure"],
        }


def memory_facts(telemetry: Any, chunk_bytes: int) -> dict[str, Any]:
    """What the environment's information and a training's curves make of Telemetry's fields: of one record, as a
    mapping, or of an array of them."""
    return {
        "migrated_bytes": telemetry["moved_chunks"] * chunk_bytes + telemetry["relocated_bytes"],
        "hit_rate": telemetry["hit_rate_10s"],
        "kv_pressure": telemetry["kv_live"] / telemetry["kv_capacity"],
        "ssm_pressure": telemetry["ssm_live"] / telemetry["ssm_capacity"],
    }


_NESTED = ("engine", "policies", "migrate", "priced")


def serving_config(settings: Mapping[str, Any]) -> ServingConfig:
    """A configuration from fields that may come from JSON.

    `engine`, `policies`, `migrate` and `priced` are mappings, what they leave out is as in the defaults; `engine` may
    also be the name of a profile or its file (a mapping with a known name leaves out from that one), and `policies`
    text like 'eviction=lru,...'. layout=padded sets page_tokens where they are not given. Raises a one-line
    ValueError that names the field.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(ServingConfig)}
    given = {}
    for name, value in settings.items():
        _check_choice("serving field", name, defaults)
        if name in _NESTED:
            given[name] = _nested(name, value, defaults[name])
        else:
            if defaults[name] is not None:
                _check_type(name, value, type(defaults[name]))
            given[name] = value
    if "page_tokens" in given:
        return ServingConfig(**given)
    policies = given.pop("policies", Policies())
    return with_policies(ServingConfig(**given), policies)


def _nested(name: str, value: Any, default: Any) -> Any:
    if isinstance(value, type(default)):
        return value
    if name == "policies" and isinstance(value, str):
        return Policies.parse(value)
    if name == "engine" and isinstance(value, str):
        return find_engine(value)
    if not isinstance(value, Mapping):
        text = {"policies": " or text like 'eviction=lru'", "engine": " or the name of a profile"}.get(name, "")
        raise ValueError(f"serving field {name} is {value!r}, expected a mapping{text}")
    if name == "engine" and value.get("name") in ENGINE_PROFILES:
        default = ENGINE_PROFILES[value["name"]]
    fields = [field.name for field in dataclasses.fields(default)]
    for field, setting in value.items():
        _check_choice(f"field of {name}", field, fields)
        if isinstance(getattr(default, field), bool):
            if not isinstance(setting, bool):
                raise ValueError(f"serving field {name}.{field} is {setting!r}, expected true or false")
        elif getattr(default, field) is not None:
            _check_type(f"{name}.{field}", setting, type(getattr(default, field)))
    return dataclasses.replace(default, **value)


def _check_references(references: Mapping[str, Sequence[float]], workloads: Sequence[str]) -> None:
    for name, reference in references.items():
        _check_choice("workload of references", name, workloads)
        if len(reference) != 2 or not (0.0 <= reference[0] <= 1.0 and 0.0 < reference[1] < math.inf):
            raise ValueError(f"reference of {name} is {reference}, expected (kv_share from 0 to 1, mean cost above 0)")


def _check_seeds(part: Part, seeds: Sequence[int]) -> None:
    if not seeds:
        raise ValueError("episode_seeds is empty, expected a seed or more, or None for all of the part")
    for seed in (min(seeds), max(seeds)):
        check_seed(part, seed)


def _listed(names: str | Sequence[str] | None) -> Sequence[str]:
    if names is None:
        return ()
    return (names,) if isinstance(names, str) else names


def _check_choice(what: str, value: object, choices: Iterable[object]) -> None:
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"{what} is {value!r}, expected one of: {', '.join(map(str, choices))}")


def _check_type(name: str, value: object, expected: type) -> None:
    accepted = (int, float) if expected is float else (expected,)
    if not isinstance(value, accepted) or isinstance(value, bool):
        raise ValueError(f"serving field {name} is {value!r}, expected {expected.__name__}")


def _observation_rows() -> str:
    rows = "\n".join(f"    | {index} | {name} | {formula} |" for index, (name, formula) in enumerate(OBSERVATION_TABLE))
    return f"| index | name | formula |\n    |---|---|---|\n{rows}"


if HbmPartitionEnv.__doc__:  # python -OO strips docstrings
    HbmPartitionEnv.__doc__ = HbmPartitionEnv.__doc__.replace("OBSERVATION_ROWS", _observation_rows())
