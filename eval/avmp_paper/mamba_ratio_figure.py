"""The picture of docs/avmp_paper.md: plain static splits beside the paper's dynamic allocator."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hbmgym.files import save_figure


@dataclass(frozen=True)
class Panel:
    """One figure of all static splits, and of the dynamic variant."""

    title: str
    statics: Sequence[float]
    dynamic: float
    limits: tuple[float | None, float | None] = (0.0, None)
    """Of the vertical axis."""


def draw_mamba_ratio(path: Path, ratios: Sequence[float], panels: Sequence[Panel], dynamic: str) -> None:
    """One curve over `ratios` per panel, and a line for the variant `dynamic`."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
        axes.plot(ratios, panel.statics, marker=".", linewidth=1.2, label="two static pools")
        axes.axhline(panel.dynamic, color="tab:orange", linewidth=1.2, label=dynamic)
        axes.set(xlabel="mamba_ratio", ylim=panel.limits)
        axes.set_title(panel.title, fontsize="medium")
    figure.axes[0].legend(fontsize="small")
    save_figure(figure, path, dpi=80)
