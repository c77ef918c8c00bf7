"""One picture of a trace: load over time, lengths, and what is reused."""

from io import BytesIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hbmgym.envs.traces.regime import load_per_bin
from hbmgym.envs.traces.reuse import found_tokens
from hbmgym.envs.traces.summary import arrivals_apart
from hbmgym.envs.traces.trace import Trace

LAST_TURN = 100
"""Later turns are drawn as this one."""
_BINS = 1000
"""More of them would not be seen."""


def picture(trace: Trace) -> bytes:
    """A PNG with four panels."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    (load, reuse), (inputs, outputs) = figure.subplots(2, 2)
    clocked = trace.trace_kind != "session-library"
    _draw_load(trace, load) if clocked else _draw_turns(trace, load)
    _draw_reuse(trace, reuse, clocked)
    _draw_lengths(trace.input_tokens, "input", inputs)
    _draw_lengths(trace.output_tokens, "output", outputs)
    figure.suptitle(f"{trace.name}: {len(trace):,} requests", parse_math=False)
    content = BytesIO()
    figure.savefig(content, dpi=110)
    return content.getvalue()


def _draw_load(trace: Trace, axes: Axes) -> None:
    arrival_s = arrivals_apart(trace)
    requests, bin_s = load_per_bin(arrival_s, most=_BINS)
    tokens, _ = load_per_bin(arrival_s, trace.input_tokens.astype(np.float64), most=_BINS)
    for load, label in ((requests, "requests"), (tokens, "input tokens")):
        if load.any():
            axes.step(np.arange(len(load)) * bin_s, load / load.mean(), where="post", linewidth=1.0, label=label)
    axes.set(xlabel="time, s", ylabel="load / mean", title=f"load per {bin_s:g} s", ylim=(0, None))
    if len(axes.lines):
        axes.legend(fontsize="small")


def _draw_turns(trace: Trace, axes: Axes) -> None:
    turns = np.unique(trace.session_id, return_counts=True)[1]
    axes.hist(turns, bins=_log_bins(turns), color="tab:blue")
    axes.set(xscale="log", xlabel="turns", ylabel="sessions", title="turns per session")


def _draw_reuse(trace: Trace, axes: Axes, clocked: bool) -> None:
    axes.set(title="prompt tokens found in an infinite cache", ylabel="share", ylim=(0, 1))
    found = found_tokens(trace)
    if found is None:
        axes.text(0.5, 0.5, "no block ids", ha="center", va="center", transform=axes.transAxes)
        return
    if clocked:
        arrival_s = arrivals_apart(trace)
        part, bin_s = load_per_bin(arrival_s, found.astype(np.float64), most=_BINS)
        whole, _ = load_per_bin(arrival_s, trace.input_tokens.astype(np.float64), most=_BINS)
        step, label = bin_s, "time, s"
    else:
        turn = np.clip(trace.turn, 0, LAST_TURN)
        part, whole = np.bincount(turn, found), np.bincount(turn, trace.input_tokens)
        step, label = 1.0, "turn"
    there = np.flatnonzero(whole)
    axes.plot(there * step, part[there] / whole[there], linewidth=1.0)
    axes.set(xlabel=label)


def _draw_lengths(tokens: np.ndarray, label: str, axes: Axes) -> None:
    axes.hist(tokens, bins=_log_bins(tokens), color="tab:blue")
    axes.set(xscale="log", xlabel="tokens", ylabel="requests", title=f"{label} tokens")


def _log_bins(values: np.ndarray) -> list[float]:
    return np.geomspace(0.9 * float(values.min()), 1.1 * float(values.max()), 60).tolist()
