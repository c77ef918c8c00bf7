"""Advice: which split to set, what it holds, what others would cost, and whether moving it would pay."""

import dataclasses
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from hbmgym.controllers.static import StaticController
from hbmgym.envs.serving.config import ServingConfig, with_policies
from hbmgym.envs.serving.core import Core
from hbmgym.eval.advising.caps import Caps, Demand, caps_at, most_decoding, slots_for
from hbmgym.eval.advising.settings import (
    VllmPool,
    balanced_ratio,
    default_controller,
    floating_rule,
    has_windows_alone,
    is_reachable,
    sglang_settings,
    vllm_pool,
)
from hbmgym.eval.advising.table import Runs, search
from hbmgym.eval.advising.traffic import Traffic
from hbmgym.eval.cells import Bench, Runner
from hbmgym.eval.comparison import rho_shares, static_shares
from hbmgym.eval.intervals import Interval
from hbmgym.eval.oracle import DYNAMIC
from hbmgym.eval.rollout import Rollout, run_episode
from hbmgym.eval.statics import UNSERVED, WORST_CLASS
from hbmgym.memory_backend.geometry import find_model
from hbmgym.memory_backend.split import Layout

OFFSET = 0.1
"""What a split that is off is off by."""
NEAR = 0.05
"""A split of the grid stands for one that is no farther from it."""
DEFAULT = "SGLang's default"
ONE_POOL = "one floating pool"
"""SGLang's --enable-unified-memory."""
PADDED_POOL = "vLLM's padded pool"
NOW = "as it is now"
RETENTIONS = ("latest", "interval-4096", "all", "path-cap-4")
"""Rules that engines have (`envs/serving/retention.py`)."""
MOVERS = ("gradient", "convex", "helm")
WORTH = 0.02
"""A moving split pays if it saves this part of the cost, and its interval excludes nothing."""
FLAT = 0.01
"""Splits that cost so little more are as good."""
TARGET_RHO = 0.85
FIGURES = ("cost", "ttft_p99_s", "hit_rate", WORST_CLASS, "slo_violation_rate")


@dataclass(frozen=True)
class Row:
    """One way to divide the memory."""

    name: str
    controller: str
    """As eval/compare.py knows it; a floating pool is a policy, and has none."""
    kv_share: float
    """Mean over time where it moves."""
    cost: float
    ttft_p99_s: float
    hit_rate: float
    worst_class_unserved: float
    slo_violation_rate: float
    over_best: Interval
    """What it costs more than the best split, as a part of that."""


@dataclass(frozen=True)
class Point:
    """A split of the curve."""

    kv_share: float
    slots: int
    cost: float
    hit_rate: float
    worst_class_unserved: float
    admitted: int
    """`Caps.admitted`."""
    binding: str


@dataclass(frozen=True)
class Own:
    """An episode, and the split that is the best one in it."""

    name: str
    seed: int
    kv_share: float
    cost: float
    hit_rate: float


@dataclass(frozen=True)
class Seen:
    """What ran at once in the replay of the best split."""

    mean_running: float
    most_running: int
    waited_for_slots: float
    """Part of the time in which the queue's head did."""
    waited_for_pages: float


@dataclass(frozen=True)
class Advice:
    """All that is told."""

    config: ServingConfig
    layout: Layout
    traffic: Traffic
    rho: float
    context_tokens: float
    """Prompt and output, mean."""
    best: Row
    slots: int
    kv_tokens: int
    sglang: dict[str, float | int]
    vllm: VllmPool | None
    caps: Caps
    slots_for_told: int | None
    """States that the requests take which the engine is told to run at once."""
    seen: Seen
    others: list[Row]
    """The default first."""
    movers: list[Row]
    mover_over_floating: Interval
    """What the best of them costs more than a floating pool, as a part of that."""
    retentions: list[Row]
    """The best split, where the engine keeps other snapshots."""
    curve: list[Point]
    episodes: list[Own]
    oracle: Row | None = None

    @property
    def default(self) -> Row:
        """What the engine does where nothing is set."""
        pool = ONE_POOL if self.vllm is None else PADDED_POOL
        wanted = pool if self.config.engine.kernels == "vllm" else DEFAULT
        return next(row for row in self.others if row.name == wanted)

    @property
    def is_served(self) -> bool:
        return self.rho < 1.0 and self.best.worst_class_unserved <= UNSERVED

    @property
    def load_factor(self) -> float | None:
        """What --load is to be multiplied by for a rho of TARGET_RHO; None where rho is unknown."""
        return TARGET_RHO / self.rho if np.isfinite(self.rho) and self.rho > 0 else None

    @property
    def flat(self) -> tuple[float, float]:
        """The kv_shares around the best one whose splits cost at most FLAT more, as far as they were tried."""
        place = min(range(len(self.curve)), key=lambda i: abs(self.curve[i].slots - self.slots))
        low = high = place
        most, unserved = (1.0 + FLAT) * self.curve[place].cost, self.curve[place].worst_class_unserved + UNSERVED
        is_good = [point.cost <= most and point.worst_class_unserved <= unserved for point in self.curve]
        while low > 0 and is_good[low - 1]:
            low -= 1
        while high < len(self.curve) - 1 and is_good[high + 1]:
            high += 1
        return self.curve[low].kv_share, self.curve[high].kv_share

    @property
    def best_mover(self) -> Row:
        return min(self.movers, key=lambda row: row.cost)

    @property
    def floating(self) -> Row:
        return next(row for row in self.others if row.name == ONE_POOL)

    @property
    def floating_pays(self) -> bool:
        """A floating pool against the best fixed split."""
        return pays(self.floating.over_best)

    @property
    def moving_pays(self) -> bool:
        """The best of the movers against the best fixed split."""
        return pays(self.best_mover.over_best)

    @property
    def moving_pays_more(self) -> bool:
        """The best of the movers against a floating pool, which needs no controller."""
        return pays(self.mover_over_floating)

    def as_json(self) -> dict[str, Any]:
        """Plain numbers and words; what is not known is None."""
        config = self.config
        return {
            "model": config.model,
            "gpu": config.gpu,
            "engine": config.engine.name,
            "tensor_parallel": config.tensor_parallel,
            "hbm_gib": config.hbm_gib,
            "dtypes": {"weights": config.weight_dtype, "kv": config.kv_dtype, "state": config.state_dtype},
            "slots_per_request": config.running_slots,
            "policies": dataclasses.asdict(config.policies),
            "slot_bytes": self.layout.slot_bytes,
            "kv_token_bytes": self.layout.page_bytes // config.page_tokens,
            "traffic": {
                "source": self.traffic.source,
                "episodes": [
                    {**dataclasses.asdict(own), "requests": len(episode.rows)}
                    for own, episode in zip(self.episodes, self.traffic.episodes, strict=True)
                ],
                "measured_requests": self.traffic.requests,
                "requests_per_s": self.traffic.rate_per_s,
                "prompt_tokens": self.traffic.mean("input_tokens"),
                "output_tokens": self.traffic.mean("output_tokens"),
                "notes": list(self.traffic.notes),
            },
            "rho": _known(self.rho),
            "is_served": self.is_served,
            "split": {
                "kv_share": self.best.kv_share,
                "slots": self.slots,
                "kv_tokens": self.kv_tokens,
                "kv_share_from": self.flat[0],
                "kv_share_to": self.flat[1],
                "sglang": self.sglang,
                "vllm": None if self.vllm is None else dataclasses.asdict(self.vllm),
            },
            "concurrency": {
                "admitted": self.caps.admitted,
                "binding": self.caps.binding,
                "holds": self.caps.holds,
                "caps": dataclasses.asdict(self.caps),
                "slots_for_max_running_requests": self.slots_for_told,
                "replayed": dataclasses.asdict(self.seen),
            },
            "best": _row(self.best),
            "default": self.default.name,
            "others": [_row(row) for row in self.others],
            "moving": {
                "pays": self.moving_pays,
                "pays_against_floating": self.moving_pays_more,
                "over_floating": self.mover_over_floating.known,
                "floating_pays": self.floating_pays,
                "rows": [_row(row) for row in self.movers],
                "oracle": None if self.oracle is None else _row(self.oracle),
            },
            "retentions": [_row(row) for row in self.retentions],
            "curve": [dataclasses.asdict(point) for point in self.curve],
        }


def pays(difference: Interval) -> bool:
    """It saves WORTH, and its interval excludes nothing."""
    return difference.value <= -WORTH and difference.high < 0.0


def _row(row: Row) -> dict[str, Any]:
    return {**dataclasses.asdict(row), "over_best": row.over_best.known}


def _known(value: float) -> float | None:
    """JSON knows no infinity."""
    return value if np.isfinite(value) else None


def advise(
    bench: Bench,
    traffic: Traffic,
    runner: Runner,
    movers: Sequence[str] = MOVERS,
    *,
    told: int | None = None,
    oracle: bool = False,
) -> Advice:
    """Replay the traffic; `movers` move the split, `told` is the engine's own bound on running requests, which the
    replay does not know."""
    with closing(Core(bench.config)) as core:
        return _Advisor(bench.config, traffic, Runs(runner, traffic), runner, core, movers, told).advise(oracle)


@dataclass(frozen=True)
class _Advisor:
    config: ServingConfig
    traffic: Traffic
    runs: Runs
    runner: Runner
    core: Core
    movers: Sequence[str]
    told: int | None

    def advise(self, oracle: bool) -> Advice:
        layout, runs = self.core.layout, self.runs
        shares = [share for share in static_shares(layout) if is_reachable(self.config, layout, layout.slots(share))]
        grid = {f"static-{share:.3f}": share for share in shares}
        best, tried = search(runs, list(grid))
        wrong = self._off_by(grid, grid[best])
        others = self._others()
        runs.run([*wrong.values(), *others.values()], "other splits")
        runs.run(self.movers, "moving splits")
        pools, vllm = [ONE_POOL], vllm_pool(self.config)
        start = StaticController(self.config.initial_kv_share)  # where one pool starts does not matter
        runs.add(ONE_POOL, self._under(start, on_shortage=floating_rule(self.config)))
        if vllm is not None:
            pools.append(PADDED_POOL)
            runs.add(PADDED_POOL, self._under(start, on_shortage="float-lru", layout="padded"))
        kept = [rule for rule in RETENTIONS if rule != self.config.policies.retention]
        for rule in kept:
            runs.add(rule, self._under(StaticController(grid[best]), retention=rule))
        if oracle:
            runs.run_oracle([grid[name] for name in tried])
        tried = sorted({*tried, *wrong.values()}, key=grid.__getitem__)
        slots = layout.slots(grid[best])
        others |= dict.fromkeys(pools, "") | {f"off by {offset:+.1f}": name for offset, name in wrong.items()}
        return Advice(
            config=self.config,
            layout=layout,
            traffic=self.traffic,
            rho=max(self._rho(place) for place in range(len(self.traffic.workloads))),
            context_tokens=self._context_tokens,
            best=self._row("this split", best, best),
            slots=slots,
            kv_tokens=layout.pages(slots) * self.config.page_tokens,
            sglang=sglang_settings(self.config, layout, slots),
            vllm=vllm,
            caps=self._caps(slots),
            slots_for_told=slots_for(self.told, self.config.running_slots) if self.told else None,
            seen=self._seen(runs.of(best)),
            others=[self._row(name, controller, best) for name, controller in others.items()],
            movers=[self._row(name, name, best) for name in self.movers],
            mover_over_floating=runs.against(min(self.movers, key=lambda name: runs.mean(name, "cost")), ONE_POOL),
            retentions=[self._row(rule, "", best) for rule in kept],
            episodes=self._best_of_each(tried, grid),
            curve=[self._point(name, grid[name]) for name in tried],
            oracle=self._row(DYNAMIC, DYNAMIC, best) if oracle else None,
        )

    def _off_by(self, grid: dict[str, float], share: float) -> dict[float, str]:
        """The splits of the grid that are nearest to OFFSET less and more; none where the bounds are nearer."""
        found = {}
        for offset in (-OFFSET, OFFSET):
            name = min(grid, key=lambda name: abs(grid[name] - share - offset))
            if abs(grid[name] - share - offset) < NEAR:
                found[offset] = name
        return found

    def _under(self, controller: StaticController, **rules: str) -> list[Rollout]:
        """Of the same episodes under other rules of the engine."""
        config = with_policies(self.config, dataclasses.replace(self.config.policies, **rules))
        same = config.page_tokens == self.config.page_tokens
        with closing(Core(config)) as core:
            episodes = self.traffic.episodes if same else self.traffic.paged(config.page_tokens)
            return [run_episode(controller, core, episode) for episode in episodes]

    @property
    def _context_tokens(self) -> float:
        return self.traffic.mean("input_tokens") + self.traffic.mean("output_tokens")

    @property
    def _balanced_ratio(self) -> float:
        config = self.config
        return balanced_ratio(self.core.layout, config.page_tokens, config.running_slots, self._context_tokens)

    def _rho(self, place: int) -> float:
        seed = next(iter(self.traffic.workloads[place].episodes))
        return self.runner.rho(place, seed, rho_shares(self.runner.bench))

    def _caps(self, slots: int) -> Caps:
        demand = Demand(self.config.running_slots, self._context_tokens)
        decoding = most_decoding(self.core.cost, self._context_tokens, self.core.setup.tpot_slo_s)
        return caps_at(self.core.layout, slots, self.config.page_tokens, demand, decoding, self.told)

    def _others(self) -> dict[str, str]:
        """Splits that an operator may have or set, and the controllers that hold them."""
        found = {DEFAULT: default_controller(self.config)}
        if not has_windows_alone(find_model(self.config.model)):
            found["SGLang's guide"] = f"sglang-{self._balanced_ratio:.3g}"
        if self.traffic.kv_share is not None:
            found[NOW] = f"static-{self.traffic.kv_share:.3f}"
        return found

    def _row(self, name: str, controller: str, best: str) -> Row:
        run = controller or name
        figures = {figure: self.runs.mean(run, figure) for figure in ("kv_share_mean", *FIGURES)}
        share, over_best = figures.pop("kv_share_mean"), self.runs.against(run, best)
        return Row(name=name, controller=controller, kv_share=share, over_best=over_best, **figures)

    def _best_of_each(self, tried: list[str], grid: dict[str, float]) -> list[Own]:
        found = []
        for number, episode in enumerate(self.traffic.episodes):
            name = self.runs.best(tried, number)
            cost, hit_rate = (self.runs.column(name, figure)[number] for figure in ("cost", "hit_rate"))
            found.append(Own(episode.name, episode.seed, grid[name], cost, hit_rate))
        return found

    def _point(self, name: str, share: float) -> Point:
        slots = self.core.layout.slots(share)
        caps = self._caps(slots)
        figures = {figure: self.runs.mean(name, figure) for figure in ("cost", "hit_rate", WORST_CLASS)}
        return Point(kv_share=share, slots=slots, admitted=caps.admitted, binding=caps.binding, **figures)

    def _seen(self, rollouts: list[Rollout]) -> Seen:
        """Over the windows of all episodes in which requests arrive."""
        columns: dict[str, list[float]] = {}
        for rollout, episode in zip(rollouts, self.traffic.episodes, strict=True):
            count = int(np.searchsorted(rollout.history["time_s"], episode.horizon_s))
            for name in ("running", "blocked_ssm_fraction", "blocked_kv_fraction"):
                columns.setdefault(name, []).extend(rollout.history[name][:count])
        return Seen(
            mean_running=float(np.mean(columns["running"])),
            most_running=int(max(columns["running"])),
            waited_for_slots=float(np.mean(columns["blocked_ssm_fraction"])),
            waited_for_pages=float(np.mean(columns["blocked_kv_fraction"])),
        )
