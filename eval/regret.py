"""What rows cost against the static split that could have been set, in every sane case: `python eval/regret.py --help`.

A row is a rule of the engine and a controller. A case of the opportunity map is sane when a static split can serve it:
rho below 1, and at most 1 % of the tokens of any class left unserved. The split is the map's, the cheapest of those
that serve what the machine can hold; all rows run on other episodes than those it was found on.
"""

import sys

try:
    from hbmgym.cli import command, in_one_line, option, parse_options, user_errors
except ModuleNotFoundError as error:
    print(f"{error}: run `make train` once, or use .venv/bin/python {__file__}", file=sys.stderr)
    raise SystemExit(2) from None

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hbmgym.envs.traces.jitter import SPREAD
from hbmgym.envs.traces.trace import TraceError
from hbmgym.eval.cells import UnusableFolder, check_folder, claimed, shown_anyway, write_json
from hbmgym.eval.regrets.cases import SaneCase, sane_cases
from hbmgym.eval.regrets.measure import fresh_seeds, measure
from hbmgym.eval.regrets.report import print_regrets
from hbmgym.eval.regrets.summary import as_json
from hbmgym.eval.rows import find_row

MAP = str(Path(__file__).with_name("opportunities") / "map.json")
ROWS = "default,float,priced,demand,gradient,convex,helm,helm@priced"


@dataclass(frozen=True)
class RegretOptions:
    """Who is judged, where, and by what."""

    controllers: str = option(ROWS, "comma-separated rows, as compare.py names them; default: SGLang's split")
    seeds: int = option(40, "validation episodes per case, none of which the map has chosen its splits on")
    platform: tuple[str, ...] = option((), "of the map, repeatable (default: all)")
    scenario: tuple[str, ...] = option((), "of the map, repeatable (default: all, unless traces are given)")
    trace: tuple[str, ...] = option(
        (), "recorded trace that the map has by its name, repeatable; its load is calibrated", metavar="PATH"
    )
    spread: bool = option(True, SPREAD)
    map: str = option(MAP, "map.json of eval/opportunity.py", metavar="PATH")
    hindsight: bool = option(True, "also some 20 static splits, for the one that is best on these episodes")
    jobs: int = option(min(2, os.cpu_count() or 1), "processes")
    out: str = option("", "new folder for regret.json")
    progress: bool = option(True, "show progress bars")


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print, write."""
    options = parse_options(RegretOptions, (__doc__ or "").splitlines()[0], arguments)
    with user_errors():
        if options.seeds < 1 or options.jobs < 1:
            raise ValueError(f"--seeds {options.seeds} and --jobs {options.jobs} must be at least 1")
        chosen = sane_cases(Path(options.map), options.platform, options.scenario, options.trace, options.spread)
        names = _names(options.controllers, chosen)
        seeds = fresh_seeds(chosen)
        if options.seeds > len(seeds):
            raise ValueError(f"--seeds is {options.seeds}, expected at most {len(seeds)}")
        if options.out:
            check_folder(Path(options.out))
    progress = options.progress and sys.stderr.isatty()
    with in_one_line(TraceError, UnusableFolder), claimed(options.out):
        regrets = measure(chosen, names, seeds, options.seeds, options.jobs, progress, options.hindsight)
        if options.out:
            with shown_anyway(lambda: print_regrets(regrets, names)):
                write_json(Path(options.out) / "regret.json", as_json(regrets, names))
    print_regrets(regrets, names)


def _names(text: str, cases: Sequence[SaneCase]) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise ValueError("--controllers is empty: give names, for example helm,gradient")
    for platform in {case.traffic.platform for case in cases}:
        for name in names:
            find_row(name, platform.config)
    return names


if __name__ == "__main__":
    main()
