"""After training: the comparison on validation seeds, its sibling curves, and one episode with bytes really moved."""

import dataclasses
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from hbmgym.controllers.registry import make_controller
from hbmgym.envs.calibration import trace_load
from hbmgym.envs.serving.config import GIB, ServingConfig
from hbmgym.envs.traces.episode import Loop
from hbmgym.envs.traces.load import load_trace
from hbmgym.envs.traces.seeds import seeds_for
from hbmgym.envs.workload import TraceWorkload, Workload, open_workloads
from hbmgym.eval.cells import Bench, shown_anyway, write_cells, write_json
from hbmgym.eval.comparison import DEFAULT_CONTROLLERS, Comparison, compare, row_names
from hbmgym.eval.figure import draw_comparison
from hbmgym.eval.intervals import iqm
from hbmgym.eval.oracle import ORACLE
from hbmgym.eval.regret import MAP
from hbmgym.eval.regrets.cases import sane_cases
from hbmgym.eval.regrets.measure import fresh_seeds, measure
from hbmgym.eval.regrets.report import print_regrets
from hbmgym.eval.regrets.summary import as_json
from hbmgym.eval.replay import Replay, excerpt, replay
from hbmgym.eval.table import print_comparison
from hbmgym.memory_backend.vmm import VmmRefused
from hbmgym.train.options import TrainOptions

MAX_GIB = 2.0
GIB_STEP = 0.25
MIN_SPAN = 0.05
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
    """The table of the run's policy against DEFAULT_CONTROLLERS; cells go to the folder."""
    bench = Bench(config, tuple(workloads), "validation")
    names = [*row_names(DEFAULT_CONTROLLERS, config), f"ppo:{folder / 'policy.npz'}"]
    seeds = seeds_for("validation", options.table_episodes)
    comparison = compare(bench, names, seeds, jobs=options.jobs, oracle=True, progress=options.progress)
    with shown_anyway(lambda: print_comparison(comparison)):
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
        references = (result.best_static, "sglang-0.9", "threshold", "demand", "gradient", "convex", "helm", ORACLE)
        for name in (name for name in result.controllers if name in references):
            with SummaryWriter(str(folder / "references" / f"{result.name}-{name}")) as writer:
                for (tag, key), step in itertools.product(CURVES.items(), (0, steps)):
                    writer.add_scalar(tag, result.mean(name, key), step)
                    writer.add_scalar(f"eval/{result.name}/{key}", result.mean(name, key), step)


def replay_on_memory(options: TrainOptions, folder: Path, config: ServingConfig) -> Replay:
    """One episode with bytes really moved, at a scaled budget: on the GPU if the run asked for it, else on the host."""
    backend = "cuda" if options.backend == "cuda" else "host"
    try:
        scaled = dataclasses.replace(config, hbm_gib=MAX_GIB if backend == "cuda" else _host_gib())
        episode = excerpt(_scaled_workload(options, scaled).episode("validation", seeds_for("validation", 1)[0]))
        return replay(make_controller(f"ppo:{folder / 'policy.npz'}"), scaled, episode, backend)
    except (VmmRefused, ValueError) as refusal:
        return Replay(backend, refused=" ".join(str(refusal).split()))


def _host_gib() -> float:
    """At most a quarter of the free memory, in whole steps so that rates that were calibrated last time serve again."""
    if not sys.platform.startswith("linux"):
        raise VmmRefused(f"memfd and mremap need Linux, this is {sys.platform}")
    from hbmgym.memory_backend.vmm.linux import free_memory  # its imports exist on Linux only

    return min(MAX_GIB, free_memory()[0] / 4 / GIB // GIB_STEP * GIB_STEP)


def _scaled_workload(options: TrainOptions, config: ServingConfig) -> Workload:
    """The run's first workload at the load that the scaled budget can carry."""
    loop: Loop = options.loop  # type: ignore[assignment]
    if options.trace and not options.scenario:
        trace = load_trace(options.trace[0], spread=options.spread)
        return TraceWorkload(trace, trace_load(trace, config), config.page_tokens, loop)
    return open_workloads(config, scenarios=options.scenario[:1], loop=loop)[0]


def score_lines(scores: Mapping[str, float]) -> list[str]:
    """How the seeds of a run did on validation, over the best fixed splits."""
    values = list(scores.values())
    if len(values) == 1:
        return [f"cost on validation over the best fixed splits: {values[0]:.3f}"]
    return [
        f"cost on validation over the best fixed splits, {len(values)} policies: interquartile mean {iqm(values):.3f}, "
        f"best {min(values):.3f}, worst {max(values):.3f}"
    ]


def judge_everywhere(options: TrainOptions, folder: Path, summary: dict[str, object]) -> None:
    """The policy of a recipe against the best static split of every sane case of the map, and gradient beside it."""
    names = [f"ppo:{folder / 'policy.npz'}", "gradient"]
    try:
        cases = sane_cases(Path(MAP))
    except ValueError as reason:
        print(f"no regret table: {reason}")
        return
    regrets = measure(cases, names, fresh_seeds(cases), options.table_episodes, options.jobs, options.progress)
    print_regrets(regrets, names)
    summary["regret"] = as_json(regrets, names)
    write_json(folder / "summary.json", summary)


def idle_lines(comparison: Comparison) -> list[str]:
    """One line per scenario with phases whose split the policy hardly moves: it has learned nothing."""
    lines = []
    for result in comparison.results:
        span = result.mean("ppo", "kv_share_max") - result.mean("ppo", "kv_share_min")
        if result.room("cost") is not None and span < MIN_SPAN:
            lines.append(f"{result.name}: kv_share spans only {span:.3f}: this training FAILED, train longer or reseed")
    return lines
