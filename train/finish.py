"""After training: the comparison on validation seeds, its sibling curves, and one episode with real remapping."""

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from hbmgym.controllers.base import HOLD, Controller, Decision, Setup
from hbmgym.controllers.registry import make_controller
from hbmgym.envs.calibration import LOAD_FACTOR, find_largest_load
from hbmgym.envs.serving.config import GIB, ServingConfig
from hbmgym.envs.serving.core import Core, make_layout
from hbmgym.envs.traces.episode import Episode
from hbmgym.envs.traces.load import load_trace
from hbmgym.envs.traces.seeds import seeds_for
from hbmgym.envs.workload import TraceWorkload, Workload, open_workloads
from hbmgym.eval.cells import Bench, write_cells
from hbmgym.eval.comparison import DEFAULT_CONTROLLERS, Comparison, compare, controller_names
from hbmgym.eval.figure import draw_comparison
from hbmgym.eval.oracle import ORACLE
from hbmgym.eval.rollout import Rollout, run_episode
from hbmgym.memory_backend.vmm import VmmRefused
from hbmgym.train.options import TrainOptions

MAX_HOST_GIB = 2.0
HOST_STEP_GIB = 0.25
MIN_MOVED_CHUNKS = 100
"""With fewer, real remapping has hardly been tried."""
MIN_SPAN = 0.05
EXCERPT_S = 400.0
CURVES = {
    "eval/cost": "cost",
    "slo/ttft_p99": "ttft_p99_s",
    "slo/tpot_p99": "tpot_p99_s",
    "slo/violation": "slo_violation_rate",
    "slo/goodput": "slo_goodput_per_s",
}


def compare_policy(
    options: TrainOptions, folder: Path, config: ServingConfig, workloads: Sequence[Workload]
) -> Comparison:
    """The table of the run's policy against the statics, sglang-0.9, threshold and demand; cells go to the folder."""
    bench = Bench(config, tuple(workloads), "validation")
    names = controller_names(f"{DEFAULT_CONTROLLERS},ppo:{folder / 'policy.npz'}", make_layout(config))
    seeds = seeds_for("validation", options.table_episodes)
    comparison = compare(bench, names, seeds, jobs=options.jobs, oracle=True, progress=options.progress)
    write_cells(folder, comparison.rollouts)
    draw_comparison(folder, comparison)
    _draw_references(folder, comparison, options.total_timesteps)
    return comparison


def _draw_references(folder: Path, comparison: Comparison, steps: int) -> None:
    """The gaps of the table, and controllers that do not learn as flat curves under the tags of the one that does."""
    for result in comparison.results:
        with SummaryWriter(str(folder)) as writer:
            for tag, name in (("gap_to_best_static", result.best_static), ("gap_to_oracle", ORACLE)):
                if name in result.controllers:
                    gap = result.mean("ppo", "cost") / result.mean(name, "cost") - 1.0
                    writer.add_scalar(f"eval/{result.name}/{tag}", gap, steps)
        references = (result.best_static, "sglang-0.9", "threshold", "demand", ORACLE)
        for name in (name for name in result.controllers if name in references):
            with SummaryWriter(str(folder / "references" / f"{result.name}-{name}")) as writer:
                for (tag, key), step in itertools.product(CURVES.items(), (0, steps)):
                    writer.add_scalar(tag, result.mean(name, key), step)
                    writer.add_scalar(f"eval/{result.name}/{key}", result.mean(name, key), step)


@dataclass(frozen=True)
class HostReport:
    """What the episode with real remapping showed; `refused` says why there was none."""

    refused: str | None = None
    budget_bytes: int = 0
    chunks_moved: int = 0
    stamps_checked: int = 0
    metrics_equal: bool = False
    measured_move_us: float = 0.0
    driven_by: str = ""

    @property
    def lines(self) -> list[str]:
        if self.refused is not None:
            return [f"real remapping: not shown, host memory was refused: {self.refused}"]
        return [
            f"real remapping on host memory, {self.budget_bytes / GIB:.2f} GiB, driven by {self.driven_by}: "
            f"{self.chunks_moved} chunks moved ({self.measured_move_us:.1f} us each), "
            f"{self.stamps_checked} stamps read back and right, metrics "
            + ("equal to the accounting episode" if self.metrics_equal else "DIFFER FROM THE ACCOUNTING EPISODE")
        ]

    @property
    def good(self) -> bool:
        """All that can be shown here was shown."""
        return self.refused is not None or (self.metrics_equal and self.chunks_moved >= MIN_MOVED_CHUNKS)


class Restless:
    """A controller and a slow swing around it, so that chunks move even where the controller sees no reason to."""

    def __init__(self, controller: Controller, swing: float = 0.1, every: int = 12) -> None:
        self.name = f"{controller.name} and a swing of {swing:g}"
        self.fixed_share: float | None = None
        self._controller, self._swing, self._every = controller, swing, every

    def reset(self, setup: Setup) -> None:
        """As the controller does."""
        self._controller.reset(setup)
        self._windows = 0
        self._share: float | None = None

    def act(self, telemetry: np.record) -> Decision:
        """The controller's share, alternately raised and lowered."""
        decision = self._controller.act(telemetry)
        self._share = decision.kv_share if decision.kv_share is not None else self._share
        self._windows += 1
        if self._windows % self._every:
            return HOLD
        center = self._share if self._share is not None else float(telemetry.kv_share_requested)
        sign = 1.0 if self._windows // self._every % 2 else -1.0
        return Decision(center + sign * self._swing)


def replay_on_host(options: TrainOptions, folder: Path, config: ServingConfig) -> HostReport:
    """One episode on host memory at a scaled budget, beside the same episode on accounting."""
    if not sys.platform.startswith("linux"):
        return HostReport(refused=f"memfd and mremap need Linux, this is {sys.platform}")
    from hbmgym.memory_backend.vmm.linux import free_memory  # its imports exist on Linux only

    try:
        # In whole steps, so that the rates that were calibrated last time serve again.
        hbm_gib = min(MAX_HOST_GIB, free_memory()[0] / 4 / GIB // HOST_STEP_GIB * HOST_STEP_GIB)
        scaled = dataclasses.replace(config, hbm_gib=hbm_gib)
        episode = _excerpt(_scaled_workload(options, scaled).episode("validation", seeds_for("validation", 1)[0]))
        policy = make_controller(f"ppo:{folder / 'policy.npz'}")
        report = _replay(policy, scaled, episode)
        if report.chunks_moved < MIN_MOVED_CHUNKS:
            report = _replay(Restless(policy), scaled, episode)
        return report
    except (VmmRefused, ValueError) as refusal:
        return HostReport(refused=" ".join(str(refusal).split()))


def _scaled_workload(options: TrainOptions, config: ServingConfig) -> Workload:
    """The run's first workload at the load that the scaled budget can carry."""
    if options.trace and not options.scenario:
        trace = load_trace(Path(options.trace[0]))
        return TraceWorkload(trace, LOAD_FACTOR * find_largest_load(trace, config), config.page_tokens)
    return open_workloads(config, scenarios=options.scenario[:1])[0]


def _excerpt(episode: Episode) -> Episode:
    """The first EXCERPT_S seconds, a quarter of them warm-up: real states are copied byte by byte, which takes time."""
    rows = episode.rows[episode.rows["arrival_s"] < EXCERPT_S].copy().view(np.recarray)
    rows["measured"] = rows["arrival_s"] >= EXCERPT_S / 4
    horizon_s = min(EXCERPT_S, episode.horizon_s)
    return dataclasses.replace(episode, rows=rows, warmup_s=EXCERPT_S / 4, horizon_s=horizon_s)


def _replay(controller: Controller, config: ServingConfig, episode: Episode) -> HostReport:
    plain = _run(controller, Core(config), episode)[0]
    core = Core(config, backend="host", check=True)
    real, facts = _run(controller, core, episode)
    return HostReport(
        budget_bytes=core.layout.budget_bytes,
        metrics_equal=plain.cell == real.cell and plain.history == real.history,
        driven_by=controller.name,
        **facts,
    )


def _run(controller: Controller, core: Core, episode: Episode) -> tuple[Rollout, dict[str, Any]]:
    try:
        rollout = run_episode(controller, core, episode)
        assert core.vmm is not None
        moved = core.vmm.chunks_moved
        move_us = 1e6 * core.vmm.measured_move_s / max(moved, 1)
        return rollout, {
            "chunks_moved": moved,
            "stamps_checked": core.vmm.stamps_checked,
            "measured_move_us": move_us,
        }
    finally:
        core.close()


def idle_lines(comparison: Comparison) -> list[str]:
    """One line per scenario with phases whose split the policy hardly moves: it has learned nothing."""
    lines = []
    for result in comparison.results:
        span = result.mean("ppo", "kv_share_max") - result.mean("ppo", "kv_share_min")
        if result.room("cost") is not None and span < MIN_SPAN:
            lines.append(f"{result.name}: kv_share spans only {span:.3f}: this training FAILED, train longer or reseed")
    return lines
