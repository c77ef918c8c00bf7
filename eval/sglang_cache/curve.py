"""Token hit rate over the split, for many short and for few long sessions: `python eval/sglang_cache/curve.py`.

This engine serves the sessions now; beside it stands what SGLang's cache reused when `record.py` was run.
"""

import sys

try:
    from hbmgym.cli import command, option, parse_options, user_errors
except ModuleNotFoundError as error:
    print(f"{error}: run `make train` once, or use .venv/bin/python {__file__}", file=sys.stderr)
    raise SystemExit(2) from None

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.serving.core import make_layout
from hbmgym.eval.sglang_cache.cases import Case
from hbmgym.eval.sglang_cache.families import LONG, SHORT, draw
from hbmgym.eval.sglang_cache.ours import ENDLESS_S, SGLANG_POLICIES, replay
from hbmgym.eval.sglang_cache.sequence import Request
from hbmgym.eval.table import UNBOUNDED_WIDTH
from hbmgym.files import save_figure

FAMILIES = {"200 short sessions": SHORT, "24 long sessions": LONG}
CONFIG = ServingConfig(hbm_gib=16.0, window_s=ENDLESS_S, policies=SGLANG_POLICIES)
RATIOS = (0.11, 0.25, 0.43, 0.9, 1.5, 3.0, 9.0)
"""Bytes of states / bytes of KV: SGLang's --mamba-full-memory-ratio."""
DEFAULT = RATIOS.index(0.9)
RECORDED = Path(__file__).with_name("curve.json")


@dataclass(frozen=True)
class CurveOptions:
    """Where the figure goes."""

    figure: str = option("", "file for a figure of the table, .png", metavar="FILE")


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Serve, print, draw."""
    options = parse_options(CurveOptions, __doc__ or "", arguments)
    recorded = json.loads(RECORDED.read_text())
    there = f"SGLang {recorded['made_with']['sglang']}"
    rates = {}
    for family, shape in FAMILIES.items():
        rates[f"{family}, here"] = hit_rates(draw(shape, seed=0))
        rates[f"{family}, {there}"] = recorded["hit_rates"][family]
    Console(width=None if sys.stdout.isatty() else UNBOUNDED_WIDTH, soft_wrap=True).print(_table(rates))
    if options.figure:
        with user_errors(OSError):
            _draw(Path(options.figure), rates)
        print(f"figure: {options.figure}")


def hit_rates(requests: Sequence[Request], config: ServingConfig = CONFIG) -> list[float]:
    """Prompt tokens reused / prompt tokens at each of RATIOS, the requests served one after the other."""
    counters = [replay(config, _kv_share(ratio), requests).counters for ratio in RATIOS]
    return [float(found.reused_tokens / found.admitted_tokens) for found in counters]


def case_at(family: str, ratio: float) -> Case:
    """The same sessions at the same slots and pages, for SGLang's cache."""
    layout = make_layout(CONFIG)
    slots = layout.slots(_kv_share(ratio))
    requests = tuple(draw(FAMILIES[family], seed=0))
    return Case(f"{family} at {ratio:g}", slots, layout.pages(slots), CONFIG.prefill_budget, requests)


def _kv_share(ratio: float) -> float:
    return 1.0 / (1.0 + ratio)


def _table(rates: dict[str, list[float]]) -> Table:
    table = Table(title=f"token hit rate by state / KV bytes, {CONFIG.hbm_gib:g} GiB, {CONFIG.model}", pad_edge=False)
    for title in ("", *(f"{ratio:g}" for ratio in RATIOS), "best", "best - default"):
        table.add_column(title, no_wrap=True)
    for name, row in rates.items():
        best = max(row)
        figures = [f"[bold]{rate:.3f}[/bold]" if rate == best else f"{rate:.3f}" for rate in row]
        table.add_row(name, *figures, f"{RATIOS[row.index(best)]:g}", f"{best - row[DEFAULT]:.3f}")
    return table


def _draw(path: Path, rates: dict[str, list[float]]) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, (name, row) in enumerate(rates.items()):
        axes.plot(RATIOS, row, "--" if number % 2 else "-", marker=".", color=f"C{number // 2}", label=name)
    axes.axvline(RATIOS[DEFAULT], color="0.7", linewidth=1.0)
    axes.set(xscale="log", xlabel="bytes of states / bytes of KV", ylabel="token hit rate", ylim=(0.0, None))
    axes.set_xticks(RATIOS, [f"{ratio:g}" for ratio in RATIOS])
    axes.minorticks_off()
    axes.legend(fontsize="small")
    save_figure(figure, path, dpi=90)


if __name__ == "__main__":
    main()
