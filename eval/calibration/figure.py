"""Modelled against measured times, as a picture."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hbmgym.eval.calibration.fit import Calibrated
from hbmgym.files import save_figure

TITLES = {"ttft": "time to first token", "tpot": "time per output token"}
COLOURS = {"vLLM": "C0", "SGLang": "C1"}


def draw_errors(path: Path, found: Sequence[Calibrated]) -> None:
    """Write one panel per figure: every row's modelled over its measured milliseconds, fitted ones hollow."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, name in zip(figure.subplots(1, 2), TITLES, strict=True):
        _draw(panel, name, found)
    save_figure(figure, path, dpi=110)


def _draw(panel: Axes, name: str, found: Sequence[Calibrated]) -> None:
    spans = []
    for one in found:
        for row, ratio in zip(one.rows, one.ratios, strict=True):
            if name not in ratio:
                continue
            measured, colour = row.measured[name], COLOURS[one.deployment.engine]
            face = "none" if row in one.fitted else colour
            panel.plot(measured, ratio[name] * measured, "o", ms=4, color=colour, markerfacecolor=face)
            spans.append(measured)
    if spans:
        ends = (0.7 * min(spans), 1.4 * max(spans))
        panel.plot(ends, ends, color="black", lw=0.8)
        for share in (0.8, 1.25):
            panel.plot(ends, [share * end for end in ends], color="black", lw=0.5, ls=":")
    panel.set(xscale="log", yscale="log", xlabel="measured, ms", ylabel="modelled, ms", title=TITLES[name])
    for engine, colour in COLOURS.items():
        panel.plot([], [], "o", ms=4, color=colour, label=f"{engine}, held out")
        panel.plot([], [], "o", ms=4, color=colour, markerfacecolor="none", label=f"{engine}, fitted")
    panel.legend(fontsize=7)
