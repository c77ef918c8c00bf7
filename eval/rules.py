"""Rules of the engine against splits: `python eval/rules.py --vary retention=all,latest --scenario steady-chat`.

Every combination of what is varied, policies or settings of the engine, under static splits at most .05 apart and
under --moving.
A row per rule and split: that of --at, the first rule's best, and the rule's own best. Differences are those from
the first rule at the same kind of split, on the same episodes.
"""

import sys

try:
    from hbmgym.cli import command, in_one_line, option, parse_options, user_errors
except ModuleNotFoundError as error:
    print(f"{error}: run `make train` once, or use .venv/bin/python {__file__}", file=sys.stderr)
    raise SystemExit(2) from None

import dataclasses
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from hbmgym.controllers.registry import make_controller
from hbmgym.envs.serving.config import GIB, Policies, ServingConfig, parse_slots_per_request, with_policies
from hbmgym.envs.traces.seeds import Part, seeds_for
from hbmgym.envs.traces.trace import TraceError
from hbmgym.envs.workload import Workload
from hbmgym.eval.advising.settings import default_controller
from hbmgym.eval.cells import Bench, UnusableFolder, claimed
from hbmgym.eval.comparison import COARSE_GRID, WorkloadResult, compare, row_names
from hbmgym.eval.intervals import mean_interval, relative_difference
from hbmgym.eval.options import ServingOptions
from hbmgym.eval.staleness import measure_staleness
from hbmgym.eval.table import UNBOUNDED_WIDTH
from hbmgym.files import write_atomically

SETTINGS: dict[str, type] = {
    field.name: type(field.default)
    for field in dataclasses.fields(ServingConfig)
    if field.name in ("long_prefill_tokens", "max_long_prefills", "receive_interval", "slots_per_request", "transfers")
}
"""Of ServingConfig, those that may be varied beside the policies."""
POLICIES = tuple(field.name for field in dataclasses.fields(Policies))
WORDS = ("rule", "split")
COLUMNS = ("kv_share", "cost", "by token", "TTFT p50 s", "p99 s", "hit", "preempted", "unserved %", "stale / slots")
DID = "per episode"


@dataclass(frozen=True)
class RuleOptions(ServingOptions):
    """What is served, what is varied, and on how many episodes."""

    vary: tuple[str, ...] = option(
        ("retention=all,latest",),
        f"field and values, repeatable (all combinations): policies ({', '.join(POLICIES)}) or settings "
        f"({', '.join(SETTINGS)})",
        metavar="FIELD=A,B,...",
    )
    at: str = option("", "the split beside the best ones (default: SGLang's for the model)", metavar="CONTROLLER")
    moving: str = option("", "controllers to show beside the static splits, comma separated")
    seeds: int = option(5, "episodes per workload")
    split: str = option("validation", "part of the data", choices=("train", "validation", "all"))
    jobs: int = option(min(2, os.cpu_count() or 1), "processes")
    out: str = option("", "folder for rules.md, the tables as Markdown", metavar="DIR")


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, run, print."""
    options = parse_options(RuleOptions, (__doc__ or "").splitlines()[0], arguments)
    part: Part = options.split  # type: ignore[assignment]
    with user_errors():
        configs = rules_of(options.serving_config(), options.vary)
        if options.seeds < 1 or options.jobs < 1:
            raise ValueError(f"--seeds {options.seeds} and --jobs {options.jobs} must be at least 1")
        first = next(iter(configs.values()))
        options = dataclasses.replace(options, at=options.at or default_controller(first))
        make_controller(options.at, first.window_s)
        if options.moving:
            row_names(options.moving, first)
        # One list for each rule, as some have pages of their own.
        workloads = {rule: options.workloads(config) for rule, config in configs.items()}
        seeds = seeds_for("validation" if part == "all" else part, options.seeds)
        options.announce(next(iter(workloads.values())), part, seeds[0])
    tables = []
    with in_one_line(TraceError, UnusableFolder), claimed(options.out):
        for own in zip(*workloads.values(), strict=True):
            by_rule = dict(zip(configs, own, strict=True))
            results = _results(configs, by_rule, part, seeds, options)
            tables.append(_table(configs, by_rule, part, seeds, results, options))
            _console(None if sys.stdout.isatty() else UNBOUNDED_WIDTH).print(tables[-1])
            print(_rhos(results))
        if options.out:
            _write(Path(options.out) / "rules.md", tables)


def rules_of(config: ServingConfig, vary: Sequence[str]) -> dict[str, ServingConfig]:
    """By the name of their row, all combinations of what is varied; ValueError in one line."""
    axes = [_axis(text) for text in vary]
    if not axes:
        raise ValueError("--vary is missing: give a field and its values, for example retention=all,latest")
    fields = [axis[0][0] for axis in axes]
    if twice := sorted({field for field in fields if fields.count(field) > 1}):
        raise ValueError(f"--vary {twice[0]} is given twice: give all of its values at once")
    rules = {}
    for combination in itertools.product(*axes):
        chosen = _with(config, dict(combination))
        # A single axis needs no names of fields; with several every value is named.
        name = ", ".join(value if len(axes) == 1 else f"{field}={value}" for field, value in combination)
        rules[name] = chosen
    return rules


def _axis(text: str) -> list[tuple[str, str]]:
    field, _, values = text.partition("=")
    if field not in (*POLICIES, *SETTINGS):
        raise ValueError(f"--vary {text!r}: {field!r} is none of {', '.join((*POLICIES, *SETTINGS))}")
    found = [value for value in values.split(",") if value]
    if not found or len(set(found)) < len(found):
        raise ValueError(f"--vary {text!r}, expected different values: FIELD=A,B,...")
    return [(field, value) for value in found]


def _with(config: ServingConfig, values: dict[str, str]) -> ServingConfig:
    """Settings first, then the policies all at once, since one may need another."""
    settings: dict[str, Any] = {field: _parsed(field, value) for field, value in values.items() if field in SETTINGS}
    config = dataclasses.replace(config, **settings)
    policies = {field: value for field, value in values.items() if field in POLICIES}
    return with_policies(config, dataclasses.replace(config.policies, **policies))


def _parsed(field: str, value: str) -> Any:
    if field == "slots_per_request":
        return parse_slots_per_request(value)
    try:
        return SETTINGS[field](value)
    except ValueError:
        raise ValueError(f"--vary {field}: {value!r} is no {SETTINGS[field].__name__}") from None


def _results(
    configs: dict[str, ServingConfig],
    workloads: dict[str, Workload],
    part: Part,
    seeds: Sequence[int],
    options: RuleOptions,
) -> dict[str, WorkloadResult]:
    results = {}
    for rule, config in configs.items():
        moving = f",{options.moving}" if options.moving else ""
        names = row_names(f"{COARSE_GRID},{options.at}{moving}", config)
        bench, progress = Bench(config, (workloads[rule],), part), sys.stderr.isatty()
        results[rule] = compare(bench, names, seeds, jobs=options.jobs, oracle=False, progress=progress).results[0]
    return results


def _table(
    configs: dict[str, ServingConfig],
    workloads: dict[str, Workload],
    part: Part,
    seeds: Sequence[int],
    results: dict[str, WorkloadResult],
    options: RuleOptions,
) -> Table:
    platform = next(iter(configs.values()))
    name = next(iter(workloads.values())).name
    title = f"{name} on {platform.model}@{platform.gpu}, {platform.hbm_gib:g} GiB: {len(seeds)} episodes"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in (*WORDS, *COLUMNS, DID):
        table.add_column(heading, justify="left" if heading in (*WORDS, DID) else "right", no_wrap=True)
    first = next(iter(results.values()))
    for rule, result in results.items():
        episode = workloads[rule].episode(part, seeds[0])
        for split, controller, reference in _splits(first, result, options):
            differs = (first, reference) if result is not first else None
            stale = ""
            if controller not in options.moving.split(","):
                stale = f"{measure_staleness(configs[rule], episode, controller).of_slots:.2f}"
            table.add_row(rule, split, *_figures(result, controller, differs), stale, _did(result, controller))
    return table


def _splits(first: WorkloadResult, result: WorkloadResult, options: RuleOptions) -> Iterator[tuple[str, str, str]]:
    """Kind of split, its controller, and the controller of the first rule that it is set against."""
    assert first.best_static is not None
    assert result.best_static is not None, "a grid has static splits"
    at = make_controller(options.at).name
    yield at, at, at
    if result is first:
        yield "best static", first.best_static, first.best_static
    else:
        # Another rule may have other splits: slots of another size.
        if first.best_static in result.controllers:
            yield "the first's best", first.best_static, first.best_static
        yield "best static", result.best_static, first.best_static
    for name in filter(None, options.moving.split(",")):
        yield name, name, name


def _figures(result: WorkloadResult, controller: str, differs: tuple[WorkloadResult, str] | None) -> Iterator[str]:
    yield f"{result.mean(controller, 'kv_share_mean'):.3f}"
    costs = result.column(controller, "cost")
    if differs is None:
        yield mean_interval(costs).text(".3f")
    else:
        change = relative_difference(costs, differs[0].column(differs[1], "cost"))
        yield f"{result.mean(controller, 'cost'):.3f} {change.text('+.1%')}"
    yield f"{result.mean(controller, 'token_cost'):.3f}"
    yield f"{result.mean(controller, 'ttft_p50_s'):.2f}"
    yield f"{result.mean(controller, 'ttft_p99_s'):.2f}"
    yield f"{result.mean(controller, 'hit_rate'):.3f}"
    yield f"{result.mean(controller, 'preemptions'):.1f}"
    yield f"{100 * result.mean(controller, 'unserved_tokens'):.2f}"


def _did(result: WorkloadResult, controller: str) -> str:
    """What pins or copies in host memory did, warm-up included."""
    cell = result.cells[0]
    if "pins" in cell:
        pins, used, given_up = (result.mean(controller, name) for name in ("pins", "pins_used", "pins_given_up"))
        return f"{pins:.0f} pins, {used / max(pins, 1):.0%} used, {given_up / max(pins, 1):.0%} given up"
    if "offloads" in cell:
        gib = (result.mean(controller, "offloaded_bytes") + result.mean(controller, "restored_bytes")) / GIB
        return f"{result.mean(controller, 'offloads'):.1f} copies, {gib:.1f} GiB both ways"
    return ""


def _rhos(results: dict[str, WorkloadResult]) -> str:
    rhos = "; ".join(f"{result.rho:.2f} ({rule})" for rule, result in results.items())
    return f"rho {rhos}; staleness is that of the first episode"


def _console(width: int | None) -> Console:
    return Console(width=width, soft_wrap=True)


def _write(path: Path, tables: Sequence[Table]) -> None:
    console = _console(UNBOUNDED_WIDTH)
    with console.capture() as captured:
        for table in tables:
            table.box, table.pad_edge = box.MARKDOWN, True
            console.print(table)
    write_atomically(path, captured.get().encode())


if __name__ == "__main__":
    main()
