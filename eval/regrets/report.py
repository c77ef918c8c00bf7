"""The regrets as people read them: one line per case, and the summary."""

import sys
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from rich.console import Console
from rich.table import Table

from hbmgym.eval.intervals import Interval
from hbmgym.eval.regrets.measure import ROOM, Regret
from hbmgym.eval.regrets.summary import FAR, groups, summary
from hbmgym.eval.statics import UNSERVED
from hbmgym.eval.table import UNBOUNDED_WIDTH

NOTES = (
    "static: the split that was best on the map's episodes, which are others: one that could have been set. hindsight: "
    "what the split saves that is best on these very episodes, %. sane: rho < 1, and some static split leaves at most "
    f"{UNSERVED:.0%} of any class's tokens unserved. with room: SGLang's default costs {ROOM:.0%} more than static. "
    "no reuse: static finds nothing in its cache, so that it caps concurrency. by token: cost, each request weighted "
    "by its tokens. left unserved: part of the tokens of the class of traffic where it is largest, less that of static."
)
RECORDED = "recorded: seeds of one recorded trace share most of their rows and are not independent."


def print_regrets(regrets: Sequence[Regret], names: Sequence[str]) -> None:
    """Both tables, then what their words mean."""
    console = Console(width=None if sys.stdout.isatty() else 2 * UNBOUNDED_WIDTH, soft_wrap=True)
    console.print(_costs(regrets, names))
    console.print(_summary(regrets, names))
    print(NOTES)
    if any(regret.case.is_recorded for regret in regrets):
        print(RECORDED)


def _empty(title: str, words: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", pad_edge=False)
    for word in words:
        table.add_column(word, no_wrap=True)
    for number in numbers:
        table.add_column(number, justify="right", no_wrap=True)
    return table


def _costs(regrets: Sequence[Regret], names: Sequence[str]) -> Table:
    episodes = len(next(iter(regrets[0].cells.values())))
    title = f"cost over that of the static split - 1, %, {episodes} validation episodes"
    table = _empty(title, ("case", "platform", "kind"), ("rho", "static", "hindsight", *names))
    before = regrets[0].case.platform
    for regret in regrets:
        case = regret.case
        if case.platform != before:
            table.add_section()
            before = case.platform
        static = f"{case.best_share:.3f}: {regret.mean(case.best_static, 'cost'):.3f}"
        facts = (case.name, case.platform, regret.kind, f"{case.rho:.2f}", static, _hindsight(regret))
        table.add_row(*facts, *(_percent(regret.relative(name)) for name in names))
    return table


def _hindsight(regret: Regret) -> str:
    return "-" if regret.in_hindsight is None else f"{100.0 * regret.excess(regret.in_hindsight):+.1f}"


def _percent(interval: Interval) -> str:
    return Interval(*(100.0 * value for value in interval)).text("+.0f")


def _summary(regrets: Sequence[Regret], names: Sequence[str]) -> Table:
    table = _empty("", ("cost over that of the static split - 1, %: median / mean / worst",), names)

    def add(title: str, tell: Callable[[str], str]) -> None:
        table.add_row(title, *(tell(name) for name in names))

    totals = {name: summary(regrets, name) for name in names}
    for title, own in {"all": regrets, **groups(regrets)}.items():
        add(f"{title} ({len(own)})", partial(_middle, own))
    table.add_section()
    if regrets[0].grid:
        add("over the best in hindsight, mean", lambda name: f"{100.0 * totals[name]['over_hindsight_mean']:+.1f}")
    add("by token", lambda name: _spread([regret.excess(name, "token_cost") for regret in regrets]))
    add("p99 TTFT", lambda name: _spread([regret.excess(name, "ttft_p99_s") for regret in regrets]))
    add("left unserved", lambda name: _spread([regret.unserved(name) for regret in regrets]))
    table.add_section()
    add(f"cases above {FAR:.0%}", lambda name: f"{totals[name]['far']}")
    add("GiB migrated per episode", lambda name: f"{totals[name]['gib_migrated']:.0f}")
    return table


def _middle(regrets: Sequence[Regret], name: str) -> str:
    return _spread([regret.excess(name) for regret in regrets])


def _spread(parts: Sequence[float]) -> str:
    """Median, mean and maximum, in per cent."""
    values = 100.0 * np.array(parts)
    return f"{np.median(values):+.1f} / {values.mean():+.1f} / {values.max():+.1f}"
