"""The comparison as people read it: one table per workload on the terminal."""

import sys
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from hbmgym.envs.serving.config import GIB
from hbmgym.envs.serving.state import ACTION_NAMES
from hbmgym.eval.comparison import OTHERS_BEST, Comparison, WorkloadResult
from hbmgym.eval.rollout import Cell
from hbmgym.eval.rows import is_split
from hbmgym.eval.statics import UNSERVED, WORST_CLASS

UNBOUNDED_WIDTH = 230
SHOWN_STATICS = 5
"""So many statics around the best are printed; all are in cells.csv."""


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print every workload's table and what it says."""
    # Without a terminal there is no width to respect, and a table that is folded cannot be read.
    console = console or Console(width=None if sys.stdout.isatty() else UNBOUNDED_WIDTH, soft_wrap=True)
    for result in comparison.results:
        console.print(_table(result))
        for line in summary_lines(result):
            console.print(line, highlight=False)


def summary_lines(result: WorkloadResult) -> list[str]:
    """What the table says, in words."""
    lines = [f"rho {result.rho:.2f}" + (" of the same rows in an open loop" if result.loop == "closed" else "")]
    lines[0] += " (overloaded: conclude nothing from TTFT)" if result.rho > 1.0 else ""
    best = result.best_static
    room, room_p99 = result.room("cost"), result.room("ttft_p99_s")
    if room is not None:
        lines[0] += f"; room (per-phase best under best static): cost {room:.1%}, p99 TTFT {room_p99:.1%}"
    elif best is not None:
        lines[0] += "; room: unknown, no per-phase best was searched"
    if best is not None:
        lines.append(
            f"best static: {result.mean(best, 'cost'):.3f} in hindsight, {_beforehand(result)} if it is chosen on the "
            f"other episodes ({OTHERS_BEST}), {result.best_static_per_seed:.3f} if anew per episode"
        )
    lines += _refusals(result)
    for name in result.rivals:
        shares = result.mean(name, "kv_share_min"), result.mean(name, "kv_share_max")
        gib = result.mean(name, "bytes_migrated") / GIB
        lines.append(f"{name}: kv_share {shares[0]:.3f} to {shares[1]:.3f}, {gib:.1f} GiB moved per episode")
    if priced := [cell for cell in result.cells if "price_ratio_log2" in cell]:
        lines.append(_actions(priced))
    lines += [_against(result, name, reference) for name, reference in result.differences]
    if result.within is not None:
        lines.append(_stopped(result, result.within))
    return lines


def _beforehand(result: WorkloadResult) -> str:
    return f"{result.mean(OTHERS_BEST, 'cost'):.3f}" if OTHERS_BEST in result.controllers else "unknown"


def _stopped(result: WorkloadResult, within: float) -> str:
    """Why there were no more episodes."""
    episodes = len(result.column(result.controllers[0], "cost"))
    if result.is_narrow:
        return f"{episodes} episodes: every difference in cost is known within +-{within:.1%}, so no more were added"
    name, reference = result.widest
    known = result.against(name, reference).half_width
    return (
        f"{episodes} episodes, the limit: {name} against {reference} is known within +-{known:.1%} only, not within "
        f"+-{within:.1%}"
    )


def _refusals(result: WorkloadResult) -> list[str]:
    """Of the static splits that are compared with: who refuses what others serve, so that its cost says little."""
    unserved = {name: result.mean(name, WORST_CLASS) for name in result.controllers}
    most = min(unserved, key=lambda name: unserved[name])
    statics = [name for name in result.controllers if is_split(name) and not name.startswith("static-")]
    lines = []
    for name in dict.fromkeys(filter(None, (result.cheapest_static, result.best_static, *statics))):
        if (more := unserved[name] - unserved[most]) > UNSERVED:
            lines.append(
                f"{name} costs {result.mean(name, 'cost'):.3f}, but leaves {more:.1%} of a class's tokens unserved "
                f"that {most} serves: its cost is no measure for others"
            )
    return lines


def backend_lines(comparison: Comparison) -> list[str]:
    """What the backends did in the episodes of the table, one line per backend; none where no op log was kept."""
    timings = [rollout.timing for rollout in comparison.rollouts]
    lines = []
    for backend in sorted({timing["backend"] for timing in timings}):
        own = [timing for timing in timings if timing["backend"] == backend]
        moved, stamps, move_s = (sum(timing[key] for timing in own) for key in _COUNTED)
        if moved or stamps:
            each = f" ({1e6 * move_s / moved:.1f} us each)" if moved else ""
            lines.append(
                f"backend {backend} in {len(own)} of {len(timings)} cells: {moved:,} chunks moved{each}, "
                f"{stamps:,} stamps read back and right"
            )
    return lines


def _actions(cells: Sequence[Cell]) -> str:
    """What on_shortage=priced did, over all cells that have it."""
    counts = {name: sum(cell[name] for cell in cells) for name in ACTION_NAMES}
    shares = (f"{name.replace('_', '-')} {n / max(sum(counts.values()), 1):.1%}" for name, n in counts.items())
    medians = [cell["price_ratio_log2"] for cell in cells if cell["price_ratio_log2"] is not None]
    ratio = f"at least {2 ** int(np.median(medians))} times dearer" if medians else "never there"
    return f"priced, all its rows: {', '.join(shares)}; second cheapest (median): {ratio}"


def _against(result: WorkloadResult, name: str, reference: str) -> str:
    parts = []
    for key, label in (("cost", "cost"), ("ttft_p99_s", "p99 TTFT"), ("slo_violation_rate", "violations")):
        parts.append(f"{label} {result.against(name, reference, key).text('+.1%')}")
    return f"{name} against {reference}: {', '.join(parts)}"


def _rows(result: WorkloadResult) -> list[str]:
    """The statics nearest to the best, then all others."""
    statics = list(result.statics)
    others = [name for name in result.controllers if name not in statics]
    statics.sort()
    if result.best_static is not None and len(statics) > SHOWN_STATICS:
        place = statics.index(result.best_static)
        first = min(max(place - SHOWN_STATICS // 2, 0), len(statics) - SHOWN_STATICS)
        statics = statics[first : first + SHOWN_STATICS]
    return statics + others


_COUNTED = ("chunks_moved", "stamps_checked", "move_s")
_COLUMNS = (
    "cost",
    "by token",
    "TTFT mean",
    "p99 s",
    "TPOT p99 ms",
    "miss %",
    "hit",
    "preempt",
    "rejected",
    "unfinished",
    "unserved %",
    "kv_share",
    "cap, min",
    "moves/h",
    "GiB/h",
)


def _table(result: WorkloadResult) -> Table:
    seeds = len(result.column(result.controllers[0], "cost"))
    loop = ", closed loop" if result.loop == "closed" else ""
    title = f"{result.name}{loop}: {seeds} episodes, means; cost with its 95 % interval"
    caption = "by token: cost, each request weighted by its tokens; unserved: of all tokens"
    table = Table(title=title, pad_edge=False, caption=caption)
    table.add_column("controller", no_wrap=True)
    for title in _COLUMNS:
        table.add_column(title, justify="right", no_wrap=True)
    for name in _rows(result):
        best = name == result.best_static
        table.add_row(*_row(result, name, best), style="bold" if best else None)
    return table


def _row(result: WorkloadResult, name: str, best: bool) -> list[str]:
    def mean(key: str) -> float:
        return result.mean(name, key)

    return [
        f"{name} (best static)" if best else name,
        result.cost(name).text(".3f"),
        f"{mean('token_cost'):.3f}",
        f"{mean('ttft_mean_s'):.3f}",
        f"{mean('ttft_p99_s'):.2f}",
        f"{1e3 * mean('tpot_p99_s'):.1f}",
        f"{100 * mean('slo_violation_rate'):.2f}",
        f"{mean('hit_rate'):.3f}",
        f"{mean('preemptions'):.1f}",
        f"{mean('rejected'):.1f}",
        f"{mean('unfinished'):.1f}",
        f"{100 * mean('unserved_tokens'):.2f}",
        f"{mean('kv_share_min'):.3f}-{mean('kv_share_max'):.3f}",
        f"{mean('concurrency_cap_mean'):.0f}, {mean('concurrency_cap_min'):.0f}",
        f"{mean('moves_per_hour'):.0f}",
        f"{mean('gib_migrated_per_hour'):.1f}",
    ]
