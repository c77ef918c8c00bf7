"""What an environment shows: one line of text, or a figure of the episode so far. Reads Telemetry, changes nothing."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BAR_WIDTH = 20
FIGURE_INCHES = (6.4, 4.8)
DOTS_PER_INCH = 75

# Label and line of each panel: Telemetry fields, over the field that makes them shares (None: as they are).
_PANELS: tuple[tuple[str, tuple[str, ...], str | None], ...] = (
    ("kv_share", ("kv_share_requested", "kv_share_effective"), None),
    ("KV pages", ("kv_live", "kv_cached"), "kv_capacity"),
    ("SSM slots", ("ssm_live", "ssm_cached"), "ssm_capacity"),
    ("requests", ("waiting", "running"), None),
)


def ansi_line(telemetry: np.record) -> str:
    """One line: time, split, both pools as bars (# live, + cached, . free), queue."""
    return (
        f"{telemetry.time_s:8.1f} s  kv_share {telemetry.kv_share_effective:.3f} -> {telemetry.kv_share_requested:.3f}"
        f"  KV [{_bar(telemetry.kv_live, telemetry.kv_cached, telemetry.kv_capacity)}]"
        f"  SSM [{_bar(telemetry.ssm_live, telemetry.ssm_cached, telemetry.ssm_capacity)}]"
        f"  waiting {telemetry.waiting:.0f}  running {telemetry.running:.0f}"
    )


def _bar(live: float, cached: float, capacity: float) -> str:
    hashes = round(BAR_WIDTH * live / capacity)
    pluses = round(BAR_WIDTH * (live + cached) / capacity) - hashes
    return ("#" * hashes + "+" * pluses).ljust(BAR_WIDTH, ".")


class HistoryFigure:
    """Share, pools and queue over the episode so far. One figure is kept, and only its lines change."""

    def __init__(self) -> None:
        # Imported here: who does not draw does not wait for matplotlib. No pyplot, so no global state.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=FIGURE_INCHES, dpi=DOTS_PER_INCH)
        figure.subplots_adjust(left=0.1, right=0.83, bottom=0.1, top=0.97)
        self._canvas = FigureCanvasAgg(figure)
        self._axes: list[Axes] = list(figure.subplots(len(_PANELS), sharex=True))
        self._lines = [
            [axes.plot([], [], label=field.rpartition("_")[2])[0] for field in fields]
            for axes, (_, fields, _) in zip(self._axes, _PANELS, strict=True)
        ]
        for axes, (label, _, whole) in zip(self._axes, _PANELS, strict=True):
            axes.set_ylabel(label)
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small", frameon=False)
            if whole is not None or label == "kv_share":
                axes.set_ylim(-0.03, 1.03)
        self._axes[-1].set_xlabel("simulated seconds")
        self._history: list[np.void] = []

    def start(self, telemetry: np.record, horizon_s: float) -> None:
        """Forget the past and begin with `telemetry`."""
        self._history = [telemetry.copy()]
        self._axes[-1].set_xlim(0.0, horizon_s)

    def add(self, telemetry: np.record) -> None:
        """Remember the end of one more window."""
        self._history.append(telemetry.copy())

    def pixels(self) -> np.ndarray:
        """uint8, shape (height, width, 3)."""
        history = np.array(self._history)
        for (_, fields, whole), lines in zip(_PANELS, self._lines, strict=True):
            for field, line in zip(fields, lines, strict=True):
                values = history[field] if whole is None else history[field] / history[whole]
                line.set_data(history["time_s"], values)
        most = max(history["waiting"].max(), history["running"].max(), 1.0)
        self._axes[-1].set_ylim(0.0, 1.1 * most)
        self._canvas.draw()
        return np.asarray(self._canvas.buffer_rgba())[..., :3].copy()
