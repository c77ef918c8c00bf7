"""Bring the tables and the figure of docs/avmp_paper.md up to date: `python eval/avmp_paper/findings.py --help`."""

import sys

try:
    from hbmgym.cli import command, fail, option, parse_options, user_errors
except ModuleNotFoundError as error:
    print(f"{error}: run `make train` once, or use .venv/bin/python {__file__}", file=sys.stderr)
    raise SystemExit(2) from None

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hbmgym.envs.traces.avmp_workloads import load_prompt_pool
from hbmgym.eval.avmp_paper.aggregate import aggregates, differences, select, total
from hbmgym.eval.avmp_paper.bootstrap import SEED, Comparison, compare
from hbmgym.eval.avmp_paper.mamba_ratio_figure import Panel, draw_mamba_ratio
from hbmgym.eval.avmp_paper.paper_tables import DIFFERENCE_HEADER, difference_cells, markdown, tables
from hbmgym.eval.avmp_paper.published import published
from hbmgym.eval.avmp_paper.sweeps import REPLICATES, SWEEPS, Cell, Result, Sweep, cells_of, run_cells, under
from hbmgym.eval.avmp_paper.variants import (
    AVMP_DYNAMIC_B128,
    HEADLINE,
    THRESHOLDS,
    Variant,
    avmp_dynamic,
    fixed_dual,
)
from hbmgym.files import write_atomically

PAGE = Path(__file__).resolve().parents[2] / "docs" / "avmp_paper.md"
FIGURE = Path("figures") / "avmp-paper-mamba-ratio.png"
_BLOCK = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

RULES: Mapping[str, Mapping[str, Any]] = {
    "as the code runs": {},
    "high (section 3.2)": {"obeys_high": True},
    "low and high (figure 2)": {"obeys_low": True, "obeys_high": True},
    "1000 operations": {"obeys_interval": True},
    "all three": {"obeys_low": True, "obeys_high": True, "obeys_interval": True},
}
STATIC_010 = fixed_dual(0.1)
AS_STATED = replace(AVMP_DYNAMIC_B128, name="avmp_dynamic_b128_as_stated", **RULES["all three"])
RANKED = (*HEADLINE, avmp_dynamic(256), STATIC_010, fixed_dual(0.25), fixed_dual(0.4), fixed_dual(0.45))


class Findings:
    """Everything that the page shows, computed when it is asked for."""

    def __init__(self, prompt_pool: np.ndarray | None = None, progress: bool = False) -> None:
        self._prompt_pool = prompt_pool
        self._progress = progress

    def blocks(self) -> dict[str, Callable[[], str]]:
        """By the names in the page; without prompt lengths the ShareGPT block is left out."""
        blocks = {
            "figures": self.figures,
            "table1": lambda: self._table("table1", 0),
            "table2": lambda: self._table("table1", 1),
            "table5": lambda: self._table("batch", 0),
            "table6": lambda: self._table("threshold", 0),
            "ooms": self.ooms,
            "losses": self.losses,
            "static": self.static,
            "differences": self.differences,
            "rules": self.rules,
            "ranking": self.ranking,
        }
        if self._prompt_pool is not None:
            blocks["sharegpt"] = lambda: self._table("sharegpt", 0)
        return blocks

    def figures(self) -> str:
        """How many published figures come out."""
        rows = []
        for name in ("table1", "batch", "threshold"):
            compared, different = differences(aggregates(self._sweep(name)), published(name))
            rows.append([name, str(len(published(name))), str(compared), str(compared - len(different))])
        return markdown(["sweep", "published rows", "figures", "equal to the last digit"], rows)

    def ooms(self) -> str:
        """Where OOMs fall, and what rebalancing did."""
        header = ["Variant", "OOM, KV at arrival", "OOM, SSM at arrival", "OOM, growth"]
        header += ["to KV", "to SSM", "rejected", "evictions"]
        rows = []
        for variant in HEADLINE:
            own = _own(self._sweep("table1"), variant)
            rows.append(
                [
                    variant.name,
                    *(f"{_per_seed(own, name):.1f}" for name in ("kv_ooms_at_arrival", "ssm_ooms_at_arrival")),
                    f"{_per_seed(own, 'ooms_at_growth'):.1f}",
                    f"{_per_seed(own, 'rebalances_to_kv'):.1f}",
                    f"{_per_seed(own, 'rebalance_count') - _per_seed(own, 'rebalances_to_kv'):.1f}",
                    f"{_per_seed(own, 'rebalance_rejected'):.1f}",
                    f"{_per_seed(own, 'evictions'):.0f}",
                ]
            )
        return markdown(header, rows)

    def losses(self) -> str:
        """Completed requests that had lost something while they were live: one seed, one workload."""
        rows = []
        for result in self._sweep("table1"):
            cell, outcome = result.cell, result.outcome
            if (cell.variant.name, cell.workload, cell.replicate) == ("avmp_static_mr05", "uniform_short", 0):
                lost = outcome.completed - outcome.intact
                rows.append([f"{cell.model}, {cell.pool_bytes >> 30} GiB", str(outcome.completed), str(lost)])
        return markdown(["avmp_static_mr05, uniform_short, seed 1", "completed", "of these, lost KV or state"], rows)

    def static(self) -> str:
        """A few points of the curve."""
        header = ["Variant", "OOM count", "never failed nor lost anything", "finished, if what is lost is recomputed"]
        shown = [variant for variant in SWEEPS["static-grid"].variants if variant.mamba_ratio in _SHOWN_RATIOS]
        rows = []
        for variant in (*shown, AVMP_DYNAMIC_B128):
            counts = (
                _per_seed(_own(self._grid, variant), "oom_count"),
                _per_seed(_own(self._grid, variant), "intact"),
                _per_seed(_own(self._recomputing_grid, variant), "completed"),
            )
            rows.append([variant.name, *(f"{count:.1f}" for count in counts)])
        return markdown(header, rows)

    def differences(self) -> str:
        """Intervals that the paper does not have."""
        results = [*self._sweep("static-grid"), *run_cells(cells_of(Sweep("as stated", (AS_STATED,))))]
        pairs = (
            (AVMP_DYNAMIC_B128.name, STATIC_010.name),
            (STATIC_010.name, "fixed_dual_mr05"),
            (AS_STATED.name, "fixed_dual_mr05"),
        )
        rows = []
        for variant, baseline in pairs:
            comparison = Comparison(variant, "oom_count", None)
            row = compare(results, comparison, np.random.default_rng(SEED), baseline)
            cells = difference_cells(row, baseline)
            rows.append([*cells[:4], *cells[5:]])
        return markdown([*DIFFERENCE_HEADER[:4], *DIFFERENCE_HEADER[5:]], rows)

    def rules(self) -> str:
        """The threshold sweep under the rules that the paper states: OOM count and, in brackets, rebalances."""
        cells = cells_of(Sweep("rules", (AVMP_DYNAMIC_B128, *THRESHOLDS)))
        columns = [aggregates(self._run(under(cells, **settings), name)) for name, settings in RULES.items()]
        rows = []
        for variant in (AVMP_DYNAMIC_B128, *THRESHOLDS):
            row = [f"{variant.name} ({variant.low:.2f}, {variant.high:.2f})"]
            for column in columns:
                own = select(column, variant.name)
                rebalances = total(own, "rebalance_count_median")
                row.append(f"{total(own, 'oom_count_mean'):.1f} ({rebalances:.0f})")
            rows.append(row)
        return markdown(["Variant (low, high)", *RULES], rows)

    def ranking(self) -> str:
        """What becomes of the order when an eviction costs something; ranks in brackets."""
        cells = cells_of(Sweep("ranking", RANKED))
        paper, recomputing = self._run(cells, "ranking"), self._run(cells, "recompute", recompute=True)
        columns = (
            ("OOM count (paper)", paper, "oom_count", 1.0, 1),
            ("completed (paper)", paper, "completed", 1.0, -1),
            ("never failed nor lost anything", paper, "intact", 1.0, -1),
            ("finished, if what is lost is recomputed", recomputing, "completed", 1.0, -1),
            ("million tokens recomputed", recomputing, "recomputed_tokens", 1e-6, 1),
        )
        texts = [
            _ranked([_per_seed(_own(r, v), name) * unit for v in RANKED], way) for _, r, name, unit, way in columns
        ]
        rows = [[variant.name, *row] for variant, row in zip(RANKED, zip(*texts, strict=True), strict=True)]
        return markdown(["Variant", *(title for title, *_ in columns)], rows)

    def draw(self, path: Path) -> None:
        """The curve over mamba_ratio."""
        panels = (
            self._panel("OOM count (the paper's; .9 and .95 lie above)", self._grid, "oom_count", (400.0, 800.0)),
            self._panel("never failed nor lost anything", self._grid, "intact"),
            self._panel("finished, if what is lost is recomputed", self._recomputing_grid, "completed"),
        )
        ratios = [variant.mamba_ratio for variant in SWEEPS["static-grid"].variants]
        draw_mamba_ratio(path, ratios, panels, AVMP_DYNAMIC_B128.name)

    def _panel(
        self,
        title: str,
        results: Sequence[Result],
        figure: str,
        limits: tuple[float | None, float | None] = (0.0, None),
    ) -> Panel:
        statics = [_per_seed(_own(results, variant), figure) for variant in SWEEPS["static-grid"].variants]
        return Panel(title, statics, _per_seed(_own(results, AVMP_DYNAMIC_B128), figure), limits)

    @cached_property
    def _grid(self) -> list[Result]:
        return self._sweep("static-grid")

    @cached_property
    def _recomputing_grid(self) -> list[Result]:
        sweep = Sweep("recompute", (*SWEEPS["static-grid"].variants, AVMP_DYNAMIC_B128))
        return self._run(cells_of(sweep), "static-grid, recompute", recompute=True)

    @cached_property
    def _sweeps(self) -> dict[str, list[Result]]:
        return {}

    def _sweep(self, name: str) -> list[Result]:
        if name not in self._sweeps:
            self._sweeps[name] = self._run(cells_of(SWEEPS[name]), name)
        return self._sweeps[name]

    def _run(self, cells: Sequence[Cell], label: str, recompute: bool = False) -> list[Result]:
        return run_cells(cells, self._prompt_pool, recompute=recompute, label=label, progress=self._progress)

    def _table(self, sweep: str, place: int) -> str:
        return list(tables(SWEEPS[sweep], self._sweep(sweep)).values())[place]


_SHOWN_RATIOS = (0.01, 0.03125, 0.05, 0.1, 0.15, 0.25, 0.4, 0.45, 0.5, 0.75, 0.9)


def _own(results: Sequence[Result], variant: Variant) -> list[Result]:
    return [result for result in results if result.cell.variant == variant]


def _per_seed(results: Sequence[Result], figure: str) -> float:
    """Sum over models, pool sizes and workloads of the mean over seeds, as the paper's totals are."""
    return float(sum(getattr(result.outcome, figure) for result in results) / REPLICATES)


def _ranked(values: Sequence[float], way: int) -> list[str]:
    """Each with its rank; `way` is 1 where less is better, else -1. Equal values share a rank."""
    return [f"{value:,.1f} ({1 + sum(way * other < way * value for other in values)})" for value in values]


def renew(text: str, blocks: Mapping[str, Callable[[], str]]) -> str:
    """The page with its generated blocks made anew; a block without a maker stays; ValueError if one is missing."""
    found = {match[2] for match in _BLOCK.finditer(text)}
    if missing := set(blocks) - found:
        raise ValueError(f"the page has no block {', '.join(sorted(missing))}: add its two comments")

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n{blocks[match[2]]()}\n\n{match[3]}" if match[2] in blocks else match[0]

    return _BLOCK.sub(fill, text)


@dataclass(frozen=True)
class FindingsOptions:
    """Where the page is, and what it is made from."""

    page: str = option(str(PAGE), "the page; its figure lies in figures/ beside it", metavar="FILE")
    sharegpt: str = option("", "prompt lengths as run.py takes them; without, that table stays", metavar="FILE")
    progress: bool = option(True, "show progress bars")


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Compute, then write the page and its figure."""
    options = parse_options(FindingsOptions, __doc__ or "", arguments)
    page = Path(options.page)
    with user_errors():
        prompt_pool = load_prompt_pool(Path(options.sharegpt)) if options.sharegpt else None
        findings = Findings(prompt_pool, options.progress and sys.stderr.isatty())
        try:
            text = page.read_text(encoding="utf-8")
        except OSError as error:
            fail(f"--page {page} cannot be read: {error.strerror}")
        renewed = renew(text, findings.blocks())
    findings.draw(page.parent / FIGURE)
    write_atomically(page, renewed.encode())


if __name__ == "__main__":
    main()
