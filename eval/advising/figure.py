"""Advice as a picture: cost and hit rate over the split, and how many requests run at once."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hbmgym.eval.advising.advice import DEFAULT, ONE_POOL, Advice
from hbmgym.files import save_figure


def draw_advice(path: Path, advice: Advice) -> None:
    """Write a PNG with three panels over kv_share."""
    figure = Figure(figsize=(9, 8), layout="constrained")
    FigureCanvasAgg(figure)
    costs, hits, caps = figure.subplots(3, 1, sharex=True, height_ratios=[2, 1, 1])
    _draw_costs(costs, advice)
    shares = [point.kv_share for point in advice.curve]
    hits.plot(shares, [point.hit_rate for point in advice.curve], ".-")
    hits.set(ylabel="hit rate", ylim=(0, None))
    caps.plot(shares, [point.admitted for point in advice.curve], ".-", color="C4")
    caps.set(ylabel="requests at once", xlabel="kv_share: KV's part of the memory for both", yscale="log", xlim=(0, 1))
    caps.axhline(advice.caps.time_per_token, color="0.5", lw=1, ls="--", label="most within the SLO of time per token")
    caps.legend(fontsize="small")
    for before, point in zip(advice.curve, advice.curve[1:], strict=False):
        if point.binding != before.binding:
            caps.axvline(0.5 * (before.kv_share + point.kv_share), color="0.7", lw=1)
    for part in _parts(advice):
        caps.text(*part, ha="center", va="bottom", fontsize="x-small", transform=caps.get_xaxis_transform())
    for axes in (costs, hits, caps):
        axes.axvline(advice.best.kv_share, color="C0", lw=0.8, ls=":")
    figure.suptitle(f"{advice.traffic.source} on {advice.config.model}, {advice.config.gpu}", parse_math=False)
    save_figure(figure, path, dpi=110)


def _draw_costs(axes: Axes, advice: Advice) -> None:
    shares = [point.kv_share for point in advice.curve]
    axes.plot(shares, [point.cost for point in advice.curve], ".-", label="static splits")
    axes.plot(advice.best.kv_share, advice.best.cost, "o", color="C0", label=f"best, {advice.best.kv_share:.3f}")
    rows = {row.name: row for row in advice.others}
    axes.plot(
        rows[DEFAULT].kv_share,
        rows[DEFAULT].cost,
        "x",
        color="C3",
        ms=9,
        label=f"{DEFAULT}, {rows[DEFAULT].kv_share:.3f}",
    )
    axes.axhline(rows[ONE_POOL].cost, color="C1", lw=1, label=ONE_POOL)
    axes.axhline(advice.best_mover.cost, color="C2", lw=1, label=f"{advice.best_mover.name}, moving")
    axes.set(ylabel="mean cost", yscale="log")
    axes.legend(fontsize="small")


def _parts(advice: Advice) -> list[tuple[float, float, str]]:
    """Where the word goes that says what binds, once for every stretch of the curve."""
    found: list[list[float]] = []
    words: list[str] = []
    for point in advice.curve:
        if not words or words[-1] != point.binding:
            words.append(point.binding)
            found.append([])
        found[-1].append(point.kv_share)
    return [(sum(part) / len(part), 0.02, word.replace("_", " ")) for part, word in zip(found, words, strict=True)]
