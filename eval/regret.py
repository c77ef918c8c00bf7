"""What controllers cost against the best static split of every sane case: `python eval/regret.py --help`.

A case of the opportunity map is sane when a static split can serve it: rho below 1, and at most 1 % of the tokens left
unserved. The best static share of each case is the map's, the cheapest of those that serve what the machine can hold.
It and all controllers run on the same validation episodes.
"""

import sys

try:
    from hbmgym.cli import command, in_one_line, option, parse_options, user_errors
except ModuleNotFoundError as error:
    print(f"{error}: run `make train` once, or use .venv/bin/python {__file__}", file=sys.stderr)
    raise SystemExit(2) from None

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hbmgym.controllers.registry import make_controller
from hbmgym.envs.traces.jitter import SPREAD
from hbmgym.envs.traces.seeds import seeds_for
from hbmgym.envs.traces.trace import TraceError
from hbmgym.eval.cells import UnusableFolder, check_folder, claimed, shown_anyway, write_json
from hbmgym.eval.comparison import OTHERS_BEST
from hbmgym.eval.regrets.cases import sane_cases
from hbmgym.eval.regrets.measure import ORACLES, measure
from hbmgym.eval.regrets.report import print_regrets
from hbmgym.eval.regrets.summary import as_json

MAP = str(Path(__file__).with_name("opportunities") / "map.json")


@dataclass(frozen=True)
class RegretOptions:
    """Who is judged, where, and by what."""

    controllers: str = option("sglang-0.9,demand,gradient,convex,helm", "comma-separated, as compare.py names them")
    seeds: int = option(10, "validation episodes per case")
    platform: tuple[str, ...] = option((), "of the map, repeatable (default: all)")
    scenario: tuple[str, ...] = option((), "of the map, repeatable (default: all, unless traces are given)")
    trace: tuple[str, ...] = option(
        (), "recorded trace that the map has by its name, repeatable; its load is calibrated", metavar="PATH"
    )
    spread: bool = option(True, SPREAD)
    map: str = option(MAP, "map.json of eval/opportunity.py", metavar="PATH")
    share_error: bool = option(
        False,
        f"also the distance to good splits, for which some 20 static ones are run, and {OTHERS_BEST}: for each episode "
        "that one which is best on the others",
    )
    oracle_late_s: tuple[str, ...] = option(
        (),
        "also the replayed dynamic oracle, found anew for every episode, its moves so many seconds late; repeatable, 0 "
        "is the map's; some 60 replays per episode",
        metavar="SECONDS",
    )
    jobs: int = option(min(2, os.cpu_count() or 1), "processes")
    out: str = option("", "new folder for regret.json")
    progress: bool = option(True, "show progress bars")


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print, write."""
    options = parse_options(RegretOptions, (__doc__ or "").splitlines()[0], arguments)
    with user_errors():
        names = _names(options)
        seeds = seeds_for("validation", options.seeds)
        chosen = sane_cases(Path(options.map), options.platform, options.scenario, options.trace, options.spread)
        if options.out:
            check_folder(Path(options.out))
    progress = options.progress and sys.stderr.isatty()
    with in_one_line(TraceError, UnusableFolder), claimed(options.out):
        regrets = measure(chosen, names, seeds, options.jobs, progress, options.share_error)
        judged = [*names, OTHERS_BEST] if OTHERS_BEST in regrets[0].cells else names
        if options.out:
            with shown_anyway(lambda: print_regrets(regrets, judged)):
                write_json(Path(options.out) / "regret.json", as_json(regrets, judged))
    print_regrets(regrets, judged)


def _names(options: RegretOptions) -> list[str]:
    if options.seeds < 1 or options.jobs < 1:
        raise ValueError(f"--seeds {options.seeds} and --jobs {options.jobs} must be at least 1")
    names = [name.strip() for name in options.controllers.split(",") if name.strip()]
    if not names:
        raise ValueError("--controllers is empty: give names, for example helm,gradient")
    for name in names:
        make_controller(name)
    return list(dict.fromkeys([*names, *map(_oracle, options.oracle_late_s)]))


def _oracle(text: str) -> str:
    try:
        late_s = float(text)
    except ValueError:
        late_s = -1.0
    if not 0.0 <= late_s < math.inf:
        raise ValueError(f"--oracle-late-s is {text}, expected a number of seconds, 0 or more")
    return f"{ORACLES}{late_s:g}"


if __name__ == "__main__":
    main()
