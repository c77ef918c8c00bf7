"""The regrets as people read them: one line per case, what is to be read off where there is room, and the summary."""

import sys
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from rich.console import Console
from rich.table import Table

from hbmgym.eval.comparison import OTHERS_BEST
from hbmgym.eval.opportunities.verdict import Interval
from hbmgym.eval.regrets.measure import Regret
from hbmgym.eval.regrets.share_error import EPSILON, GRID_STEP, SEGMENT_S
from hbmgym.eval.regrets.summary import (
    BEST_STATIC,
    COST_ROOM,
    DEFAULT,
    FAR,
    P99_ROOM,
    groups,
    median_gap_closed,
    price_of_saving,
    summary,
    with_cost_room,
    with_moving_room,
    with_p99_room,
)
from hbmgym.eval.statics import UNSERVED
from hbmgym.eval.table import UNBOUNDED_WIDTH


def print_regrets(regrets: Sequence[Regret], names: Sequence[str]) -> None:
    """Every table for which there are cases, then what their words mean."""
    console = Console(width=None if sys.stdout.isatty() else 2 * UNBOUNDED_WIDTH, soft_wrap=True)
    console.print(_costs(regrets, names))
    if room := with_cost_room(regrets):
        console.print(_gaps(room, names))
    if room := with_p99_room(regrets):
        title = f"where it saves {P99_ROOM:.0%} of the p99 TTFT: p99 TTFT over the best static's - 1, worst seed, %"
        console.print(_table(title, room, names, _p99))
    if regrets[0].share_errors:
        console.print(_shares(regrets, names))
    console.print(_summary(regrets, names))
    for line in _notes(regrets):
        print(line)


def _gaps(regrets: Sequence[Regret], names: Sequence[str]) -> Table:
    title = (
        f"where the oracle saves {COST_ROOM:.0%} of the cost: what it saves, what of that one share per episode saves, "
        "%; part of it saved, GiB migrated per episode"
    )
    table = _empty(title, ("case", "platform", "kind"), ("oracle", "one share", *names))
    for regret in regrets:
        case = regret.case
        rooms = (f"{100.0 * room:.0f}" for room in (case.cost_room, case.chosen_room))
        table.add_row(case.name, case.platform, regret.kind, *rooms, *(_gap(regret, name) for name in names))
    return table


def _table(title: str, regrets: Sequence[Regret], names: Sequence[str], tell: Callable[[Regret, str], str]) -> Table:
    """One line per case, with what there is to tell of each controller."""
    table = _empty(title, ("case", "platform", "kind"), names)
    for regret in regrets:
        table.add_row(regret.case.name, regret.case.platform, regret.kind, *(tell(regret, name) for name in names))
    return table


def _empty(title: str, words: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", pad_edge=False)
    for word in words:
        table.add_column(word, no_wrap=True)
    for number in numbers:
        table.add_column(number, justify="right", no_wrap=True)
    return table


def _costs(regrets: Sequence[Regret], names: Sequence[str]) -> Table:
    episodes = len(next(iter(regrets[0].cells.values())))
    title = f"cost over the best static split's - 1, %, {episodes} validation episodes"
    table = _empty(title, ("case", "platform", "kind"), ("rho", "best static", "oracle", *names))
    before = regrets[0].case.platform
    for regret in regrets:
        case = regret.case
        if case.platform != before:
            table.add_section()
            before = case.platform
        best = f"{case.best_share:.3f}: {regret.mean(case.best_static, 'cost'):.3f}"
        facts = (case.name, case.platform, regret.kind, f"{case.rho:.2f}", best, f"{-100 * case.cost_room:+.0f}")
        table.add_row(*facts, *(_percent(regret.relative(name)) for name in names))
    return table


def _percent(interval: Interval) -> str:
    return "{:+.0f} [{:+.0f}, {:+.0f}]".format(*(100.0 * value for value in interval))


def _gap(regret: Regret, name: str) -> str:
    return f"{regret.gap_closed(name):.0%}, {regret.gib_migrated(name):.0f}"


def _p99(regret: Regret, name: str) -> str:
    worst = 100.0 * regret.worst_seed(name, "ttft_p99_s")
    return f"{_percent(regret.relative(name, 'ttft_p99_s'))}, {worst:+.0f}"


def _shares(regrets: Sequence[Regret], names: Sequence[str]) -> Table:
    title = f"share error: distance to the splits within {EPSILON:.0%} of the best of a {SEGMENT_S:.0f} s segment"
    table = _empty(title, ("case", "platform", "kind"), ("requests", BEST_STATIC, *names))
    for regret in regrets:
        case = regret.case
        shares = [regret.share_errors[name] for name in (case.best_static, *names)]
        errors = (f"{share.error:.3f}" for share in shares)
        table.add_row(case.name, case.platform, regret.kind, f"{shares[0].requests:.0f}", *errors)
    return table


def _summary(regrets: Sequence[Regret], names: Sequence[str]) -> Table:
    table = _empty("", ("cost over the best static split's - 1, %: median / mean / worst",), names)

    def add(title: str, tell: Callable[[str], str]) -> None:
        table.add_row(title, *(tell(name) for name in names))

    totals = {name: summary(regrets, name) for name in names}
    parts = {"all": regrets, **groups(regrets)}
    for title, own in parts.items():
        add(f"{title} ({len(own)})", partial(_middle, own))
    table.add_section()
    add("by token", lambda name: _spread([regret.excess(name, "token_cost") for regret in regrets]))
    add("tokens left unserved", lambda name: _spread([regret.unserved(name) for regret in regrets]))
    table.add_section()
    add(f"cases above {FAR:.0%}", lambda name: f"{totals[name]['far']}")
    add("GiB migrated per episode", lambda name: f"{totals[name]['gib_migrated']:.0f}")
    if room := with_cost_room(regrets):
        where = f"where the oracle saves {COST_ROOM:.0%} ({len(room)})"
        add(f"part of it saved, median {where}", lambda name: f"{median_gap_closed(room, name):.0%}")
        if moving := with_moving_room(regrets):
            title = f"... where {COST_ROOM:.0%} beyond one share per episode ({len(moving)})"
            add(title, lambda name: f"{median_gap_closed(moving, name):.0%}")
        for reference in (BEST_STATIC, DEFAULT):
            add(f"GiB / % of {reference}'s cost saved, sums {where}", partial(_price, room, reference))
    if regrets[0].share_errors:
        table.add_section()
        for title, own in parts.items():
            add(f"share error, mean, {title} ({len(own)})", partial(_mean_share, own))
    return table


def _middle(regrets: Sequence[Regret], name: str) -> str:
    return _spread([regret.excess(name) for regret in regrets])


def _spread(parts: Sequence[float]) -> str:
    """Median, mean and maximum, in per cent."""
    values = 100.0 * np.array(parts)
    return f"{np.median(values):+.1f} / {values.mean():+.1f} / {values.max():+.1f}"


def _mean_share(regrets: Sequence[Regret], name: str) -> str:
    return f"{np.mean([regret.share_errors[name].error for regret in regrets]):.3f}"


def _price(regrets: Sequence[Regret], reference: str, name: str) -> str:
    found = price_of_saving(regrets, reference, name)
    if found is None:
        return "-"
    ratio = found["gib_per_percent"]
    return f"{found['gib']:.0f} / {found['saved_percent']:.0f} = {'-' if ratio is None else f'{ratio:.1f}'}"


def _notes(regrets: Sequence[Regret]) -> list[str]:
    lines = [
        "oracle: what the replayed dynamic oracle of the map saves; it is one path, and no bound. one share: what the "
        "best static share of each single episode saves, which takes hindsight but no moving. sane: rho < 1 and some "
        f"static split leaves at most {UNSERVED:.0%} of the tokens unserved; the best static is the cheapest of those "
        "that leave no more beyond that. Its share is the map's. no reuse: the best static finds nothing in its cache; "
        "it caps concurrency. by token: cost, each request weighted by its tokens. tokens left unserved: of all, less "
        "those that the best static leaves."
    ]
    if regrets[0].share_errors:
        lines.append(
            "share error: means over segments, weighted by their requests, of which one has as many as the table says: "
            "with few, chance says which splits are good, as the best static's own error shows. The statics know "
            "nothing of carried-over state."
        )
    if OTHERS_BEST in regrets[0].cells:
        lines.append(
            f"{OTHERS_BEST}: in every episode the static split that is best on the others, of a grid with {GRID_STEP:g}"
            " between two: what the best static is worth to somebody who has to choose it beforehand."
        )
    if any(regret.case.is_recorded for regret in regrets):
        lines.append(
            "recorded: seeds of one recorded trace share most of their rows and are not independent; an episode lasts "
            "as long as the part does at its load."
        )
    return lines + [_off_the_map(regret) for regret in regrets if not regret.is_as_mapped]


def _off_the_map(regret: Regret) -> str:
    case = regret.case
    return (
        f"{case.traffic.name}: the best static costs {regret.mean(case.best_static, 'cost'):.4f}, in the map "
        f"{case.best_cost:.4f}: traffic or rules are not the map's, and its share may not be the best one here"
    )
