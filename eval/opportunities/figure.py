"""The map as a picture: how cost depends on the split, case by case."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hbmgym.eval.opportunities.verdict import CaseResult
from hbmgym.files import save_figure

COLUMNS = 5


def draw_map(path: Path, results: Sequence[CaseResult]) -> None:
    """Write one panel per case: cost over kv_share, SGLang's default, the dynamic oracle."""
    rows = max(math.ceil(len(results) / COLUMNS), 1)
    figure = Figure(figsize=(3.2 * COLUMNS, 2.3 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for panel, result in zip(panels, results, strict=False):
        panel.plot(result.shares, result.static_costs, color="C0", label="static splits")
        panel.plot(result.shares[result.best], result.static_costs[result.best], "o", color="C0")
        default = float(np.mean(result.of("default", "kv_share_mean"))), float(np.mean(result.of("default", "cost")))
        panel.plot(*default, "x", color="C3", label="SGLang's default")
        panel.axhline(float(np.mean(result.of("dynamic", "cost"))), color="C2", lw=1, label="dynamic oracle")
        panel.set(xlim=(0, 1), ylim=(0.05, 12), yscale="log")
        panel.set_title(f"{result.name}\n{result.platform}: {result.verdict}", fontsize=7)
        panel.tick_params(labelsize=6)
    for panel in panels[len(results) :]:
        panel.set_visible(False)
    if results:
        panels[0].legend(fontsize=6)
    figure.supxlabel("kv_share", fontsize=8)
    figure.supylabel("mean cost", fontsize=8)
    save_figure(figure, path, dpi=90)
