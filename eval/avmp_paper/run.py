"""Reproduce a sweep of the AVMP paper (arXiv 2605.22416): `python eval/avmp_paper/run.py --help`."""

import sys

try:
    from hbmgym.cli import command, in_one_line, option, parse_options, user_errors
except ModuleNotFoundError as error:
    print(f"{error}: run `make train` once, or use .venv/bin/python {__file__}", file=sys.stderr)
    raise SystemExit(2) from None

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hbmgym.envs.traces.avmp_workloads import SHAREGPT, load_prompt_pool
from hbmgym.eval.avmp_paper.aggregate import aggregates, differences
from hbmgym.eval.avmp_paper.paper_tables import tables
from hbmgym.eval.avmp_paper.published import published
from hbmgym.eval.avmp_paper.sweeps import SWEEPS, as_row, cells_of, run_cells
from hbmgym.eval.cells import check_folder, claimed, write_json
from hbmgym.files import write_atomically


@dataclass(frozen=True)
class PaperOptions:
    """Which sweep, and where its cells and tables go."""

    sweep: str = option("table1", "what to run", choices=tuple(SWEEPS))
    sharegpt: str = option(
        "",
        "for --sweep sharegpt: its prompt lengths, a JSON list, or an object with one under prompt_tokens "
        "(research/avmp/data/sharegpt_prompts.json of github.com/codepawl/cachepawl)",
        metavar="FILE",
    )
    out: str = option("", "new folder for cells.json and tables.md", metavar="DIR")
    progress: bool = option(True, "show a progress bar")


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print, write; exit code 1 if a published figure does not come out."""
    options = parse_options(PaperOptions, __doc__ or "", arguments)
    with user_errors():
        prompt_pool = _prompt_pool(options)
        if options.out:
            check_folder(Path(options.out))
    sweep = SWEEPS[options.sweep]
    with in_one_line():
        progress = options.progress and sys.stderr.isatty()
        results = run_cells(cells_of(sweep), prompt_pool, label=sweep.name, progress=progress)
    text = "\n\n".join(f"## {title}\n\n{table}" for title, table in tables(sweep, results).items())
    print(text)
    if options.out:
        # What the tables show for reference is no cell of the sweep.
        own = [as_row(result) for result in results if result.cell.variant not in sweep.references]
        with user_errors(), claimed(options.out):
            write_json(Path(options.out) / "cells.json", own)
            write_atomically(Path(options.out) / "tables.md", f"{text}\n".encode())
        print(f"\ncells.json ({len(own)} cells) and tables.md are in {options.out}")
    _compare(sweep.name, *differences(aggregates(results), published(sweep.name)))


def _prompt_pool(options: PaperOptions) -> np.ndarray | None:
    needed = SHAREGPT in SWEEPS[options.sweep].workloads
    if needed and not options.sharegpt:
        raise ValueError(f"--sweep {options.sweep} needs the recorded prompt lengths: give --sharegpt FILE")
    if options.sharegpt and not needed:
        raise ValueError(f"--sharegpt {options.sharegpt} is read by --sweep sharegpt only, not by {options.sweep}")
    return load_prompt_pool(Path(options.sharegpt)) if needed else None


def _compare(name: str, compared: int, different: Sequence[str]) -> None:
    if not compared:
        return
    print(f"\n{compared - len(different)} of {compared} published figures of {name} come out exactly")
    for line in different:
        print(line, file=sys.stderr)
    if different:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
