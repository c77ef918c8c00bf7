"""One picture per workload: how the controllers divide the memory of one episode, and what waits meanwhile."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hbmgym.envs.traces.scenarios import SCENARIOS, phase_schedule
from hbmgym.eval.comparison import Comparison, WorkloadResult
from hbmgym.eval.rollout import Rollout
from hbmgym.files import save_figure


def draw_comparison(folder: Path, comparison: Comparison) -> list[Path]:
    """Write split-<workload>.png for each workload, drawn from its first episode; returns the files."""
    files = []
    for result in comparison.results:
        shown = [*filter(None, (result.best_static,)), *result.rivals] or result.controllers
        seed = result.cells[0]["seed"]
        rollouts = [_find(comparison, result, name, seed) for name in shown]
        files.append(folder / f"split-{result.name}.png")
        _draw(files[-1], result.name, seed, rollouts)
    return files


def _find(comparison: Comparison, result: WorkloadResult, controller: str, seed: int) -> Rollout:
    wanted = (controller, result.name, seed)
    keys = ("controller", "trace", "seed")
    return next(rollout for rollout in comparison.rollouts if tuple(rollout.cell[key] for key in keys) == wanted)


def _draw(path: Path, workload: str, seed: int, rollouts: list[Rollout]) -> None:
    figure = Figure(figsize=(11, 6), layout="constrained")
    FigureCanvasAgg(figure)
    shares, queue = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    for rollout in rollouts:
        times_s = np.array(rollout.history["time_s"])
        label = f"{rollout.cell['controller']}, cost {rollout.cell['cost']:.3f}"
        shares.step(times_s, rollout.history["kv_share_effective"], where="post", label=label, linewidth=1.3)
        queue.plot(times_s, rollout.history["waiting"], linewidth=1.0)
    _shade_phases(workload, seed, max(rollout.history["time_s"][-1] for rollout in rollouts), shares, queue)
    shares.set(ylim=(0, 1), ylabel="share of the KV cache", title=f"{workload}, episode {seed}")
    queue.set(ylabel="requests waiting", xlabel="simulated time, s", ylim=(0, None))
    shares.legend(loc="upper right", fontsize="small")
    save_figure(figure, path, dpi=110)


def _shade_phases(workload: str, seed: int, end_s: float, shares: Axes, queue: Axes) -> None:
    scenario = SCENARIOS.get(workload)
    if scenario is None or not scenario.has_phases:
        return
    for begin_s, stop_s, group in phase_schedule(workload, seed, end_s):
        if group == 1:
            shares.axvspan(begin_s, stop_s, color="0.92", zorder=0)
            queue.axvspan(begin_s, stop_s, color="0.92", zorder=0)
    shares.text(0.01, 0.02, f"shaded: {scenario.classes[1].name}", transform=shares.transAxes, fontsize="small")
